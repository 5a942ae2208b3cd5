// The playground: a trained network, computed and taken apart in the page. One module, no build step.
// A map is {h, w, c, d}: height, width, channels, and the values row by row, channels last. Flattened, it
// keeps its form and is marked `flat`, so that a dense layer is a convolution as large as the map.

const $ = (id) => document.getElementById(id);
const content = JSON.parse($("content").textContent);
const [H, W, C] = content.shape;
const MAPS = 8; // of a layer, shown at once
const MOST_UNITS = 1024; // of a dense layer, drawn
const SLICE = 12; // milliseconds of computation before the page may react
const GRID = 7; // the largest kernel that is written as numbers
const BARS = 8; // the largest parts of a sum, shown one by one
const LINES = 24; // from the largest parts of a sum to the value
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const SLIDERS = { dx: "", dy: "", turn: "°", noise: "%" };

const range = (size) => [...Array(size).keys()];
const cells = (h, w) => range(h * w).map((k) => [Math.floor(k / w), k % w]);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const best = (values) => values.indexOf(Math.max(...values));
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;

// ---- The arithmetic -------------------------------------------------------------------------------

const map = (h, w, c, d = new Float32Array(h * w * c)) => ({ h, w, c, d });
const each = (x, f) => ({ ...x, d: x.d.map(f) });

// How a kernel moves over a map: by axis its size, stride, number of outputs, and zeros before the first input.
function geometry({ kernel, strides, padding }, x) {
  const axis = (i, size) => {
    const [width, stride] = [kernel.shape[i], strides[i]];
    const same = Math.max((Math.ceil(size / stride) - 1) * stride + width - size, 0);
    const [before, after] = padding === "SAME" ? [same >> 1, same - (same >> 1)] : padding[i];
    return [width, stride, Math.max(0, Math.floor((size + before + after - width) / stride) + 1), before];
  };
  return [...axis(0, x.h), ...axis(1, x.w)];
}

