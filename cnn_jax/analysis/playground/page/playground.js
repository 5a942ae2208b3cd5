// The playground: a trained network, computed and taken apart in the page. One module, no build step.
// A map is {h, w, c, d}: height, width, channels, and the values row by row, channels last.

const content = JSON.parse(document.getElementById("content").textContent);
const [H, W, C] = content.shape;
const MAPS = 8; // of a layer, shown at once
const MOST_UNITS = 1024; // of a dense layer, drawn
const SLICE = 12; // milliseconds of computation before the page may react
const GRID = 7; // the largest kernel that is written as numbers
const BARS = 8; // the largest parts of a sum, shown one by one
const LINES = 24; // from the largest parts of a sum to the value
const ZOOM = 8; // pixels of the screen's canvas for one of the larger picture

// ---- The arithmetic -------------------------------------------------------------------------------

const map = (h, w, c, d = new Float32Array(h * w * c)) => ({ h, w, c, d });

// The number of outputs along an axis, and the zeros before the first input.
function along(size, kernel, stride, padding, axis) {
  if (padding === "SAME") {
    const count = Math.ceil(size / stride);
    return [count, Math.max((count - 1) * stride + kernel - size, 0) >> 1];
  }
  const [before, after] = padding === "VALID" ? [0, 0] : padding[axis];
  return [Math.floor((size + before + after - kernel) / stride) + 1, before];
}

function geometry(step, x) {
  const [kh, kw] = step.kernel.shape;
  const [sh, sw] = step.strides;
  const [oh, top] = along(x.h, kh, sh, step.padding, 0);
  const [ow, left] = along(x.w, kw, sw, step.padding, 1);
  return { kh, kw, sh, sw, oh, ow, top, left };
}

