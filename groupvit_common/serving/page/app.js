// The page: an image, its labels and options, requests, and what is shown of the answers.

import { ApiError, call, configure } from "./api.js";
import { Chips, split } from "./chips.js";
import { askKey, segments, wireDropAndPaste, wireTheme } from "./controls.js";
import { coco, jsonBlob, pngBlob, record, save } from "./downloads.js";
import { heatColour } from "./draw.js";
import { Legend, areaRows, heatRows } from "./legend.js";
import { busy, clearError, fail, plainError, say } from "./notices.js";
import { Options } from "./options.js";
import { Pane } from "./pane.js";
import { Photo } from "./photo.js";
import { Result, difference } from "./result.js";
import { count, duration, megabytes, percent } from "./text.js";

const $ = (id) => document.getElementById(id);
const PATIENCE = 400; // ms: once a slider is let go, a request that takes longer is given up for a newer one
const FALLBACK_COLOURS = ["#e69f00", "#0a7fc4", "#d62f4b", "#00a676", "#f0e442", "#cc79a7", "#56b4e9"];

const state = {
  info: null,
  photo: null,
  opening: null, // a Photo on its way
  running: null, // {controller, since} of a request for labels
  again: false,
  backends: [], // those that are shown
  results: new Map(), // backend -> Result
  request: null, // of these results
  difference: null,
  shown: null, // {view, results, layers: Map backend -> layer}: what is drawn, which fits together
  view: "labels",
  stage: 0,
  heat: null,
  hidden: { labels: new Set(), groups: new Set() },
  highlight: null,
  point: null,
};
const panes = new Map(); // backend -> Pane

// ---- images ----

async function open(blob, name, labels = null) {
  if (!state.info)
    return fail(plainError("The server is not ready yet: try again in a moment."), () => open(blob, name, labels));
  const { limits } = state.info;
  if (limits?.bytes && blob.size > limits.bytes) {
    return fail(
      plainError(
        `${name} has ${megabytes(blob.size)}, and the server takes at most ${megabytes(limits.bytes)}: choose a smaller file.`,
      ),
    );
  }
  state.opening?.close();
  const photo = (state.opening = new Photo(blob, name));
  const work = busy();
  clearError();
  $("status").textContent = `Sending ${name} …`;
  say(`Sending ${name}`);
  try {
    await readable(blob, name);
    const bitmap = createImageBitmap(blob).catch(() => null);
    await photo.send(state.backends[0], work.value);
    photo.bitmap = await bitmap;
    if (state.opening !== photo) return;
    state.photo?.close();
    state.photo = photo;
    state.opening = null;
    if (labels) setLabels(labels);
    showPhoto();
    update();
  } catch (error) {
    if (state.opening !== photo) return;
    state.opening = null;
    $("status").textContent = "";
    fail(error, error.code === "network" ? () => open(blob, name, labels) : null);
  } finally {
    work.end();
  }
}

/** Raises an error for what is no file, or one that is gone: sending it would look like a server that does not answer. */
async function readable(blob, name) {
  try {
    await blob.slice(0, 1).arrayBuffer();
  } catch {
    throw plainError(`${name} cannot be read: choose an image file, not a folder.`);
  }
}

function showPhoto() {
  const { photo } = state;
  document.body.classList.remove("empty");
  state.results.clear();
  state.point = state.highlight = state.difference = state.shown = null;
  state.hidden = { labels: new Set(), groups: new Set() };
  $("choose").textContent = "Another image";
  $("readout").textContent = "";
  $("legend").replaceChildren();
  showPanes();
}

function openFiles(files, places) {
  const file = [...files].find((each) => each.type.startsWith("image/")) || files[0];
  if (!file)
    return fail(
      plainError(`There is no image in what was ${places}: ${places === "dropped" ? "drop" : "paste"} an image file.`),
    );
  if (files.length > 1) say(`Took ${file.name}, the first image of ${files.length} files.`);
  open(file, file.name || "image.png");
}

