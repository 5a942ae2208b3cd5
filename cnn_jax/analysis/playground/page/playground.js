// The playground: a trained network, computed and taken apart in the page. One module, no build step.
// A map is {h, w, c, d}: height, width, channels, and the values row by row, channels last.

const content = JSON.parse(document.getElementById("content").textContent);
const [H, W, C] = content.shape;
const MAPS = 8; // of a layer, shown at once
const MOST_UNITS = 1024; // of a dense layer, drawn
const SLICE = 12; // milliseconds of computation before the page may react
const GRID = 7; // the largest kernel that is written as numbers

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

// Abramowitz and Stegun 7.1.5 (series) and 7.1.14 (continued fraction); exact to 1e-15.
function erf(x) {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  let sum = 0;
  if (a < 2.5) {
    for (let n = 0, term = a; Math.abs(term) > 1e-17 * a; n++, term *= (-a * a) / n) {
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  for (let n = 60; n > 0; n--) sum = n / 2 / (a + sum);
  return Math.sign(x) * (1 - Math.exp(-a * a) / (a + sum) / Math.sqrt(Math.PI));
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const tanhGelu = (x) => (x / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const ACTIVATIONS = {
  ReLU: (x) => Math.max(0, x),
  GELU: (x) => (x / 2) * (1 + erf(x / Math.SQRT2)),
  "GELU (tanh)": tanhGelu,
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
  const y = map(x.h, x.w, x.c);
  for (let i = 0; i < x.h; i++) {
    for (let j = 0; j < x.w; j++) {
      const [row, column] = where(i, j);
      const [r, q] = [Math.floor(row), Math.floor(column)];
      for (let c = 0; c < x.c; c++) {
        let sum = 0;
        for (const [a, b] of [[r, q], [r, q + 1], [r + 1, q], [r + 1, q + 1]]) {
          const share = (1 - Math.abs(row - a)) * (1 - Math.abs(column - b));
          const inside = a >= 0 && a < x.h && b >= 0 && b < x.w;
          if (share) sum += share * (inside ? x.d[(a * x.w + b) * x.c + c] : content.background[c]);
        }
        y.d[(i * x.w + j) * x.c + c] = sum;
      }
    }
  }
  return y;
}

function changed(x, { dx, dy, turn, noise }) {
  const [sin, cos] = [Math.sin((turn * Math.PI) / 180), Math.cos((turn * Math.PI) / 180)];
  const [a, b] = [(x.h - 1) / 2, (x.w - 1) / 2];
  let y = x;
  if (dx || dy || turn) {
    y = sample(x, (i, j) => {
      const [u, v] = [i - a - dy, j - b - dx];
      return turn ? [a + cos * u - sin * v, b + sin * u + cos * v] : [a + u, b + v];
    });
  }
  if (!noise) return y;
  let seed = 1; // the same noise for every image, so that only the image changes
  const uniform = () => {
    seed = (seed * 48271) % 2147483647;
    return seed / 2147483647;
  };
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  return each(y, (value) => Math.min(1, Math.max(0, value + noise * normal())));
}

const VIEWS = { none: 1, mirror: 2, mirror_shift: 6 };

// The views of an image whose logits predict averages, and their weights.
function* views(kind, x) {
  const mirror = (i, j) => [i, x.w - 1 - j];
  const inside = (k, size) => (k < 0 ? -k : k >= size ? 2 * size - 2 - k : k);
  const moved = (by) => (i, j) => [inside(i + by, x.h), inside(j + by, x.w)];
  const turned = (by) => (i, j) => moved(by)(...mirror(i, j));
  const shifts = kind === "mirror_shift" ? [[-1, 0.125], [1, 0.125]] : [];
  const weight = kind === "none" ? 1 : kind === "mirror" ? 0.5 : 0.25;
  yield [x, weight];
  if (kind !== "none") yield [sample(x, mirror), weight];
  for (const [by, share] of shifts) {
    yield [sample(x, moved(by)), share];
    yield [sample(x, turned(by)), share];
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

// ---- The runs -------------------------------------------------------------------------------------

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const runs = content.runs.map((run, number) => {
  const data = new Float32Array(
    bytes(document.getElementsByClassName("weights")[number].textContent).buffer,
  );
  for (const step of run.steps) {
    for (const value of Object.values(step)) {
      if (!value?.shape) continue;
      const size = value.shape.reduce((a, b) => a * b, 1);
      value.d = data.subarray(value.at, value.at + size);
    }
  }
  run.steps.push({ kind: "softmax" });
  const same = content.runs.filter((other) => other.name === run.name).length > 1;
  run.label = same ? run.workdir : run.name.split("/").at(-1);
  return run;
});

const pixels = bytes(content.pixels);
const testImage = (i) =>
  map(H, W, C, Float32Array.from(pixels.subarray(i * H * W * C, (i + 1) * H * W * C), (v) => v / 255));

const state = {
  exact: 0, // the test image that is shown, or null for a drawing
  image: testImage(0),
  run: 0,
  chosen: null, // {step, y, x, c}: a value of the shown run
  from: {}, // the first channel that a layer's column shows, by step
  input: null, // the input channel whose products are shown
  ticket: 0,
};

const $ = (id) => document.getElementById(id);
const current = () => runs[state.run];
const best = (values) => values.indexOf(Math.max(...values));

function element(name, options = {}, ...children) {
  const { style, data, ...rest } = options;
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(rest)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  Object.assign(made.style, style);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

// ---- Texts ----------------------------------------------------------------------------------------

const preferred = navigator.language.slice(0, 2);
let language = preferred in content.texts ? preferred : "en";
const number = (value, digits = 3) =>
  (Math.abs(value) < 5e-7 ? "0" : `${+value.toPrecision(digits)}`).replace("-", "−");
const percent = (value) => `${(100 * value).toFixed(value < 0.9995 && value >= 0.0005 ? 1 : 0)}%`;
const count = (value) => value.toLocaleString(language);

function t(key, values = {}) {
  const text = content.texts[language][key] ?? content.texts.en[key];
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function titleOf(step) {
  if (step.title) return step.name.split("/").at(-1);
  return step.function ?? t(step.kind);
}

function translate() {
  document.documentElement.lang = language;
  for (const made of document.querySelectorAll("[data-t]")) made.textContent = t(made.dataset.t);
  for (const made of document.querySelectorAll("[data-label]")) {
    made.setAttribute("aria-label", t(made.dataset.label, { size: `${H}×${W}` }));
  }
  buildTests();
  buildRow();
  trust();
}

// ---- Pictures -------------------------------------------------------------------------------------

// The colour of a value in [-1, 1].
function colour(value) {
  const place = ((Math.max(-1, Math.min(1, value || 0)) + 1) / 2) * (content.colours.length - 1);
  const i = Math.min(Math.floor(place), content.colours.length - 2);
  const [low, high] = [content.colours[i], content.colours[i + 1]];
  return low.map((level, k) => Math.round(level + (place - i) * (high[k] - level)));
}
const css = (value) => `rgb(${colour(value).join(" ")})`;
const ink = (value) => (Math.abs(value) > 0.75 ? "#fff" : "#1c2126");

// Paints h x w pixels, whose colours [red, green, blue] `at` gives, onto a canvas of that size.
function paint(canvas, h, w, at) {
  Object.assign(canvas, { width: w, height: h });
  const picture = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) picture.data.set([...at(i), 255], 4 * i);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

const rgb = (x) => (i) =>
  [0, 1, 2].map((k) => Math.round(255 * x.d[i * x.c + (x.c === 3 ? k : 0)]));
const paintImage = (canvas, x) => paint(canvas, x.h, x.w, rgb(x));

const largest = (x) => x.d.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;

function box(kind, x, size) {
  const part = (value, whole) => `${(100 * value) / whole}%`;
  return element("i", {
    className: kind,
    style: {
      left: part(x[1], size[1]),
      top: part(x[0], size[0]),
      width: part(x[3], size[1]),
      height: part(x[2], size[0]),
    },
  });
}

// ---- The drawing pad ------------------------------------------------------------------------------

const PAD = 280;
const pad = $("pad");
Object.assign(pad, { width: Math.round((PAD * W) / Math.max(H, W)), height: Math.round((PAD * H) / Math.max(H, W)) });
const pen = pad.getContext("2d", { willReadFrequently: true });
const background = `rgb(${content.background.map((v) => Math.round(255 * v)).join(" ")})`;
const paper = C === 1 ? `rgb(${Array(3).fill(Math.round(255 * content.background[0])).join(" ")})` : background;
let photo = null;
const cursor = { x: pad.width / 2, y: pad.height / 2 };

function clearPad(frame) {
  pen.fillStyle = paper;
  pen.fillRect(0, 0, pad.width, pad.height);
  $("frame").checked = frame && content.extent !== null;
}

function showTest(i) {
  state.exact = i;
  clearPad(false);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(paintImage(document.createElement("canvas"), testImage(i)), 0, 0, pad.width, pad.height);
  for (const button of $("tests").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.image === `${i}`);
  }
  update();
}

function drawn() {
  state.exact = null;
  for (const button of $("tests").querySelectorAll("[aria-pressed=true]")) {
    button.setAttribute("aria-pressed", false);
  }
  update();
}

// A pixel of the pad differs from the background.
function boundingBox() {
  const { data } = pen.getImageData(0, 0, pad.width, pad.height);
  let [top, left, bottom, right] = [pad.height, pad.width, -1, -1];
  const levels = C === 1 ? Array(3).fill(content.background[0]) : content.background;
  for (let i = 0; i < data.length; i += 4) {
    if (!levels.some((level, k) => Math.abs(data[i + k] - 255 * level) > 32)) continue;
    const [y, x] = [Math.floor(i / 4 / pad.width), (i / 4) % pad.width];
    [top, bottom, left, right] = [Math.min(top, y), Math.max(bottom, y), Math.min(left, x), Math.max(right, x)];
  }
  return bottom < 0 ? null : [left, top, right - left + 1, bottom - top + 1];
}

// The pad as the dataset's images are: of their size, and a drawing centred and scaled as their things.
function padImage() {
  const canvas = element("canvas", { width: W, height: H });
  const small = canvas.getContext("2d");
  small.fillStyle = paper;
  small.fillRect(0, 0, W, H);
  small.imageSmoothingQuality = "high";
  const found = $("frame").checked && content.extent !== null ? boundingBox() : null;
  if (found) {
    const scale = (content.extent * Math.max(H, W)) / Math.max(found[2], found[3]);
    const [w, h] = [found[2] * scale, found[3] * scale];
    small.drawImage(pad, ...found, (W - w) / 2, (H - h) / 2, w, h);
  } else small.drawImage(pad, 0, 0, W, H);
  return fromCanvas(small, H, W);
}

function fromCanvas(context, h, w) {
  const { data } = context.getImageData(0, 0, w, h);
  const x = map(h, w, C);
  for (let i = 0; i < h * w; i++) {
    const [red, green, blue] = data.subarray(4 * i, 4 * i + 3);
    if (C === 3) x.d.set([red / 255, green / 255, blue / 255], 3 * i);
    else x.d[i] = Math.round(0.299 * red + 0.587 * green + 0.114 * blue) / 255;
  }
  return x;
}

function stroke(x, y) {
  pen.strokeStyle = C === 3 ? $("colour").value : `rgb(${Array(3).fill($("shade").value).join(" ")})`;
  pen.lineWidth = +$("brush").value;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(cursor.x, cursor.y);
  pen.lineTo(x + 0.01, y);
  pen.stroke();
  Object.assign(cursor, { x, y });
  drawn();
}

function listenToPad() {
  const place = (event) => {
    const area = pad.getBoundingClientRect();
    return [
      ((event.clientX - area.left) * pad.width) / area.width,
      ((event.clientY - area.top) * pad.height) / area.height,
    ];
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    [cursor.x, cursor.y] = place(event);
    stroke(cursor.x, cursor.y);
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons) stroke(...place(event));
  });
  pad.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    const [dy, dx] = (move ?? [0, 0]).map((v) => v * 10);
    const [x, y] = [cursor.x + dx, cursor.y + dy];
    if (event.key === " " || event.shiftKey) stroke(x, y);
    else Object.assign(cursor, { x, y });
  });
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

const say = (text) => {
  $("message").textContent = text;
};

// An image file on the pad. It is decoded and reduced outside of this thread.
async function openFile(file) {
  say(t("reading"));
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file, { resizeWidth: 512, resizeQuality: "medium" });
  } catch {
    return say(t("not_image"));
  }
  if (bitmap.height > 4096) return say(t("too_long"));
  photo = bitmap;
  $("scene").querySelector("[value=photo]").disabled = false;
  clearPad(false);
  pen.fillStyle = "#fff"; // behind what is transparent, as predict does
  pen.fillRect(0, 0, pad.width, pad.height);
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, pad.width, pad.height);
  say("");
  drawn();
}

function listenToFiles() {
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => $("file").files[0] && openFile($("file").files[0]));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
    else say(t("not_image"));
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData.files[0];
    if (file) openFile(file);
  });
}