// Abramowitz and Stegun 7.1.6: all terms have one sign, so that nothing cancels.
function erf(x) {
  let [sum, term] = [0, x];
  for (let n = 1; Math.abs(x) < 6 && Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    sum += term;
    term *= (2 * x * x) / (2 * n + 1);
  }
  return Math.abs(x) < 6 ? (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum : Math.sign(x);
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const ACTIVATIONS = {
  ReLU: (x) => Math.max(0, x),
  GELU: (x) => (x / 2) * (1 + erf(x / Math.SQRT2)),
  "GELU (tanh)": (x) => (x / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  SiLU: (x) => x * sigmoid(x),
  tanh: Math.tanh,
  sigmoid,
  ELU: (x) => (x > 0 ? x : Math.expm1(x)),
  "leaky ReLU": (x) => (x > 0 ? x : 0.01 * x),
};

// Scale and shift of a channel of BatchNorm.
function normOf(step, c) {
  const factor = (step.scale ? step.scale.d[c] : 1) / Math.sqrt(step.var.d[c] + step.epsilon);
  return [factor, (step.bias ? step.bias.d[c] : 0) - step.mean.d[c] * factor];
}

const range = (size) => [...Array(size).keys()];
const each = (x, f) => map(x.h, x.w, x.c, x.d.map(f));

// What each kind of step computes. A generator stops after each row, so that a long one can be cut.
const COMPUTE = {
  *conv(step, x) {
    const { kh, kw, sh, sw, oh, ow, top, left } = geometry(step, x);
    const [, , ci, co] = step.kernel.shape;
    const y = map(Math.max(oh, 0), Math.max(ow, 0), co);
    const weight = step.kernel.d;
    const sum = new Float64Array(co);
    for (let i = 0; i < oh; i++) {
      for (let j = 0; j < ow; j++) {
        if (step.bias) sum.set(step.bias.d);
        else sum.fill(0);
        for (let a = 0; a < kh; a++) {
          const row = i * sh + a - top;
          if (row < 0 || row >= x.h) continue;
          for (let b = 0; b < kw; b++) {
            const column = j * sw + b - left;
            if (column < 0 || column >= x.w) continue;
            const from = (row * x.w + column) * ci;
            let at = (a * kw + b) * ci * co;
            for (let c = 0; c < ci; c++, at += co) {
              const value = x.d[from + c];
              if (value === 0) continue; // half of them, behind a ReLU
              for (let k = 0; k < co; k++) sum[k] += value * weight[at + k];
            }
          }
        }
        y.d.set(sum, (i * ow + j) * co);
      }
      yield;
    }
    return y;
  },
  *pool(step, x) {
    const [kh, kw] = step.window;
    const y = map(Math.floor(x.h / kh), Math.floor(x.w / kw), x.c);
    y.d.fill(-Infinity);
    for (let i = 0; i < y.h * kh; i++) {
      for (let j = 0; j < y.w * kw; j++) {
        const to = (Math.floor(i / kh) * y.w + Math.floor(j / kw)) * x.c;
        const from = (i * x.w + j) * x.c;
        for (let c = 0; c < x.c; c++) y.d[to + c] = Math.max(y.d[to + c], x.d[from + c]);
      }
      yield;
    }
    return y;
  },
  *norm(step, x) {
    const terms = Array.from({ length: x.c }, (_, c) => normOf(step, c));
    return each(x, (value, i) => value * terms[i % x.c][0] + terms[i % x.c][1]);
  },
  *activation(step, x) {
    return each(x, ACTIVATIONS[step.function]);
  },
  *scale(step, x) {
    return each(x, (value) => value * step.factor);
  },
  *flatten(_, x) {
    return map(1, 1, x.d.length, x.d);
  },
  *mean(_, x) {
    const sum = new Float64Array(x.c);
    x.d.forEach((value, i) => {
      sum[i % x.c] += value;
    });
    return map(1, 1, x.c, new Float32Array(sum.map((value) => value / (x.h * x.w))));
  },
  *softmax(_, x) {
    return map(1, 1, x.c, Float32Array.from(softmax(x.d)));
  },
};

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}

// All maps of a network for an input, the input first.
function* forward(steps, x) {
  const maps = [x];
  for (const step of steps) maps.push(yield* COMPUTE[step.kind](step, maps.at(-1)));
  return maps;
}

// Runs a generator in slices; null if it is no longer wanted.
async function finish(work, wanted = () => true) {
  for (let until = performance.now() + SLICE; ; ) {
    const { done, value } = work.next();
    if (done) return value;
    if (performance.now() > until) {
      await new Promise((next) => setTimeout(next));
      if (!wanted()) return null;
      until = performance.now() + SLICE;
    }
  }
}

// ---- Images: values in [0, 1] of H x W x C ---------------------------------------------------------

const normalise = (run, x) =>
  each(x, (value, i) => {
    const c = i % C;
    return (value - run.mean[c % run.mean.length]) / run.std[c % run.std.length];
  });

// The image at places that `where` gives for each pixel, between four pixels; outside, the background.
function sample(x, where) {
  const at = (a, b, c) => (a >= 0 && a < x.h && b >= 0 && b < x.w ? x.d[(a * x.w + b) * C + c] : content.background[c]);
  const values = Array.from({ length: x.h * x.w }, (_, k) => {
    const [row, column] = where(Math.floor(k / x.w), k % x.w);
    const [r, q] = [Math.floor(row), Math.floor(column)];
    const across = (a, c) => (q + 1 - column) * at(a, q, c) + (column - q) * at(a, q + 1, c);
    return range(C).map((c) => (r + 1 - row) * across(r, c) + (row - r) * across(r + 1, c));
  });
  return map(x.h, x.w, C, Float32Array.from(values.flat()));
}

function changed(x, { dx, dy, turn, noise }) {
  const [sin, cos] = [Math.sin((turn * Math.PI) / 180), Math.cos((turn * Math.PI) / 180)];
  const [a, b] = [(x.h - 1) / 2, (x.w - 1) / 2];
  const where = (u, v) => (turn ? [a + cos * u - sin * v, b + sin * u + cos * v] : [a + u, b + v]);
  const y = dx || dy || turn ? sample(x, (i, j) => where(i - a - dy, j - b - dx)) : x;
  let seed = 1; // the same noise for every image, so that only the image changes
  const uniform = () => {
    seed = (seed * 48271) % 2147483647;
    return seed / 2147483647;
  };
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  return noise ? each(y, (value) => Math.min(1, Math.max(0, value + noise * normal()))) : y;
}

const VIEWS = { none: 1, mirror: 2, mirror_shift: 6 };

// The views of an image whose logits predict averages, and their weights.
function* views(kind, x) {
  const inside = (k, size) => (k < 0 ? -k : k >= size ? 2 * size - 2 - k : k);
  for (const by of kind === "mirror_shift" ? [0, -1, 1] : [0]) {
    for (const mirrored of kind === "none" ? [false] : [false, true]) {
      const where = (i, j) => [inside(i + by, x.h), inside((mirrored ? x.w - 1 - j : j) + by, x.w)];
      const weight = { none: 1, mirror: 0.5, mirror_shift: by ? 0.125 : 0.25 }[kind];
      yield [by || mirrored ? sample(x, where) : x, weight];
    }
  }
}

// The logits of an image as predict gives them, and the maps of the image itself.
function* predict(run, x) {
  let maps;
  const logits = new Float64Array(content.classes.length);
  for (const [view, weight] of views(run.views, x)) {
    const found = yield* forward(run.steps, normalise(run, view));
    maps ??= found;
    found.at(-2).d.forEach((value, i) => {
      logits[i] += weight * value;
    });
  }
  return { maps, logits, probabilities: softmax(logits) };
}

// ---- The runs, the state, the texts ----------------------------------------------------------------

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const runs = content.runs.map((run, place) => {
  const data = new Float32Array(bytes(document.getElementsByClassName("weights")[place].textContent).buffer);
  for (const array of run.steps.flatMap(Object.values)) {
    if (array?.shape) array.d = data.subarray(array.at, array.at + array.shape.reduce((a, b) => a * b, 1));
  }
  run.steps.push({ kind: "softmax" });
  const same = content.runs.filter((other) => other.name === run.name).length > 1;
  run.label = same ? run.workdir : run.name.split("/").at(-1);
  return run;
});

const pixels = bytes(content.pixels);
const fromBytes = (data) => each(map(H, W, C, Float32Array.from(data)), (value) => value / 255);
const testImage = (i) => fromBytes(pixels.subarray(i * H * W * C, (i + 1) * H * W * C));

const state = {
  exact: 0, // the test image on the pad, or null once it is drawn on
  image: null, // before the sliders
  shown: null, // after them
  run: 0,
  chosen: null, // {step, y, x, c}: a value of the shown run
  from: {}, // the first channel that a layer's column shows, by step
  input: null, // the input channel whose products are shown
  ticket: 0, // counts the inputs
};

const $ = (id) => document.getElementById(id);
const current = () => runs[state.run];
const best = (values) => values.indexOf(Math.max(...values));

let language = navigator.language.slice(0, 2) in content.texts ? navigator.language.slice(0, 2) : "en";
const number = (value, digits = 3) =>
  `${Math.abs(value) < 5e-7 ? 0 : +(+value).toPrecision(digits)}`.replace("e-", "e−").replace(/^-/, "−");
const bracket = (value) => (value < 0 ? `(${number(value)})` : number(value));
const percent = (value) => `${(100 * value).toFixed(value < 0.9995 && value >= 0.0005 ? 1 : 0)}%`;
const count = (value) => value.toLocaleString("en");

function t(key, values = {}) {
  return content.texts[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// A template whose values are escaped, unless they are such templates or lists of them.
const html = (parts, ...values) => ({ markup: parts.reduce((whole, part, i) => whole + write(values[i - 1]) + part) });

function write(value) {
  if (Array.isArray(value)) return value.map(write).join("");
  return value?.markup ?? String(value ?? "").replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

const waiting = []; // pictures whose canvases are not yet in the page

// A canvas of h x w pixels, whose colours [red, green, blue] `at` gives.
function picture(h, w, at, label) {
  waiting.push([h, w, at]);
  const role = label ? html`role="img" aria-label="${label}"` : html`aria-hidden="true"`;
  return html`<canvas data-picture="${waiting.length - 1}" ${role}></canvas>`;
}

function paint(canvas, h, w, at) {
  Object.assign(canvas, { width: w, height: h });
  const data = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) data.data.set([...at(i), 255], 4 * i);
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

// Replaces what an element holds. The page's policy allows no style attributes, so data-style has them.
function put(target, ...made) {
  const focused = document.activeElement?.id;
  target.innerHTML = write(made);
  for (const one of target.querySelectorAll("[data-style]")) one.style.cssText = one.dataset.style;
  for (const one of target.querySelectorAll("[data-picture]")) paint(one, ...waiting[one.dataset.picture]);
  waiting.length = 0;
  if (focused && document.activeElement?.id !== focused) $(focused)?.focus({ preventScroll: true });
}

function translate() {
  document.documentElement.lang = language;
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-label]")) {
    one.setAttribute("aria-label", t(one.dataset.label, { size: `${H}×${W}` }));
  }
  const about = (run) =>
    t("about", { model: run.model, parameters: count(run.parameters), step: count(run.step), name: run.label });
  $("about").textContent = runs.map(about).join(" · ");
  showTests();
}

// ---- Colours and pictures --------------------------------------------------------------------------

// The colour of a value in [-1, 1].
function colour(value) {
  const place = ((Math.max(-1, Math.min(1, value || 0)) + 1) / 2) * (content.colours.length - 1);
  const i = Math.min(Math.floor(place), content.colours.length - 2);
  const [low, high] = [content.colours[i], content.colours[i + 1]];
  return low.map((level, k) => Math.round(level + (place - i) * (high[k] - level)));
}
const css = (value) => `rgb(${colour(value).join(" ")})`;
const rgb = (x) => (i) => range(3).map((k) => Math.round(255 * x.d[i * x.c + (x.c === 3 ? k : 0)]));
const imageOf = (x, label) => picture(x.h, x.w, rgb(x), label);
const canvasOf = (x) => paint(document.createElement("canvas"), x.h, x.w, rgb(x));
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;

// A frame around an area [top, left, height, width] of a picture of [h, w].
function frame([top, left, height, width], [h, w], part = "") {
  const share = (value, whole) => `${(100 * value) / whole}%`;
  const place = `left:${share(left, w)};top:${share(top, h)};width:${share(width, w)};height:${share(height, h)}`;
  return html`<i class="mark" data-part="${part}" data-style="${place}"></i>`;
}

// ---- The drawing pad -------------------------------------------------------------------------------

const pad = $("pad");
pad.width = Math.round((280 * W) / Math.max(H, W));
pad.height = Math.round((280 * H) / Math.max(H, W));
const pen = pad.getContext("2d", { willReadFrequently: true });
const cursor = { x: pad.width / 2, y: pad.height / 2 };
const paper = range(3).map((k) => Math.round(255 * content.background[k % C]));
let photo = null;

function clearPad(centred) {
  pen.fillStyle = `rgb(${paper.join(" ")})`;
  pen.fillRect(0, 0, pad.width, pad.height);
  $("frame").checked = centred && content.extent !== null;
}

function drawn() {
  state.exact = null;
  showTests();
  update();
}

function stroke(x, y) {
  const { value } = $("shade");
  pen.strokeStyle = C === 3 ? $("colour").value : `rgb(${value} ${value} ${value})`;
  pen.lineWidth = +$("brush").value;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(cursor.x, cursor.y);
  pen.lineTo(x + 0.01, y);
  pen.stroke();
  Object.assign(cursor, { x, y });
  drawn();
}

// The part of the pad that differs from the background: left, top, width, height; null if none does.
function boundingBox() {
  const { data } = pen.getImageData(0, 0, pad.width, pad.height);
  let [top, left, bottom, right] = [pad.height, pad.width, -1, -1];
  for (let i = 0; i < data.length; i += 4) {
    if (paper.every((level, k) => Math.abs(data[i + k] - level) <= 32)) continue;
    const [y, x] = [Math.floor(i / 4 / pad.width), (i / 4) % pad.width];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    [left, right] = [Math.min(left, x), Math.max(right, x)];
  }
  return bottom < 0 ? null : [left, top, right - left + 1, bottom - top + 1];
}

// The pad as an image of the dataset: of its size, with a drawing centred and scaled as its things are.
function padImage() {
  const found = $("frame").checked ? boundingBox() : null;
  if (!found) return reduced(pad, H, W, [0, 0, W, H]);
  const scale = (content.extent * Math.max(H, W)) / Math.max(found[2], found[3]);
  const [w, h] = [found[2] * scale, found[3] * scale];
  return reduced(pad, H, W, found, [(W - w) / 2, (H - h) / 2, w, h]);
}

function reduced(source, h, w, ...areas) {
  const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
  const context = canvas.getContext("2d");
  context.fillStyle = `rgb(${paper.join(" ")})`;
  context.fillRect(0, 0, w, h);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, ...areas.flat());
  const { data } = context.getImageData(0, 0, w, h);
  const grey = (i) => Math.round(0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]);
  const at = (i) => (C === 1 ? grey(4 * i) : data[4 * Math.floor(i / 3) + (i % 3)]) / 255;
  return map(h, w, C, Float32Array.from(range(h * w * C).map(at)));
}

// Lays an image file on the pad. The browser decodes and reduces it outside of this thread.
async function openFile(file) {
  $("message").textContent = t("reading");
  const bitmap = await createImageBitmap(file, { resizeWidth: 512, resizeQuality: "medium" }).catch(() => null);
  const refusal = !bitmap ? t("not_image") : bitmap.height > 4096 ? t("too_long") : "";
  $("message").textContent = refusal;
  if (refusal) return;
  photo = bitmap;
  $("scene").querySelector("[value=photo]").disabled = false;
  clearPad(false);
  pen.fillStyle = "#fff"; // behind what is transparent, as in predict
  pen.fillRect(0, 0, pad.width, pad.height);
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, pad.width, pad.height);
  drawn();
}

