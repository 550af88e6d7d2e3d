// The table of cases: rows, order, filters, thumbnails.

const FIRST_ROWS = 100;
const MORE_ROWS = 200;
const THUMB = 96;

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};
const figure = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
/** What a person may say and has said, where the page is served for a review; null elsewhere. */
const REVIEW = DATA.review ?? null;
const wordOf = (c) => (REVIEW && REVIEW.cases[c.id]) || null;
const known = (quality) => (quality.m === null ? quality.e : quality.m);

const STATES = [
  ["unlabelled", "unlabelled cases", (c) => !c.human],
  ["all", "all cases", () => true],
  ["look", "to look at", (c) => !c.human && (c.out || c.q.some((q) => q.x || q.g || (known(q) !== null && known(q) < 0.7)))],
  ["out", "left out", (c) => c.out],
  ["distrusted", "a class distrusted", (c) => c.q.some((q) => q.x)],
  ["human", "with human labels", (c) => c.human],
];
if (REVIEW) STATES.push(["open", "still to decide", (c) => wordOf(c) && Object.keys(wordOf(c).open).length], ["decided", "decided", (c) => wordOf(c) && !Object.keys(wordOf(c).open).length]);

const choice = { text: "", value: null, state: "unlabelled", each: false, sort: REVIEW ? "worth" : "dice", down: Boolean(REVIEW) };

const SORTS = {
  id: (row) => row.c.id,
  class: (row) => (row.q ? CLASS_OF.get(row.q.v).index : 0),
  dice: (row) => (row.q && known(row.q) !== null ? known(row.q) : null),
  worth: (row) => worthOf(row.c, row.q),
  bound: (row) => (row.q ? row.q.l : null),
  change: (row) => (row.q ? row.q.d : null),
  conf: (row) => row.c.conf,
};

/** Return the rows to show: a case's worst class (by what is sorted by), a chosen class, or one row a class. */
function rowsShown() {
  const [, , fits] = STATES.find(([name]) => name === choice.state);
  const text = choice.text.trim().toLowerCase();
  const rows = [];
  DATA.cases.forEach((c, index) => {
    if (!fits(c)) return;
    if (text && !`${c.id}\n${c.out || ""}`.toLowerCase().includes(text)) return;
    const found = choice.value === null ? c.q : c.q.filter((q) => q.v === choice.value);
    if (choice.each) found.forEach((q) => rows.push({ c, index, q }));
    else rows.push({ c, index, q: worstOf(c, found) });
  });
  const key = SORTS[choice.sort];
  const sign = choice.down ? -1 : 1;
  // Left-out cases are the worst there are; what is not known comes last, whichever way round.
  const rank = (row) => (choice.sort === "dice" && row.c.out ? -1 : key(row));
  return rows.sort((a, b) => {
    const x = rank(a), y = rank(b);
    if (x === null || y === null) return (x === null) - (y === null) || (a.c.conf ?? 2) - (b.c.conf ?? 2);
    const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return sign * order || a.c.id.localeCompare(b.c.id, undefined, { numeric: true });
  });
}

function worstOf(c, qualities) {
  if (choice.sort === "worth") return qualities.reduce((best, q) => (best === null || (worthOf(c, q) ?? -1) > (worthOf(c, best) ?? -1) ? q : best), null);
  const by = choice.sort === "change" ? (q) => (q.d === null ? null : -q.d) : choice.sort === "bound" ? (q) => q.l : known;
  let worst = null;
  for (const q of qualities) {
    if (worst === null || by(worst) === null || (by(q) !== null && by(q) < by(worst))) worst = q;
  }
  return worst;
}

/** Return what looking at a class is worth, of a case where none is chosen; null where nothing is open. */
function worthOf(c, q) {
  const w = wordOf(c);
  return w && q && q.v in w.open ? w.open[q.v] : null;
}

const levelOf = (dice) => (dice === null ? "note" : dice < DATA.least ? "bad" : dice < 0.7 ? "look" : "good");

function makeRow({ c, index, q }) {
  const row = make("tr");
  row.dataset.case = index;
  row.dataset.value = q ? q.v : "";
  const thumb = make("canvas", { className: "thumb", width: THUMB, height: THUMB });
  thumb.dataset.thumb = index;
  thumb.setAttribute("aria-hidden", "true");
  // Where it must, an id breaks behind an underscore or hyphen, not inside a number.
  const parts = c.id.split(/(?<=[_-])/);
  const name = make("button", { type: "button", className: "open" }, ...parts.flatMap((part) => [part, make("wbr", {})]));
  const dice = q ? known(q) : null;
  row.append(
    make("td", { className: "c-thumb" }, thumb),
    make("td", { className: "c-case" }, name, make("span", { className: "in-case", textContent: q ? CLASS_OF.get(q.v).name : "" }), chipOf(c, q), c.out ? make("span", { className: "why", textContent: c.out, title: c.out }) : null, c.word && !REVIEW ? make("span", { className: "why", textContent: c.word }) : null),
    make("td", { className: "c-class", textContent: q ? CLASS_OF.get(q.v).name : "–" }),
    REVIEW ? make("td", { className: "c-worth", textContent: wordOf(c) ? figure(worthOf(c, q)) : "" }) : "",
    make("td", { className: "c-dice" }, qualityBar(dice, q)),
    make("td", { className: "c-bound", textContent: q && q.l !== null ? figure(q.l) : "" }),
    make("td", { className: "c-change", textContent: q ? figure(q.d, 3) : "–" }),
    make("td", { className: "c-conf", textContent: figure(c.conf) }),
  );
  watchThumb(thumb);
  return row;
}