function sliders() {
  const value = (id) => +$(id).value;
  return { dx: value("dx"), dy: value("dy"), turn: value("turn"), noise: value("noise") / 100 };
}

// ---- From the input to everything shown -----------------------------------------------------------

let busy = false;

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
  paintImage($("seen"), state.shown);
  for (const id of ["dx", "dy", "turn", "noise"]) {
    $(id).nextElementSibling.textContent = `${$(id).value}${{ turn: "°", noise: "%" }[id] ?? ""}`;
  }
  showBars();
  if (!state.chosen) {
    const step = current().steps.length - 1;
    state.chosen = { step, y: 0, x: 0, c: best(current().probabilities) };
  }
  showRow();
  showDetail();
}

function showBars() {
  const label = state.exact === null ? null : content.images[state.exact][2];
  $("bars").replaceChildren(
    ...(label === null ? [] : [element("p", {}, t("truth", { place: content.images[state.exact][1], name: content.classes[label] }))]),
    ...runs.map((run) => {
      const top = best(run.probabilities);
      const rows = run.probabilities.map((value, i) =>
        element(
          "li",
          { className: i === top ? "top" : "" },
          element("span", {}, content.classes[i]),
          element("span", { className: "bar" }, element("i", { style: { width: `${100 * value}%` } })),
          element("span", { className: "right" }, percent(value)),
        ),
      );
      const time = t("milliseconds", { ms: number(run.milliseconds, 2) });
      const note = run.views === "none" ? time : `${time}. ${t("views", { count: VIEWS[run.views] })}`;
      return element("div", {}, element("h3", {}, run.label), element("ol", {}, ...rows), element("p", { className: "muted" }, note));
    }),
  );
}