// ---- From the input to all that is shown -----------------------------------------------------------

const SLIDERS = { dx: "", dy: "", turn: "°", noise: "%" };

function sliders() {
  const values = Object.fromEntries(Object.keys(SLIDERS).map((id) => [id, +$(id).value]));
  return { ...values, noise: values.noise / 100 };
}

let busy = false;

// Computes the newest input; one that comes meanwhile is next.
async function update() {
  state.ticket++;
  if (busy) return;
  busy = true;
  for (let ticket = -1; ticket !== state.ticket; ) {
    ticket = state.ticket;
    state.image = state.exact === null ? padImage() : testImage(state.exact);
    const image = changed(state.image, sliders());
    for (const run of runs) {
      const start = performance.now();
      Object.assign(run, await finish(predict(run, image)));
      run.milliseconds = performance.now() - start;
    }
    state.shown = image;
    show();
    await new Promise(requestAnimationFrame);
  }
  busy = false;
  later();
}

function show() {
  paint($("seen"), H, W, rgb(state.shown));
  for (const [id, unit] of Object.entries(SLIDERS)) $(id).nextElementSibling.textContent = $(id).value + unit;
  const { steps, probabilities } = current();
  state.chosen ??= { step: steps.length - 1, y: 0, x: 0, c: best(probabilities) };
  showBars();
  showRow();
  showDetail();
}

function showTests() {
  const thumb = ([, place, label], i) => {
    const name = t("test_label", { place, name: content.classes[label] });
    const about = html`id="test-${i}" title="${name}" aria-label="${name}" aria-pressed="${i === state.exact}"`;
    return html`<button type="button" data-do="test" data-at="${i}" ${about}>${imageOf(testImage(i))}</button>`;
  };
  const of = (kind) => content.images.map((one, i) => (one[0] === kind ? thumb(one, i) : ""));
  const group = (kind) => html`<h3>${t(kind)}</h3><div class="thumbs">${of(kind)}</div>`;
  put($("tests"), ["right", "wrong", "unsure"].map(group));
}

function showBars() {
  const [, place, label] = content.images[state.exact] ?? [];
  const truth = state.exact === null ? "" : html`<p>${t("truth", { place, name: content.classes[label] })}</p>`;
  const line = (run) => (value, i) =>
    html`<li class="${i === best(run.probabilities) ? "top" : ""}"><span>${content.classes[i]}</span>
      <span class="bar"><i data-style="width:${100 * value}%"></i></span><span class="right">${percent(value)}</span></li>`;
  const note = (run) => (run.views === "none" ? "" : t("views", { count: VIEWS[run.views] }));
  const block = (run) =>
    html`<div><h3>${run.label}</h3><ol>${run.probabilities.map(line(run))}</ol>
      <p class="muted">${t("milliseconds", { ms: number(run.milliseconds, 2) })} ${note(run)}</p></div>`;
  put($("bars"), truth, runs.map(block));
}