function chipOf(c, q) {
  const say = (level, text) => make("span", { className: `chip ${level}`, textContent: text });
  const w = wordOf(c);
  if (w && w.taken_out) return say("bad", "taken out");
  if (w && w.drawn.length) return say("good", "drawn by hand");
  if (w && w.accepted.length + w.rejected.length) {
    const parts = [["accepted", w.accepted.length], ["rejected", w.rejected.length]].filter(([, count]) => count);
    return say(w.rejected.length ? "look" : "good", CLASSES.length === 1 ? parts[0][0] : parts.map(([what, count]) => `${count} ${what}`).join(", "));
  }
  if (c.out) return say("bad", "left out");
  if (q && q.x) return say("look", "class distrusted");
  if (q && q.g) return say("look", "class missing");
  if (c.human) return say("note", c.held ? "human label, held out" : "human label");
  return null;
}

function qualityBar(dice, q) {
  const track = make("span", { className: `track ${levelOf(dice)}` });
  if (dice !== null) {
    const bar = make("i");
    bar.style.width = `${100 * dice}%`;
    track.append(bar);
    if (q.l !== null && q.m === null) {
      const bound = make("u", { title: `SAM 2’s label: at least ${figure(q.l)} in ${Math.round(100 * q.c)} % of cases${q.p === null ? "" : `, proven for ${Math.round(100 * q.p)} %`}` });
      bound.style.left = `${100 * q.l}%`;
      track.append(bound);
    }
  }
  return make("span", { className: "quality" }, make("b", { textContent: figure(dice) }), track);
}

const table = { rows: [], drawn: 0, chosen: null };

function redrawTable() {
  table.rows = rowsShown();
  table.drawn = 0;
  document.querySelector("#table tbody").replaceChildren();
  drawRows(FIRST_ROWS);
  const cases = new Set(table.rows.map((row) => row.index)).size;
  document.getElementById("count").textContent = `${cases} of ${DATA.cases.length} cases`;
  for (const head of document.querySelectorAll("#table th[data-sort]")) {
    if (head.dataset.sort === choice.sort) head.setAttribute("aria-sort", choice.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function drawRows(count) {
  const part = document.createDocumentFragment();
  for (const row of table.rows.slice(table.drawn, table.drawn + count)) part.append(makeRow(row));
  table.drawn = Math.min(table.rows.length, table.drawn + count);
  document.querySelector("#table tbody").append(part);
  markChosen();
  const left = table.rows.length - table.drawn;
  const more = make("button", { type: "button", textContent: `Show more rows (${left.toLocaleString("en")} left)` });
  more.addEventListener("click", () => drawRows(MORE_ROWS));
  document.getElementById("more").replaceChildren(left ? more : table.rows.length ? "" : "No case fits.");
}

function markChosen() {
  for (const row of document.querySelectorAll("#table tbody tr")) {
    const chosen = Number(row.dataset.case) === table.chosen;
    row.classList.toggle("chosen", chosen);
    if (chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
}

/** Return the cases in the order of the table, each once. */
const casesInOrder = () => [...new Set(table.rows.map((row) => row.index))];

// Thumbnails are drawn when they come into sight, one after another.
const thumbQueue = [];
let thumbBusy = false;
const thumbWatcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    thumbWatcher.unobserve(target);
    thumbQueue.push(target);
  }
  drawThumbs();
}, { rootMargin: "200px" });

function watchThumb(canvas) {
  if (DATA.cases[Number(canvas.dataset.thumb)].px) thumbWatcher.observe(canvas);
}

async function drawThumbs() {
  if (thumbBusy) return;
  thumbBusy = true;
  while (thumbQueue.length) {
    const canvas = thumbQueue.shift();
    if (!canvas.isConnected) continue;
    try {
      const pictures = await picturesOf(Number(canvas.dataset.thumb));
      const [width, height] = sizeWithin(pictures, THUMB, THUMB);
      const show = { last: true, first: !pictures.planes.last };
      drawSlice(canvas, pictures, pictures.fullest, { show, hidden: new Set(), width, height, line: 1 });
      canvas.classList.add("drawn");
    } catch {
      canvas.classList.add("broken");
    }
  }
  thumbBusy = false;
}

/** Return the largest size within a box that keeps the proportions in millimetres. */
function sizeWithin({ rows, cols, header }, width, height) {
  const [mmHigh, mmWide] = [rows * header.pixel_mm[0], cols * header.pixel_mm[1]];
  const scale = Math.min(width / mmWide, height / mmHigh);
  return [Math.max(1, Math.round(mmWide * scale)), Math.max(1, Math.round(mmHigh * scale))];
}
