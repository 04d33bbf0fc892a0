"use strict";
const TOKEN = document.querySelector("meta[name=token]").content;
const ROLES = [
  ["ct", "CT", "NIfTI, or a DICOM series"],
  ["mask", "Mask", "vertebra labels on the CT's grid"],
  ["xray1", "X-ray 1", "DICOM, PNG, TIFF, NPY or NIfTI"],
  ["xray2", "X-ray 2", "from another side"],
  ["cameras", "Cameras", "cameras.json; optional with DICOM"],
];
const FOLDERS = ["ct", "mask"]; // what may be a folder of files
const PLANES = ["axial", "coronal", "sagittal"];
const CROSSED = { axial: ["sagittal", "coronal"], coronal: ["sagittal", "axial"], sagittal: ["coronal", "axial"] };
const POLL_MS = 250;
const ESTIMATE = "#1fa8ff", START = "#e8a33d", CURSOR = "#fff27a";
const $ = (id) => document.getElementById(id);
const chosen = {}, views = [], planes = {};
let state = null, polling = false, drawnInputs = null, drawnResult = "";

// --- talking to the server

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { "X-Radgs-Token": TOKEN, ...options.headers } });
  if (response.ok) return response;
  let line = `${response.status} ${response.statusText}`;
  try { line = (await response.json()).error; } catch { /* no line of ours */ }
  throw new Error(line);
}
const asked = async (path, options) => (await ask(path, options)).json();

// Runs what may fail, and shows its line.
async function attempt(work) {
  try { return await work(); } catch (error) {
    say(error instanceof TypeError ? "The server does not answer: was it ended?" : error.message);
    return null;
  }
}
function say(line) {
  $("error").hidden = !line;
  $("error").textContent = line;
}

async function begin(path, body) {
  say("");
  const found = await attempt(() => asked(path, { method: "POST", body: JSON.stringify(body) }));
  if (found) { show(found); poll(); }
}

async function poll() {
  if (polling) return;
  polling = true;
  try {
    while (state && state.busy) {
      await new Promise((done) => setTimeout(done, POLL_MS));
      show(await asked("/api/state"));
    }
  } catch { say("The server does not answer: was it ended?"); $("progress").hidden = true; }
  polling = false;
}

// --- files

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

for (const [role, name, what] of ROLES) {
  const input = make("input", { type: "file", multiple: FOLDERS.includes(role), className: "away", id: `${role}-upload`,
    ariaLabel: `Upload: ${name}` });
  const pick = make("button", { type: "button", textContent: "Choose from the folder", id: `${role}-pick`,
    ariaLabel: `Choose from the folder: ${name}` });
  const row = make("div", { className: "file", id: `${role}-row` },
    make("strong", {}, name, make("span", { className: "what", textContent: what })),
    make("output", { id: `${role}-name`, textContent: "nothing chosen" }), pick,
    make("label", { className: "button" }, "Upload", input));
  input.addEventListener("change", () => { upload(role, [...input.files]); input.value = ""; });
  pick.addEventListener("click", () => openPicker(role, "."));
  droppable(row, (files) => upload(role, files));
  $("files").append(row);
}
droppable($("drop"), (files) => {
  const series = files.filter((file) => roleOf(file.name) === "ct");
  const xrays = files.filter((file) => roleOf(file.name) === "xray");
  if (series.length) upload("ct", series);
  if (xrays.length > 2) upload("ct", xrays); // a DICOM series
  else xrays.forEach((file, index) => upload(`xray${index + 1}`, [file]));
  for (const role of ["mask", "cameras"]) {
    const found = files.filter((file) => roleOf(file.name) === role);
    if (found.length) upload(role, found);
  }
});

// What a dropped file is, by its name; whoever drops it sees where it went.
function roleOf(name) {
  const lower = name.toLowerCase();
  if (lower.endsWith(".json")) return "cameras";
  if (/\.nii(\.gz)?$/.test(lower)) return /mask|label|seg/.test(lower) ? "mask" : "ct";
  return "xray";
}

function droppable(element, take) {
  const over = (on) => (event) => {
    if (on) event.preventDefault();
    event.stopPropagation();
    element.classList.toggle("over", on);
  };
  element.addEventListener("dragover", over(true));
  element.addEventListener("dragleave", over(false));
  element.addEventListener("drop", async (event) => {
    event.preventDefault();
    over(false)(event);
    // Before anything is waited for, since the items are gone then.
    const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
    const found = await Promise.all(dropped.filter(Boolean).map(filesOf));
    take(found.flat().sort((a, b) => a.name.localeCompare(b.name)));
  });
}
// A file that misses the page must not replace it.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());