// ---- The row of maps ------------------------------------------------------------------------------

function buildTests() {
  const kinds = ["right", "wrong", "unsure"];
  $("tests").replaceChildren(
    ...kinds.map((kind) => {
      const buttons = content.images.flatMap(([own, place, label], i) => {
        if (own !== kind) return [];
        const name = t("test_label", { place, name: content.classes[label] });
        const picture = paintImage(document.createElement("canvas"), testImage(i));
        const pressed = i === state.exact;
        const options = { type: "button", title: name, ariaLabel: name, ariaPressed: pressed, data: { image: i } };
        const button = element("button", options, picture);
        button.addEventListener("click", () => showTest(i));
        return [button];
      });
      return element("div", {}, element("h3", {}, t(kind)), element("div", { className: "thumbs" }, ...buttons));
    }),
  );
}

function buildSwitch() {
  $("switch").replaceChildren(
    ...(runs.length > 1 ? runs : []).map((run, i) => {
      const button = element("button", { type: "button", ariaPressed: i === state.run }, run.label);
      button.addEventListener("click", () => {
        Object.assign(state, { run: i, chosen: null, from: {}, input: null });
        buildRow();
        show();
      });
      return button;
    }),
  );
  $("about").textContent = runs
    .map((run) => t("about", { model: run.model, parameters: count(run.parameters), step: count(run.step) }))
    .join(" · ");
}

function facts(step, x) {
  const shape = x.h * x.w > 1 ? `${x.h}×${x.w}×${x.c}` : `${x.c}`;
  const lines = [shape];
  if (step?.title?.includes(" ")) lines.push(step.title.slice(step.title.indexOf(" ") + 1));
  if (step?.parameters) lines.push(t("parameters", { count: count(step.parameters) }));
  if (step?.field) lines.push(t("window", { height: step.field[0], width: step.field[1] }));
  return lines.map((line) => element("span", {}, line));
}

// One column for the input and for each step; its pictures are painted by showRow.
function buildRow() {
  buildSwitch();
  const run = current();
  if (!run.maps) return;
  const columns = run.maps.map((x, i) => {
    const step = run.steps[i - 1];
    const title = step ? titleOf(step) : t("input");
    const column = element("div", { className: "column" }, element("h3", {}, title), element("p", {}, ...facts(step, x)));
    column.append(...(i === 0 ? [element("div", { className: "cell" }, element("canvas"))] : buildCells(i, x, title)));
    return column;
  });
  const lines = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  lines.setAttribute("aria-hidden", true);
  $("row").replaceChildren(element("div", { className: "columns" }, lines, ...columns));
}

const isMap = (x) => x.h * x.w > 1;
const unitsAcross = (x) => (x.c <= 12 ? 1 : x.c <= 160 ? 8 : 16);

function buildCells(i, x, layer) {
  const from = state.from[i] ?? 0;
  const shown = isMap(x) ? Math.min(MAPS, x.c - from) : 1;
  const cells = Array.from({ length: shown }, (_, k) => {
    const name = isMap(x) ? t("map_label", { layer, channel: from + k }) : t("units_label", { layer, count: x.c });
    const kind = isMap(x) ? "cell" : `cell units across${unitsAcross(x)}`;
    const cell = element("button", { type: "button", className: kind, ariaLabel: name }, element("canvas"));
    cell.addEventListener("click", (event) => chooseIn(i, from + k, cell, event));
    cell.addEventListener("keydown", (event) => moveBy(event, ARROWS[event.key]));
    return cell;
  });
  if (isMap(x) && x.c > MAPS) {
    const page = (by, key, sign) => {
      const button = element("button", { type: "button", ariaLabel: `${layer}: ${t(key)}` }, sign);
      button.disabled = from + by < 0 || from + by >= x.c;
      button.addEventListener("click", () => {
        state.from[i] = from + by;
        buildRow();
        showRow();
      });
      return button;
    };
    const text = t("channels", { from, to: from + shown - 1, count: x.c });
    cells.push(element("div", { className: "pager" }, page(-MAPS, "previous", "‹"), element("span", {}, text), page(MAPS, "next", "›")));
  }
  if (!isMap(x) && x.c > MOST_UNITS) cells.push(element("span", {}, t("first_units", { count: count(MOST_UNITS) })));
  if (i === current().steps.length) cells.push(element("ol", {}, ...content.classes.map((name) => element("li", {}, name))));
  return cells;
}

