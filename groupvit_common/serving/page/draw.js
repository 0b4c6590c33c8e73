// From index maps and values to pixels. Nothing here knows of the page.

const HEAT = [
  [20, 11, 70],
  [98, 22, 122],
  [186, 48, 96],
  [238, 116, 46],
  [250, 226, 110],
]; // as the Python package's
const DIM = 0.25; // of what is not highlighted

/** Returns the three numbers of "#rrggbb". */
export function rgb(colour) {
  const value = parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** Returns the colour of 0 (dark violet) to 1 (light yellow). */
export function heatColour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  return HEAT[low].map((channel, i) => Math.round(channel + (HEAT[low + 1][i] - channel) * (at - low)));
}

const packed = ([r, g, b], alpha) => ((Math.round(alpha * 255) << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** Returns a map at another size: each pixel the nearest one's. */
export function resized({ values, width, height }, toWidth, toHeight) {
  if (width === toWidth && height === toHeight) return values;
  const out = new values.constructor(toWidth * toHeight);
  const columns = Uint32Array.from({ length: toWidth }, (_, x) => Math.floor(((x + 0.5) * width) / toWidth));
  for (let y = 0, i = 0; y < toHeight; y++) {
    const row = Math.floor(((y + 0.5) * height) / toHeight) * width;
    for (let x = 0; x < toWidth; x++) out[i++] = values[row + columns[x]];
  }
  return out;
}

/** Returns 1 where a pixel is within the line's width of another index: the outlines of the Python package. */
export function outlines(values, width, height) {
  const edge = new Uint8Array(values.length);
  const line = Math.max(1, Math.round(Math.min(width, height) / 300));
  for (let d = 1; d <= line; d++) {
    for (let i = d * width; i < values.length; i++)
      if (values[i] !== values[i - d * width]) edge[i] = edge[i - d * width] = 1;
    for (let y = 0; y < height; y++) {
      for (let i = y * width + d; i < (y + 1) * width; i++) if (values[i] !== values[i - d]) edge[i] = edge[i - d] = 1;
    }
  }
  return edge;
}

/**
 * Fills `image` (ImageData) with the colours of an index map of its size.
 * entries: {colour, plain} an index, `plain` for what is left as it is; hidden: a set of indices; highlight: an index or
 * null; marked: 1 for pixels to hatch, or null; stripe: the hatching's period in pixels.
 */
export function paint(image, values, edge, { entries, opacity, hidden, highlight, marked, stripe }) {
  const out = new Uint32Array(image.data.buffer);
  const { width } = image;
  const shown = (i) => !hidden.has(i) && !entries[i].plain;
  const weight = (i) => (highlight === null || highlight === i ? 1 : DIM);
  const strong = opacity > 0 ? Math.max(opacity, 0.9) : 0;
  const fills = entries.map(({ colour }, i) => (shown(i) ? packed(rgb(colour), opacity * weight(i)) : 0));
  const lines = entries.map(({ colour }, i) => (shown(i) ? packed(rgb(colour), strong * weight(i)) : 0));
  // What is highlighted is hatched too: seen without colours, and in the background, which has none.
  const dark = packed([0, 0, 0], 0.55);
  const light = packed([255, 255, 255], 0.75);
  for (let i = 0, y = 0; i < values.length; y++) {
    for (let x = 0; x < width; x++, i++) {
      const index = values[i];
      let pixel = edge[i] ? lines[index] : fills[index];
      if (index === highlight) {
        const at = (x + y) % stripe;
        if (at < stripe * 0.2) pixel = light;
        else if (at < stripe * 0.3) pixel = dark;
      }
      if (marked && marked[i])
        pixel = (Math.floor((2 * x) / stripe) + Math.floor((2 * y) / stripe)) % 2 ? 0xff000000 : 0xffffffff;
      out[i] = pixel;
    }
  }
}

/** Returns a canvas of a map of 0 to 255 in the colours of heat. */
export function heatCanvas({ values, width, height }) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const image = new ImageData(width, height);
  const colours = Array.from({ length: 256 }, (_, value) => packed(heatColour(value / 255), 1));
  const out = new Uint32Array(image.data.buffer);
  for (let i = 0; i < values.length; i++) out[i] = colours[values[i]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const ANCHOR_SIDE = 160; // places of names are looked for at this size
const DIAGONAL = 1.4;

/**
 * Returns, for each index whose area has room for a name, the place farthest from other areas: [{index, x, y}] in
 * fractions of the sides.
 */
export function anchors(map, room = 0.035) {
  const scale = Math.min(1, ANCHOR_SIDE / Math.max(map.width, map.height));
  const width = Math.max(1, Math.round(map.width * scale));
  const height = Math.max(1, Math.round(map.height * scale));
  const values = resized(map, width, height);
  const far = distances(values, width, height);
  const best = new Map(); // index -> its pixel that is farthest
  for (let i = 0; i < values.length; i++) {
    const at = best.get(values[i]);
    if (at === undefined || far[i] > far[at]) best.set(values[i], i);
  }
  return [...best]
    .filter(([, at]) => far[at] >= room * Math.min(width, height))
    .map(([index, at]) => ({ index, x: ((at % width) + 0.5) / width, y: (Math.floor(at / width) + 0.5) / height }));
}

// Distance to the nearest pixel of another index or the border, along rows, columns and diagonals: a pass from the top
// left, and one back.
function distances(values, width, height) {
  const far = new Float32Array(values.length);
  const from = (i, j, cost, isInside) => (isInside && values[i] === values[j] ? far[j] : 0) + cost;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const beside = from(i, i - 1, 1, x > 0);
      const above = from(i, i - width, 1, y > 0);
      const left = from(i, i - width - 1, DIAGONAL, x > 0 && y > 0);
      const right = from(i, i - width + 1, DIAGONAL, x + 1 < width && y > 0);
      far[i] = Math.min(beside, above, left, right);
    }
  }
  for (let y = height - 1, i = values.length - 1; y >= 0; y--) {
    for (let x = width - 1; x >= 0; x--, i--) {
      const beside = from(i, i + 1, 1, x + 1 < width);
      const below = from(i, i + width, 1, y + 1 < height);
      const right = from(i, i + width + 1, DIAGONAL, x + 1 < width && y + 1 < height);
      const left = from(i, i + width - 1, DIAGONAL, x > 0 && y + 1 < height);
      far[i] = Math.min(far[i], beside, below, left, right);
    }
  }
  return far;
}
