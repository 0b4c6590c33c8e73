// A list of labels as chips. One chip is one label with its synonyms, as the server's lists take it.

// Commas as other scripts write them, and what a pasted list may have instead.
const SEPARATOR = /[,，、،;；\r\n]/;

/** Splits a text at commas outside of double quotes: a definition may hold commas. */
export function split(text) {
  const parts = [""];
  let quoted = false;
  for (const letter of text) {
    // A quote opens a definition only where a word begins; elsewhere it is a letter (12" record).
    if (letter === '"' && (quoted || /(^|[|｜])\s*$/.test(parts.at(-1)))) quoted = !quoted;
    if (!quoted && SEPARATOR.test(letter)) parts.push("");
    else parts[parts.length - 1] += letter;
  }
  return { parts: parts.map((part) => part.trim()), quoted };
}

export class Chips {
  /** `root`: an empty element. `say(text)` announces; `changed()` is called when the list is another. */
  constructor(root, { name, titleId, hintId, placeholder, say, changed }) {
    Object.assign(this, { root, name, say, changed });
    this.values = [];
    this.list = document.createElement("ul");
    this.list.setAttribute("aria-labelledby", titleId);
    this.input = document.createElement("input");
    Object.assign(this.input, {
      type: "text",
      id: `${root.id}-input`,
      placeholder,
      autocomplete: "off",
      spellcheck: false,
      enterKeyHint: "done",
    });
    this.input.autocapitalize = "none";
    this.input.setAttribute("aria-label", `Add a ${name}`);
    this.input.setAttribute("aria-describedby", hintId);
    root.append(this.list, this.input);
    root.addEventListener("pointerdown", (event) => {
      if (event.target !== root && event.target !== this.list) return;
      event.preventDefault();
      this.input.focus();
    });
    this.input.addEventListener("keydown", (event) => this.#key(event));
    this.input.addEventListener("input", () => this.#typed());
    // Another window, where one looks something up, is no reason to end a word.
    this.input.addEventListener("blur", () => document.hasFocus() && this.#commit());
    this.input.addEventListener("paste", (event) => this.#paste(event));
  }

  /** Replaces the list, without calling `changed`. */
  set(values) {
    this.values = [...values];
    this.#draw();
  }

  #key(event) {
    if (event.isComposing) return;
    const atStart = !this.input.selectionStart && !this.input.selectionEnd;
    if (event.key === "Enter") {
      event.preventDefault();
      this.#commit();
    } else if (event.key === "Backspace" && !this.input.value && this.values.length)
      this.remove(this.values.length - 1);
    else if (event.key === "ArrowLeft" && atStart && this.values.length) {
      event.preventDefault();
      this.#focus(this.values.length - 1);
    }
  }

  #typed() {
    const { parts, quoted } = split(this.input.value);
    if (parts.length < 2 || quoted) return;
    this.input.value = parts.pop();
    this.#add(parts);
  }

  // An input field drops line ends, and would join the words beside them.
  #paste(event) {
    const text = event.clipboardData?.getData("text/plain") ?? "";
    if (!SEPARATOR.test(text)) return;
    event.preventDefault();
    this.#add(split(this.input.value + text).parts);
    this.input.value = "";
  }

  #commit() {
    const { parts } = split(this.input.value);
    this.input.value = "";
    this.#add(parts);
  }

  #add(parts) {
    const added = [];
    for (const part of parts.filter(Boolean)) {
      if (this.values.includes(part)) this.#isThere(part);
      else {
        this.values.push(part);
        added.push(part);
      }
    }
    if (!added.length) return;
    this.#draw();
    this.say(`Added ${added.join(", ")}`);
    this.changed();
  }

  #isThere(value) {
    this.say(`${value} is there already`);
    const chip = this.list.children[this.values.indexOf(value)];
    chip?.classList.remove("flash");
    requestAnimationFrame(() => chip?.classList.add("flash"));
  }

  remove(index) {
    const [value] = this.values.splice(index, 1);
    const inside = this.list.contains(document.activeElement);
    this.#draw();
    // The focus goes to what follows: a chip, or the field.
    if (inside) this.#focus(index);
    this.say(`Removed ${value}`);
    this.changed();
  }

  // Chips that stay are the same elements, so that a click that ends an edit still reaches what was clicked.
  #draw() {
    const old = new Map([...this.list.children].map((chip) => [chip.dataset.value, chip]));
    this.values.forEach((value, index) => {
      const chip = old.get(value) || this.#chip(value);
      old.delete(value);
      if (this.list.children[index] !== chip) this.list.insertBefore(chip, this.list.children[index] || null);
    });
    for (const chip of old.values()) chip.remove();
    this.list.hidden = !this.values.length;
  }

  #chip(value) {
    const chip = document.createElement("li");
    const edit = document.createElement("button");
    edit.type = "button";
    edit.className = "word";
    const [first, ...others] = value.split(/[|｜]/);
    edit.append(first.trim());
    for (const other of others)
      edit.append(Object.assign(document.createElement("small"), { textContent: other.trim() }));
    chip.dataset.value = value;
    edit.title = "Edit; Delete removes it";
    edit.addEventListener("click", () => this.#edit(chip, value));
    edit.addEventListener("keydown", (event) => {
      const index = this.values.indexOf(value);
      if (event.key === "Delete" || event.key === "Backspace") this.remove(index);
      else if (event.key === "ArrowLeft") this.#focus(Math.max(0, index - 1));
      else if (event.key === "ArrowRight") this.#focus(index + 1);
      else return;
      event.preventDefault();
    });
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.textContent = "×";
    remove.title = "Remove";
    remove.tabIndex = -1; // the Delete key does the same
    remove.setAttribute("aria-label", `Remove ${value}`);
    // What is being edited stays as wide as it is, or the button would move from under the pointer.
    remove.addEventListener("mousedown", (event) => event.preventDefault());
    remove.addEventListener("click", () => {
      this.remove(this.values.indexOf(value));
      this.input.focus({ preventScroll: true });
    });
    chip.append(edit, remove);
    return chip;
  }

  #focus(index) {
    const chip = this.list.children[index];
    (chip ? chip.firstChild : this.input).focus();
  }

  /** A chip becomes a field; Enter or leaving it keeps the text, Escape the old one. */
  #edit(chip, old) {
    const field = document.createElement("input");
    Object.assign(field, { type: "text", value: old, autocomplete: "off", spellcheck: false, className: "edit" });
    field.style.width = `${Math.max(6, old.length + 2)}ch`;
    field.setAttribute("aria-label", `Edit the ${this.name} ${old}`);
    chip.replaceChildren(field);
    field.focus();
    field.select();
    let done = false;
    const finish = (keep, focus) => {
      const index = this.values.indexOf(old);
      if (done || index < 0) return;
      done = true;
      const parts = keep ? split(field.value).parts.filter(Boolean) : [old];
      const fresh = parts.filter(
        (part, at) => part === old || (!this.values.includes(part) && parts.indexOf(part) === at),
      );
      this.values.splice(index, 1, ...fresh);
      delete chip.dataset.value; // it is a field now
      this.#draw();
      if (focus) this.#focus(index);
      if (fresh.length !== 1 || fresh[0] !== old) this.changed();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      finish(event.key === "Enter", true);
    });
    field.addEventListener("blur", () => document.hasFocus() && finish(true, false));
  }
}