// The value of a map at the place of a click; of a key, the largest one.
function chooseIn(i, channel, cell, event) {
  const x = current().maps[i];
  const area = cell.firstChild.getBoundingClientRect();
  const place = (at, start, size, cells) => Math.max(0, Math.min(cells - 1, Math.floor(((at - start) * cells) / size)));
  const found = { step: i - 1, y: 0, x: 0, c: channel };
  const rows = isMap(x) ? x.h : Math.ceil(Math.min(x.c, MOST_UNITS) / unitsAcross(x));
  const row = place(event.clientY, area.top, area.height, rows);
  const column = place(event.clientX, area.left, area.width, isMap(x) ? x.w : unitsAcross(x));
  if (event.detail === 0) {
    const of = isMap(x) ? x.d.filter((_, k) => k % x.c === channel) : x.d;
    const most = of.reduce((top, value, k) => (Math.abs(value) > Math.abs(of[top]) ? k : top), 0);
    if (isMap(x)) [found.y, found.x] = [Math.floor(most / x.w), most % x.w];
    else found.c = most;
  } else if (isMap(x)) [found.y, found.x] = [row, column];
  else found.c = Math.min(x.c - 1, row * unitsAcross(x) + column);
  choose(found);
}

function choose(found) {
  state.chosen = found;
  state.input = null;
  showRow();
  showDetail();
}

function moveBy(event, move) {
  if (!move) return;
  event?.preventDefault();
  const { step, y, x, c } = state.chosen;
  const of = current().maps[step + 1];
  const wrap = (value, size) => (value + size) % size;
  if (isMap(of)) choose({ step, y: wrap(y + move[0], of.h), x: wrap(x + move[1], of.w), c });
  else choose({ step, y: 0, x: 0, c: wrap(c + move[0] * unitsAcross(of) + move[1], of.c) });
}

function paintCell(canvas, x, channel) {
  const most = largest(x);
  if (isMap(x)) return paint(canvas, x.h, x.w, (k) => colour(x.d[k * x.c + channel] / most));
  const across = unitsAcross(x);
  const shown = Math.min(x.c, MOST_UNITS);
  return paint(canvas, Math.ceil(shown / across), across, (k) => (k < shown ? colour(x.d[k] / most) : [128, 128, 128]));
}

const cellsOf = (i) => [...$("row").querySelectorAll(".column")[i].querySelectorAll(".cell")];

function showRow() {
  const run = current();
  if (!$("row").firstChild) buildRow();
  run.maps.forEach((x, i) => {
    cellsOf(i).forEach((cell, k) => {
      cell.querySelectorAll("i").forEach((mark) => mark.remove());
      if (i === 0) paintImage(cell.firstChild, state.shown);
      else paintCell(cell.firstChild, x, (state.from[i] ?? 0) + k);
    });
  });
  const { step, y, x, c } = state.chosen;
  markIn(step + 1, [y, x, 1, 1], c);
  drawLines();
}

// Marks a rectangle of a channel in a column; returns the mark, or null if the channel is not shown.
function markIn(i, area, channel) {
  const of = current().maps[i];
  const across = unitsAcross(of);
  const k = isMap(of) && i > 0 ? channel - (state.from[i] ?? 0) : 0;
  const cell = cellsOf(i)[k];
  if (!cell || (!isMap(of) && channel >= MOST_UNITS)) return null;
  const unit = [Math.floor(channel / across), channel % across, 1, 1];
  const size = isMap(of) ? [of.h, of.w] : [Math.ceil(Math.min(of.c, MOST_UNITS) / across), across];
  const mark = box("mark", isMap(of) ? area : unit, size);
  cell.append(mark);
  return mark;
}

// Lines from the inputs of the chosen value to it, as thick as their contributions.
function drawLines() {
  const made = explain(current(), state.chosen);
  const svg = $("row").querySelector("svg");
  const origin = svg.getBoundingClientRect();
  const center = (mark) => {
    const area = mark.getBoundingClientRect();
    return [area.left - origin.left, area.right - origin.left, area.top + area.height / 2 - origin.top];
  };
  const target = $("row").querySelectorAll(".mark")[0];
  if (!target) return svg.replaceChildren();
  const to = center(target);
  const most = Math.max(...made.parts.map(({ value }) => Math.abs(value))) || 1;
  const strongest = [...made.parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 24);
  svg.replaceChildren(
    ...strongest.flatMap(({ channel, value, area }) => {
      const mark = markIn(made.source, area, channel);
      if (!mark) return [];
      const from = center(mark);
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const middle = (from[1] + to[0]) / 2;
      line.setAttribute("d", `M${from[1]} ${from[2]} C${middle} ${from[2]} ${middle} ${to[2]} ${to[0]} ${to[2]}`);
      line.style.strokeWidth = `${0.5 + (3.5 * Math.abs(value)) / most}px`;
      line.setAttribute("class", value < 0 ? "minus" : "plus");
      return [line];
    }),
  );
}

// ---- One value and all its sums -------------------------------------------------------------------

// What a value is made of: the column of its inputs, and for each channel of them its part and its area.
function explain(run, { step: at, y, x, c }) {
  const step = run.steps[at];
  const given = run.maps[at];
  const value = run.maps[at + 1].d[(y * run.maps[at + 1].w + x) * run.maps[at + 1].c + c];
  const one = (channel, part, area = [y, x, 1, 1]) => ({ channel, value: part, area });
  const input = (row, column, channel) => given.d[(row * given.w + column) * given.c + channel];
  if (step.kind === "conv") return { ...explainConv(run, at, y, x, c), value };
  if (step.kind === "softmax") {
    return { source: at, value, parts: [...given.d].map((logit, k) => one(k, Math.exp(logit - Math.max(...given.d)))) };
  }
  if (step.kind === "pool") {
    const [kh, kw] = step.window;
    return { source: at, value, parts: [one(c, value, [y * kh, x * kw, kh, kw])] };
  }
  if (step.kind === "mean") return { source: at, value, parts: [one(c, value, [0, 0, given.h, given.w])] };
  if (step.kind === "flatten") {
    const [place, channel] = [Math.floor(c / given.c), c % given.c];
    const [row, column] = [Math.floor(place / given.w), place % given.w];
    return { source: at, value, row, column, channel, parts: [one(channel, value, [row, column, 1, 1])] };
  }
  return { source: at, value, given: input(y, x, c), parts: [one(c, value)] };
}

