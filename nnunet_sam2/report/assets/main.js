// What happens when: filters, sorting, keys, the address.

const wide = matchMedia("(min-width: 980px)");
const fill = (select, options) => select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));

fill(byId("filter-class"), [["", CLASSES.length > 1 ? "worst class" : "class"], ...CLASSES.map((one) => [one.value, one.name])]);
function fillStates() {
  fill(byId("filter-state"), STATES.map(([name, text, fits]) => [name, `${text} (${DATA.cases.filter(fits).length})`]));
  byId("filter-state").value = choice.state;
}
fillStates();
byId("filter-class").addEventListener("change", (event) => choose({ value: event.target.value === "" ? null : Number(event.target.value) }));
byId("filter-state").addEventListener("change", (event) => choose({ state: event.target.value }));
byId("filter-text").addEventListener("input", (event) => choose({ text: event.target.value }));
byId("each-class").addEventListener("change", (event) => choose({ each: event.target.checked }));

function choose(values) {
  Object.assign(choice, values);
  redrawTable();
}

document.querySelector("#table thead").addEventListener("click", (event) => {
  const head = event.target.closest("th[data-sort]");
  if (!head) return;
  const sort = head.dataset.sort;
  choose(sort === choice.sort ? { down: !choice.down } : { sort, down: sort === "change" || sort === "worth" });
});

document.querySelector("#table tbody").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row) openCase(Number(row.dataset.case));
});

for (const button of document.querySelectorAll(".first [data-case]")) {
  button.addEventListener("click", () => {
    openCase(Number(button.dataset.case));
    bringIntoView();
  });
}

// Where the list scrolls by itself, rows follow by themselves; on a phone they would keep the page's end out of reach.
new IntersectionObserver(([entry]) => {
  if (entry.isIntersecting && table.drawn < table.rows.length && wide.matches) drawRows(MORE_ROWS);
}, { root: document.querySelector(".list"), rootMargin: "500px" }).observe(byId("more"));

byId("close").addEventListener("click", closeCase);
byId("before").addEventListener("click", () => stepCase(-1));
byId("next").addEventListener("click", () => stepCase(1));
byId("tab-slices").addEventListener("click", () => chooseMode("slices"));
byId("tab-surface").addEventListener("click", () => chooseMode("surface"));
byId("slider").addEventListener("input", (event) => {
  viewer.slice = Number(event.target.value);
  drawStage();
});
byId("viewer").addEventListener("click", (event) => {
  const button = event.target.closest("[data-toggle], [data-class]");
  if (!button) return;
  const { toggle: name, class: index } = button.dataset;
  if (name) toggle(name);
  else toggleClass(Number(index));
  byId("viewer").querySelector(name ? `[data-toggle="${name}"]` : `[data-class="${index}"]`).focus();
});
byId("slice").addEventListener("wheel", (event) => {
  event.preventDefault();
  if (event.ctrlKey) return relook(LOOKS[event.deltaY < 0 ? "in" : "out"]);  // so do pinches on a touchpad
  stepSlice(Math.sign(event.deltaY));
}, { passive: false });

byId("looks").addEventListener("click", (event) => {
  const button = event.target.closest("[data-look]");
  if (button && viewer.pictures) relook(LOOKS[button.dataset.look]);
});
// A mouse that drags changes level (up, down) and window (left, right); with shift, or the middle button, it moves the picture.
byId("slice").addEventListener("pointerdown", (event) => {
  if (event.pointerType === "touch" || event.button > 1 || !viewer.pictures) return;
  event.preventDefault();
  byId("slice").focus({ preventScroll: true });
  byId("slice").setPointerCapture(event.pointerId);
});
byId("slice").addEventListener("pointermove", (event) => {
  if (!byId("slice").hasPointerCapture(event.pointerId) || event.pointerType === "touch") return;
  const { movementX: dx, movementY: dy } = event;
  const { clientWidth: width, clientHeight: height } = byId("slice");
  const move = ({ x, y, zoom }) => ({ x: x - dx / width / zoom, y: y - dy / height / zoom });
  relook(event.shiftKey || event.buttons === 4 ? move : ({ level, window }) => ({ level: level + dy, window: window + 2 * dx }));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  // Caps lock makes no capital: what is meant for one class must not be said of all.
  const key = event.shiftKey || event.key.length > 1 ? event.key : event.key.toLowerCase();
  // A person's word is said once, however long its key is held.
  if (event.repeat && key in moreKeys) return;
  const anywhere = { j: () => stepSlice(1), k: () => stepSlice(-1), n: () => stepCase(1), p: () => stepCase(-1), Escape: closeCase, v: () => chooseMode(viewer.mode === "surface" ? "slices" : "surface") };
  for (const [name, look] of [["+", "in"], ["=", "in"], ["-", "out"], ["0", "reset"], ["]", "brighter"], ["[", "darker"], ["}", "narrower"], ["{", "wider"]]) anywhere[name] = () => viewer.pictures && viewer.mode === "slices" && relook(LOOKS[look]);
  for (let n = 1; n <= 9; n++) anywhere[n] = () => casesInOrder()[n - 1] !== undefined && showCase(casesInOrder()[n - 1]);
  Object.assign(anywhere, moreKeys);
  for (const [name, letter] of TOGGLES) anywhere[letter] = () => viewer.pictures && toggle(name);
  // Arrows belong to the page, but in the viewer.
  const inside = { ArrowUp: () => stepSlice(-1), ArrowDown: () => stepSlice(1), ArrowLeft: () => stepCase(-1), ArrowRight: () => stepCase(1), Home: () => stepSlice(-1e6), End: () => stepSlice(1e6) };
  const action = anywhere[key] || (event.target.closest("#viewer") && inside[key]);
  if (!action || (viewer.index === null && !["n", "u"].includes(key) && !/^[1-9]$/.test(key))) return;
  event.preventDefault();
  action();
});

let resized = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(resized);
  resized = requestAnimationFrame(drawStage);
}).observe(byId("stage"));

addEventListener("beforeprint", () => {
  drawRows(table.rows.length);
  for (const details of document.querySelectorAll("details")) details.open = true;
});

function openFromAddress() {
  const [, name] = location.hash.match(/^#case=(.*)$/) || [];
  if (!name) return;
  let id = name;
  try {
    id = decodeURIComponent(name);
  } catch {
    return;
  }
  const index = DATA.cases.findIndex((c) => c.id === id);
  if (index < 0) return;
  if (index !== viewer.index) openCase(index, { focus: false });
  bringIntoView();
}

addEventListener("hashchange", openFromAddress);
for (const canvas of document.querySelectorAll(".first .thumb")) watchThumb(canvas);
redrawTable();
openFromAddress();
// A wide page has room for a case beside the list: the first of it.
if (viewer.index === null && table.rows.length && wide.matches) openCase(table.rows[0].index, { focus: false });
