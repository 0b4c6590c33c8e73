// The page: an image, its labels and options, requests, and what is shown of the answers.

import { ApiError, call, configure, forget } from "./api.js";
import { Chips, split } from "./chips.js";
import { coco, jsonBlob, pngBlob, record, save } from "./downloads.js";
import { heatColour } from "./draw.js";
import { Legend } from "./legend.js";
import { Options } from "./options.js";
import { Pane } from "./pane.js";
import { Result, difference } from "./result.js";
import { count, duration, megabytes, percent } from "./text.js";

const $ = (id) => document.getElementById(id);
const HAND_OVER = 400; // ms: a request that takes longer is given up for a newer one, even while a slider moves
const FALLBACK_COLOURS = ["#e69f00", "#0a7fc4", "#d62f4b", "#00a676", "#f0e442", "#cc79a7", "#56b4e9"];

const state = {
  info: null,
  photo: null, // {name, blob, bitmap, width, height, ids: Map backend -> id, encoded: ms}
  opening: null, // AbortController of an image on its way
  running: null, // {controller, since} of a request for labels
  again: false,
  backends: [], // those that are shown
  results: new Map(), // backend -> Result
  request: null, // of these results
  difference: null,
  view: "labels",
  stage: 0,
  heat: null,
  hidden: { labels: new Set(), groups: new Set() },
  highlight: null,
  point: null,
};
const panes = new Map(); // backend -> Pane

// ---- saying things ----

let liveTimer = 0;

/** Tells a screen reader, once things are quiet. */
function say(text, wait = 150) {
  clearTimeout(liveTimer);
  liveTimer = setTimeout(() => ($("live").textContent = text), wait);
}

function fail(error, retry = null) {
  if (error.name === "AbortError") return;
  const known = error instanceof ApiError || error.isPlain;
  $("error-text").textContent = known ? error.message : `The page has a fault: ${error.message}.`;
  $("error").hidden = false;
  $("retry").hidden = !retry;
  $("retry").onclick = () => {
    clearError();
    retry();
  };
}

function clearError() {
  $("error").hidden = true;
  $("error-text").textContent = "";
}

const plainError = (message) => Object.assign(new Error(message), { isPlain: true });

const jobs = new Set(); // what is being waited for
let busyTimer = 0;

/** Shows that something is awaited, from 150 ms on; returns what ends it. `value`: how much is done, 0 to 1. */
function busy() {
  const job = {};
  jobs.add(job);
  const bar = $("progress").firstElementChild;
  if (jobs.size === 1) {
    bar.removeAttribute("value");
    busyTimer = setTimeout(() => ($("progress").hidden = false), 150);
  }
  $("panes").setAttribute("aria-busy", "true");
  return {
    value: (part) => (part < 1 ? (bar.value = part) : bar.removeAttribute("value")),
    end: () => {
      jobs.delete(job);
      if (jobs.size) return;
      clearTimeout(busyTimer);
      $("progress").hidden = true;
      $("panes").removeAttribute("aria-busy");
    },
  };
}

// ---- images ----

async function open(blob, name, labels = null) {
  if (!state.info) return fail(plainError("The server is not ready yet: try again in a moment."), () => open(blob, name, labels));
  const { limits } = state.info;
  if (limits?.bytes && blob.size > limits.bytes) {
    return fail(plainError(`${name} has ${megabytes(blob.size)}, and the server takes at most ${megabytes(limits.bytes)}: choose a smaller file.`));
  }
  state.opening?.abort();
  const controller = (state.opening = new AbortController());
  const photo = { name, blob, ids: new Map(), encoded: 0 };
  const work = busy();
  clearError();
  $("status").textContent = `Sending ${name} …`;
  say(`Sending ${name}`);
  try {
    const bitmap = createImageBitmap(blob).catch(() => null);
    await upload(photo, state.backends[0], controller.signal, work.value);
    photo.bitmap = await bitmap;
    if (state.opening !== controller) return;
    if (state.photo) letGo(state.photo);
    state.photo = photo;
    state.opening = null;
    if (labels) setLabels(labels);
    showPhoto();
    update();
  } catch (error) {
    if (state.opening !== controller) return;
    state.opening = null;
    $("status").textContent = "";
    fail(error, error.code === "network" ? () => open(blob, name, labels) : null);
  } finally {
    work.end();
  }
}