// A dense layer behind a flattened map is a convolution whose kernel is as large as the map.
function explainConv(run, at, y, x, c) {
  const step = run.steps[at];
  const flat = run.steps[at - 1]?.kind === "flatten";
  const source = flat ? at - 1 : at;
  const given = run.maps[source];
  const [, , , co] = step.kernel.shape;
  const g = flat
    ? { kh: given.h, kw: given.w, sh: 1, sw: 1, top: 0, left: 0 }
    : geometry(step, given);
  const [row, column] = [y * g.sh - g.top, x * g.sw - g.left];
  const weight = (a, b, k) => step.kernel.d[((a * g.kw + b) * given.c + k) * co + c];
  const input = (a, b, k) => {
    const [i, j] = [row + a, column + b];
    return i < 0 || j < 0 || i >= given.h || j >= given.w ? null : given.d[(i * given.w + j) * given.c + k];
  };
  const parts = Array.from({ length: given.c }, (_, channel) => {
    let value = 0;
    for (let a = 0; a < g.kh; a++) for (let b = 0; b < g.kw; b++) value += (input(a, b, channel) ?? 0) * weight(a, b, channel);
    return { channel, value, area: [row, column, g.kh, g.kw] };
  });
  return { source, parts, weight, input, kh: g.kh, kw: g.kw, bias: step.bias ? step.bias.d[c] : 0, flat };
}

function showDetail() {
  const run = current();
  const { step: at, y, x, c } = state.chosen;
  const step = run.steps[at];
  const made = explain(run, state.chosen);
  const of = run.maps[at + 1];
  const values = { layer: titleOf(step), channel: c, row: y, column: x, value: number(made.value, 5), name: content.classes[c] };
  const key = isMap(of) ? "statement" : of.c === content.classes.length && at >= run.steps.length - 3 ? "statement_class" : "statement_unit";
  $("statement").textContent = t(key, values);
  $("slide").disabled = !isMap(of);
  $("detail").replaceChildren(seenWindow(run, at, y, x), element("div", { className: "sums" }, ...DETAIL[step.kind](step, made, run)));
}

// The image with the window that a value sees.
function seenWindow(run, at, y, x) {
  let k = at;
  while (k >= 0 && !run.steps[k].field) k--;
  const canvas = paintImage(element("canvas", { role: "img", ariaLabel: t("sees") }), state.shown);
  const figure = element("figure", {}, element("div", { className: "window" }, canvas), element("figcaption", {}, t("sees")));
  const field = run.steps[k]?.field;
  if (field) {
    const [height, width, sh, sw, top, left] = field;
    figure.firstChild.append(box("mark", [top + y * sh, left + x * sw, height, width], [H, W]));
  }
  return figure;
}

// A small matrix as numbers, a larger one as a picture.
function grid(title, h, w, at, most) {
  const caption = element("figcaption", {}, title);
  const cells = Array.from({ length: h * w }, (_, k) => at(Math.floor(k / w), k % w));
  const limit = most ?? (Math.max(...cells.map((value) => Math.abs(value ?? 0))) || 1);
  if (Math.max(h, w) > GRID) {
    const canvas = paint(document.createElement("canvas"), h, w, (k) => colour((cells[k] ?? 0) / limit));
    Object.assign(canvas, { role: "img", ariaLabel: title });
    return element("figure", { className: "heat" }, canvas, caption);
  }
  const rows = Array.from({ length: h }, (_, i) =>
    element("tr", {}, ...cells.slice(i * w, i * w + w).map((value) => {
      if (value === null) return element("td", { className: "padding" }, "0");
      const style = { backgroundColor: css(value / limit), color: ink(value / limit) };
      return element("td", { style }, number(value, 2));
    })),
  );
  return element("figure", {}, element("table", { ariaLabel: title }, element("tbody", {}, ...rows)), caption);
}

const sign = (text) => element("span", { className: "sign", ariaHidden: true }, text);
const text = (key, values) => element("p", {}, t(key, values));
const formula = (line) => element("p", { className: "formula" }, line);
const bracket = (value) => (value < 0 ? `(${number(value)})` : number(value));

function bars(parts, bias, total, pick) {
  const shown = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 8);
  const rest = parts.length - shown.length;
  const others = total - bias - shown.reduce((sum, { value }) => sum + value, 0);
  const most = Math.max(...shown.map(({ value }) => Math.abs(value)), Math.abs(bias), Math.abs(others)) || 1;
  const line = (name, value, kind = "") => {
    const share = (50 * Math.abs(value)) / most;
    const style = { width: `${share}%`, left: `${value < 0 ? 50 - share : 50}%`, backgroundColor: css(value < 0 ? -0.7 : 0.7) };
    return element("li", { className: kind }, name, element("span", { className: "bar" }, element("i", { style })), element("span", { className: "right" }, number(value)));
  };
  const list = shown.map(({ channel, value }) => line(pick(channel), value));
  if (rest) list.push(line(element("span", {}, t("others", { count: count(rest) })), others));
  list.push(line(element("span", {}, t("bias")), bias), line(element("span", {}, t("total")), total, "total"));
  return element("figure", {}, element("figcaption", {}, t("by_channel")), element("ol", { className: "parts" }, ...list));
}

