// The form of options: the fields of a request, which keep the server's defaults until they are moved.

const SCALES = [0.75, 1, 1.25];
const NAMED_TEMPLATES = ["one", "seven", "eighty"];

export class Options {
  /** `changed(slider)` is called when a value is another; for a slider with "moved", then with "released", else null. */
  constructor(form, changed) {
    this.form = form;
    form.addEventListener("input", (event) => {
      this.#tell();
      changed(event.target.type === "range" ? "moved" : null);
    });
    form.addEventListener("change", (event) => event.target.type === "range" && changed("released"));
    form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.set(this.defaults);
      changed(null);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Takes the model's own options, as the server names them. */
  set(defaults) {
    this.defaults = defaults;
    const field = this.form.elements;
    field.background.value = defaults.background ?? 0;
    field.temperature.value = Math.log10(defaults.temperature ?? 1);
    field.refine.value = defaults.refine ?? 0;
    field.foreground.value = defaults.foreground ?? 0;
    field.assignment.value = defaults.assignment ?? "hard";
    field.top_k.value = defaults.top_k ?? "";
    field.templates.value = NAMED_TEMPLATES.includes(defaults.templates) ? defaults.templates : "";
    field.synonyms.value = defaults.synonyms ?? "mean";
    field.flip.checked = defaults.flip ?? false;
    field.scales.checked = (defaults.scales?.length ?? 1) > 1;
    this.#tell();
  }

  /** Returns the fields of a request. */
  values() {
    const field = this.form.elements;
    const { defaults } = this;
    const orNull = (input) => Number(input.value) || null; // 0 is off
    const values = {
      background: orNull(field.background),
      temperature: this.#temperature(),
      refine: Number(field.refine.value),
      foreground: orNull(field.foreground),
      assignment: field.assignment.value,
      top_k: field.top_k.value === "" ? null : Number(field.top_k.value),
      synonyms: field.synonyms.value,
      flip: field.flip.checked,
    };
    if (field.templates.value) values.templates = field.templates.value;
    const hasScales = (defaults.scales?.length ?? 1) > 1;
    if (field.scales.checked !== hasScales) values.scales = field.scales.checked ? SCALES : [1];
    return values;
  }

  #temperature() {
    return Number((10 ** Number(this.form.elements.temperature.value)).toPrecision(3));
  }

  #tell() {
    const { background, foreground, refine } = this.form.elements;
    const texts = {
      background: orOff(background),
      foreground: orOff(foreground),
      temperature: String(this.#temperature()),
      refine: Number(refine.value) ? `${refine.value} times` : "off",
    };
    for (const [name, text] of Object.entries(texts)) {
      this.form.querySelector(`output[for=${name}]`).textContent = text;
      this.form.elements[name].setAttribute("aria-valuetext", text);
    }
  }
}

function orOff(input) {
  return Number(input.value) ? Number(input.value).toFixed(2) : "off";
}