async function upload(photo, backend, signal, progress) {
  const form = new FormData();
  form.append("image", photo.blob, photo.name);
  form.append("backend", backend);
  const answer = await call("POST", "v1/images", form, { signal, progress });
  photo.ids.set(backend, answer.image_id);
  Object.assign(photo, { width: answer.width, height: answer.height, encoded: answer.milliseconds?.encode ?? 0 });
}

function letGo(photo) {
  for (const id of photo.ids.values()) forget(id);
  photo.bitmap?.close();
}

function showPhoto() {
  const { photo } = state;
  document.body.classList.remove("empty");
  state.results.clear();
  state.point = state.highlight = state.difference = null;
  state.hidden = { labels: new Set(), groups: new Set() };
  $("choose").textContent = "Another image";
  $("readout").textContent = photo.bitmap ? "" : "This browser cannot show this kind of file; its labels are shown without it.";
  $("legend").replaceChildren();
  showPanes();
}

function openFiles(files, places) {
  const file = [...files].find((each) => each.type.startsWith("image/")) || files[0];
  if (!file) return fail(plainError(`There is no image in what was ${places}: ${places === "dropped" ? "drop" : "paste"} an image file.`));
  if (files.length > 1) say(`Took ${file.name}, the first image of ${files.length} files.`);
  open(file, file.name || "image.png");
}

// ---- requests ----

/** Asks for labels anew. `gentle`: a slider that is still moved, which waits for the answer on its way. */
function update(gentle = false) {
  if (!state.photo) return;
  const { running } = state;
  if (running && gentle && performance.now() - running.since < HAND_OVER) {
    state.again = true;
    return;
  }
  running?.controller.abort();
  run();
}

async function run() {
  const controller = new AbortController();
  const running = (state.running = { controller, since: performance.now() });
  state.again = false;
  const { photo } = state;
  const request = wanted();
  if (!request.labels.length) {
    state.running = null;
    state.results.clear();
    return showNothing();
  }
  const work = busy();
  try {
    const answers = await Promise.all(state.backends.map((backend) => segment(photo, backend, request, controller.signal, work)));
    const results = await Promise.all(answers.map((answer) => Result.of(answer)));
    if (state.running !== running || state.photo !== photo) return;
    state.results = new Map(state.backends.map((backend, at) => [backend, results[at]]));
    state.request = request;
    state.difference = results.length > 1 ? difference(...results) : null;
    clearError();
    $("panes").classList.remove("stale");
    await show();
    tellResult(performance.now() - running.since);
  } catch (error) {
    if (state.running !== running) return;
    // What is shown is of an earlier request.
    $("panes").classList.toggle("stale", error.name !== "AbortError");
    fail(error, () => update());
  } finally {
    work.end();
    if (state.running === running) {
      state.running = null;
      if (state.again) run();
    }
  }
}

function wanted() {
  const include = ["label_map", "score_map", "group_map"];
  if (state.view === "groups") include.push("stages");
  if (state.view === "heat") include.push("similarity");
  return { labels: chips.labels.values, background_labels: chips.background.values, ...options.values(), include };
}

/** Asks for the labels of an image that one backend has encoded; sends the image again if it is gone. */
async function segment(photo, backend, request, signal, work) {
  for (let tries = 1; ; tries++) {
    if (!photo.ids.has(backend)) await upload(photo, backend, signal, work?.value);
    try {
      return await call("POST", "v1/segment", { image_id: photo.ids.get(backend), backend, ...request }, { signal });
    } catch (error) {
      if (error.code !== "image_gone" || tries > 1) throw error;
      photo.ids.delete(backend);
    }
  }
}

// ---- what is shown ----

const first = () => state.results.get(state.backends[0]);
const palette = () => state.info.palette || FALLBACK_COLOURS;