// ---- requests ----

/**
 * Asks for labels anew. `slider`: "moved", which waits for the answer on its way, so that there are answers while it
 * moves; "released", which asks for nothing new.
 */
function update(slider = null) {
  if (!state.photo) return;
  const { running } = state;
  if (slider && running) {
    if (slider === "moved") state.again = true;
    if (slider === "moved" || !state.again || performance.now() - running.since < PATIENCE) return;
  }
  if (slider === "released" && !running) return;
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
    const answers = await Promise.all(
      state.backends.map((backend) =>
        photo.segment(backend, request, { signal: controller.signal, progress: work.value }),
      ),
    );
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
  const unseen = photo.bitmap ? "" : " (this browser cannot show such files; their labels it can)";
  for (const backend of state.backends) {
    const caption = `${photo.name}, ${photo.width} × ${photo.height}${several ? `, ${backend}` : ""}${unseen}`;
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
  const { view } = state;
  if (![...state.results.values()].every((each) => each.has(view))) return update();
  if (view === "heat" && !result.answer.similarity.some(({ label }) => label === state.heat))
    state.heat = result.answer.similarity[0].label;
  if (result.answer.stages) state.stage = Math.min(state.stage, result.answer.stages.length - 1);
  const token = (show.latest = {});
  const layers = await Promise.all(
    [...state.results].map(async ([backend, each]) => [backend, await each.layer(view, layerSettings())]),
  );
  if (token !== show.latest) return;
  state.shown = { view, results: new Map(state.results), layers: new Map(layers) };
  $("panes").classList.toggle("heat", view === "heat");
  draw();
  showLegend();
  showStages();
  showDifference();
  point(state.point, null);
}

const layerSettings = () => ({ stage: state.stage, heat: state.heat, palette: palette() });

function showNothing() {
  state.shown = null;
  for (const pane of panes.values())
    pane.draw(
      {
        map: { values: new Uint8Array(1), width: 1, height: 1 },
        entries: [{ plain: true, colour: "#000000", key: "" }],
      },
      look([]),
    );
  legend.show([], "", false);
  $("difference").hidden = true;
  $("readout").textContent = "";
  $("status").textContent = "Add at least one label.";
  say("Add at least one label.");
}

/** Returns how entries are drawn now: their hidden and highlighted ones as indices. */
function look(entries) {
  const view = state.shown?.view;
  const set = state.hidden[view];
  const index = entries.findIndex(({ key }) => key === state.highlight);
  return {
    opacity: Number($("opacity").value),
    hidden: new Set(entries.flatMap(({ key }, at) => (set?.has(key) ? [at] : []))),
    highlight: index < 0 ? null : index,
    marked: $("mark").checked && view === "labels" ? state.difference : null,
    names: $("names").checked,
  };
}

let drawing = 0;

function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    if (!state.shown) return;
    for (const [backend, layer] of state.shown.layers) panes.get(backend)?.draw(layer, look(layer.entries || []));
  });
}

function showLegend() {
  const { view, results, layers } = state.shown;
  const [[backend, { answer }]] = results;
  const layer = layers.get(backend);
  const set = state.hidden[view];
  $("legend-title").textContent = {
    labels: "Legend",
    heat: "Similarity to",
    groups: answer.stages?.length > 1 ? `Groups of stage ${state.stage + 1}` : "Groups",
  }[view];
  $("columns").hidden = view !== "labels";
  $("scale").hidden = view !== "heat";
  if (view === "heat") {
    $("low").textContent = layer.entry.low.toFixed(2);
    $("high").textContent = layer.entry.high.toFixed(2);
    legend.show(heatRows(answer.similarity, state.heat), "Show its heat map", false);
  } else {
    const rows = areaRows(layer.entries, view === "labels" ? answer.labels : null, set);
    legend.show(rows, "Show or hide", true);
  }
  $("show-all").hidden = !set?.size;
}

