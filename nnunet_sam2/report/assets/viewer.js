// The viewer of one case: slices, 3D, what is drawn, what is known.

const viewer = {
  index: null, pictures: null, slice: 0, mode: "slices",
  show: { first: true, last: true, human: true, confidence: false, changed: false },
  hidden: new Set(),
  look: { ...PLAIN },
};

const TOGGLES = [
  ["last", "l", (c) => (c.human ? "nnU-Net, held out" : "last label"), "M1 5H21", "2.4", ""],
  ["first", "f", (c) => (c.human ? "SAM 2, from other patients" : "first label (SAM 2)"), "M1 5H21", "1.4", "4 3"],
  ["human", "h", () => "human label", "M1 5H21", "2", "2 3"],
  ["changed", "d", () => "changed voxels", "", "", ""],
  ["confidence", "c", () => "low confidence", "", "", ""],
];

/** What else happens when a case is opened, and what other keys do. */
const onOpen = [], moreKeys = {};

const byId = (id) => document.getElementById(id);

/** Bring the open case to where it is seen, if it is not. */
function bringIntoView() {
  const box = byId("stage").getBoundingClientRect();
  const last = (REVIEW && !byId("word").hidden ? byId("word") : byId("stage")).getBoundingClientRect();
  if (box.top < 0 || last.bottom > innerHeight) {
    byId("viewer").scrollTop = 0;
    document.querySelector(".cases").scrollIntoView({ block: "start" });
  }
}

/** Return the height for a picture under which the panel of decisions still fits, in a review; else a share of the window. */
function stageHeight() {
  const rest = byId("word") && !byId("word").hidden ? byId("word") : null;
  if (!rest) return Math.max(240, Math.min(innerHeight * 0.58, 640));
  const box = byId("stage").getBoundingClientRect();
  const above = box.top - byId("viewer").getBoundingClientRect().top + byId("viewer").scrollTop;
  const below = rest.getBoundingClientRect().bottom - box.bottom;
  const start = wide.matches ? document.querySelector(".cases").getBoundingClientRect().top + scrollY : 0;
  // Far down on the page the viewer is brought to the window's top.
  return Math.max(200, Math.min(innerHeight - (start < innerHeight / 3 ? start : 12) - above - below - 12, 760));
}

/** Zoom, level and window by steps. */
function relook(change) {
  const look = viewer.look;
  Object.assign(look, change(look));
  look.zoom = Math.max(1, Math.min(12, look.zoom));
  look.window = Math.max(8, Math.min(1020, look.window));
  look.level = Math.max(-127, Math.min(382, look.level));
  const edge = 0.5 / look.zoom;
  look.x = Math.max(edge, Math.min(1 - edge, look.x));
  look.y = Math.max(edge, Math.min(1 - edge, look.y));
  drawStage();
}

const LOOKS = {
  in: ({ zoom }) => ({ zoom: zoom * 1.25 }), out: ({ zoom }) => ({ zoom: zoom / 1.25 }), reset: () => PLAIN,
  darker: ({ level }) => ({ level: level + 12 }), brighter: ({ level }) => ({ level: level - 12 }),
  narrower: ({ window }) => ({ window: window / 1.15 }), wider: ({ window }) => ({ window: window * 1.15 }),
};