// Abramowitz and Stegun 7.1.26, which is wrong by 1.5e-7 at most.
function erf(x) {
  const u = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = u * (0.254829592 + u * (-0.284496736 + u * (1.421413741 + u * (-1.453152027 + u * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
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

// Adds `count` rows of a matrix, from places p, times values v: eight at once, for one reading and writing of a sum.
function addRows(sum, matrix, v, p, count) {
  for (let n = 0; n < count; n += 8) {
    const [a, b, c, d, e, f, g, h] = [v[n], v[n + 1], v[n + 2], v[n + 3], v[n + 4], v[n + 5], v[n + 6], v[n + 7]];
    const [i, j, k, l, q, r, s, t] = [p[n], p[n + 1], p[n + 2], p[n + 3], p[n + 4], p[n + 5], p[n + 6], p[n + 7]];
    for (let x = 0; x < sum.length; x++) {
      const first = a * matrix[i + x] + b * matrix[j + x] + c * matrix[k + x] + d * matrix[l + x];
      sum[x] += first + e * matrix[q + x] + f * matrix[r + x] + g * matrix[s + x] + h * matrix[t + x];
    }
  }
}

// What each kind of step computes. A convolution stops after each row, so that a long one can be cut.
const COMPUTE = {
  *conv(step, x) {
    const [kh, sh, oh, top, kw, sw, ow, left] = geometry(step, x);
    const co = step.kernel.shape[3];
    const y = map(oh, ow, co);
    const sum = new Float64Array(co);
    const bias = step.bias?.d ?? sum.slice();
    const values = new Float64Array(kh * kw * x.c + 8); // what the kernel lies on, without zeros: half, behind a ReLU
    const places = new Int32Array(values.length); // of their weights
    for (let i = 0; i < oh; i++) {
      const [above, below] = [Math.max(0, top - i * sh), Math.min(kh, x.h + top - i * sh)];
      for (let j = 0; j < ow; j++) {
        const [first, last] = [Math.max(0, left - j * sw), Math.min(kw, x.w + left - j * sw)];
        let count = 0;
        for (let a = above; a < below; a++) {
          const from = ((i * sh + a - top) * x.w + j * sw - left) * x.c;
          for (let k = first * x.c; k < last * x.c; k++) {
            if (x.d[from + k] === 0) continue;
            values[count] = x.d[from + k];
            places[count++] = (a * kw * x.c + k) * co;
          }
        }
        sum.set(bias);
        addRows(sum, step.kernel.d, values.fill(0, count, count + 8), places, count);
        y.d.set(sum, (i * ow + j) * co);
      }
      yield;
    }
    return y;
  },
  pool(step, x) {
    const [kh, kw] = step.window;
    const y = map(Math.floor(x.h / kh), Math.floor(x.w / kw), x.c);
    y.d.fill(-Infinity);
    for (const [i, j] of cells(y.h * kh, y.w * kw)) {
      const to = (Math.floor(i / kh) * y.w + Math.floor(j / kw)) * x.c;
      for (let c = 0; c < x.c; c++) y.d[to + c] = Math.max(y.d[to + c], x.d[(i * x.w + j) * x.c + c]);
    }
    return y;
  },
  norm(step, x) {
    const { mean, scale, bias } = step;
    const size = mean.d.length;
    const factor = mean.d.map((_, c) => (scale?.d[c] ?? 1) / Math.sqrt(step.var.d[c] + step.epsilon));
    const shift = mean.d.map((value, c) => (bias?.d[c] ?? 0) - value * factor[c]);
    return each(x, (value, i) => value * factor[i % size] + shift[i % size]);
  },
  mean(_, x) {
    const sum = new Float64Array(x.c);
    for (let i = 0; i < x.d.length; i++) sum[i % x.c] += x.d[i] / (x.h * x.w);
    return map(1, 1, x.c, Float32Array.from(sum));
  },
  activation: (step, x) => each(x, ACTIVATIONS[step.name]),
  scale: (step, x) => each(x, (value) => value * step.factor),
  flatten: (_, x) => ({ ...x, flat: true }),
  softmax: (_, x) => map(1, 1, x.c, Float32Array.from(softmax(x.d))),
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
  for (const step of steps) {
    const made = COMPUTE[step.kind](step, maps.at(-1));
    maps.push(made.next ? yield* made : made);
  }
  return maps;
}

// The logits of an image as predict gives them, the mean of its views, and the maps of the first view.
function* predict(run, x) {
  let maps = null;
  const logits = new Float64Array(content.classes.length);
  for (const [weight, places] of run.views) {
    const view = each(x, (_, i) => x.d[places[Math.floor(i / C)] * C + (i % C)]);
    const found = yield* forward(run.steps, view);
    maps ??= found;
    for (const [k, value] of found.at(-2).d.entries()) logits[k] += weight * value;
  }
  return { maps, logits, probabilities: softmax(logits) };
}

// Runs a generator in slices. There is no answer if the ticket changes, because its result is not wanted then.
async function finish(work, of = {}) {
  const { ticket } = of;
  for (let until = performance.now() + SLICE; ; ) {
    const { done, value } = work.next();
    if (done) return value;
    if (performance.now() > until) {
      await new Promise((next) => setTimeout(next));
      if (ticket !== of.ticket) await new Promise(() => {});
      until = performance.now() + SLICE;
    }
  }
}

// The probability of a class in variants of an image: of `make` of each place.
async function probabilities(run, places, make, target, message) {
  const [found, start] = [[], performance.now()];
  for (const place of places) {
    found.push((await finish(predict(run, make(place)), state)).probabilities[target]);
    const done = { run: run.label, done: found.length, count: places.length };
    const slow = performance.now() - start > 500 && done.done < done.count;
    $(message).textContent = slow ? t("progress", done) : "";
  }
  return found;
}

// ---- Images: values in [0, 1] of H x W x C ---------------------------------------------------------

// The same noise for every image, so that only the image changes.
const NOISE = range(H * W * C).map(
  () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
);

function changed(x, { dx, dy, turn, noise }) {
  const moved = rendered(H, W, (context) => {
    context.translate(W / 2 + dx, H / 2 + dy);
    context.rotate((turn * Math.PI) / 180);
    context.drawImage(canvasOf(x), -W / 2, -H / 2);
  });
  return noise ? each(moved, (value, i) => clamp(value + (noise / 100) * NOISE[i], 0, 1)) : moved;
}

// ---- The runs, the state, texts and pictures -------------------------------------------------------

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

const runs = content.runs;
for (const [place, run] of runs.entries()) {
  const data = new Float32Array(bytes(document.getElementsByClassName("weights")[place].textContent).buffer);
  for (const array of run.steps.flatMap(Object.values).filter((value) => value?.shape))
    array.d = data.subarray(array.at, array.at + array.shape.reduce((a, b) => a * b, 1));
  run.steps.push({ kind: "softmax" });
}

const pixels = bytes(content.pixels);
const fromBytes = (data) => each(map(H, W, C, Float32Array.from(data)), (value) => value / 255);
const testImage = (i) => fromBytes(pixels.subarray(i * H * W * C, (i + 1) * H * W * C));

const state = {
  exact: 0, // the test image on the pad, or null once it is drawn on
  image: null, // before the sliders
  shown: null, // after them
  run: 0,
  chosen: null, // {step, channel, place}: a value of the shown run
  from: 0, // the first channel that is shown of each map
  input: null, // the input channel whose products are shown
  ticket: 0, // counts the inputs
  difference: 0, // of a logit from predict's, by the largest
  busy: false, // an input is computed
  sliding: 0, // the timer that moves the chosen value
};
const current = () => runs[state.run];

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

const waiting = []; // pictures whose canvases are not yet in the page: made where `put` is called

// A canvas of h x w pixels, whose colours [red, green, blue, 255] `at` gives.
function picture(h, w, at, label) {
  waiting.push([h, w, at]);
  const role = label ? html`role="img" aria-label="${label}"` : html`aria-hidden="true"`;
  return html`<canvas data-picture="${waiting.length - 1}" ${role}></canvas>`;
}

function paint(canvas, h, w, at) {
  Object.assign(canvas, { width: w, height: h });
  const data = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) data.data.set(at(i), 4 * i);
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

// Writes the texts of elements that have the key of one, with the values that it takes.
function translate() {
  document.documentElement.lang = language;
  for (const one of document.querySelectorAll("[data-t], [data-label]")) {
    const { t: key, label, values = "{}" } = one.dataset;
    if (key) one.textContent = t(key, JSON.parse(values));
    if (label) one.setAttribute("aria-label", t(label, JSON.parse(values)));
  }
}

// The colour of a value in [-1, 1].
const colour = (value) =>
  content.colours[Math.round(((clamp(value || 0, -1, 1) + 1) / 2) * (content.colours.length - 1))];
const rgb = (x) => (i) => [0, 1, 2].map((k) => Math.round(255 * x.d[i * C + (C === 3 ? k : 0)])).concat(255);
const imageOf = (x, label) => picture(x.h, x.w, rgb(x), label);
const canvasOf = (x) => paint(document.createElement("canvas"), x.h, x.w, rgb(x));

// Where an area [top, left, height, width] lies in a picture of h x w.
function placed([top, left, height, width], { h, w }) {
  const share = (value, whole) => `${(100 * value) / whole}%`;
  return `left:${share(left, w)};top:${share(top, h)};width:${share(width, w)};height:${share(height, h)}`;
}

const frame = (area, whole, part = "") =>
  html`<i class="mark" data-part="${part}" data-style="${placed(area, whole)}"></i>`;

// ---- The drawing pad -------------------------------------------------------------------------------

const pad = $("pad");
const pen = pad.getContext("2d", { willReadFrequently: true });
const cursor = { x: pad.width / 2, y: pad.height / 2 };
let photo = null;
const paper = range(3).map((k) => Math.round(255 * content.background[k % C]));
function fill(context, levels = paper) {
  context.fillStyle = `rgb(${levels.join(" ")})`;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

// Lays a test image or a picture on the whole pad, or nothing.
function lay(source, exact = null) {
  const own = source && exact === null;
  fill(pen, own ? [255, 255, 255] : paper); // white behind what is transparent, as in predict
  Object.assign(pen, { imageSmoothingEnabled: own, imageSmoothingQuality: "high" });
  if (source) pen.drawImage(source, 0, 0, pad.width, pad.height);
  $("frame").checked = !source && content.extent !== null;
  drawn(exact);
}

const drawn = (exact = null) => update(Object.assign(state, { exact }));

// Draws from where the pen is, or a dot where it is put down.
function stroke(x, y, down = false) {
  if (down) Object.assign(cursor, { x, y });
  const shade = $("shade").value;
  pen.strokeStyle = C === 3 ? shade : `rgb(${shade} ${shade} ${shade})`;
  Object.assign(pen, { lineWidth: +$("brush").value, lineCap: "round", lineJoin: "round" });
  pen.stroke(new Path2D(`M${cursor.x} ${cursor.y}L${x + 0.01} ${y}`));
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
  if (!found) return rendered(H, W, (context) => context.drawImage(pad, 0, 0, W, H));
  const scale = (content.extent * Math.max(H, W)) / Math.max(found[2], found[3]);
  const [w, h] = [found[2] * scale, found[3] * scale];
  return rendered(H, W, (context) => context.drawImage(pad, ...found, (W - w) / 2, (H - h) / 2, w, h));
}

// What `draw` draws on the background's colour, as an image of h x w.
function rendered(h, w, draw) {
  const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  fill(context);
  draw(context);
  const { data } = context.getImageData(0, 0, w, h);
  const grey = (i) => Math.round(0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]);
  const at = (i) => (C === 1 ? grey(4 * i) : data[4 * Math.floor(i / 3) + (i % 3)]) / 255;
  return map(h, w, C, Float32Array.from(range(h * w * C), at));
}

// Lays an image file on the pad. The browser decodes and reduces it outside of this thread.
async function openFile(file) {
  $("message").textContent = t("reading");
  const reduced = (resizeWidth, resizeQuality) =>
    createImageBitmap(file, { resizeWidth, resizeQuality }).catch(() => null);
  const probe = await reduced(16, "low"); // because a long and narrow one, 512 wide, has too many pixels
  const refusal = !probe ? t("not_image") : probe.height > 128 ? t("too_long") : "";
  if (!refusal) [photo, larger.scores] = [await reduced(512, "medium"), null];
  $("message").textContent = refusal;
  if (!refusal) lay(photo);
}

// ---- From the input to all that is shown -----------------------------------------------------------

const sliders = () => Object.fromEntries(Object.keys(SLIDERS).map((id) => [id, +$(id).value]));
// Computes the newest input; one that comes meanwhile is next.
async function update() {
  state.ticket++;
  if (state.busy) return;
  state.busy = true;
  for (let ticket = -1; ticket !== state.ticket; ) {
    ticket = state.ticket;
    state.image = state.exact === null ? padImage() : testImage(state.exact);
    const image = changed(state.image, sliders());
    for (const run of runs) Object.assign(run, await finish(predict(run, image)));
    state.shown = image;
    show();
    await new Promise(requestAnimationFrame);
  }
  state.busy = false;
  later();
}

function show() {
  paint($("seen"), H, W, rgb(state.shown));
  for (const [id, unit] of Object.entries(SLIDERS)) $(id).nextElementSibling.textContent = $(id).value + unit;
  for (const one of $("tests").querySelectorAll("button")) one.ariaPressed = +one.dataset.at === state.exact;
  const [, place, label] = content.images[state.exact] ?? [];
  $("truth").textContent = place === undefined ? "" : t("truth", { place, name: content.classes[label] });
  const line = (value, i, all) =>
    html`<li class="${i === best(all) ? "top" : ""}"><span>${content.classes[i]}</span>
      <span class="bar"><i data-style="width:${100 * value}%"></i></span><span class="right">${percent(value)}</span></li>`;
  for (const [i, run] of runs.entries()) put($(`bars-${i}`), run.probabilities.map(line));
  set();
}

// ---- The row of maps -------------------------------------------------------------------------------

const isMap = (x) => !x.flat && x.h * x.w > 1;

// How a channel of a map lies in its picture of h x w, or all units of a dense layer in theirs: number k of
// `size` is d[k * stride + channel].
function layout(x) {
  if (isMap(x)) return { h: x.h, w: x.w, size: x.h * x.w, stride: x.c };
  const size = Math.min(x.d.length, MOST_UNITS);
  const w = size <= 12 ? 1 : size <= 160 ? 8 : 16;
  return { h: Math.ceil(size / w), w, size, stride: 1 };
}

const areaOf = (place, { w }) => [Math.floor(place / w), place % w, 1, 1];
const strongest = (parts) => [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
const titleOf = (step) => step.name ?? t(step.kind);

// Shows the chosen value in the row of maps, and below it taken apart.
function set(values = {}) {
  Object.assign(state, values);
  const { steps, maps } = current();
  const first = steps.findIndex(({ kind }) => kind === "conv");
  state.chosen ??= { step: first, channel: 0, place: strongestPlace(maps[first + 1], 0) };
  const made = explain(current(), state.chosen);
  showRow(made);
  showDetail(made);
}

function showRow({ parts, source }) {
  const { maps } = current();
  const { step, channel, place } = state.chosen;
  const lines = strongest(parts).slice(0, LINES);
  const marks = lines.map((part, name) => ({ ...part, i: source, name }));
  marks.push({ i: step + 1, channel, area: areaOf(place, layout(maps[step + 1])), name: "to" });
  for (const [i, x] of maps.entries()) {
    const shown = layout(x);
    const framed = (at) =>
      marks
        .filter((mark) => mark.i === i && (i === 0 || mark.channel === at) && mark.area[0] < shown.h)
        .map(({ area, name }) => frame(area, shown, name));
    const [all, limit] = isMap(x) ? [x.c, MAPS] : [x.d.length, MOST_UNITS];
    const from = isMap(x) ? clamp(state.from, 0, Math.max(0, all - limit)) : 0;
    const most = largest(x.d);
    const channels = isMap(x) ? range(all).slice(from, from + limit) : [0];
    const input = html`<div class="cell">${imageOf(state.shown)}${framed(0)}</div>`;
    put(
      $(`maps-${state.run}-${i}`),
      i ? channels.map((at) => cell(x, i, at, most, framed(at))) : input,
      all > limit ? html`<span>${t("channels", { from, to: from + limit - 1, count: count(all) })}</span>` : "",
    );
  }
  drawLines(lines);
}

// The button of a map's channel, or of all units.
function cell(x, i, channel, most, marks) {
  const { h, w, size, stride } = layout(x);
  const layer = titleOf(current().steps[i - 1]);
  const name = isMap(x) ? t("map_label", { layer, channel }) : t("units_label", { layer, count: x.d.length });
  const at = (k) => (k < size ? colour(x.d[k * stride + channel] / most) : [128, 128, 128, 255]);
  const own = html`id="cell-${i}-${channel}" data-at="${i}" data-channel="${channel}" aria-label="${name}"`;
  const kind = isMap(x) ? "cell" : `cell across${w}`;
  return html`<button type="button" class="${kind}" data-do="cell" ${own}>${picture(h, w, at)}${marks}</button>`;
}

// Lines from the inputs of the chosen value to it, as thick as their contributions.
function drawLines(parts) {
  const row = $(`row-${state.run}`);
  const svg = row.querySelector("svg");
  const origin = svg.getBoundingClientRect();
  const area = (name) => row.querySelector(`[data-part="${name}"]`)?.getBoundingClientRect();
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

function strongestPlace(x, channel) {
  const { size, stride } = layout(x);
  return best(range(size).map((k) => Math.abs(x.d[k * stride + channel])));
}

// The value of a map at the place of a click; of a key, the strongest one.
function placeIn(button, event) {
  const [i, channel] = [+button.dataset.at, +button.dataset.channel];
  const x = current().maps[i];
  const { h, w, size } = layout(x);
  const area = button.firstChild.getBoundingClientRect();
  const at = (distance, whole, count) => clamp(Math.floor((distance * count) / whole), 0, count - 1);
  const place = at(event.clientY - area.top, area.height, h) * w + at(event.clientX - area.left, area.width, w);
  return { step: i - 1, channel, place: event.detail ? Math.min(place, size - 1) : strongestPlace(x, channel) };
}

function moveBy([down, right]) {
  const { w, size } = layout(current().maps[state.chosen.step + 1]);
  set({ chosen: { ...state.chosen, place: (state.chosen.place + down * w + right + size) % size }, input: null });
}

function slide() {
  clearInterval(state.sliding);
  state.sliding = state.sliding ? 0 : setInterval(moveBy, 400, [0, 1]);
  $("slide").ariaPressed = state.sliding > 0;
}

// ---- One value and all its sums --------------------------------------------------------------------

// What a value is made of: the column of its inputs, the parts of it that come from there, and the text.
function explain({ steps, maps }, { step: at, channel, place }) {
  const [step, given, of] = [steps[at], maps[at], maps[at + 1]];
  const source = step.kind === "conv" && given.flat ? at - 1 : at; // the map before it was flattened
  const index = place * layout(of).stride + channel;
  const [spot, c] = [Math.floor(index / of.c), index % of.c];
  const [y, x] = areaOf(spot, of);
  const made = { at, step, given, of, index, y, x, c, value: of.d[index], input: given.d[index] };
  // An area of a channel of the inputs; or the unit, if they are no map.
  made.part = (value, k = c, area = [y, x, 1, 1], unit = index) =>
    isMap(maps[source]) ? { value, channel: k, area } : { value, channel: 0, area: areaOf(unit, layout(maps[source])) };
  return { ...made, source, parts: [made.part(made.value)], key: `${step.kind}_text`, ...EXPLAIN[step.kind](made) };
}

const EXPLAIN = {
  conv({ step, given, of, y, x, c, value, part }) {
    const [kh, sh, , top, kw, sw, , left] = geometry(step, given);
    const [row, column] = [y * sh - top, x * sw - left];
    const terms = (k) =>
      cells(kh, kw).map(([a, b], at) => {
        const [i, j] = [row + a, column + b];
        const inside = i >= 0 && j >= 0 && i < given.h && j < given.w;
        const input = inside ? given.d[(i * given.w + j) * given.c + k] : null;
        const weight = step.kernel.d[(at * given.c + k) * step.kernel.shape[3] + c];
        return { input, weight, value: input * weight, text: `${number(input)}*${bracket(weight)}` };
      });
    const sum = (k) => terms(k).reduce((all, term) => all + term.value, 0);
    const parts = range(given.c).map((k) => part(sum(k), k, [row, column, kh, kw], k));
    const sums = parts.map((one, k) => ({ k, value: one.value, text: bracket(one.value) }));
    const bias = step.bias?.d[c] ?? 0;
    const channel = state.input ?? strongest(sums)[0].k;
    const shown = terms(channel);
    const numbers = (key) => shown.map((term) => term[key]);
    const matrix = (title, key, limit) => grid(title, kw, numbers(key), limit);
    const figure = () => html`
      <div class="grids">
        ${matrix(t("patch", { channel }), "input", largest(given.d))}<span class="sign">×</span>
        ${matrix(t("kernel"), "weight")}<span class="sign">=</span>${matrix(t("products"), "value")}
      </div>
      ${shown.some(({ input }) => input === null) ? html`<p class="muted">${t("padding")}</p>` : ""}
      <p class="formula">${t("sum_of", { channel })}: ${written(shown, GRID * GRID, BARS)} = ${number(sums[channel].value, 4)}</p>
      ${sums.length > 1 ? bars(sums, bias, value, channel) : ""}`;
    const line = `${t("total")}: ${written(sums, 3, 3)} + ${bracket(bias)} = ${number(value, 5)}`;
    return { parts, figure, line, key: isMap(of) ? "conv_text" : "dense_text" };
  },
  pool({ step, given, y, x, c, value, part }) {
    const [kh, kw] = step.window;
    const window = cells(kh, kw).map(([a, b]) => given.d[((y * kh + a) * given.w + x * kw + b) * given.c + c]);
    const figure = () =>
      html`<div class="grids">${grid(t("patch", { channel: c }), kw, window, largest(given.d))}</div>`;
    const line = `max(${window.map((one) => number(one)).join(", ")}) = ${number(value)}`;
    return { parts: [part(value, c, [y * kh, x * kw, kh, kw])], figure, line };
  },
  norm({ step, input, index, value }) {
    const c = index % step.mean.d.length;
    const [mean, scale, shift] = [step.mean.d[c], step.scale?.d[c] ?? 1, step.bias?.d[c] ?? 0];
    const divided = `(${number(input)} − ${bracket(mean)}) / ${number(Math.sqrt(step.var.d[c] + step.epsilon))}`;
    return { line: `${divided} × ${number(scale)} + ${bracket(shift)} = ${number(value)}` };
  },
  activation({ step: { name }, input, value }) {
    const given = number(input);
    const applied = name === "ReLU" ? `max(0, ${given})` : `${name}(${given})`;
    return { values: { name }, line: `${applied} = ${number(value)}` };
  },
  scale: ({ step, input, value }) => ({ line: `${number(input)} × ${number(step.factor)} = ${number(value)}` }),
  flatten({ of: { w: width, c: channels }, y: row, x: column, c: channel, index }) {
    const line = `(${row} × ${width} + ${column}) × ${channels} + ${channel} = ${index}`;
    return { values: { row, column, channel, width, channels, index }, line };
  },
  mean: ({ given: { h, w }, c: channel, value, part }) => ({
    parts: [part(value, channel, [0, 0, h, w])],
    values: { count: count(h * w), channel },
    line: `= ${number(value)}`,
  }),
  softmax({ given, c, value, part }) {
    const [most, shares] = [Math.max(...given.d), softmax(given.d)];
    const row = (share, k) => {
      const texts = [number(given.d[k]), number(Math.exp(given.d[k] - most)), percent(share)];
      return html`<tr class="${k === c ? "top" : ""}"><th scope="row">${content.classes[k]}</th>
        ${texts.map((text) => html`<td>${text}</td>`)}</tr>`;
    };
    const head = ["class", "logit", "power", "softmax"].map((key) => html`<th scope="col">${t(key)}</th>`);
    const figure = () =>
      html`<table class="plain"><thead><tr>${head}</tr></thead><tbody>${shares.map(row)}</tbody></table>`;
    const line = `exp(${number(given.d[c])} − ${bracket(most)}) / ${number(1 / Math.max(...shares))} = ${number(value)}`;
    return { parts: shares.map((share, k) => part(share, k, [], k)), figure, line };
  },
};

function showDetail({ at, step, of, key, values, figure, line, index, y, x, c, value }) {
  const { steps } = current();
  const isClass = steps.slice(at + 1).every(({ kind }) => ["scale", "mean", "softmax"].includes(kind));
  const about = { layer: titleOf(step), row: y, column: x, name: content.classes[c], value: number(value, 5) };
  const kind = isMap(of) ? "statement" : isClass ? "statement_class" : "statement_unit";
  $("statement").textContent = t(kind, { ...about, channel: isMap(of) ? c : index });
  const field = steps.slice(0, at + 1).findLast((one) => one.field)?.field ?? [1, 1, 1, 1, 0, 0];
  const area = [field[4] + y * field[2], field[5] + x * field[3], field[0], field[1]];
  paint($("window"), H, W, rgb(state.shown));
  put($("mark"), frame(area, { h: H, w: W }));
  showSeen(field, of);
  put($("made"), html`<p>${t(key, values)}</p>${figure?.()}<p class="formula">${line}</p>`);
}

// How many values of a map see each pixel: where padding is "valid", fewer see the border than the middle.
function showSeen([high, wide, down, right, top, left], of) {
  const times = (whole, first, size, step, most) =>
    range(whole).map((k) => range(most).filter((i) => k >= first + i * step && k < first + i * step + size).length);
  const [rows, columns] = [times(H, top, high, down, of.h), times(W, left, wide, right, of.w)];
  const seen = cells(H, W).map(([i, j]) => rows[i] * columns[j]);
  const values = { corner: count(seen[0]), middle: count(largest(seen)), count: count(of.h * of.w) };
  paint($("times"), H, W, (k) => colour(seen[k] / largest(seen)));
  $("times_text").textContent = t("times", values);
  $("seen_by").hidden = !isMap(of);
}

// A sum as text: all terms, or, of more than `most`, the largest.
function written(terms, most, shown) {
  const kept = terms.length <= most ? terms : [...strongest(terms).slice(0, shown), { text: "…" }];
  return kept.map(({ text }) => text).join(" + ");
}

// A small matrix of w columns as numbers, a larger one as a picture.
function grid(title, w, values, limit = largest(values)) {
  const h = values.length / w;
  const figure = (inside) => html`<figure>${inside}<figcaption>${title}</figcaption></figure>`;
  if (Math.max(h, w) > GRID) return figure(picture(h, w, (k) => colour(values[k] / limit), title));
  const one = (value) => {
    if (value === null) return html`<td class="padding">0</td>`;
    const [r, g, b] = colour(value / limit);
    const ink = 0.2126 * r * r + 0.7152 * g * g + 0.0722 * b * b < 13350 ? "#fff" : "#000"; // by the luminance
    return html`<td data-style="background:rgb(${r} ${g} ${b});color:${ink}">${number(value, 2)}</td>`;
  };
  const rows = range(h).map((i) => html`<tr>${values.slice(i * w, i * w + w).map(one)}</tr>`);
  return figure(html`<table aria-label="${title}"><tbody>${rows}</tbody></table>`);
}

// A sum over the input channels as bars; each channel can be chosen.
function bars(sums, bias, total, channel) {
  const shown = strongest(sums).slice(0, BARS);
  const rest = sums.length - shown.length;
  const others = shown.reduce((left, { value }) => left - value, total - bias);
  const most = largest([...shown.map(({ value }) => value), bias, others]);
  const line = (name, value, kind = "") => {
    const share = (50 * Math.abs(value)) / most;
    const style = `width:${share}%;left:${value < 0 ? 50 - share : 50}%`;
    return html`<li class="${kind}"><span>${name}</span><span class="bar"><i class="${value < 0 ? "below" : "above"}" data-style="${style}"></i></span>
      <span class="right">${number(value)}</span></li>`;
  };
  const pick = (k) =>
    html`<button type="button" id="input-${k}" data-do="input" data-at="${k}" aria-pressed="${k === channel}">${k}</button>`;
  return html`<figure><figcaption>${t("by_channel")}</figcaption><ol class="parts">
    ${shown.map(({ k, value }) => line(pick(k), value))}${rest ? line(t("others", { count: count(rest) }), others) : ""}
    ${line(t("bias"), bias)}${line(t("total"), total, "total")}</ol></figure><p class="muted">${t("choose_channel")}</p>`;
}

// ---- Questions: shifts, covers, a larger picture ---------------------------------------------------

// What takes longer, once the reader pauses.
async function later() {
  const { ticket } = state;
  await new Promise((next) => setTimeout(next, 150));
  if (ticket !== state.ticket) return;
  put($("covered"));
  if (!larger.scores) await showLarger();
  await showShifts();
  await trust();
}

async function showShifts() {
  const target = state.exact === null ? best(runs[0].probabilities) : content.images[state.exact][2];
  const reach = Math.round(W / 3);
  const places = range(2 * reach + 1).map((i) => i - reach);
  const shifted = (dx) => changed(state.image, { ...sliders(), dx });
  const said = [];
  for (const [k, run] of runs.entries()) {
    const curve = await probabilities(run, places, shifted, target, "message_shifts");
    $(`curve-${k}`).setAttribute("d", `M${curve.map((value, i) => `${places[i]} ${value}`).join("L")}`);
    said.push(`${run.label}: ${curve.map((value, i) => `${places[i]}: ${percent(value)}`).join(", ")}`);
  }
  const name = content.classes[target];
  $("here").setAttribute("d", `M${clamp(sliders().dx, -reach, reach)} 0V1`);
  $("shifts_class").textContent = t("shifts_class", { name });
  $("shifts").setAttribute("aria-label", t("shifts_label", { name, curves: said.join(". ") }));
}

// The fall of a class's probability where a square covers the image, as the mean over the squares.
async function occlusion(run, image, target, message = "message_cover") {
  const side = Math.max(2, Math.round(Math.max(H, W) / 7));
  const steps = (size) => range(Math.floor((size - side) / (side >> 1)) + 1).map((i) => i * (side >> 1));
  const square = (top, left) => cells(side, side).map(([a, b]) => (top + a) * W + left + b);
  const squares = steps(H).flatMap((top) => steps(W).map((left) => square(top, left)));
  const covered = (places) => {
    const x = each(image, (value) => value);
    for (const place of places) x.d.set(content.background, place * C);
    return x;
  };
  const [before, ...after] = await probabilities(run, [[], ...squares], covered, target, message);
  const fall = range(H * W).map((pixel) => {
    const over = after.filter((_, k) => squares[k].includes(pixel));
    return over.reduce((sum, value) => sum + before - value, 0) / Math.max(1, over.length);
  });
  return { before, least: Math.min(...after), side, fall };
}

async function showCovered() {
  const results = [];
  for (const run of runs) {
    const target = best(run.probabilities);
    results.push({ run, target, ...(await occlusion(run, state.shown, target)) });
  }
  const figure = ({ run, target, before, least, side, fall }) => {
    const values = { name: content.classes[target], before: percent(before), after: percent(least), patch: side };
    const said = t("cover_result", { run: run.label, ...values });
    const heat = picture(H, W, (i) => colour(fall[i] / largest(fall)), said);
    return html`<figure><div class="pair">${imageOf(state.shown)}${heat}</div><figcaption>${said}</figcaption></figure>`;
  };
  put($("covered"), results.map(figure));
}

const larger = { y: 0, x: 0, h: 2 * H, w: 2 * W, scores: null, ticket: 0 };

// The part from (y, x) of what the window moves over: the reader's picture, or test images.
function drawScene(context, y, x) {
  context.translate(-x, -y);
  const scale = photo && Math.min((5 * W) / photo.width, (3 * H) / photo.height);
  if (photo) context.drawImage(photo, 0, 0, photo.width * scale, photo.height * scale);
  for (const k of photo ? [] : range(Math.min(8, content.images.length))) {
    const [top, left] = [0.5 + 1.25 * (k % 2) + 0.1 * (k % 3), 0.5 + 1.15 * (k >> 1)]; // the first: in the frame
    context.drawImage(canvasOf(testImage(k)), Math.round(left * W), Math.round(top * H));
  }
}

// The part of the scene, and over the middle of each window its class, as strong as its probability. The
// network has no fixed size, because its dense layers are convolutions already.
async function showLarger(row = larger.y, column = larger.x) {
  const run = current();
  if (!run.any_size) return put($("larger"), html`<p>${t("larger_none")}</p>`);
  larger.ticket++;
  const { h, w } = larger;
  const [y, x] = [clamp(Math.round(row), 0, 3 * H - h), clamp(Math.round(column), 0, 5 * W - w)];
  const part = rendered(h, w, (context) => drawScene(context, y, x));
  const steps = run.steps.filter(({ kind }) => !["flatten", "mean", "softmax"].includes(kind));
  const scores = (await finish(forward(steps, part), larger)).at(-1);
  Object.assign(larger, { y, x, scores });
  const [high, wide, down, right, top, left] = steps.findLast((step) => step.field).field;
  const side = Math.min(down, right, 8);
  const found = cells(scores.h, scores.w).map(([i, j], k) => {
    const shares = softmax(scores.d.subarray(k * scores.c, (k + 1) * scores.c));
    const at = [top + high / 2 + i * down, left + wide / 2 + j * right];
    return { i: best(shares), share: Math.max(...shares), at };
  });
  const square = ([row, column], size) => placed([row - size[0] / 2, column - size[1] / 2, ...size], larger);
  const tile = ({ i, share, at }) =>
    html`<b class="tone${i % 10}" data-style="${square(at, [side, side])};--share:${20 + 70 * share ** 2}%">${side > 3 ? i : ""}</b>`;
  const here = found[(scores.h >> 1) * scores.w + (scores.w >> 1)];
  const mark = html`<i class="mark" data-style="${square(here.at, [H, W])}"></i>`;
  put($("larger"), imageOf(part), found.map(tile), mark);
  const values = { height: scores.h, width: scores.w, name: content.classes[here.i], probability: percent(here.share) };
  $("found").textContent = t("larger_found", values);
}

// ---- The start -------------------------------------------------------------------------------------

const unchecked = runs.flatMap((run) => run.logits_of_predict.map((logits, i) => ({ run, logits, i })));

// Compares the logits of the test images with predict's.
async function trust() {
  for (; unchecked.length; unchecked.pop()) {
    const { run, logits, i } = unchecked.at(-1);
    const found = await finish(predict(run, testImage(i)), state);
    const difference = Math.max(...logits.map((value, k) => Math.abs(value - found.logits[k])));
    state.difference = Math.max(state.difference, difference / largest(run.logits_of_predict.flat()));
  }
  const values = { count: content.images.length, difference: state.difference.toExponential(1) };
  Object.assign($("trust").dataset, { t: "trust", values: JSON.stringify(values) });
  translate();
}

// What a click on an element with data-do does.
const CLICKS = {
  test: ({ dataset }) => lay(canvasOf(testImage(+dataset.at)), +dataset.at),
  run({ dataset }) {
    for (const one of $("switch").children) one.ariaPressed = one.dataset.at === dataset.at;
    for (const one of document.querySelectorAll(".row")) one.hidden = one.id !== `row-${dataset.at}`;
    Object.assign(state, { run: +dataset.at, chosen: null, from: 0, input: null });
    larger.scores = null;
    update();
  },
  cell: (button, event) => set({ chosen: placeIn(button, event), input: null }),
  page: ({ dataset }) => set({ from: clamp(state.from + +dataset.by, 0, Math.max(0, current().deepest - MAPS)) }),
  input: ({ dataset }) => set({ input: +dataset.at }),
  move: ({ dataset }) => moveBy(dataset.by.split(",").map(Number)),
  slide,
  cover: showCovered,
  open: () => Object.assign($("file"), { value: "" }).click(), // so that the same file can be opened again
  clear: () => lay(null),
  invert() {
    pen.globalCompositeOperation = "difference";
    fill(pen, [255, 255, 255]);
    pen.globalCompositeOperation = "source-over";
    drawn();
  },
};

// Calls `react` with places in an element, as shares of its height and width, while a pointer is down there.
function listenToPointer(target, react) {
  const listener = (event) => {
    const down = event.type === "pointerdown";
    if (down) target.setPointerCapture(event.pointerId);
    const area = target.getBoundingClientRect();
    const place = [(event.clientY - area.top) / area.height, (event.clientX - area.left) / area.width];
    if (event.buttons) react(...place, down);
  };
  for (const name of ["pointerdown", "pointermove"]) target.addEventListener(name, listener);
}

function listen() {
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-do]");
    if (target) CLICKS[target.dataset.do](target, event);
  });
  document.addEventListener("keydown", (event) => {
    const [move, { id, dataset }] = [ARROWS[event.key], event.target];
    if (!move || (dataset.do !== "cell" && id !== "larger")) return;
    event.preventDefault();
    if (id === "larger") showLarger(larger.y + 2 * move[0], larger.x + 2 * move[1]);
    else if (state.chosen.step === dataset.at - 1) moveBy(move);
    else CLICKS.cell(event.target, { detail: 0 });
  });
  listenToPointer(pad, (y, x, down) => stroke(x * pad.width, y * pad.height, down));
  let grip = [0, 0]; // the place of the scene that the pointer holds
  listenToPointer($("larger"), (y, x, down) => {
    if (down) grip = [larger.y + y * larger.h, larger.x + x * larger.w];
    else showLarger(grip[0] - y * larger.h, grip[1] - x * larger.w);
  });
  $("sliders").addEventListener("input", update);
  $("sliders").addEventListener("reset", () => setTimeout(update));
  $("frame").addEventListener("change", () => drawn());
  $("file").addEventListener("change", () => $("file").files[0] && openFile($("file").files[0]));
  $("language").addEventListener("change", () => {
    language = $("language").value;
    translate();
    larger.scores = null;
    update();
  });
  for (const name of ["dragover", "drop", "paste"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      if (name !== "dragover") openFile((event.dataTransfer ?? event.clipboardData).files[0]);
    });
  }
}

// For the tests, and for readers who open the console.
globalThis.playground = {
  state,
  runs,
  predict: (run, data) => finish(predict(runs[run], fromBytes(bytes(data)))),
  occlusion: (run, i, target) => occlusion(runs[run], testImage(i), target),
};

for (const [i, one] of $("tests").querySelectorAll("canvas").entries()) paint(one, H, W, rgb(testImage(i)));
$("language").value = language;
translate();
listen();
$("test-0").click();
