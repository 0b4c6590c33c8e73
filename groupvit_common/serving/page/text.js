// Numbers and sizes for people.

/** Returns 0.083 as "8%"; and less than 1% as "<1%". */
export function percent(fraction) {
  if (fraction > 0 && fraction < 0.01) return "<1%";
  return `${Math.round(100 * fraction)}%`;
}

/** Returns a count with separators. */
export const count = (number) => number.toLocaleString("en");

/** Returns bytes as "3.1 MB". */
export function megabytes(bytes) {
  return `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
}

/** Returns a duration in milliseconds as "38 ms" or "1.2 s". */
export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