async function openCase(index, { focus = true } = {}) {
  const c = DATA.cases[index];
  viewer.index = table.chosen = index;
  viewer.pictures = null;
  markChosen();
  byId("viewer").hidden = false;
  byId("case-name").textContent = c.id;
  byId("case-state").replaceChildren(...stateOf(c));
  byId("case-note").textContent = "";
  byId("story").hidden = true;
  drawCaseTable(c);
  for (const opened of onOpen) opened(c);
  const hash = `#case=${encodeURIComponent(c.id)}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
  if (focus) byId("slice").focus({ preventScroll: true });
  if (!c.px) return showMessage(c.why ? `This case’s files could not be read: ${c.why}` : "This case has no pictures in this file.");
  showMessage("");
  try {
    const pictures = await picturesOf(index);
    if (viewer.index !== index) return;
    viewer.pictures = pictures;
    viewer.slice = pictures.fullest;
    viewer.look = { ...PLAIN };
    byId("slider").max = byId("slice").ariaValueMax = pictures.count - 1;
    byId("slider").disabled = pictures.count < 2;
    byId("case-note").textContent = noteOf(pictures);
    drawToggles(c);
    drawCase();
    const story = await pictures.story();
    if (viewer.index !== index) return;
    byId("story").hidden = !story;
    byId("story").querySelector("pre").textContent = story;
  } catch (error) {
    showMessage(`The pictures of this case could not be shown (${error.message}); a newer browser may help.`);
  }
}

function closeCase() {
  const before = document.querySelector(`#table tr[data-case="${viewer.index}"] .open`);
  viewer.index = table.chosen = viewer.pictures = null;
  byId("viewer").hidden = true;
  markChosen();
  history.replaceState(null, "", "#cases");
  if (before) before.focus();
}

function stateOf(c) {
  const chip = chipOf(c, c.q.find((q) => q.x) || c.q.find((q) => q.g) || null);
  const names = (found) => found.map((q) => CLASS_OF.get(q.v).name).join(", ");
  const distrusted = c.q.filter((q) => q.x), missing = c.q.filter((q) => q.g);
  let text = c.human ? "Measured: Dice of labels that this human label had no part in." : c.out ? `Not trained on: ${c.out}.` : DATA.trained ? "Trained on." : "No round has been trained yet.";
  if (distrusted.length && !c.out) text += ` Not learnt from: ${names(distrusted)}, because the estimated Dice is below ${DATA.least}.`;
  if (c.word && !REVIEW) text += ` People’s word: ${c.word}.`;
  if (missing.length) text += ` ${names(missing)}: every labelled case shows it, this label does not.`;
  return chip ? [chip, text] : [text];
}

function noteOf({ header }) {
  const parts = [];
  if (header.step > 1) parts.push(`every ${header.step}${header.step === 2 ? "nd" : header.step === 3 ? "rd" : "th"} slice is shown`);
  if (header.shrunk) parts.push("slices are shrunk");
  if (!header.whole) parts.push("cut to the surroundings of the labels");
  if (header.channel) parts.push(`channel ${header.channel}`);
  const text = parts.join("; ");
  return text ? `${text[0].toUpperCase()}${text.slice(1)}.` : "";
}

function drawCaseTable(c) {
  const measured = c.human;
  const heads = measured ? ["Class", "Dice, measured", "SAM 2 voxels"] : ["Class", "Estimate", "SAM 2’s", "At least", "Change", "Voxels"];
  const cellsOf = (q) => (measured ? [figure(q.m, 3), q.n] : [figure(q.e), figure(q.s), q.l === null ? "–" : figure(q.l), figure(q.d, 3), q.n.toLocaleString("en")]);
  const body = c.q.map((q) => {
    const one = CLASS_OF.get(q.v);
    const head = make("th", { scope: "row" }, make("i", { className: `dot ${one.style}` }), one.name);
    return make("tr", {}, head, ...cellsOf(q).map((text) => make("td", { textContent: text })));
  });
  const top = make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col", textContent: text }))));
  byId("case-table").replaceChildren(top, make("tbody", {}, ...body));
}

function drawToggles(c) {
  const { planes } = viewer.pictures;
  const there = { ...planes, changed: planes.first && planes.last };
  byId("toggles").replaceChildren(...TOGGLES.filter(([name]) => there[name] || !["human", "last"].includes(name)).map(([name, key, label, path, width, dash]) => {
    const button = make("button", { type: "button", disabled: !there[name], title: `key ${key}` }, sample(name, path, width, dash), label(c));
    button.setAttribute("aria-pressed", String(Boolean(viewer.show[name])));
    button.setAttribute("aria-keyshortcuts", key);
    button.dataset.toggle = name;
    return button;
  }));
  byId("classes").replaceChildren(...CLASSES.map((one) => {
    const dot = make("i", { className: "dot" });
    dot.style.background = brightOf(one.index);
    const button = make("button", { type: "button" }, dot, one.name);
    button.setAttribute("aria-pressed", String(!viewer.hidden.has(one.index)));
    button.dataset.class = one.index;
    return button;
  }));
}