function showPanes() {
  const { photo } = state;
  for (const [backend, pane] of panes) {
    if (state.backends.includes(backend)) continue;
    pane.root.remove();
    panes.delete(backend);
  }
  const several = state.backends.length > 1;
  for (const backend of state.backends) {
    const caption = `${photo.name}, ${photo.width} × ${photo.height}${several ? `, ${backend}` : ""}`;
    let pane = panes.get(backend);
    if (!pane) panes.set(backend, (pane = new Pane($("panes"), (place, how) => point(place, how))));
    if (pane.photoShown !== photo) pane.setImage(photo.bitmap, photo.width, photo.height, caption);
    pane.photoShown = photo;
    pane.setCaption(caption);
    $("panes").append(pane.root);
  }
  $("panes").classList.toggle("several", several);
  $("panes").classList.remove("stale");
}

/** Shows the results in the present view; asks for what the view needs and they lack. */
async function show() {
  const result = first();
  if (!result) return;
  if (![...state.results.values()].every((each) => each.has(state.view))) return update();
  if (state.view === "heat" && !result.answer.similarity.some(({ label }) => label === state.heat)) state.heat = result.answer.similarity[0].label;
  if (result.answer.stages) state.stage = Math.min(state.stage, result.answer.stages.length - 1);
  const token = (show.latest = {});
  const layers = await Promise.all([...state.results].map(async ([backend, each]) => [backend, await each.layer(state.view, layerSettings())]));
  if (token !== show.latest) return;
  state.layers = new Map(layers);
  $("panes").classList.toggle("heat", state.view === "heat");
  draw();
  showLegend();
  showStages();
  showDifference();
  point(state.point, null);
}

const layerSettings = () => ({ stage: state.stage, heat: state.heat, palette: palette() });

function showNothing() {
  state.layers = null;
  for (const pane of panes.values()) pane.draw({ map: { values: new Uint8Array(1), width: 1, height: 1 }, entries: [{ plain: true, colour: "#000000", key: "" }] }, look([]));
  legend.show([], "", false);
  $("difference").hidden = true;
  $("readout").textContent = "";
  $("status").textContent = "Add at least one label.";
  say("Add at least one label.");
}

/** Returns how entries are drawn now: their hidden and highlighted ones as indices. */
function look(entries) {
  const set = state.hidden[state.view];
  const index = entries.findIndex(({ key }) => key === state.highlight);
  return {
    opacity: Number($("opacity").value),
    hidden: new Set(entries.flatMap(({ key }, at) => (set?.has(key) ? [at] : []))),
    highlight: index < 0 ? null : index,
    marked: $("mark").checked && state.view === "labels" ? state.difference : null,
    names: $("names").checked,
  };
}

let drawing = 0;

function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    if (!state.layers) return;
    for (const [backend, layer] of state.layers) panes.get(backend)?.draw(layer, look(layer.entries || []));
  });
}

function showLegend() {
  const { answer } = first();
  const { view } = state;
  const layer = state.layers.get(state.backends[0]);
  const set = state.hidden[view];
  $("legend-title").textContent = { labels: "Legend", heat: "Similarity to", groups: answer.stages?.length > 1 ? `Groups of stage ${state.stage + 1}` : "Groups" }[view];
  $("columns").hidden = view !== "labels";
  $("scale").hidden = view !== "heat";
  if (view === "heat") {
    $("low").textContent = layer.entry.low.toFixed(2);
    $("high").textContent = layer.entry.high.toFixed(2);
    const rows = answer.similarity.map(({ label, low, high }) => ({
      key: label, colour: null, name: label, share: null, note: `${low.toFixed(2)} to ${high.toFixed(2)}`,
      spoken: `${label}, similarity ${low.toFixed(2)} to ${high.toFixed(2)}`, pressed: label === state.heat,
    }));
    legend.show(rows, "Show its heat map", false);
  } else {
    const shown = layer.entries.filter(({ key }) => !set.has(key));
    const rows = layer.entries.map((entry, at) => {
      const label = view === "labels" ? answer.labels[at] : null;
      const likely = label && label.probability !== null ? percent(label.probability) : "";
      const name = label ? label.name : `Group ${at}`;
      const share = label ? label.pixel_share : entry.share;
      const note = label ? likely : entry.note;
      return {
        key: entry.key, colour: entry.plain ? null : entry.colour, name, share, note,
        spoken: `${name}: ${percent(share)} of the pixels${note && `, ${label ? "probability " : ""}${note}`}`,
        pressed: !set.has(entry.key), alone: shown.length === 1 && shown[0] === entry && layer.entries.length > 1,
      };
    });
    // What is not there comes last, the background before it.
    const rank = ({ colour, share }) => (share === 0 ? 2 : colour ? 0 : 1);
    const listed = view === "groups" ? rows.filter(({ share }) => share > 0) : rows.sort((a, b) => rank(a) - rank(b));
    legend.show(listed, "Show or hide", true);
  }
  $("show-all").hidden = !set?.size;
}

