// The page: takes an image and labels, asks worker.js, and draws what comes.

const byId = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let file = null;
let requests = 0;

// state: loading, ready, working, done or fault.
function say(text, state) {
  byId("status").textContent = text;
  byId("status").dataset.state = state;
}

// Only the answer to the last request is shown: others are outdated by then.
function segment() {
  if (!file) return;
  say("Segmenting …", "working");
  worker.postMessage({ id: ++requests, file, labels: byId("labels").value, background: byId("background").value });
}

function take(given) {
  if (!given) return;
  file = given;
  segment();
}

// A label that is the name of a colour is shown in it. The others have hues in golden steps, so that neighbours in the
// list differ; the background stays as it is.
function colours(names) {
  const own = { red: 0xd62f4b, orange: 0xe69f00, yellow: 0xf0e442, green: 0x00a676, cyan: 0x35c9d6, blue: 0x0a7fc4 };
  Object.assign(own, { purple: 0x7b2d9e, pink: 0xf48fb1, brown: 0x8b5a2b });
  return names.map((name, i) => {
    if (name === "background") return null;
    const known = own[name.toLowerCase()];
    return known === undefined ? hue((i * 137.508) % 360) : [known >> 16, (known >> 8) & 255, known & 255];
  });
}

function hue(degrees) {
  // hsl(degrees, 85 %, 55 %) as bytes.
  return [0, 8, 4].map((n) => {
    const k = (n + degrees / 30) % 12;
    return Math.round(255 * (0.55 - 0.85 * 0.45 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

async function show({ labelMap, names, width, height, notes, milliseconds }, source) {
  const bitmap = await createImageBitmap(source, { imageOrientation: "from-image" });
  const palette = colours(names);
  const drawn = new ImageData(width, height);
  const [words, counts] = [new Uint32Array(drawn.data.buffer), new Array(names.length).fill(0)];
  // Red, green, blue and opacity in the order of memory.
  const word = palette.map((colour) => (colour ? new Uint32Array(Uint8Array.of(...colour, 255).buffer)[0] : 0));
  labelMap.forEach((value, i) => {
    counts[value]++;
    words[i] = word[value];
  });
  for (const id of ["photo", "overlay"]) [byId(id).width, byId(id).height] = [width, height];
  byId("photo").getContext("2d").drawImage(bitmap, 0, 0, width, height);
  byId("overlay").getContext("2d").putImageData(drawn, 0, 0);
  const order = names.map((_, i) => i).filter((i) => counts[i]).sort((a, b) => counts[b] - counts[a]);
  byId("legend").replaceChildren(...order.map((i) => entry(names[i], palette[i], counts[i] / labelMap.length)));
  byId("result").hidden = false;
  const size = `${width} × ${height}` + (notes.length ? ` (${notes.join("; ")})` : "");
  // For scripts.
  window.segmentation = { labelMap, names, width, height };
  const [read, ran] = [milliseconds.decode, milliseconds.model].map((time) => `${time.toFixed(0)} ms`);
  say(`${size}: read in ${read}, segmented in ${ran}.`, "done");
}

function entry(name, colour, share) {
  const [item, swatch, text, percent] = ["li", "span", "span", "span"].map((tag) => document.createElement(tag));
  swatch.className = "swatch";
  if (colour) swatch.style.background = `rgb(${colour})`;
  text.textContent = name;
  percent.className = "share";
  percent.textContent = `${(100 * share).toFixed(1)} %`;
  item.append(swatch, text, percent);
  return item;
}

worker.addEventListener("message", async ({ data: { id, model, result, error } }) => {
  if (model) {
    byId("typed").hidden = !model.typed;
    byId("fixed").hidden = model.typed;
    [byId("labels").value, byId("background").value] = [model.text.labels, model.text.background_labels];
    if (!model.typed) byId("fixed").textContent = `Labels: ${model.labels.join(", ")}`;
    if (!file) say("Ready.", "ready");
  } else if (id === undefined || id === requests) {
    if (error) say(error, "fault");
    else await show(result, file).catch((fault) => say(fault.message, "fault"));
  }
});
worker.addEventListener("error", () => say("The worker did not start: serve this folder over http.", "fault"));

byId("file").addEventListener("change", (event) => take(event.target.files[0]));
byId("opacity").addEventListener("input", (event) => (byId("overlay").style.opacity = event.target.value / 100));
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  segment();
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
byId("overlay").style.opacity = byId("opacity").value / 100;