// The files of a dropped file or folder.
async function filesOf(entry) {
  if (entry instanceof File) return [entry];
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) { // a reader gives a hundred entries at a time
    const part = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!part.length) break;
    found.push(...part);
  }
  return (await Promise.all(found.map(filesOf))).flat();
}

async function upload(role, files) {
  if (!files.length) return;
  const shown = files.length === 1 ? files[0].name : `${files.length} files`;
  choose(role, null, `uploading ${shown}`);
  const done = await attempt(async () => {
    const { upload: id } = await asked("/api/uploads", { method: "POST" });
    for (const [index, file] of files.entries()) {
      if (files.length > 1) choose(role, null, `uploading ${index + 1} of ${files.length}`);
      await ask(`/api/uploads/${id}/${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
    }
    return { upload: id };
  });
  choose(role, done, done ? shown : "nothing chosen");
}

function choose(role, given, name) {
  chosen[role] = given;
  $(`${role}-name`).textContent = name;
  $(`${role}-row`).classList.toggle("chosen", Boolean(given));
}

async function openPicker(role, folder) {
  const found = await attempt(() => asked(`/api/files?folder=${encodeURIComponent(folder)}`));
  if (!found) return;
  const [, name] = ROLES.find(([each]) => each === role);
  $("picker-title").textContent = `Choose: ${name}`;
  $("picker-folder").textContent = found.folder === "." ? "The folder where the server was started" : found.folder;
  const entry = (text, act) => {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", act);
    return make("li", {}, button);
  };
  const take = (path) => { choose(role, { path }, path); $("picker").close(); };
  const rows = found.entries.map((each) => each.folder
    ? entry(`${each.name}/`, () => openPicker(role, each.path)) : entry(each.name, () => take(each.path)));
  if (found.parent !== null) rows.unshift(entry("../", () => openPicker(role, found.parent)));
  if (found.left_out) rows.push(make("li", { textContent: `${found.left_out} more are not shown` }));
  $("picker-list").replaceChildren(...rows);
  $("picker-this").hidden = !FOLDERS.includes(role);
  $("picker-this").onclick = () => take(found.folder);
  if (!$("picker").open) $("picker").showModal();
  $("picker-list").querySelector("button")?.focus();
}
$("picker-close").addEventListener("click", () => $("picker").close());

$("load").addEventListener("click", () => begin("/api/load", {
  ct: chosen.ct, mask: chosen.mask, xrays: [chosen.xray1 ?? null, chosen.xray2 ?? null], cameras: chosen.cameras,
  ...Object.fromEntries(["values", "air", "bits", "camera_sd", "labels"].map((name) => [name, $(name).value])),
  mirrored: $("mirrored").checked,
}));

// --- what the state says

function show(found) {
  state = found;
  const { job, loaded, result } = state;
  $("progress").hidden = !job;
  if (job) {
    const step = job.beside ? `in advance: ${job.step}` : job.step;
    if ($("step").textContent !== step) $("step").textContent = step;
    $("seconds").textContent = `${Math.floor(job.seconds)} s`;
  }
  if (state.error) say(state.error);
  if (loaded?.number !== drawnInputs) showInputs(loaded);
  $("choose").hidden = $("xrays").hidden = !loaded;
  const key = result ? [result.name, result.written, result.reviewed].join(" ") : "";
  if (key !== drawnResult) showResult(result, result && drawnResult.startsWith(`${result.name} `));
  drawnResult = key;
  refresh();
}

// What may be pressed.
function refresh() {
  const waiting = state?.job && !state.job.beside, level = $("level").value;
  $("load").disabled = waiting;
  $("by-body").disabled = waiting || !level;
  $("by-points").disabled = waiting || !level || !views.length || views.some((view) => !view.centre);
}

function listed(id, lines) {
  $(id).hidden = !lines.length;
  $(id).replaceChildren(...lines.map((line) => make("li", { textContent: line })));
}

function showInputs(loaded) {
  drawnInputs = loaded?.number;
  views.length = 0;
  $("views").replaceChildren();
  $("images").open = !loaded;
  $("images-summary").textContent = loaded ? loaded.files.join(", ") : "";
  if (!loaded) return;
  listed("remarks", loaded.warnings);
  $("level").replaceChildren(make("option", { value: "", textContent: "choose" }),
    ...loaded.levels.map(({ label, name }) => make("option", { value: label, textContent: name })));
  loaded.views.forEach((view, index) => views.push(new View(view, index)));
  $("level").focus();
}

$("level").addEventListener("change", () => {
  refresh();
  // In advance, so that the first click is answered as quickly as the next ones.
  if (Number($("level").value)) begin("/api/prepare", { label: Number($("level").value) });
});
const register = (points) => begin("/api/register", { label: Number($("level").value), points });
$("by-points").addEventListener("click", () => register(views.map((view) => view.centre)));
$("by-body").addEventListener("click", () => register(null));
$("accept").addEventListener("click", () => begin("/api/accept", {}));
$("again").addEventListener("click", () => {
  for (const view of views) view.set(null);
  $("xrays").scrollIntoView({ block: "start" });
  views[0].canvas.focus({ preventScroll: true });
});

function showResult(result, same) {
  $("result").hidden = $("ct").hidden = !result;
  views.forEach((view, index) => { view.outline = result?.outlines[index] ?? null; view.draw(); });
  if (!result) return;
  $("banner").className = result.state;
  $("headline").textContent = result.headline;
  const sentence = (line) => make("p", { textContent: `${line[0].toUpperCase()}${line.slice(1)}.` });
  const moved = [`moved ${result.moved_mm.toFixed(1)} mm from the start pose`, ...result.notes].join("; ");
  $("reasons").replaceChildren(...[result.why, result.advice, moved].filter(Boolean).map(sentence));
  $("accept").hidden = result.state !== "accepted";
  $("accept").disabled = !result.written || result.reviewed;
  const writing = result.written ? "" : "The files are being written.";
  $("reviewed").textContent = result.reviewed ? "You accepted this pose." : writing;
  listed("result-remarks", result.warnings);
  const link = (file, text, opens) => {
    const a = make("a", { href: `/api/results/${result.name}/${file}?token=${TOKEN}`, textContent: text });
    if (opens) Object.assign(a, { target: "_blank", rel: "noopener" }); else a.download = `${result.name}-${file}`;
    return a;
  };
  const links = [link("report.html", "Report", true), link("result.zip", "All files (.zip)")];
  // A refused pose must not be used, so that it is not handed out alone.
  if (result.state !== "refused") links.push(link("pose.json", "pose.json"), link("pose.tfm", "pose.tfm"));
  $("downloads").replaceChildren(...(result.written ? links : []));
  if (same) return;
  for (const plane of PLANES) planes[plane].take(result);
  $("result").scrollIntoView({ block: "start" });
  $("headline").focus({ preventScroll: true });
}

// --- drawing

// A canvas as sharp as the screen; its context is in units of the image's pixels.
function context(canvas, width, height) {
  const sharp = canvas.clientWidth * (window.devicePixelRatio || 1) || width;
  const size = { width: Math.round(sharp), height: Math.round(sharp * height / width) };
  if (canvas.width !== size.width || canvas.height !== size.height) Object.assign(canvas, size);
  const pen = canvas.getContext("2d");
  pen.setTransform(size.width / width, 0, 0, size.height / height, 0, 0);
  pen.pixel = width / size.width * (window.devicePixelRatio || 1); // one pixel of the page
  return pen;
}

// Numbers as a picture: black up to `low`, white from `high`.
function picture(numbers, width, height, low, high) {
  const image = new ImageData(width, height), scale = 255 / Math.max(high - low, 1e-9);
  for (let i = 0; i < numbers.length; i++) {
    const grey = (numbers[i] - low) * scale;
    image.data[4 * i] = image.data[4 * i + 1] = image.data[4 * i + 2] = grey;
    image.data[4 * i + 3] = 255;
  }
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// Calls `act` before the next frame, once however often it is asked for.
function onceAFrame(act) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; act(); });
  };
}

class View {
  constructor(view, index) {
    Object.assign(this, view, { index, centre: null, outline: null, numbers: null });
    this.cross = [(view.width - 1) / 2, (view.height - 1) / 2];
    this.draw = onceAFrame(() => this.paint());
    const name = `${index + 1}: ${view.name}`;
    const ariaLabel = `X-ray ${name}: choose the vertebra's centre`;
    this.canvas = make("canvas", { tabIndex: 0, id: `view${index}`, role: "application", ariaLabel });
    this.canvas.setAttribute("aria-describedby", "xrays-hint");
    this.canvas.style.aspectRatio = `${view.width} / ${view.height}`;
    this.fields = ["u", "v"].map((axis, which) => {
      const ariaLabel = `X-ray ${name}: ${axis === "u" ? "column" : "row"} of the centre, pixels`;
      const input = make("input", { type: "number", step: "any", id: `${axis}${index}`, ariaLabel });
      input.addEventListener("change", () => {
        const given = this.fields.map((field) => field.valueAsNumber);
        this.set(given.every(Number.isFinite) ? given : null, true);
      });
      return input;
    });
    const slider = (what, value, min, max) => {
      const ariaLabel = `X-ray ${name}: ${what} of the grey values`;
      const input = make("input", { type: "range", min, max, step: (max - min) / 500, value, ariaLabel });
      input.addEventListener("input", () => { this.grey = null; this.draw(); });
      return input;
    };
    this.range = view.high - view.low;
    this.level = slider("level", (view.black + view.white) / 2, view.low, view.high);
    this.window = slider("width", view.white - view.black, this.range / 200, this.range);
    this.place = make("span");
    const label = (text, input) => make("label", {}, text, input);
    $("views").append(make("figure", {}, make("figcaption", {}, `X-ray ${name}`, this.place), this.canvas,
      make("div", { className: "under" }, label("Column", this.fields[0]), label("Row", this.fields[1]),
        label("Level", this.level), label("Width", this.window))));
    this.canvas.addEventListener("click", (event) => {
      const box = this.canvas.getBoundingClientRect(), scale = this.width / box.width;
      this.set([(event.clientX - box.left) * scale - 0.5, (event.clientY - box.top) * scale - 0.5]);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "blur"]) this.canvas.addEventListener(name, this.draw);
    new ResizeObserver(this.draw).observe(this.canvas);
    this.set(null);
    attempt(async () => {
      this.numbers = new Uint16Array(await (await ask(`/api/xrays/${index}`)).arrayBuffer());
      this.draw();
    });
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Enter") {
      this.set([...this.cross]);
      const left = views.find((view) => !view.centre);
      if (left) left.canvas.focus(); else if (!$("by-points").disabled) $("by-points").focus();
    } else if (moves[event.key]) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(this.width / 80));
      const most = [this.width - 1, this.height - 1];
      this.cross = this.cross.map((at, axis) => Math.min(most[axis], Math.max(0, at + step * moves[event.key][axis])));
      this.draw();
    } else return;
    event.preventDefault();
  }

  set(centre, typed = false) {
    this.centre = centre && centre.map((value) => Math.round(10 * value) / 10);
    if (this.centre) this.cross = [...this.centre];
    if (!typed) this.fields.forEach((field, which) => { field.value = this.centre ? this.centre[which] : ""; });
    this.place.textContent = this.centre ? `centre at ${this.centre[0]}, ${this.centre[1]}` : "no centre yet";
    this.draw();
    refresh();
  }

  paint() {
    const pen = context(this.canvas, this.width, this.height);
    if (!this.numbers) return;
    if (!this.grey) {
      const level = Number(this.level.value), half = Number(this.window.value) / 2;
      const ends = [level - half, level + half].map((value) => (value - this.low) * 65535 / Math.max(this.range, 1e-9));
      this.grey = picture(this.numbers, this.width, this.height, ...ends);
    }
    pen.drawImage(this.grey, 0, 0);
    if (this.outline) {
      pen.save();
      pen.translate(...this.outline.first);
      pen.scale(this.outline.scale, this.outline.scale);
      pen.lineWidth = 1.8 * pen.pixel / this.outline.scale;
      pen.strokeStyle = ESTIMATE;
      pen.stroke(new Path2D(this.outline.path));
      pen.restore();
    }
    const focused = document.activeElement === this.canvas;
    if (focused && String(this.cross) !== String(this.centre)) this.mark(pen, this.cross, CURSOR, 14);
    if (this.centre) this.mark(pen, this.centre, START, 18);
  }

  mark(pen, [u, v], colour, size) {
    const reach = size * pen.pixel, gap = 4 * pen.pixel;
    pen.beginPath();
    for (const [x, y] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      pen.moveTo(u + 0.5 + x * gap, v + 0.5 + y * gap);
      pen.lineTo(u + 0.5 + x * reach, v + 0.5 + y * reach);
    }
    pen.lineWidth = 5 * pen.pixel; pen.strokeStyle = "rgb(0 0 0 / 55%)"; pen.stroke();
    pen.lineWidth = 2.6 * pen.pixel; pen.strokeStyle = colour; pen.stroke();
  }
}

