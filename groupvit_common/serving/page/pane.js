// An image with its overlay, names and crosshair: one for each backend that is shown.

import { anchors, heatCanvas, outlines, paint, resized } from "./draw.js";

// Larger images are drawn at this many pixels; their maps keep all of theirs.
const MOST_PIXELS = 1_500_000;
const GREY = "grayscale(1)"; // the image under a heat map, whose colours would mix with its own

const element = (tag, className, parent) => {
  const made = document.createElement(tag);
  made.className = className;
  parent?.append(made);
  return made;
};

// A photo's light and shade change colours more than they change hues.
const heatOpacity = ({ opacity }) => Math.sqrt(opacity);

// Which part of a name is at its place: its middle, but near a side the name stays within the image.
const inward = (at) => (at < 0.15 ? at / 0.3 : at > 0.85 ? 1 - (1 - at) / 0.3 : 0.5);

export class Pane {
  /** `pointed(x, y, how)` is called with a pixel of the image, or null; `how` is "mouse", "touch" or "keys". */
  constructor(parent, pointed) {
    this.pointed = pointed;
    this.root = element("figure", "pane", parent);
    this.frame = element("div", "frame", this.root);
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "application");
    this.frame.setAttribute("aria-roledescription", "label map");
    this.photo = element("canvas", "photo", this.frame);
    this.overlay = element("canvas", "overlay", this.frame);
    this.names = element("div", "names", this.frame);
    this.names.setAttribute("aria-hidden", "true");
    this.cross = element("div", "cross", this.frame);
    this.tip = element("div", "tip", this.frame);
    this.tip.setAttribute("aria-hidden", "true");
    this.caption = element("figcaption", "", this.root);
    this.cross.hidden = this.tip.hidden = true;
    this.#listen();
  }

  /** Shows an image of `width` x `height`; `bitmap` is null where the browser cannot show the file. */
  setImage(bitmap, width, height, caption) {
    Object.assign(this, { width, height, layer: null });
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
    for (const canvas of [this.photo, this.overlay]) {
      canvas.width = Math.max(1, Math.round(width * scale));
      canvas.height = Math.max(1, Math.round(height * scale));
    }
    const context = this.photo.getContext("2d");
    context.imageSmoothingQuality = "high";
    if (bitmap) context.drawImage(bitmap, 0, 0, this.photo.width, this.photo.height);
    // A strip is drawn wider than it is: its pixels are to be seen.
    this.root.style.setProperty("--ratio", Math.min(Math.max(width / height, 0.15), 8));
    this.setCaption(caption);
    this.point(null);
    this.names.replaceChildren();
  }

  setCaption(caption) {
    this.caption.textContent = caption;
    this.frame.setAttribute(
      "aria-label",
      `${caption}. Arrow keys move a crosshair, with Shift by one pixel; Escape takes it away.`,
    );
  }

  /**
   * Draws what lies over the image. layer: {map, entries} of indices, or {heat} of values, made once for each result;
   * look: {opacity, hidden, highlight, marked, names}.
   */
  draw(layer, look) {
    const { width, height } = this.overlay;
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (layer !== this.layer) {
      this.layer = layer;
      if (layer.heat) this.heat = heatCanvas(layer.heat);
      else {
        this.values = resized(layer.map, width, height);
        this.edge = outlines(this.values, width, height);
        this.places = anchors(layer.map);
      }
    }
    if (layer.heat) {
      context.globalAlpha = heatOpacity(look);
      context.imageSmoothingQuality = "high";
      context.drawImage(this.heat, 0, 0, width, height);
      context.globalAlpha = 1;
    } else this.#paint(context, this.values, this.edge, layer, look);
    this.#drawNames(layer, look);
  }

  /** Returns a canvas of the image and what lies over it, at the image's own size. */
  picture(bitmap, look) {
    const { width, height, layer } = this;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    if (layer.heat) context.filter = GREY;
    if (bitmap) context.drawImage(bitmap, 0, 0, width, height);
    context.filter = "none";
    const over = Object.assign(document.createElement("canvas"), { width, height });
    if (layer.heat) {
      context.globalAlpha = heatOpacity(look);
      context.imageSmoothingQuality = "high";
      context.drawImage(this.heat, 0, 0, width, height);
    } else {
      this.#paint(over.getContext("2d"), layer.map.values, outlines(layer.map.values, width, height), layer, look);
      context.drawImage(over, 0, 0);
    }
    return canvas;
  }

  #paint(context, values, edge, { entries }, look) {
    const { width, height } = context.canvas;
    const image = context.createImageData(width, height);
    const stripe = Math.max(4, (12 * width) / (this.frame.clientWidth || width));
    const marked = look.marked && resized(look.marked, width, height);
    paint(image, values, edge, { ...look, entries, marked, stripe });
    context.putImageData(image, 0, 0);
  }

  #drawNames(layer, { names, hidden, highlight }) {
    const shown =
      names && layer.map ? this.places.filter(({ index }) => !hidden.has(index) && layer.entries[index].label) : [];
    this.names.replaceChildren(
      ...shown.map(({ index, x, y }) => {
        const name = element("span", highlight === null || highlight === index ? "" : "dim");
        name.textContent = layer.entries[index].label;
        name.style.left = `${100 * x}%`;
        name.style.top = `${100 * y}%`;
        name.style.transform = `translate(${-100 * inward(x)}%, ${-100 * inward(y)}%)`;
        return name;
      }),
    );
  }

  /** Shows the crosshair at a pixel with a line of text, or takes it away. */
  point(place, text = "") {
    this.place = place;
    this.cross.hidden = this.tip.hidden = !place;
    if (!place) return;
    const [left, top] = [(100 * (place.x + 0.5)) / this.width, (100 * (place.y + 0.5)) / this.height];
    for (const each of [this.cross, this.tip]) {
      each.style.left = `${left}%`;
      each.style.top = `${top}%`;
    }
    this.tip.textContent = text;
    this.tip.hidden = !text;
    this.tip.classList.toggle("leftwards", left > 60);
    this.tip.classList.toggle("upwards", top > 70);
  }

  #listen() {
    const { frame } = this;
    const at = (event) => {
      const box = frame.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * this.width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * this.height);
      const isInside = x >= 0 && y >= 0 && x < this.width && y < this.height;
      if (isInside) this.pointed({ x, y }, event.pointerType === "mouse" ? "mouse" : "touch");
    };
    frame.addEventListener("pointermove", at);
    frame.addEventListener("pointerdown", at);
    frame.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.pointed(null, "mouse"));
    frame.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this;
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 48));
    const { x, y } = this.place || { x: width >> 1, y: height >> 1 };
    const isNew = !this.place;
    const moved = {
      ArrowLeft: [x - step, y],
      ArrowRight: [x + step, y],
      ArrowUp: [x, y - step],
      ArrowDown: [x, y + step],
      Home: [0, y],
      End: [width - 1, y],
      PageUp: [x, 0],
      PageDown: [x, height - 1],
      Enter: [x, y],
      " ": [x, y],
    }[event.key];
    if (event.key === "Escape") this.pointed(null, "keys");
    if (!moved) return;
    event.preventDefault();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
    this.pointed(isNew ? { x, y } : { x: clamp(moved[0], width), y: clamp(moved[1], height) }, "keys");
  }
}