// ---- The row of maps -------------------------------------------------------------------------------

const isMap = (x) => x.h * x.w > 1;
const across = (x) => (x.c <= 12 ? 1 : x.c <= 160 ? 8 : 16);
const shownUnits = (x) => Math.min(x.c, MOST_UNITS);
// The picture of a map's channel, or of all units: height, width.
const extentOf = (x) => (isMap(x) ? [x.h, x.w] : [Math.ceil(shownUnits(x) / across(x)), across(x)]);

const unitArea = (x, unit) => [Math.floor(unit / across(x)), unit % across(x), 1, 1];

function titleOf(step) {
  return step ? (step.name?.split("/").at(-1) ?? step.function ?? t(step.kind)) : t("input");
}

function facts(step, x) {
  const lines = [isMap(x) ? `${x.h}×${x.w}×${x.c}` : x.c, step?.title?.split(" ").slice(1).join(" ")];
  if (step?.parameters) lines.push(t("parameters", { count: count(step.parameters) }));
  if (step?.field) lines.push(t("window", { height: step.field[0], width: step.field[1] }));
  return lines.filter(Boolean).map((line) => html`<span>${line}</span>`);
}

function showRow() {
  const run = current();
  const button = ({ label }, i) =>
    html`<button type="button" id="run-${i}" data-do="run" data-at="${i}" aria-pressed="${i === state.run}">${label}</button>`;
  put($("switch"), runs.length > 1 ? runs.map(button) : "");
  const made = explain(run, state.chosen);
  const strongest = [...made.parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, LINES);
  // The frames in a column: of the chosen value, and of the inputs that its lines come from.
  const { step: at, y, x: left, c } = state.chosen;
  const parts = strongest.map((part, k) => ({ ...part, name: k, i: made.source }));
  parts.push({ i: at + 1, channel: c, area: [y, left, 1, 1], name: "to" });
  const framed = (x, i, channel) =>
    parts
      .filter((part) => part.i === i && (i > 0 && isMap(x) ? part.channel === channel : part.channel < MOST_UNITS))
      .map((part) => frame(isMap(x) ? part.area : unitArea(x, part.channel), extentOf(x), part.name));
  const columns = run.maps.map((x, i) => {
    const step = run.steps[i - 1];
    const start = state.from[i] ?? 0;
    const channels = isMap(x) ? range(x.c).slice(start, start + MAPS) : [0];
    const input = html`<div class="cell">${imageOf(state.shown)}${framed(x, 0)}</div>`;
    const cells = i ? channels.map((channel) => cell(x, i, channel, framed(x, i, channel))) : input;
    return html`<div class="column"><h3>${titleOf(step)}</h3><p>${facts(step, x)}</p>${cells}${below(x, i, start)}</div>`;
  });
  put($("row"), html`<div class="columns"><svg aria-hidden="true"></svg>${columns}</div>`);
  drawLines(strongest);
}

function cell(x, i, channel, marks) {
  const layer = titleOf(current().steps[i - 1]);
  const name = isMap(x) ? t("map_label", { layer, channel }) : t("units_label", { layer, count: x.c });
  const most = largest(x.d);
  const at = isMap(x)
    ? (k) => colour(x.d[k * x.c + channel] / most)
    : (k) => (k < shownUnits(x) ? colour(x.d[k] / most) : [128, 128, 128]);
  const own = html`id="cell-${i}-${channel}" data-at="${i}" data-channel="${channel}" aria-label="${name}"`;
  const kind = isMap(x) ? "cell" : `cell across${across(x)}`;
  return html`<button type="button" class="${kind}" data-do="cell" ${own}>${picture(...extentOf(x), at)}${marks}</button>`;
}

function below(x, i, start) {
  if (i === current().steps.length) return html`<ol>${content.classes.map((name) => html`<li>${name}</li>`)}</ol>`;
  if (!isMap(x) && x.c > MOST_UNITS) return html`<span>${t("first_units", { count: count(MOST_UNITS) })}</span>`;
  if (i === 0 || !isMap(x) || x.c <= MAPS) return "";
  const layer = titleOf(current().steps[i - 1]);
  const page = (to, key, sign) => {
    const about = html`id="${key}-${i}" data-at="${i}" data-from="${to}" aria-label="${layer}: ${t(key)}"`;
    return html`<button type="button" data-do="page" ${about} ${to < 0 || to >= x.c ? "disabled" : ""}>${sign}</button>`;
  };
  const text = t("channels", { from: start, to: Math.min(start + MAPS, x.c) - 1, count: x.c });
  return html`<div class="pager">${page(start - MAPS, "previous", "‹")}<span>${text}</span>${page(start + MAPS, "next", "›")}</div>`;
}

// Lines from the inputs of the chosen value to it, as thick as their contributions.
function drawLines(parts) {
  const svg = $("row").querySelector("svg");
  const origin = svg.getBoundingClientRect();
  const area = (name) => $("row").querySelector(`[data-part="${name}"]`)?.getBoundingClientRect();
  const to = area("to");
  const most = largest(parts.map(({ value }) => value));
  const line = ({ value }, k) => {
    const from = area(k);
    if (!from || !to) return "";
    const [x, y] = [from.right - origin.left, from.top + from.height / 2 - origin.top];
    const [u, v] = [to.left - origin.left, to.top + to.height / 2 - origin.top];
    const path = `M${x} ${y} C${(x + u) / 2} ${y} ${(x + u) / 2} ${v} ${u} ${v}`;
    const width = 0.5 + (3.5 * Math.abs(value)) / most;
    return html`<path class="${value < 0 ? "minus" : "plus"}" d="${path}" data-style="stroke-width:${width}px"></path>`;
  };
  put(svg, parts.map(line));
}

// The value of a map at the place of a click; of a key, the largest one.
function placeIn(button, event) {
  const [i, channel] = [+button.dataset.at, +button.dataset.channel];
  const x = current().maps[i];
  const area = button.firstChild.getBoundingClientRect();
  const at = (place, size, cells) => Math.max(0, Math.min(cells - 1, Math.floor((place * cells) / size)));
  const [rows, columns] = extentOf(x);
  let place =
    at(event.clientY - area.top, area.height, rows) * columns + at(event.clientX - area.left, area.width, columns);
  if (event.detail === 0) {
    const values = [...x.d].filter((_, k) => !isMap(x) || k % x.c === channel).map(Math.abs);
    place = Math.max(0, best(values));
  }
  if (isMap(x)) return { step: i - 1, y: Math.floor(place / columns), x: place % columns, c: channel };
  return { step: i - 1, y: 0, x: 0, c: Math.min(shownUnits(x) - 1, place) };
}

function choose(found) {
  state.chosen = found;
  state.input = null;
  showRow();
  showDetail();
}