const DETAIL = {
  conv(step, made, run) {
    const order = [...made.parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const channel = state.input ?? order[0].channel;
    const part = made.parts[channel];
    const { kh, kw, input, weight } = made;
    const single = kh * kw === 1;
    const pick = (k) => {
      const button = element("button", { type: "button", ariaPressed: k === channel }, String(k));
      button.addEventListener("click", () => {
        state.input = k;
        showDetail();
      });
      return button;
    };
    const terms = [];
    for (let a = 0; a < kh; a++) for (let b = 0; b < kw; b++) terms.push([input(a, b, channel) ?? 0, weight(a, b, channel)]);
    terms.sort((a, b) => (terms.length > GRID * GRID ? Math.abs(b[0] * b[1]) - Math.abs(a[0] * a[1]) : 0));
    const written = terms.slice(0, terms.length > GRID * GRID ? 8 : GRID * GRID).map(([v, w]) => `${number(v)}*${bracket(w)}`);
    if (written.length < terms.length) written.push("…");
    const most = largest(run.maps[made.source]);
    const padded = terms.length && !made.flat && kh * kw > 1 && Array.from({ length: kh * kw }).some((_, k) => input(Math.floor(k / kw), k % kw, channel) === null);
    const grids = [
      grid(t("patch", { channel }), kh, kw, (a, b) => input(a, b, channel), most),
      sign("×"),
      grid(t("kernel"), kh, kw, (a, b) => weight(a, b, channel)),
      sign("="),
      grid(t("products"), kh, kw, (a, b) => (input(a, b, channel) ?? 0) * weight(a, b, channel)),
    ];
    return [
      text(made.flat || (single && !isMap(run.maps[made.source])) ? "dense_text" : "conv_text"),
      element("div", { className: "grids" }, ...grids),
      ...(padded ? [element("p", { className: "muted" }, t("padding"))] : []),
      formula(`${t("sum_of", { channel })}: ${written.join(" + ")} = ${number(part.value, 4)}`),
      ...(made.parts.length > 1 ? [bars(made.parts, made.bias, made.value, pick), element("p", { className: "muted" }, t("choose_channel"))] : []),
      formula(`${t("total")}: ${order.slice(0, 3).map(({ value }) => bracket(value)).join(" + ")}${order.length > 3 ? " + …" : ""} + ${bracket(made.bias)} = ${number(made.value, 5)}`),
    ];
  },
  pool(step, made, run) {
    const [y, x, kh, kw] = made.parts[0].area;
    const given = run.maps[made.source];
    const { channel } = made.parts[0];
    const at = (a, b) => given.d[((y + a) * given.w + x + b) * given.c + channel];
    const all = Array.from({ length: kh * kw }, (_, k) => number(at(Math.floor(k / kw), k % kw)));
    return [
      text("pool_text"),
      element("div", { className: "grids" }, grid(t("patch", { channel }), kh, kw, at, largest(given))),
      formula(`max(${all.join(", ")}) = ${number(made.value)}`),
    ];
  },
  norm(step, made) {
    const c = state.chosen.c;
    const [factor] = normOf(step, c);
    const [mean, scale, bias] = [step.mean.d[c], step.scale ? step.scale.d[c] : 1, step.bias ? step.bias.d[c] : 0];
    const deviation = scale / factor;
    return [
      text("norm_text"),
      formula(`(${number(made.given)} − ${bracket(mean)}) / ${number(deviation)} × ${number(scale)} + ${bracket(bias)} = ${number(made.value)}`),
    ];
  },
  activation(step, made) {
    const name = step.function;
    const forms = { ReLU: `max(0, ${number(made.given)})`, GELU: `${number(made.given)} × P(Z < ${number(made.given)})` };
    return [text("activation_text", { name }), formula(`${forms[name] ?? `${name}(${number(made.given)})`} = ${number(made.value)}`)];
  },
  scale: (step, made) => [text("scale_text"), formula(`${number(made.given)} × ${number(step.factor)} = ${number(made.value)}`)],
  flatten(_, made, run) {
    const { h, w, c } = run.maps[made.source];
    const { row, column, channel } = made;
    return [
      text("flatten_text", { row, column, channel, width: w, channels: c, index: state.chosen.c }),
      formula(`(${row} × ${w} + ${column}) × ${c} + ${channel} = ${state.chosen.c} < ${h * w * c}`),
    ];
  },
  mean(_, made, run) {
    const { h, w } = run.maps[made.source];
    return [text("mean_text", { count: count(h * w), channel: state.chosen.c }), formula(`= ${number(made.value)}`)];
  },
  softmax(_, made, run) {
    const logits = run.maps[made.source].d;
    const most = Math.max(...logits);
    const powers = [...logits].map((logit) => Math.exp(logit - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    const rows = [...logits].map((logit, k) =>
      element("tr", { className: k === state.chosen.c ? "top" : "" }, element("th", { scope: "row" }, content.classes[k]), ...[number(logit), number(powers[k]), percent(powers[k] / sum)].map((cell) => element("td", {}, cell))),
    );
    const head = ["", t("logit"), t("power"), "softmax"].map((cell) => element("td", {}, cell));
    return [
      text("softmax_text"),
      element("table", { className: "plain" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)),
      formula(`exp(${number(logits[state.chosen.c])} − ${bracket(most)}) / ${number(sum)} = ${number(made.value)}`),
    ];
  },
};

let sliding = null;
function slide() {
  const on = sliding === null;
  clearInterval(sliding);
  sliding = on ? setInterval(slideOn, 400) : null;
  $("slide").setAttribute("aria-pressed", on);
}

function slideOn() {
  const { step, x } = state.chosen;
  const of = current().maps[step + 1];
  if (!isMap(of)) return slide();
  moveBy(null, [x === of.w - 1 ? 1 : 0, 1]);
}

// ---- Questions: shifts, covers, a larger picture --------------------------------------------------

// What takes longer, once the reader pauses.
async function later() {
  const { ticket } = state;
  const wanted = () => ticket === state.ticket;
  await new Promise((next) => setTimeout(next, 150));
  if (!wanted()) return;
  $("covered").replaceChildren();
  await showShifts(wanted);
  if (wanted() && !$("found").firstChild) showLarger();
}

async function showShifts(wanted) {
  const target = state.exact === null ? best(runs[0].probabilities) : content.images[state.exact][2];
  const reach = Math.round(W / 3);
  const places = Array.from({ length: 2 * reach + 1 }, (_, i) => i - reach);
  const curves = [];
  for (const run of runs) {
    const curve = [];
    for (const dx of places) {
      const found = await finish(predict(run, changed(state.image, { ...sliders(), dx })), wanted);
      if (!found) return;
      curve.push(found.probabilities[target]);
    }
    curves.push(curve);
  }
  const name = content.classes[target];
  const said = curves.map((curve, k) => `${runs[k].label}: ${places.map((dx, i) => `${dx}: ${percent(curve[i])}`).join(", ")}`);
  const svg = chart(places, curves, sliders().dx);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", t("shifts_label", { name, curves: said.join(". ") }));
  const legend = runs.map((run, k) => element("span", { className: `curve${k}` }, run.label));
  $("shifts").replaceChildren(element("figcaption", {}, `${t("shifts_class", { name })} `, ...legend), svg);
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function chart(places, curves, here) {
  const at = (place) => 44 + ((place - places[0]) / (places.at(-1) - places[0])) * 540;
  const up = (value) => 170 - 150 * value;
  const words = (x, y, anchor, content) => shape("text", { x, y, "text-anchor": anchor }, content);
  return shape(
    "svg",
    { viewBox: "0 0 600 212" },
    ...[0, 0.5, 1].map((value) => shape("path", { class: "rule", d: `M44 ${up(value)}H584` })),
    ...[0, 0.5, 1].map((value) => words(38, up(value) + 4, "end", percent(value))),
    ...places.filter((place) => place % 3 === 0).map((place) => words(at(place), 188, "middle", number(place))),
    words(314, 207, "middle", t("shifts_axis")),
    shape("path", { class: "here", d: `M${at(Math.max(places[0], Math.min(places.at(-1), here)))} 20V170` }),
    ...curves.map((curve, k) => shape("path", { class: `curve${k}`, d: `M${curve.map((value, i) => `${at(places[i])} ${up(value)}`).join("L")}` })),
  );
}

// The fall of a class's probability when a square is covered, as the mean over the squares at a pixel.
async function occlusion(run, image, target, wanted = () => true, progress = () => {}) {
  const side = Math.max(2, Math.round(Math.max(H, W) / 7));
  const step = side >> 1;
  const [fall, times] = [new Float64Array(H * W), new Float64Array(H * W)];
  const before = (await finish(predict(run, image), wanted))?.probabilities[target];
  const corners = [];
  for (let y = 0; y + side <= H; y += step) for (let x = 0; x + side <= W; x += step) corners.push([y, x]);
  let least = 1;
  for (const [k, [y, x]] of corners.entries()) {
    const inside = (i) => Math.floor(i / C / W) - y >>> 0 < side && (Math.floor(i / C) % W) - x >>> 0 < side;
    const covered = each(image, (value, i) => (inside(i) ? content.background[i % C] : value));
    const found = await finish(predict(run, covered), wanted);
    if (!found) return null;
    const after = found.probabilities[target];
    least = Math.min(least, after);
    for (let i = 0; i < H * W; i++) {
      if (!inside(i * C)) continue;
      fall[i] += before - after;
      times[i]++;
    }
    progress(k + 1, corners.length);
  }
  return { before, least, side, fall: fall.map((value, i) => value / Math.max(1, times[i])) };
}

async function showCovered() {
  const { ticket } = state;
  const wanted = () => ticket === state.ticket;
  const figures = [];
  for (const run of runs) {
    const target = best(run.probabilities);
    const progress = element("p", { className: "muted" });
    $("covered").replaceChildren(...figures, progress);
    const found = await occlusion(run, state.shown, target, wanted, (done, count) => {
      progress.textContent = t("cover_progress", { done, count });
    });
    if (!found) return;
    const most = Math.max(...found.fall.map(Math.abs)) || 1;
    const name = content.classes[target];
    const canvas = paint(document.createElement("canvas"), H, W, (i) => colour(found.fall[i] / most));
    const said = t("cover_result", { run: run.label, name, before: percent(found.before), after: percent(found.least), patch: found.side });
    Object.assign(canvas, { role: "img", ariaLabel: said });
    const image = Object.assign(paintImage(document.createElement("canvas"), state.shown), { ariaHidden: true });
    figures.push(element("figure", {}, element("div", { className: "pair" }, image, canvas), element("figcaption", {}, said)));
    $("covered").replaceChildren(...figures);
  }
}

// The steps of a network whose dense layers are convolutions; null if it has no such form.
function convolutional(run) {
  const made = [];
  for (const [i, step] of run.steps.slice(0, -1).entries()) {
    const { h, w, c } = run.maps[i];
    if (step.kind === "mean" && i < run.steps.length - 2) return null;
    if (step.kind === "mean" || step.kind === "flatten") continue;
    const behind = run.steps[i - 1]?.kind === "flatten";
    if (behind && step.kind !== "conv") return null;
    const before = behind ? run.maps[i - 1] : { h, w, c };
    const shape = [before.h, before.w, before.c, step.kernel?.shape[3]];
    made.push(behind ? { ...step, kernel: { ...step.kernel, shape } } : step);
  }
  return made;
}

const larger = { y: 0, x: 0, h: 2 * H, w: 2 * W, cell: null };

// The picture under the window: test images on a canvas, or the reader's own.
function scene() {
  if ($("scene").value === "photo" && photo) {
    const scale = Math.max((4 * W) / photo.width, (3 * H) / photo.height, 1 / 8);
    const [h, w] = [Math.round(photo.height * scale), Math.round(photo.width * scale)];
    const context = element("canvas", { width: w, height: h }).getContext("2d");
    context.drawImage(photo, 0, 0, w, h);
    return fromCanvas(context, h, w);
  }
  const whole = map(3 * H, 5 * W, C);
  whole.d.forEach((_, i) => {
    whole.d[i] = content.background[i % C];
  });
  const rightOnes = content.images.flatMap(([kind], i) => (kind === "right" ? [i] : []));
  rightOnes.slice(0, 8).forEach((i, k) => {
    const [top, left] = [Math.round((0.15 + 1.45 * (k % 2) + 0.1 * (k % 3)) * H), Math.round((0.05 + 1.25 * (k >> 1)) * W)];
    const image = testImage(i);
    for (let row = 0; row < H; row++) {
      whole.d.set(image.d.subarray(row * W * C, (row + 1) * W * C), ((top + row) * whole.w + left) * C);
    }
  });
  return whole;
}

async function showLarger() {
  const run = current();
  const steps = convolutional(run);
  if (!steps) return $("found").replaceChildren(text("larger_none"));
  const whole = scene();
  larger.y = Math.max(0, Math.min(whole.h - larger.h, larger.y));
  larger.x = Math.max(0, Math.min(whole.w - larger.w, larger.x));
  const part = sampleArea(whole);
  larger.ticket = (larger.ticket ?? 0) + 1;
  const { ticket } = larger;
  const maps = await finish(forward(steps, normalise(run, part)), () => ticket === larger.ticket);
  if (!maps) return;
  Object.assign(larger, { part, scores: maps.at(-1), field: run.steps.findLast((step) => step.field)?.field });
  paintLarger();
}

function sampleArea(whole) {
  const part = map(larger.h, larger.w, C);
  for (let row = 0; row < larger.h; row++) {
    const from = ((larger.y + row) * whole.w + larger.x) * C;
    part.d.set(whole.d.subarray(from, from + larger.w * C), row * larger.w * C);
  }
  return part;
}

// The picture, and over the middle of each window a square of its class's colour and number.
function paintLarger() {
  const { part, scores, field } = larger;
  const zoom = 8;
  const canvas = $("larger");
  Object.assign(canvas, { width: part.w * zoom, height: part.h * zoom });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(paintImage(document.createElement("canvas"), part), 0, 0, canvas.width, canvas.height);
  const [, , sh, sw] = field;
  const ends = [scores.h, scores.w].map((size, axis) => ([H, W][axis] + (axis ? larger.w : larger.h) - (size - 1) * [sh, sw][axis] - [H, W][axis]) / 2);
  larger.center = (i, j) => [ends[0] + i * sh, ends[1] + j * sw];
  const seen = Array.from({ length: scores.h * scores.w }, (_, k) => softmax(scores.d.subarray(k * scores.c, (k + 1) * scores.c)));
  larger.cell ??= seen.reduce((top, row, k) => (Math.max(...row) > Math.max(...seen[top]) ? k : top), 0);
  larger.cell = Math.min(larger.cell, seen.length - 1);
  context.textAlign = "center";
  context.textBaseline = "middle";
  seen.forEach((row, k) => {
    const [y, x] = larger.center(Math.floor(k / scores.w), k % scores.w).map((v) => v * zoom);
    const side = Math.min(sh, sw) * zoom - 4;
    const top = best(row);
    context.globalAlpha = 0.15 + 0.85 * row[top] ** 2;
    context.fillStyle = CLASSES[top % CLASSES.length];
    context.fillRect(x - side / 2, y - side / 2, side, side);
    context.fillStyle = "#111";
    context.font = `600 ${Math.min(side * 0.7, 20)}px system-ui, sans-serif`;
    context.fillText(top, x, y);
  });
  context.globalAlpha = 1;
  const [y, x] = larger.center(Math.floor(larger.cell / scores.w), larger.cell % scores.w);
  context.lineWidth = 4;
  context.strokeStyle = "#ec7a1c";
  context.strokeRect((x - W / 2) * zoom, (y - H / 2) * zoom, W * zoom, H * zoom);
  const row = seen[larger.cell];
  const used = [...new Set(seen.map(best))].sort((a, b) => a - b);
  $("found").replaceChildren(
    text("larger_found", { height: scores.h, width: scores.w, name: content.classes[best(row)], probability: percent(Math.max(...row)) }),
    element("ul", {}, ...used.map((k) => element("li", {}, element("i", { style: { backgroundColor: CLASSES[k % CLASSES.length] } }, `${k}`), content.classes[k]))),
  );
}

// Light colours that colour-blind readers tell apart; the number says the same.
const CLASSES = ["#7fc4e8", "#f2b45c", "#6fcfa8", "#f5e663", "#e79ac0", "#a9b4f0", "#f08a6b", "#c9ccd1", "#b7dd72", "#d2b48c"];

function listenToLarger() {
  const canvas = $("larger");
  let start = null;
  const scale = () => larger.w / canvas.getBoundingClientRect().width;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = { x: event.clientX, y: event.clientY, left: larger.x, top: larger.y, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!event.buttons || !start) return;
    const [dx, dy] = [event.clientX - start.x, event.clientY - start.y].map((v) => Math.round(v * scale()));
    start.moved ||= Math.abs(dx) + Math.abs(dy) > 1;
    Object.assign(larger, { x: start.left - dx, y: start.top - dy });
    if (start.moved) showLarger();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (start?.moved || !larger.scores) return;
    const area = canvas.getBoundingClientRect();
    const [y, x] = [event.clientY - area.top, event.clientX - area.left].map((v) => v * scale());
    const near = (k) => {
      const [a, b] = larger.center(Math.floor(k / larger.scores.w), k % larger.scores.w);
      return (a - y) ** 2 + (b - x) ** 2;
    };
    larger.cell = Array.from({ length: larger.scores.h * larger.scores.w }, (_, k) => k).reduce((a, b) => (near(b) < near(a) ? b : a));
    paintLarger();
  });
  canvas.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move) return;
    event.preventDefault();
    larger.y += 2 * move[0];
    larger.x += 2 * move[1];
    showLarger();
  });
}

