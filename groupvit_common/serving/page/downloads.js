// Files of a result, as `groupvit segment` writes them.

import { bytesOf } from "./png.js";

/** Hands a file to the browser's downloads. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const pngBlob = (base64) => new Blob([bytesOf(base64)], { type: "image/png" });
export const jsonBlob = (value) => new Blob([`${JSON.stringify(value, null, 2)}\n`], { type: "application/json" });

/** Returns the record of a result: `Segmentation.to_dict()`, and what was asked for. */
export function record(answer, source, request) {
  const { width, height } = answer;
  return {
    source,
    size: { width, height },
    has_background: answer.has_background,
    labels: answer.labels.map(({ index, name, probability, pixel_share }) => ({
      index,
      name,
      probability,
      pixel_share,
    })),
    groups: answer.groups.map(({ label }) => answer.labels[label].name),
    request,
  };
}

/** Returns a COCO data set of an answer with run lengths, whose label map is decoded: `adapters.to_coco`. */
export function coco(answer, labels, source) {
  const { width, height } = answer;
  const named = answer.labels.filter(({ index }) => !(answer.has_background && index === 0));
  const annotations = named
    .map(({ index, mask }, number) => ({ index, mask, category: number + 1, ...extent(labels.values, width, index) }))
    .filter(({ area }) => area)
    .map(({ mask, category, area, bbox }, number) => ({
      id: number + 1,
      image_id: 1,
      category_id: category,
      segmentation: mask,
      area,
      bbox,
      iscrowd: 0,
    }));
  return {
    images: [{ id: 1, file_name: source, width, height }],
    annotations,
    categories: named.map(({ name }, number) => ({ id: number + 1, name })),
  };
}

function extent(values, width, index) {
  let [area, left, top, right, bottom] = [0, width, Infinity, 0, 0];
  for (let i = 0; i < values.length; i++) {
    if (values[i] !== index) continue;
    const x = i % width;
    const y = (i - x) / width;
    area++;
    left = Math.min(left, x);
    right = Math.max(right, x);
    top = Math.min(top, y);
    bottom = Math.max(bottom, y);
  }
  return { area, bbox: [left, top, right + 1 - left, bottom + 1 - top] };
}