function showStages() {
  const stages = state.view === "groups" ? first().answer.stages.length : 0;
  const box = $("stages");
  box.hidden = stages < 2;
  if (box.querySelectorAll("input").length !== stages) segments(box, "stage", Array.from({ length: stages }, (_, at) => [at, at + 1]), chooseStage);
  const chosen = box.querySelector(`input[value="${state.stage}"]`);
  if (chosen) chosen.checked = true;
}

function chooseStage(value) {
  state.stage = Number(value);
  state.hidden.groups.clear();
  show();
}

function showDifference() {
  const { difference: found } = state;
  $("difference").hidden = !found;
  if (!found) return;
  const all = found.width * found.height;
  $("difference-text").textContent = `${count(found.count)} of ${count(all)} pixels differ${found.count ? ` (${percent(found.count / all)})` : ""}.`;
}

function tellResult(milliseconds) {
  const { answer } = first();
  const again = answer.milliseconds?.encode > 0 ? ", encoded again" : "";
  $("status").textContent = `Labelled in ${duration(milliseconds)}${again}. Encoded in ${duration(state.photo.encoded)}.`;
  const present = answer.labels.filter(({ pixel_share }) => pixel_share > 0).sort((a, b) => b.pixel_share - a.pixel_share);
  const differing = state.difference ? ` ${$("difference-text").textContent}` : "";
  say(`Labelled: ${present.map(({ name, pixel_share }) => `${name} ${percent(pixel_share)}`).join(", ")}.${differing}`, 700);
}

/** Shows what is at a pixel, in all panes. `how`: "mouse", "touch", "keys" (which is read out), null for a new result. */
function point(place, how) {
  state.point = place;
  const found = place && [...state.results].map(([backend, result]) => ({ backend, ...result.at(place) }));
  if (!found?.length) {
    for (const pane of panes.values()) pane.point(null);
    legend.mark(null);
    if (state.results.size) $("readout").textContent = "Point at the image, or move over it with the arrow keys.";
    return;
  }
  const several = found.length > 1;
  const lines = found.map((each) => `${several ? `${each.backend}: ` : ""}${each.label} ${percent(each.score)}, group ${each.group}`);
  found.forEach(({ backend, label, score, group }) => {
    const value = state.view === "heat" ? `similarity ${similarityAt(backend, place).toFixed(2)}` : state.view === "groups" ? `group ${groupAt(backend, place)}` : percent(score);
    panes.get(backend)?.point(place, state.view === "labels" ? `${label} ${value}` : value);
  });
  const where = `column ${place.x}, row ${place.y}`;
  const lead = document.createElement("strong");
  lead.textContent = lines.join("; ");
  const rest = document.createElement("span");
  rest.textContent = several ? where : `Group ${found[0].group}: ${found[0].others}. ${where[0].toUpperCase()}${where.slice(1)}.`;
  $("readout").replaceChildren(lead, " ", rest);
  legend.mark({ labels: found[0].label, heat: state.heat, groups: state.view === "groups" ? groupAt(found[0].backend, place) : null }[state.view]);
  if (how === "keys") say(`${lines.join("; ")}, ${where}`, 200);
}