/** Draw what a toggle stands for: a line as in the picture, or a tint. */
function sample(name, path, width, dash) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const shape = document.createElementNS(space, path ? "path" : "rect");
  const set = (values) => Object.entries(values).forEach(([key, value]) => shape.setAttribute(key, value));
  svg.setAttribute("viewBox", "0 0 22 10");
  svg.setAttribute("aria-hidden", "true");
  if (path) set({ d: path, fill: "none", stroke: "currentColor", "stroke-width": width, "stroke-dasharray": dash });
  else set({ x: 4, y: 0, width: 14, height: 10, rx: 3, fill: `rgb(${(name === "changed" ? CHANGED : DOUBT).join(" ")})` });
  svg.append(shape);
  return svg;
}

function toggle(name) {
  viewer.show[name] = !viewer.show[name];
  drawToggles(DATA.cases[viewer.index]);
  drawCase();
}

function toggleClass(index) {
  if (!viewer.hidden.delete(index)) viewer.hidden.add(index);
  drawToggles(DATA.cases[viewer.index]);
  drawCase();
}

function chooseMode(mode) {
  viewer.mode = mode;
  for (const name of ["slices", "surface"]) byId(`tab-${name}`).setAttribute("aria-selected", String(mode === name));
  if (viewer.pictures) drawCase();
}

function drawCase() {
  const surface = viewer.mode === "surface";
  byId("slice").hidden = byId("slider").hidden = byId("slice-name").hidden = surface;
  byId("surface").hidden = byId("compass").hidden = !surface;
  byId("looks").hidden = surface;
  showMessage("");
  setSides(surface ? null : viewer.pictures.header.letters);
  if (!surface) return drawStage();
  showSurface(byId("surface"), viewer.pictures, viewer).catch((error) => showMessage(error.message));
}

function drawStage() {
  const { pictures, slice } = viewer;
  if (!pictures || viewer.mode !== "slices") return;
  const [width, height] = sizeWithin(pictures, byId("stage").clientWidth, stageHeight());
  const ratio = Math.min(2, devicePixelRatio || 1);
  const canvas = byId("slice");
  drawSlice(canvas, pictures, slice, { ...viewer, width: Math.round(width * ratio), height: Math.round(height * ratio), line: ratio });
  canvas.style.width = `${width}px`;
  const { header } = pictures;
  const name = header.plane === "picture" ? "" : `${header.plane} slice ${header.slices[slice] + 1} of ${header.file_slices}`;
  byId("slice-name").textContent = name;
  canvas.ariaValueNow = String(slice);
  canvas.ariaValueText = name;
  byId("slider").value = slice;
}

function setSides(letters) {
  ["left", "right", "top", "bottom"].forEach((side, n) => {
    document.querySelector(`.side.${side}`).textContent = letters ? letters[n] : "";
  });
}

function showMessage(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

function stepSlice(by) {
  if (!viewer.pictures) return;
  if (viewer.mode === "surface") return turnSurface((by * Math.PI) / 12);
  viewer.slice = Math.max(0, Math.min(viewer.pictures.count - 1, viewer.slice + by));
  drawStage();
}

function stepCase(by) {
  const order = casesInOrder();
  if (!order.length) return;
  const at = order.indexOf(viewer.index);
  const next = at < 0 ? 0 : Math.max(0, Math.min(order.length - 1, at + by));
  if (order[next] !== viewer.index) showCase(order[next]);
}

/** Open a case and bring its row into sight. */
function showCase(index) {
  openCase(index);
  bringIntoView();
  const row = () => document.querySelector(`#table tr[data-case="${index}"]`);
  while (table.drawn < table.rows.length && !row()) drawRows(MORE_ROWS);
  if (row()) row().scrollIntoView({ block: "nearest" });
}