class Plane {
  constructor(name) {
    Object.assign(this, { name, index: 0, kept: new Map() });
    this.draw = onceAFrame(() => this.paint());
    this.canvas = make("canvas", { id: `slice-${name}`, role: "img" });
    this.place = make("span");
    const ariaLabel = `${name} slice, mm from the vertebra's centre`;
    this.slider = make("input", { type: "range", step: 1, id: `slider-${name}`, ariaLabel });
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    const turned = (event) => { event.preventDefault(); this.go(this.index + Math.sign(event.deltaY)); };
    this.canvas.addEventListener("wheel", turned, { passive: false });
    const title = make("figcaption", {}, name[0].toUpperCase() + name.slice(1), this.place);
    const below = make("div", { className: "under" }, make("label", {}, "Slice", this.slider));
    $("slices").append(make("figure", {}, title, this.canvas, below));
    new ResizeObserver(this.draw).observe(this.canvas);
  }

  take(result) {
    Object.assign(this, result.planes[this.name], { of: result.name });
    this.kept.clear();
    this.canvas.style.aspectRatio = "1";
    Object.assign(this.slider, { min: -this.reach, max: this.reach });
    this.canvas.ariaLabel = `${this.name} slice of the CT at the found pose of ${result.level}`;
    this.go(0);
  }