function valueAt(map, { x, y }) {
  const column = Math.floor(((x + 0.5) * map.width) / state.photo.width);
  return map.values[Math.floor(((y + 0.5) * map.height) / state.photo.height) * map.width + column];
}

function similarityAt(backend, place) {
  const { heat, entry } = state.layers.get(backend);
  return entry.low + ((entry.high - entry.low) * valueAt(heat, place)) / 255;
}

const groupAt = (backend, place) => valueAt(state.layers.get(backend).map, place);

// ---- controls ----

const chipSettings = { say, changed: () => update(), hintId: "chips-hint" };
const chips = {
  labels: new Chips($("labels"), { ...chipSettings, name: "label", titleId: "labels-title", placeholder: "Add a label" }),
  background: new Chips($("background-labels"), { ...chipSettings, name: "background word", titleId: "background-title", placeholder: "Add a word" }),
};
const options = new Options($("options"), update);
const legend = new Legend($("legend"), {
  hovered(key) {
    if (state.highlight === key || state.view === "heat") return;
    state.highlight = key;
    draw();
  },
  pressed(key) {
    if (state.view === "heat") state.heat = key;
    else {
      const set = state.hidden[state.view];
      if (!set.delete(key)) set.add(key);
    }
    show();
  },
  only(key) {
    const set = state.hidden[state.view];
    const others = state.layers.get(state.backends[0]).entries.map((entry) => entry.key).filter((each) => each !== key);
    const isAlone = !set.has(key) && others.every((each) => set.has(each));
    set.clear();
    if (!isAlone) others.forEach((each) => set.add(each));
    show();
  },
});

function setLabels({ labels, background_labels: background }) {
  const list = (value) => (typeof value === "string" ? split(value).parts.filter(Boolean) : value || []);
  chips.labels.set(list(labels));
  chips.background.set(list(background));
}

/** Fills a fieldset with radio buttons of [value, text], the first one checked. */
function segments(box, name, choices, chosen) {
  const made = choices.map(([value, text], at) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked: at === 0 });
    input.addEventListener("change", () => chosen(value));
    label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
    return label;
  });
  box.replaceChildren(box.querySelector("legend"), ...made);
}

function showBackends() {
  const loaded = state.info.backends;
  state.backends = loaded.slice(0, 1);
  $("backends").hidden = loaded.length < 2;
  if (loaded.length < 2) return;
  const choices = loaded.map((name) => [name, name]);
  segments($("backends"), "backend", [...choices, ["both", "Side by side"]], (value) => {
    state.backends = value === "both" ? loaded.slice(0, 2) : [value];
    state.results.clear();
    state.difference = null;
    $("difference").hidden = true;
    if (!state.photo) return;
    showPanes();
    update();
  });
}

function showExamples() {
  const made = (state.info.examples || []).map((example) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", title: example.name });
    button.append(Object.assign(document.createElement("img"), { src: example.url, alt: example.name, width: 96, height: 72 }));
    button.addEventListener("click", () => openExample(example));
    item.append(button);
    return item;
  });
  $("examples").replaceChildren(...made);
  $("or").hidden = !made.length;
}

async function openExample(example) {
  try {
    const answer = await fetch(example.url);
    if (!answer.ok) throw plainError(`The example ${example.name} is not there: choose another one.`);
    open(await answer.blob(), example.url.split("/").pop(), example);
  } catch (error) {
    fail(error.isPlain ? error : new ApiError("network", "The server does not answer: check that it runs, then try again."), () => openExample(example));
  }
}

async function download(kind) {
  const { photo } = state;
  const result = first();
  if (!result) return fail(plainError("There is nothing to download yet: add at least one label."));
  const stem = photo.name.replace(/\.[^.]*$/, "") || "image";
  const work = busy();
  try {
    const again = (fields) => segment(photo, state.backends[0], { ...state.request, ...fields }, null, work);
    if (kind === "overlay") save(pngBlob((await again({ include: ["overlay"], opacity: Number($("opacity").value) })).overlay), `${stem}_overlay.png`);
    else if (kind === "labels") save(pngBlob(result.answer.label_map), `${stem}_labels.png`);
    else if (kind === "record") save(jsonBlob(record(result.answer, photo.name, { ...state.request, include: undefined })), `${stem}_segmentation.json`);
    else if (kind === "coco") save(jsonBlob(coco(await again({ include: ["label_map"], masks: "rle" }), result.labels, photo.name)), `${stem}_coco.json`);
    else save(await pictureShown(), `${stem}_view.png`);
    say("Downloaded.");
  } catch (error) {
    fail(error, () => download(kind));
  } finally {
    work.end();
  }
}