function moveBy([down, right]) {
  const { step, y, x, c } = state.chosen;
  const of = current().maps[step + 1];
  const wrap = (value, size) => (value + size) % size;
  if (isMap(of)) choose({ step, y: wrap(y + down, of.h), x: wrap(x + right, of.w), c });
  else choose({ step, y: 0, x: 0, c: wrap(c + down * across(of) + right, of.c) });
}

// ---- One value and all its sums --------------------------------------------------------------------

// What a value is made of: the column of its inputs; the part and the area of each channel of them.
function explain(run, { step: at, y, x, c }) {
  const step = run.steps[at];
  const [given, of] = [run.maps[at], run.maps[at + 1]];
  const value = of.d[(y * of.w + x) * of.c + c];
  const made = { step, source: at, given, value };
  const one = (area, channel = c) => ({ ...made, parts: [{ channel, area, value }], area });
  if (step.kind === "conv") return { ...made, ...explainConv(run, at, y, x, c) };
  const share = (value, channel) => ({ channel, value, area: [0, 0, 1, 1] });
  if (step.kind === "softmax") return { ...made, parts: [...softmax(given.d)].map(share) };
  const [kh, kw] = step.window ?? [];
  if (step.kind === "pool") return one([y * kh, x * kw, kh, kw]);
  if (step.kind === "mean") return one([0, 0, given.h, given.w]);
  const place = Math.floor(c / given.c);
  if (step.kind === "flatten") return one([Math.floor(place / given.w), place % given.w, 1, 1], c % given.c);
  return { ...one([y, x, 1, 1]), input: given.d[(y * given.w + x) * given.c + c] };
}

// A dense layer behind a flattened map is a convolution whose kernel is as large as the map.
function explainConv(run, at, y, x, c) {
  const step = run.steps[at];
  const flat = run.steps[at - 1]?.kind === "flatten";
  const given = run.maps[at - flat];
  const whole = { kh: given.h, kw: given.w, sh: 1, sw: 1, top: 0, left: 0 };
  const { kh, kw, sh, sw, top, left } = flat ? whole : geometry(step, given);
  const [row, column] = [y * sh - top, x * sw - left];
  const weight = (a, b, k) => step.kernel.d[((a * kw + b) * given.c + k) * step.kernel.shape[3] + c];
  const input = (a, b, k) => {
    const [i, j] = [row + a, column + b];
    return i < 0 || j < 0 || i >= given.h || j >= given.w ? null : given.d[(i * given.w + j) * given.c + k];
  };
  const places = range(kh * kw).map((k) => [Math.floor(k / kw), k % kw]);
  const part = (k) => places.reduce((sum, [a, b]) => sum + input(a, b, k) * weight(a, b, k), 0);
  const parts = range(given.c).map((k) => ({ channel: k, value: part(k), area: [row, column, kh, kw] }));
  return { source: at - flat, given, parts, places, weight, input, kh, kw, bias: step.bias?.d[c] ?? 0 };
}

function showDetail() {
  const run = current();
  const { step: at, y, x, c } = state.chosen;
  const made = explain(run, state.chosen);
  const of = run.maps[at + 1];
  const isClass = !run.steps.slice(at + 1).some(({ kind }) => !["scale", "mean", "softmax"].includes(kind));
  const key = isMap(of) ? "statement" : isClass ? "statement_class" : "statement_unit";
  const values = { layer: titleOf(made.step), channel: c, row: y, column: x, name: content.classes[c] };
  $("statement").textContent = t(key, { ...values, value: number(made.value, 5) });
  $("slide").disabled = !isMap(of);
  const field = run.steps.slice(0, at + 1).findLast((step) => step.field)?.field;
  const area = field && [field[4] + y * field[2], field[5] + x * field[3], field[0], field[1]];
  put(
    $("detail"),
    html`<figure><div class="window">${imageOf(state.shown, t("sees"))}${field ? frame(area, [H, W]) : ""}</div>
      <figcaption>${t("sees")}</figcaption></figure>
      <div class="sums">${DETAIL[made.step.kind](made, c)}</div>`,
  );
}

// A small matrix as numbers, a larger one as a picture.
function grid(title, h, w, at, most) {
  const cells = range(h * w).map((k) => at(Math.floor(k / w), k % w));
  const limit = most ?? largest(cells);
  const figure = (inside) => html`<figure>${inside}<figcaption>${title}</figcaption></figure>`;
  if (Math.max(h, w) > GRID) return figure(picture(h, w, (k) => colour(cells[k] / limit), title));
  const one = (value) => {
    if (value === null) return html`<td class="padding">0</td>`;
    const ink = Math.abs(value / limit) > 0.75 ? "#fff" : "#1c2126";
    return html`<td data-style="background:${css(value / limit)};color:${ink}">${number(value, 2)}</td>`;
  };
  const rows = range(h).map((i) => html`<tr>${cells.slice(i * w, i * w + w).map(one)}</tr>`);
  return figure(html`<table aria-label="${title}"><tbody>${rows}</tbody></table>`);
}

const sentence = (key, values) => html`<p>${t(key, values)}</p>`;
const muted = (key, values) => html`<p class="muted">${t(key, values)}</p>`;
const formula = (line) => html`<p class="formula">${line}</p>`;

// The sum over the input channels as bars; each channel can be chosen.
function bars(order, bias, total, channel) {
  const shown = order.slice(0, BARS);
  const others = total - bias - shown.reduce((sum, { value }) => sum + value, 0);
  const most = largest([...shown.map(({ value }) => value), bias, others]);
  const line = (name, value, kind = "") => {
    const share = (50 * Math.abs(value)) / most;
    const style = `width:${share}%;left:${value < 0 ? 50 - share : 50}%;background:${css(value < 0 ? -0.7 : 0.7)}`;
    return html`<li class="${kind}">${name}<span class="bar"><i data-style="${style}"></i></span>
      <span class="right">${number(value)}</span></li>`;
  };
  const pick = ({ channel: k, value }) =>
    line(
      html`<button type="button" id="input-${k}" data-do="input" data-at="${k}" aria-pressed="${k === channel}">${k}</button>`,
      value,
    );
  const rest = order.length - shown.length;
  return html`<figure><figcaption>${t("by_channel")}</figcaption><ol class="parts">${shown.map(pick)}
    ${rest ? line(html`<span>${t("others", { count: count(rest) })}</span>`, others) : ""}
    ${line(html`<span>${t("bias")}</span>`, bias)}${line(html`<span>${t("total")}</span>`, total, "total")}</ol></figure>
    ${muted("choose_channel")}`;
}

