// Reads PNG files of indices. A canvas gives colours, of which two labels may share one, and 8 bits.

const CHANNELS = { 0: 1, 3: 1 };

/** Returns the bytes of base64 text. */
export function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Decodes a palette or grey PNG of 1 to 16 bits in base64: {width, height, values}, values as they are in the file. */
export async function readIndices(base64) {
  const bytes = bytesOf(base64);
  const view = new DataView(bytes.buffer);
  const parts = [];
  let width, height, depth;
  for (let at = 8; at < bytes.length;) {
    const size = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const start = at + 8;
    if (kind === "IHDR") {
      [width, height, depth] = [view.getUint32(start), view.getUint32(start + 4), bytes[start + 8]];
      if (!CHANNELS[bytes[start + 9]] || bytes[start + 12])
        throw new Error("The server sent a map that this page cannot read.");
    } else if (kind === "IDAT") parts.push(bytes.subarray(start, start + size));
    at = start + size + 4;
  }
  const packed = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(packed).arrayBuffer());
  return { width, height, values: unpack(unfilter(rows, width, height, depth), width, height, depth) };
}

/** Undoes the filter of each row (PNG, section 9) in place; returns the rows without their filter bytes. */
function unfilter(rows, width, height, depth) {
  const step = Math.max(1, depth >> 3);
  const length = Math.ceil((width * depth) / 8);
  const out = new Uint8Array(length * height);
  for (let y = 0; y < height; y++) {
    const filter = rows[y * (length + 1)];
    const from = y * (length + 1) + 1;
    const to = y * length;
    const up = to - length;
    if (filter === 0) {
      out.set(rows.subarray(from, from + length), to);
      continue;
    }
    for (let x = 0; x < length; x++) {
      const left = x >= step ? out[to + x - step] : 0;
      const above = y ? out[up + x] : 0;
      const corner = y && x >= step ? out[up + x - step] : 0;
      const guess =
        filter === 1 ? left : filter === 2 ? above : filter === 3 ? (left + above) >> 1 : paeth(left, above, corner);
      out[to + x] = rows[from + x] + guess;
    }
  }
  return out;
}

function paeth(left, above, corner) {
  const p = left + above - corner;
  const [a, b, c] = [Math.abs(p - left), Math.abs(p - above), Math.abs(p - corner)];
  return a <= b && a <= c ? left : b <= c ? above : corner;
}

/** Returns a number a pixel. */
function unpack(bytes, width, height, depth) {
  if (depth === 8) return bytes;
  const values = depth === 16 ? new Uint16Array(width * height) : new Uint8Array(width * height);
  const length = Math.ceil((width * depth) / 8);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (depth === 16) values[i] = (bytes[2 * i] << 8) | bytes[2 * i + 1];
      else {
        const bit = x * depth;
        values[i] = (bytes[y * length + (bit >> 3)] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
      }
    }
  }
  return values;
}