async function pictureShown() {
  const backend = state.backends[0];
  const canvas = panes.get(backend).picture(state.photo.bitmap, look(state.layers.get(backend).entries || []));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw plainError("This browser cannot write an image of this size: download the overlay instead.");
  return blob;
}

function askKey(wasWrong) {
  askKey.asked ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-title").textContent = wasWrong ? "That key is not the server's" : "API key";
    $("key").value = "";
    $("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      askKey.asked = null;
      resolve(dialog.returnValue === "ok" ? $("key").value : null);
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return askKey.asked;
}

function wireDropAndPaste() {
  let depth = 0; // drag events come from every element on the way
  const over = (change) => document.body.classList.toggle("dropping", (depth = Math.max(0, depth + change)) > 0);
  // Text that is dragged into a field is the browser's; a link that is dropped would leave the page.
  const isOurs = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
  addEventListener("dragenter", (event) => isOurs(event) && over(1));
  addEventListener("dragleave", (event) => isOurs(event) && over(-1));
  addEventListener("dragover", (event) => isOurs(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isOurs(event)) return;
    event.preventDefault();
    over(-depth);
    openFiles(event.dataTransfer.files, "dropped");
  });
  addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (files.length) {
      event.preventDefault();
      openFiles(files, "pasted");
    } else if (!event.target.closest?.("input")) openFiles([], "pasted");
  });
}

function wireTheme() {
  const root = document.documentElement;
  const themes = ["", "light", "dark"];
  const tell = () => {
    const name = { "": "Auto", light: "Light", dark: "Dark" }[root.dataset.theme || ""];
    $("theme-name").textContent = name;
    $("theme").setAttribute("aria-label", `Theme: ${name}`);
  };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = themes[(themes.indexOf(root.dataset.theme || "") + 1) % themes.length];
    try {
      localStorage.setItem("groupvit-theme", root.dataset.theme);
    } catch {
      // Storage is blocked: it holds until the page is left.
    }
    tell();
  });
  tell();
}

function wire() {
  $("file").addEventListener("change", (event) => {
    if (event.target.files.length) openFiles(event.target.files, "chosen");
    event.target.value = ""; // the same file may be chosen again
  });
  $("views").addEventListener("change", (event) => {
    state.view = event.target.value;
    state.highlight = null;
    show();
    if (!state.results.size) update();
  });
  for (const id of ["opacity", "names", "mark"]) $(id).addEventListener("input", draw);
  $("show-all").addEventListener("click", () => {
    state.hidden[state.view]?.clear();
    show();
    $("legend").querySelector("button")?.focus();
  });
  $("downloads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) download(button.value);
  });
  $("dismiss").addEventListener("click", clearError);
  addEventListener("pagehide", () => {
    if (state.photo) for (const id of state.photo.ids.values()) forget(id);
  });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((value) => `rgb(${heatColour(value)})`);
  $("ramp").style.background = `linear-gradient(to right, ${stops})`;
  configure({ askKey, busy: (seconds) => say(($("status").textContent = `The server is busy; trying again in ${Math.ceil(seconds)} s.`)) });
  wireDropAndPaste();
  wireTheme();
}

async function start() {
  const work = busy();
  try {
    const info = (state.info = await call("GET", "v1/info", null, { isPatient: true }));
    $("model").textContent = `${info.model} · ${info.version}`;
    options.set(info.options || {});
    setLabels({ labels: info.default_labels, background_labels: info.default_background_labels });
    showBackends();
    showExamples();
    document.body.classList.add("ready");
  } catch (error) {
    fail(error, start);
  } finally {
    work.end();
  }
}

wire();
start();
