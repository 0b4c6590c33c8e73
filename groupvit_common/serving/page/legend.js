// The legend: a row for each label or group, to show or hide it, to see it alone, or to choose it.

import { percent } from "./text.js";

const make = (tag, className, parent) => {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
};

export class Legend {
  /** `hovered(key or null)`, `pressed(key)` and `only(key)` are called with the key of a row. */
  constructor(list, { hovered, pressed, only }) {
    this.list = list;
    const keyOf = (event) => event.target.closest("li")?.dataset.key ?? null;
    list.addEventListener("pointerover", (event) => event.pointerType === "mouse" && hovered(keyOf(event)));
    list.addEventListener("pointerleave", () => hovered(null));
    list.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && hovered(keyOf(event)));
    list.addEventListener("focusout", () => hovered(null));
    list.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) (button.className === "only" ? only : pressed)(keyOf(event));
    });
  }

  /**
   * Shows rows of {key, colour (null: none), name, share, note, unit, pressed, alone}; a share of null has no bar,
   * `unit` is read out before the note. `title` says what pressing a row does; `hasOnly` adds the button that shows a row alone. Rows stay the elements they are, so that
   * the focus stays too.
   */
  show(rows, title, hasOnly) {
    this.list.classList.toggle("choosing", !hasOnly);
    while (this.list.children.length > rows.length) this.list.lastChild.remove();
    while (this.list.children.length < rows.length) this.#add();
    rows.forEach((row, at) => this.#fill(this.list.children[at], row, title, hasOnly));
  }

  /** Marks the row that the crosshair is on. */
  mark(key) {
    for (const item of this.list.children)
      item.classList.toggle("at", key !== null && item.dataset.key === String(key));
  }

  #add() {
    const item = make("li", "", this.list);
    const row = make("button", "row", item);
    row.type = "button";
    for (const part of ["swatch", "name", "unit hidden", "note", "share", "of hidden", "bar"]) make("span", part, row);
    make("span", "fill", row.querySelector(".bar"));
    const only = make("button", "only", item);
    only.type = "button";
    only.textContent = "Only";
  }

  #fill(item, { key, colour, name, share, note, unit, pressed, alone }, title, hasOnly) {
    const part = (className) => item.querySelector(`.${className}`);
    item.dataset.key = key;
    item.classList.toggle("absent", share === 0);
    part("swatch").style.backgroundColor = colour || "";
    part("swatch").classList.toggle("plain", !colour);
    part("name").textContent = name;
    part("note").textContent = note;
    part("share").textContent = share === null ? "" : percent(share);
    part("bar").hidden = share === null;
    part("fill").style.width = `${100 * (share || 0)}%`;
    part("fill").style.backgroundColor = colour || "";
    part("row").setAttribute("aria-pressed", String(pressed));
    part("unit").textContent = unit;
    part("of").textContent = share === null ? "" : "of the pixels";
    part("row").title = title;
    part("only").hidden = !hasOnly;
    part("only").setAttribute("aria-pressed", String(Boolean(alone)));
    part("only").setAttribute("aria-label", `Only ${name}`);
  }
}

/** Returns the rows of a legend of labels, or of groups (`labels` null), which leaves out those without pixels. */
export function areaRows(entries, labels, hidden) {
  const shown = entries.filter(({ key }) => !hidden.has(key));
  const rows = entries.map((entry, at) => {
    const { name, share, note, unit } = labels ? labelTexts(labels[at]) : groupTexts(entry, at);
    return {
      key: entry.key,
      colour: entry.plain ? null : entry.colour,
      name,
      share,
      note,
      unit: note && unit,
      pressed: !hidden.has(entry.key),
      alone: shown.length === 1 && shown[0] === entry && entries.length > 1,
    };
  });
  if (!labels) return rows.filter(({ share }) => share > 0);
  // What is not there comes last, the background before it.
  const rank = ({ colour, share }) => (share === 0 ? 2 : colour ? 0 : 1);
  return rows.sort((a, b) => rank(a) - rank(b));
}

function labelTexts({ name, pixel_share: share, probability }) {
  const note = probability === null ? "" : percent(probability);
  return { name, share, note, unit: "probability" };
}

function groupTexts({ share, note }, at) {
  return { name: `Group ${at}`, share, note, unit: "" };
}

/** Returns the rows of labels whose heat map may be shown, of which `chosen` is. */
export function heatRows(similarity, chosen) {
  return similarity.map(({ label, low, high }) => {
    const note = `${low.toFixed(2)} to ${high.toFixed(2)}`;
    return { key: label, colour: null, name: label, share: null, note, unit: "similarity", pressed: label === chosen };
  });
}