const DETAIL = {
  conv({ step, given, parts, places, weight, input, kh, kw, bias, value }) {
    const order = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const channel = state.input ?? order[0].channel;
    const many = places.length > GRID * GRID;
    const terms = places.map(([a, b]) => [input(a, b, channel) ?? 0, weight(a, b, channel)]);
    if (many) terms.sort((a, b) => Math.abs(b[0] * b[1]) - Math.abs(a[0] * a[1]));
    const written = terms.slice(0, many ? BARS : terms.length).map(([v, w]) => `${number(v)}*${bracket(w)}`);
    const rest = many ? " + …" : "";
    const firsts = order.slice(0, 3).map((part) => bracket(part.value));
    if (order.length > 3) firsts.push("…");
    return html`${sentence(step.title?.startsWith("Dense") ? "dense_text" : "conv_text")}
      <div class="grids">
        ${grid(t("patch", { channel }), kh, kw, (a, b) => input(a, b, channel), largest(given.d))}<span class="sign">×</span>
        ${grid(t("kernel"), kh, kw, (a, b) => weight(a, b, channel))}<span class="sign">=</span>
        ${grid(t("products"), kh, kw, (a, b) => input(a, b, channel) * weight(a, b, channel))}
      </div>
      ${places.some(([a, b]) => input(a, b, channel) === null) ? muted("padding") : ""}
      ${formula(`${t("sum_of", { channel })}: ${written.join(" + ")}${rest} = ${number(parts[channel].value, 4)}`)}
      ${parts.length > 1 ? bars(order, bias, value, channel) : ""}
      ${formula(`${t("total")}: ${firsts.join(" + ")} + ${bracket(bias)} = ${number(value, 5)}`)}`;
  },
  pool({ area: [y, x, kh, kw], given, value }, channel) {
    const at = (a, b) => given.d[((y + a) * given.w + x + b) * given.c + channel];
    const all = range(kh * kw).map((k) => number(at(Math.floor(k / kw), k % kw)));
    return html`${sentence("pool_text")}
      <div class="grids">${grid(t("patch", { channel }), kh, kw, at, largest(given.d))}</div>
      ${formula(`max(${all.join(", ")}) = ${number(value)}`)}`;
  },
  norm({ step, input, value }, c) {
    const [mean, scale, shift] = [step.mean.d[c], step.scale?.d[c] ?? 1, step.bias?.d[c] ?? 0];
    const deviation = Math.sqrt(step.var.d[c] + step.epsilon);
    const line = `(${number(input)} − ${bracket(mean)}) / ${number(deviation)} × ${number(scale)} + ${bracket(shift)}`;
    return html`${sentence("norm_text")}${formula(`${line} = ${number(value)}`)}`;
  },
  activation({ step: { function: name }, input, value }) {
    const given = number(input);
    const forms = { ReLU: `max(0, ${given})`, GELU: `${given} × P(Z < ${given})` };
    const line = `${forms[name] ?? `${name}(${given})`} = ${number(value)}`;
    return html`${sentence("activation_text", { name })}${formula(line)}`;
  },
  scale: ({ step, input, value }) =>
    html`${sentence("scale_text")}${formula(`${number(input)} × ${number(step.factor)} = ${number(value)}`)}`,
  flatten({ area: [row, column], parts: [{ channel }], given: { w: width, c: channels } }, index) {
    const line = `(${row} × ${width} + ${column}) × ${channels} + ${channel} = ${index}`;
    return html`${sentence("flatten_text", { row, column, channel, width, channels, index })}${formula(line)}`;
  },
  mean: ({ given, value }, channel) =>
    html`${sentence("mean_text", { count: count(given.h * given.w), channel })}${formula(`= ${number(value)}`)}`,
  softmax({ given, value }, c) {
    const most = Math.max(...given.d);
    const powers = [...given.d].map((logit) => Math.exp(logit - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    const line = (power, k) =>
      html`<tr class="${k === c ? "top" : ""}"><th scope="row">${content.classes[k]}</th>
        ${[number(given.d[k]), number(power), percent(power / sum)].map((text) => html`<td>${text}</td>`)}</tr>`;
    const head = [t("class"), t("logit"), t("power"), t("softmax")].map((text) => html`<th scope="col">${text}</th>`);
    return html`${sentence("softmax_text")}
      <table class="plain"><thead><tr>${head}</tr></thead><tbody>${powers.map(line)}</tbody></table>
      ${formula(`exp(${number(given.d[c])} − ${bracket(most)}) / ${number(sum)} = ${number(value)}`)}`;
  },
};

let sliding = 0;

function slide() {
  clearInterval(sliding);
  const next = () => {
    const of = current().maps[state.chosen.step + 1];
    if (isMap(of)) moveBy([state.chosen.x === of.w - 1 ? 1 : 0, 1]);
    else slide();
  };
  sliding = sliding ? 0 : setInterval(next, 400);
  $("slide").setAttribute("aria-pressed", sliding > 0);
}

// ---- Questions: shifts, covers, a larger picture ---------------------------------------------------

// What takes longer, once the reader pauses.
async function later() {
  const { ticket } = state;
  const wanted = () => ticket === state.ticket;
  await new Promise((next) => setTimeout(next, 150));
  if (!wanted()) return;
  put($("covered"));
  if (!larger.scores) await showLarger();
  await showShifts(wanted);
  if (wanted()) await trust(wanted);
}

async function showShifts(wanted) {
  const target = state.exact === null ? best(runs[0].probabilities) : content.images[state.exact][2];
  const reach = Math.round(W / 3);
  const places = range(2 * reach + 1).map((i) => i - reach);
  const curves = [];
  for (const run of runs) {
    curves.push([]);
    for (const dx of places) {
      const found = await finish(predict(run, changed(state.image, { ...sliders(), dx })), wanted);
      if (!found) return;
      curves.at(-1).push(found.probabilities[target]);
      const done = curves.at(-1).length;
      if (run.milliseconds > 50) put($("shifts"), muted("progress", { run: run.label, done, count: places.length }));
    }
  }
  const x = (place) => 44 + ((place + reach) / (2 * reach)) * 540;
  const y = (value) => 170 - 150 * value;
  const name = content.classes[target];
  const said = (curve, k) =>
    `${runs[k].label}: ${curve.map((value, i) => `${places[i]}: ${percent(value)}`).join(", ")}`;
  const label = t("shifts_label", { name, curves: curves.map(said).join(". ") });
  const rule = (value) =>
    html`<path d="M44 ${y(value)}H584"></path><text x="38" y="${y(value) + 4}" text-anchor="end">${percent(value)}</text>`;
  const tick = (place) => html`<text x="${x(place)}" y="188" text-anchor="middle">${number(place)}</text>`;
  const curve = (values, k) =>
    html`<path class="curve${k}" d="M${values.map((v, i) => `${x(places[i])} ${y(v)}`).join("L")}"></path>`;
  const here = x(Math.max(-reach, Math.min(reach, sliders().dx)));
  put(
    $("shifts"),
    html`<figcaption>${t("shifts_class", { name })} ${runs.map((run, k) => html`<span class="curve${k}">${run.label}</span>`)}</figcaption>
      <svg viewBox="0 0 600 212" role="img" aria-label="${label}">${[0, 0.5, 1].map(rule)}
      ${places.filter((place) => place % 3 === 0).map(tick)}<text x="314" y="207" text-anchor="middle">${t("shifts_axis")}</text>
      <path class="here" d="M${here} 20V170"></path>${curves.map(curve)}</svg>`,
  );
}

// The fall of a class's probability where a square covers the image, as the mean over the squares.
async function occlusion(run, image, target, wanted = () => true, progress = () => {}) {
  const side = Math.max(2, Math.round(Math.max(H, W) / 7));
  const steps = (size) => range(Math.floor((size - side) / (side >> 1)) + 1).map((i) => i * (side >> 1));
  const corners = steps(H).flatMap((y) => steps(W).map((x) => [y, x]));
  const [fall, times] = [new Float64Array(H * W), new Float64Array(H * W)];
  const probability = async (x) => (await finish(predict(run, x), wanted))?.probabilities[target];
  const before = await probability(image);
  let least = 1;
  for (const [k, [y, x]] of corners.entries()) {
    const covered = map(H, W, C, image.d.slice());
    const places = range(side * side).map((i) => (y + Math.floor(i / side)) * W + x + (i % side));
    for (const place of places) covered.d.set(content.background, place * C);
    const after = await probability(covered);
    if (after === undefined) return null;
    least = Math.min(least, after);
    for (const place of places) {
      fall[place] += before - after;
      times[place]++;
    }
    progress(k + 1, corners.length);
  }
  return { before, least, side, fall: fall.map((value, i) => value / Math.max(1, times[i])) };
}

async function showCovered() {
  const { ticket } = state;
  const wanted = () => ticket === state.ticket;
  const results = [];
  for (const run of runs) {
    const target = best(run.probabilities);
    const progress = (done, all) => {
      $("message_cover").textContent = t("progress", { run: run.label, done, count: all });
    };
    const found = await occlusion(run, state.shown, target, wanted, progress);
    $("message_cover").textContent = "";
    if (!found) return;
    results.push([run, target, found]);
  }
  const figure = ([run, target, { before, least, side, fall }]) => {
    const values = { name: content.classes[target], before: percent(before), after: percent(least), patch: side };
    const said = t("cover_result", { run: run.label, ...values });
    const heat = picture(H, W, (i) => colour(fall[i] / largest(fall)), said);
    return html`<figure><div class="pair">${imageOf(state.shown)}${heat}</div><figcaption>${said}</figcaption></figure>`;
  };
  put($("covered"), results.map(figure));
}

// The steps of a network whose dense layers are convolutions; null if it has no such form.
function convolutional({ steps, maps }) {
  const made = [];
  for (const [i, step] of steps.slice(0, -1).entries()) {
    const behind = steps[i - 1]?.kind === "flatten";
    if ((step.kind === "mean" && i < steps.length - 2) || (behind && step.kind !== "conv")) return null;
    if (step.kind === "mean" || step.kind === "flatten") continue;
    const { h, w, c } = maps[i - behind];
    made.push(behind ? { ...step, kernel: { ...step.kernel, shape: [h, w, c, step.kernel.shape[3]] } } : step);
  }
  return made;
}

const larger = { y: 0, x: 0, h: 2 * H, w: 2 * W, cell: null, scores: null, ticket: 0 };

// What the window moves over: test images on a canvas, or the reader's own picture.
function scene() {
  if ($("scene").value === "photo") {
    const scale = Math.max((4 * W) / photo.width, (3 * H) / photo.height);
    const [h, w] = [photo.height, photo.width].map((size) => Math.round(size * scale));
    return reduced(photo, h, w, [0, 0, w, h]);
  }
  const whole = map(3 * H, 5 * W, C);
  for (const i of range(whole.h * whole.w)) whole.d.set(content.background, i * C);
  content.images.slice(0, 8).forEach((_, k) => {
    const top = Math.round((0.15 + 1.45 * (k % 2) + 0.1 * (k % 3)) * H);
    const left = Math.round((0.05 + 1.25 * (k >> 1)) * W);
    lay(whole, testImage(k), top, left);
  });
  return whole;
}

// Copies an image onto a map where it is inside; negative places cut a part out.
function lay(onto, image, top, left) {
  for (const i of range(image.h)) {
    if (top + i < 0 || top + i >= onto.h) continue;
    const [from, to] = [Math.max(0, -left), Math.min(image.w, onto.w - left)];
    const row = image.d.subarray((i * image.w + from) * C, (i * image.w + to) * C);
    onto.d.set(row, ((top + i) * onto.w + left + from) * C);
  }
}

async function showLarger() {
  const run = current();
  const steps = convolutional(run);
  if (!steps) return put($("found"), sentence("larger_none"));
  const whole = scene();
  larger.y = Math.max(0, Math.min(whole.h - larger.h, larger.y));
  larger.x = Math.max(0, Math.min(whole.w - larger.w, larger.x));
  const part = map(larger.h, larger.w, C);
  lay(part, whole, -larger.y, -larger.x);
  const ticket = ++larger.ticket;
  const maps = await finish(forward(steps, normalise(run, part)), () => ticket === larger.ticket);
  if (!maps) return;
  Object.assign(larger, { part, scores: maps.at(-1), field: run.steps.findLast((step) => step.field).field });
  paintLarger();
}

// The middle of the window that a score sees: row, column.
function middle(k) {
  const [height, width, down, right, top, left] = larger.field;
  const [i, j] = [Math.floor(k / larger.scores.w), k % larger.scores.w];
  return [top + height / 2 + i * down, left + width / 2 + j * right];
}

// The picture, and over the middle of each window its class, in a colour as strong as the probability.
function paintLarger() {
  const { part, scores, field } = larger;
  const canvas = $("larger");
  Object.assign(canvas, { width: part.w * ZOOM, height: part.h * ZOOM });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvasOf(part), 0, 0, canvas.width, canvas.height);
  const seen = range(scores.h * scores.w).map((k) => softmax(scores.d.subarray(k * scores.c, (k + 1) * scores.c)));
  const tops = seen.map((row) => Math.max(...row));
  if (!(larger.cell < seen.length)) larger.cell = null;
  larger.cell ??= best(tops);
  Object.assign(context, { textAlign: "center", textBaseline: "middle", font: "600 20px system-ui, sans-serif" });
  seen.forEach((row, k) => {
    const [y, x] = middle(k).map((value) => value * ZOOM);
    const side = Math.min(field[2], field[3], 8) * ZOOM - 4;
    context.globalAlpha = 0.15 + 0.85 * tops[k] ** 2;
    context.fillStyle = content.class_colours[best(row) % content.class_colours.length];
    context.fillRect(x - side / 2, y - side / 2, side, side);
    context.fillStyle = "#111";
    context.fillText(best(row), x, y);
  });
  const [y, x] = middle(larger.cell);
  Object.assign(context, { globalAlpha: 1, lineWidth: 5, strokeStyle: "#e8590c" });
  context.strokeRect((x - W / 2) * ZOOM, (y - H / 2) * ZOOM, W * ZOOM, H * ZOOM);
  const name = content.classes[best(seen[larger.cell])];
  const values = { height: scores.h, width: scores.w, name, probability: percent(tops[larger.cell]) };
  const item = (k) =>
    html`<li><i data-style="background:${content.class_colours[k % content.class_colours.length]}">${k}</i>${content.classes[k]}</li>`;
  put(
    $("found"),
    sentence("larger_found", values),
    html`<ul>${[...new Set(seen.map(best))].sort((a, b) => a - b).map(item)}</ul>`,
  );
}

// ---- The start -------------------------------------------------------------------------------------

// The largest difference of a logit from predict's, by the largest logit of the run.
async function trust(wanted) {
  const differences = [];
  for (const run of state.differences ? [] : runs) {
    let difference = 0;
    for (const [i, logits] of run.logits_of_predict.entries()) {
      const found = await finish(predict(run, testImage(i)), wanted);
      if (!found) return;
      difference = Math.max(difference, ...logits.map((value, k) => Math.abs(value - found.logits[k])));
    }
    differences.push(difference / largest(run.logits_of_predict.flat()));
  }
  state.differences ??= differences;
  const difference = Math.max(...state.differences).toExponential(1);
  const others = runs.filter(({ dtype }) => dtype !== "float32").map(({ dtype }) => t("trust_dtype", { dtype }));
  $("trust").textContent = [t("trust", { count: content.images.length, difference }), ...others].join(" ");
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

// What a click on an element with data-do does.
const CLICKS = {
  test({ dataset }) {
    state.exact = +dataset.at;
    clearPad(false);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(canvasOf(testImage(state.exact)), 0, 0, pad.width, pad.height);
    showTests();
    update();
  },
  run({ dataset }) {
    Object.assign(state, { run: +dataset.at, chosen: null, from: {}, input: null });
    Object.assign(larger, { scores: null, cell: null });
    show();
    later();
  },
  cell: (button, event) => choose(placeIn(button, event)),
  page({ dataset }) {
    state.from[dataset.at] = +dataset.from;
    showRow();
  },
  input({ dataset }) {
    state.input = +dataset.at;
    showDetail();
  },
  move: ({ dataset }) => moveBy(dataset.by.split(",").map(Number)),
  slide,
  cover: showCovered,
  open: () => $("file").click(),
  clear() {
    clearPad(true);
    drawn();
  },
  invert() {
    Object.assign(pen, { globalCompositeOperation: "difference", fillStyle: "#fff" });
    pen.fillRect(0, 0, pad.width, pad.height);
    pen.globalCompositeOperation = "source-over";
    drawn();
  },
  reset() {
    for (const id of Object.keys(SLIDERS)) $(id).value = 0;
    update();
  },
};

// What a key does in an element; `move` is that of an arrow.
function pressed(target, { key, shiftKey }, move) {
  if (target.dataset.do === "cell" && move) {
    if (state.chosen.step !== target.dataset.at - 1) choose(placeIn(target, { detail: 0 }));
    else moveBy(move);
  } else if (target.id === "larger" && move) {
    Object.assign(larger, { y: larger.y + 2 * move[0], x: larger.x + 2 * move[1] });
    showLarger();
  } else if (target.id === "pad" && (move || key === " ")) {
    const [y, x] = [cursor.y + 10 * (move?.[0] ?? 0), cursor.x + 10 * (move?.[1] ?? 0)];
    if (key === " " || shiftKey) stroke(x, y);
    else Object.assign(cursor, { x, y });
  } else return false;
  return true;
}

// Calls `begin`, `drag` and `end` with places on a canvas, in its pixels.
function listenToPointer(canvas, begin, drag, end) {
  const place = (event) => {
    const area = canvas.getBoundingClientRect();
    const scale = canvas.width / area.width;
    return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    begin(...place(event));
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && drag(...place(event)));
  canvas.addEventListener("pointerup", (event) => end(...place(event)));
}

function listen() {
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-do]");
    if (target) CLICKS[target.dataset.do](target, event);
  });
  document.addEventListener("keydown", (event) => {
    if (pressed(event.target, event, ARROWS[event.key])) event.preventDefault();
  });
  const beginStroke = (x, y) => {
    Object.assign(cursor, { x, y });
    stroke(x, y);
  };
  listenToPointer(pad, beginStroke, stroke, () => {});
  listenToLarger();
  for (const id of Object.keys(SLIDERS)) $(id).addEventListener("input", update);
  $("frame").addEventListener("change", drawn);
  $("file").addEventListener("change", () => $("file").files[0] && openFile($("file").files[0]));
  $("scene").addEventListener("change", showLarger);
  $("language").addEventListener("change", () => {
    language = $("language").value;
    translate();
    show();
    if (larger.scores) paintLarger();
    later();
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  for (const name of ["drop", "paste"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      openFile((event.dataTransfer ?? event.clipboardData).files[0]);
    });
  }
  addEventListener("resize", () => current().maps && showRow());
}

