// Decodes images and runs the model, beside the page, which stays responsive meanwhile.

import { Tokenizer, checkDifferent, parseLabels } from "./tokenizer.js";

const RUNTIME = "./onnxruntime/";
const MODEL = "./model/";
const TEMPLATE = "a photo of a {}.";
// A photo with more pixels times labels is made smaller first: scores of each have to fit into WebAssembly's memory.
const MOST_SCORES = 80_000_000;

let ort, about, segmenter, textEncoder, tokenizer;
let encoded = { key: null, embeds: null, labels: null };
const ready = load();

async function load() {
  try {
    ort = await import(`${RUNTIME}ort.wasm.bundle.min.mjs`);
  } catch {
    throw new Error("onnxruntime-web is not in onnxruntime/: fill this folder as README.md says.");
  }
  // More threads need headers (cross-origin isolation) that a plain file server does not send.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL(`${RUNTIME}ort-wasm-simd-threaded.wasm`, import.meta.url).href };
  about = (await read("export_report.json", "json")).metadata;
  segmenter = await session("segmenter.onnx");
  if (!segmenter.inputNames.includes("images")) {
    throw new Error("model/segmenter.onnx takes no images: export it with the preprocessing inside, as README.md says.");
  }
  if (segmenter.inputNames.includes("text_embeds")) {
    textEncoder = await session("text_encoder.onnx");
    tokenizer = new Tokenizer(await read("tokenizer.json", "json"), about.max_tokens);
  }
  return { labels: about.labels, typed: Boolean(tokenizer), text: await read("labels.json", "json") };
}

async function read(name, kind) {
  const answer = await fetch(MODEL + name);
  if (!answer.ok) throw new Error(`model/${name} is missing: fill this folder as README.md says.`);
  return answer[kind]();
}

async function session(name) {
  const file = new Uint8Array(await read(name, "arrayBuffer"));
  return ort.InferenceSession.create(file, { executionProviders: ["wasm"] }).catch((error) => {
    throw new Error(`model/${name} does not run in this browser: ${error.message}`);
  });
}

// A file as upright RGB, its stored values: nothing is converted to the screen's colours, transparency is dropped.
async function decode(file, labelCount) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, options);
  } catch {
    throw new Error("This browser cannot read the file as an image: use a JPEG, PNG, WebP, GIF, BMP or AVIF.");
  }
  // Groups have scores as well, some 16 of them.
  const shrink = Math.sqrt(MOST_SCORES / ((labelCount + 16) * bitmap.width * bitmap.height));
  if (shrink < 1) {
    const [resizeWidth, resizeHeight] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
    bitmap = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high", premultiplyAlpha: "none" });
  }
  const { width, height } = bitmap;
  let rgba = canvasPixels(bitmap);
  // A canvas has multiplied colours by the opacity, and forgotten them where it is 0. WebGL has not.
  const notes = shrink < 1 ? ["made smaller first"] : [];
  if (!isOpaque(rgba)) {
    const stored = texturePixels(bitmap);
    if (!stored) notes.push("without WebGL, colours of transparent pixels are lost");
    rgba = stored ?? rgba;
  }
  bitmap.close();
  const rgb = new Uint8Array(3 * width * height);
  for (let i = 0, j = 0; j < rgb.length; i += 4, j += 3) [rgb[j], rgb[j + 1], rgb[j + 2]] = [rgba[i], rgba[i + 1], rgba[i + 2]];
  return { rgb, width, height, notes };
}

function canvasPixels(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

function isOpaque(rgba) {
  for (let i = 3; i < rgba.length; i += 4) if (rgba[i] !== 255) return false;
  return true;
}

// null where this browser has no WebGL, or none for images of this size.
function texturePixels(bitmap) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl || Math.max(bitmap.width, bitmap.height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const rgba = new Uint8Array(4 * bitmap.width * bitmap.height);
  gl.readPixels(0, 0, bitmap.width, bitmap.height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  return gl.getError() === gl.NO_ERROR ? rgba : null;
}

// Typed labels -> their embeddings [L, E], names, and the value of each in a label map. Kept until they change.
async function encodeLabels(labels, background) {
  const key = JSON.stringify([labels, background]);
  if (encoded.key === key) return encoded;
  const [given, hidden] = [parseLabels(labels), parseLabels(background)];
  const hiddenNames = new Set(["background", ...hidden.map(([name]) => name.toLowerCase())]);
  // Of a label that is in both, the words are those of the first.
  const known = new Set(given.map(([name]) => name.toLowerCase()));
  const every = [...given, ...hidden.filter(([name]) => !known.has(name.toLowerCase()))];
  checkDifferent(every);
  if (!every.length) throw new Error("Type at least one label.");
  const words = every.flat();
  const { ids, mask, shape, rows } = tokenizer.batch(words.map((word) => TEMPLATE.replace("{}", () => word)));
  const alike = new Map();
  rows.forEach((row, i) => {
    if (!tokenizer.tokens(words[i]).length) throw new Error(`The model knows no letter or sign of “${words[i]}”.`);
    const other = alike.get(row.join());
    if (other !== undefined) throw new Error(`“${words[other]}” and “${words[i]}” are the same to the model: keep one.`);
    alike.set(row.join(), i);
  });
  const inputs = { input_ids: new ort.Tensor("int64", ids, shape), attention_mask: new ort.Tensor("int64", mask, shape) };
  const { text_embeds: found } = await textEncoder.run(inputs);
  const width = found.dims[1];
  const embeds = new Float32Array(every.length * width);
  let row = 0;
  every.forEach((synonyms, l) => {
    // A label is the mean of its words, of length 1 again.
    const sum = embeds.subarray(l * width, (l + 1) * width);
    for (const _ of synonyms) found.data.subarray(row * width, ++row * width).forEach((value, e) => (sum[e] += value));
    const norm = Math.hypot(...sum);
    sum.forEach((value, e) => (sum[e] = value / norm));
  });
  const isHidden = every.map(([name]) => hiddenNames.has(name.toLowerCase()));
  const names = every.filter((_, l) => !isHidden[l]).map(([name]) => name);
  if (isHidden.includes(true)) names.unshift("background");
  const values = every.map(([name], l) => (isHidden[l] ? 0 : names.indexOf(name)));
  encoded = { key, embeds: new ort.Tensor("float32", embeds, [every.length, width]), names, values };
  return encoded;
}

async function segment({ file, labels, background }) {
  await ready;
  const texts = tokenizer ? await encodeLabels(labels, background) : null;
  const begun = performance.now();
  const { rgb, width, height, notes } = await decode(file, texts ? texts.values.length : about.labels.length);
  const decoded = performance.now();
  const inputs = { images: new ort.Tensor("uint8", rgb, [1, height, width, 3]) };
  if (texts) inputs.text_embeds = texts.embeds;
  const { label_map: found } = await segmenter.run(inputs, ["label_map"]);
  const labelMap = Uint16Array.from(found.data, texts ? (index) => texts.values[index] : undefined);
  const names = texts ? texts.names : about.labels;
  const milliseconds = { decode: decoded - begun, model: performance.now() - decoded };
  return { labelMap, names, width, height, notes, milliseconds };
}

self.addEventListener("message", async ({ data: { id, ...request } }) => {
  try {
    const result = await segment(request);
    self.postMessage({ id, result }, [result.labelMap.buffer]);
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
});

ready.then(
  (model) => self.postMessage({ model }),
  (error) => self.postMessage({ error: error.message }),
);