function showStages() {
  const stages = state.shown.view === "groups" ? first().answer.stages.length : 0;
  const box = $("stages");
  box.hidden = stages < 2;
  if (box.querySelectorAll("input").length !== stages)
    segments(
      box,
      "stage",
      Array.from({ length: stages }, (_, at) => [at, at + 1]),
      chooseStage,
    );
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
  $("mark").parentElement.hidden = !found.count;
  const all = found.width * found.height;
  $("difference-text").textContent =
    `${count(found.count)} of ${count(all)} pixels differ${found.count ? ` (${percent(found.count / all)})` : ""}.`;
}

function tellResult(milliseconds) {
  const { answer } = first();
  const again = answer.milliseconds?.encode > 0 ? ", encoded again" : "";
  $("status").textContent =
    `Labelled in ${duration(milliseconds)}${again}. Encoded in ${duration(state.photo.encoded)}.`;
  const present = answer.labels
    .filter(({ pixel_share }) => pixel_share > 0)
    .sort((a, b) => b.pixel_share - a.pixel_share);
  const differing = state.difference ? ` ${$("difference-text").textContent}` : "";
  say(
    `Labelled: ${present.map(({ name, pixel_share }) => `${name} ${percent(pixel_share)}`).join(", ")}.${differing}`,
    700,
  );
}

/** Shows what is at a pixel, in all panes. `how`: "mouse", "touch", "keys" (which is read out), null for a new result. */
function point(place, how) {
  state.point = place;
  const { shown } = state;
  const found = place && shown && [...shown.results].map(([backend, result]) => ({ backend, ...result.at(place) }));
  if (!found?.length) {
    for (const pane of panes.values()) pane.point(null);
    legend.mark(null);
    if (shown) $("readout").textContent = "Point at the image, or move over it with the arrow keys.";
    return;
  }
  const several = found.length > 1;
  const lines = found.map(
    (each) => `${several ? `${each.backend}: ` : ""}${each.label} ${percent(each.score)}, group ${each.group}`,
  );
  found.forEach(({ backend, label, score, group }) => {
    const value =
      shown.view === "heat"
        ? `similarity ${similarityAt(backend, place).toFixed(2)}`
        : shown.view === "groups"
          ? `group ${groupAt(backend, place)}`
          : percent(score);
    panes.get(backend)?.point(place, shown.view === "labels" ? `${label} ${value}` : value);
  });
  const where = `column ${place.x}, row ${place.y}`;
  const lead = document.createElement("strong");
  lead.textContent = lines.join("; ");
  const rest = document.createElement("span");
  rest.textContent = several
    ? where
    : `Group ${found[0].group}: ${found[0].others}. ${where[0].toUpperCase()}${where.slice(1)}.`;
  $("readout").replaceChildren(lead, " ", rest);
  legend.mark(
    {
      labels: found[0].label,
      heat: state.heat,
      groups: shown.view === "groups" ? groupAt(found[0].backend, place) : null,
    }[shown.view],
  );
  if (how === "keys") say(`${lines.join("; ")}, ${where}`, 200);
}

function valueAt(map, { x, y }) {
  const column = Math.floor(((x + 0.5) * map.width) / state.photo.width);
  return map.values[Math.floor(((y + 0.5) * map.height) / state.photo.height) * map.width + column];
}

function similarityAt(backend, place) {
  const { heat, entry } = state.shown.layers.get(backend);
  return entry.low + ((entry.high - entry.low) * valueAt(heat, place)) / 255;
}

const groupAt = (backend, place) => valueAt(state.shown.layers.get(backend).map, place);

// ---- controls ----