// ---- The start ------------------------------------------------------------------------------------

// The largest difference of a logit from predict's, by the largest logit.
async function trust() {
  if (state.difference === undefined) {
    let [difference, most] = [0, 0];
    for (const run of runs) {
      for (const [i, logits] of run.logits_of_predict.entries()) {
        const found = await finish(predict(run, testImage(i)));
        logits.forEach((value, k) => {
          difference = Math.max(difference, Math.abs(value - found.logits[k]));
          most = Math.max(most, Math.abs(value));
        });
      }
    }
    state.difference = difference / most;
  }
  const others = runs.filter(({ dtype }) => dtype !== "float32").map(({ dtype }) => t("trust_dtype", { dtype }));
  $("trust").textContent = [t("trust", { count: content.images.length, difference: state.difference.toExponential(1) }), ...others].join(" ");
}

function start() {
  for (const name of Object.keys(content.texts)) $("language").append(element("option", { value: name }, content.texts[name]._name));
  $("language").value = language;
  $("language").addEventListener("change", () => {
    language = $("language").value;
    translate();
    show();
    later();
    if (larger.scores) paintLarger();
  });
  for (const [id, size] of [["dx", W], ["dy", H]]) Object.assign($(id), { min: -Math.round(size / 2), max: Math.round(size / 2), value: 0 });
  $("shade").value = content.background[0] > 0.5 ? 0 : 255;
  $(C === 3 ? "shade_label" : "colour_label").hidden = true;
  $("frame_label").hidden = content.extent === null;
  for (const id of ["dx", "dy", "turn", "noise"]) $(id).addEventListener("input", update);
  $("frame").addEventListener("change", drawn);
  $("clear").addEventListener("click", () => {
    clearPad(true);
    drawn();
  });
  $("invert").addEventListener("click", () => {
    pen.globalCompositeOperation = "difference";
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, pad.width, pad.height);
    pen.globalCompositeOperation = "source-over";
    drawn();
  });
  $("reset").addEventListener("click", () => {
    for (const id of ["dx", "dy", "turn", "noise"]) $(id).value = 0;
    update();
  });
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", (event) => moveBy(event, button.dataset.move.split(",").map(Number)));
  }
  $("slide").addEventListener("click", slide);
  $("cover").addEventListener("click", showCovered);
  $("scene").addEventListener("change", showLarger);
  addEventListener("resize", () => current().maps && showRow());
  listenToPad();
  listenToFiles();
  listenToLarger();
  translate();
  showTest(0);
}

// For tests, and for readers who open the console.
globalThis.playground = {
  state,
  runs,
  predict: (run, data) => finish(predict(runs[run], map(H, W, C, Float32Array.from(bytes(data), (value) => value / 255)))),
  occlusion: (run, i) => occlusion(runs[run], testImage(i), best(runs[run].probabilities)),
};

start();