  async go(index) {
    this.index = Math.max(-this.reach, Math.min(this.reach, index));
    this.slider.value = this.index;
    this.place.textContent = this.index ? `${this.index > 0 ? "+" : "−"}${Math.abs(this.index)} mm` : "centre";
    const at = this.index, key = `${this.of}/${at}`;
    if (!this.kept.has(at)) {
      await attempt(async () => {
        const data = await (await ask(`/api/results/${this.of}/${this.name}/${at}`)).arrayBuffer();
        if (key === `${this.of}/${at}`) this.kept.set(at, new Int16Array(data));
      });
    }
    for (const plane of Object.values(planes)) plane.draw();
  }

  paint() {
    const numbers = this.kept.get(this.index);
    if (!numbers) return;
    const level = Number($("ct-level").value), half = Number($("ct-width").value) / 2;
    const pen = context(this.canvas, this.pixels, this.pixels);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture(numbers, this.pixels, this.pixels, level - half, level + half), 0, 0);
    // Columns and rows run against the world's axes.
    const [column, row] = CROSSED[this.name];
    const at = (plane) => this.pixels / 2 - planes[plane].index / this.pixel_mm;
    pen.beginPath();
    pen.moveTo(at(column), 0); pen.lineTo(at(column), this.pixels);
    pen.moveTo(0, at(row)); pen.lineTo(this.pixels, at(row));
    pen.lineWidth = pen.pixel; pen.strokeStyle = "rgb(31 168 255 / 55%)"; pen.stroke();
    pen.font = `${13 * pen.pixel}px system-ui, sans-serif`;
    pen.fillStyle = "#ffffff";
    pen.textBaseline = "middle"; pen.textAlign = "center";
    const far = 10 * pen.pixel, middle = this.pixels / 2;
    [[far, middle], [this.pixels - far, middle], [middle, far], [middle, this.pixels - far]].forEach(([x, y], edge) => {
      pen.strokeStyle = "#000000"; pen.lineWidth = 3 * pen.pixel;
      pen.strokeText(this.edges[edge], x, y); pen.fillText(this.edges[edge], x, y);
    });
  }
}
for (const name of PLANES) planes[name] = new Plane(name);

function showWindow() {
  $("ct-level-value").textContent = `${$("ct-level").value} HU`;
  $("ct-width-value").textContent = `${$("ct-width").value} HU`;
  for (const name of PLANES) planes[name].draw();
}
function takePreset() {
  if ($("ct-preset").value) [$("ct-level").value, $("ct-width").value] = $("ct-preset").value.split(",");
  showWindow();
}
$("ct-preset").addEventListener("change", takePreset);
for (const id of ["ct-level", "ct-width"]) {
  $(id).addEventListener("input", () => { $("ct-preset").value = ""; showWindow(); });
}
takePreset();

attempt(async () => { show(await asked("/api/state")); poll(); });