const chipSettings = { say, changed: () => update(), hintId: "chips-hint" };
const chips = {
  labels: new Chips($("labels"), {
    ...chipSettings,
    name: "label",
    titleId: "labels-title",
    placeholder: "Add a label",
  }),
  background: new Chips($("background-labels"), {
    ...chipSettings,
    name: "background word",
    titleId: "background-title",
    placeholder: "Add a word",
  }),
};
const options = new Options($("options"), update);
const legend = new Legend($("legend"), {
  hovered(key) {
    if (state.highlight === key || state.shown?.view === "heat") return;
    state.highlight = key;
    draw();
  },
  pressed(key) {
    const { view } = state.shown;
    if (view === "heat") state.heat = key;
    else {
      const set = state.hidden[view];
      if (!set.delete(key)) set.add(key);
    }
    show();
  },
  only(key) {
    const { view, layers } = state.shown;
    const set = state.hidden[view];
    const [layer] = layers.values();
    const others = layer.entries.map((entry) => entry.key).filter((each) => each !== key);
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

function showBackends() {
  const loaded = state.info.backends;
  state.backends = loaded.slice(0, 1);
  $("backends").hidden = loaded.length < 2;
  if (loaded.length < 2) return;
  const choices = loaded.map((name) => [name, name]);
  segments($("backends"), "backend", [...choices, ["both", "Side by side"]], (value) => {
    state.backends = value === "both" ? loaded.slice(0, 2) : [value];
    state.results.clear();
    state.difference = state.shown = null;
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
    button.append(
      Object.assign(document.createElement("img"), { src: example.url, alt: example.name, width: 96, height: 72 }),
    );
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
    fail(
      error.isPlain
        ? error
        : new ApiError("network", "The server does not answer: check that it runs, then try again."),
      () => openExample(example),
    );
  }
}

async function download(kind) {
  const { photo } = state;
  const result = first();
  if (!result) return fail(plainError("There is nothing to download yet: add at least one label."));
  const stem = photo.name.replace(/\.[^.]*$/, "") || "image";
  const work = busy();
  try {
    const again = (fields) =>
      photo.segment(state.backends[0], { ...state.request, ...fields }, { progress: work.value });
    if (kind === "overlay")
      save(
        pngBlob((await again({ include: ["overlay"], opacity: Number($("opacity").value) })).overlay),
        `${stem}_overlay.png`,
      );
    else if (kind === "labels") save(pngBlob(result.answer.label_map), `${stem}_labels.png`);
    else if (kind === "record")
      save(
        jsonBlob(record(result.answer, photo.name, { ...state.request, include: undefined })),
        `${stem}_segmentation.json`,
      );
    else if (kind === "coco")
      save(
        jsonBlob(coco(await again({ include: ["label_map"], masks: "rle" }), result.labels, photo.name)),
        `${stem}_coco.json`,
      );
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
  const canvas = panes.get(backend).picture(state.photo.bitmap, look(state.shown.layers.get(backend).entries || []));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw plainError("This browser cannot write an image of this size: download the overlay instead.");
  return blob;
}

function wire() {
  $("file").addEventListener("change", (event) => {
    if (event.target.files.length) openFiles(event.target.files, "chosen");
    event.target.value = ""; // the same file may be chosen again
  });
  $("views").addEventListener("change", (event) => {
    state.view = event.target.value;
    state.highlight = null;
    clearError();
    show();
    if (!state.results.size) update();
  });
  for (const id of ["opacity", "names", "mark"]) $(id).addEventListener("input", draw);
  $("show-all").addEventListener("click", () => {
    state.hidden[state.shown.view]?.clear();
    show();
    $("legend").querySelector("button")?.focus();
  });
  $("downloads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) download(button.value);
  });
  $("dismiss").addEventListener("click", clearError);
  addEventListener("pagehide", () => {
    state.photo?.release();
  });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((value) => `rgb(${heatColour(value)})`);
  $("ramp").style.background = `linear-gradient(to right, ${stops})`;
  configure({
    askKey,
    busy: (message, seconds) => {
      const text = `${message} Trying again in ${Math.ceil(seconds)} s.`;
      $(state.info ? "status" : "model").textContent = text;
      say(text);
    },
  });
  wireDropAndPaste(openFiles);
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