function listenToLarger() {
  let start = null;
  const begin = (x, y) => {
    start = { x, y, left: larger.x, top: larger.y, moved: false };
  };
  const drag = (x, y) => {
    const [right, down] = [x - start.x, y - start.y].map((value) => Math.round(value / ZOOM));
    start.moved ||= Math.abs(right) + Math.abs(down) > 1;
    Object.assign(larger, { x: start.left - right, y: start.top - down });
    if (start.moved) showLarger();
  };
  const end = (x, y) => {
    if (start.moved || !larger.scores) return;
    const far = (k) => Math.hypot(middle(k)[0] - y / ZOOM, middle(k)[1] - x / ZOOM);
    larger.cell = range(larger.scores.h * larger.scores.w).reduce((a, b) => (far(b) < far(a) ? b : a));
    paintLarger();
  };
  listenToPointer($("larger"), begin, drag, end);
}

function start() {
  const option = ([name, { _name }]) => html`<option value="${name}">${_name}</option>`;
  put($("language"), Object.entries(content.texts).map(option));
  $("language").value = language;
  const bounds = (size) => ({ min: -Math.round(size / 2), max: Math.round(size / 2), value: 0 });
  Object.assign($("dx"), bounds(W));
  Object.assign($("dy"), bounds(H));
  $("shade").value = content.background[0] > 0.5 ? 0 : 255;
  $(C === 3 ? "shade_label" : "colour_label").hidden = true;
  $("frame_label").hidden = content.extent === null;
  translate();
  listen();
  $("test-0").click();
}

// For the tests, and for readers who open the console.
globalThis.playground = {
  state,
  runs,
  background: content.background,
  images: content.images.map(([, place]) => place),
  predict: (run, data) => finish(predict(runs[run], fromBytes(bytes(data)))),
  occlusion: (run, i, target) => occlusion(runs[run], testImage(i), target),
};

start();
