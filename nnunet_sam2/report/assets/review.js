// A person's word: accept, reject, take out, by class and case, saved the moment it is said.

const word = { marked: null, queue: Promise.resolve() };
// The labels that this page shows: what the server shows may be newer, once it has been loaded elsewhere.
const SEEN = Object.fromEntries(Object.entries(REVIEW.cases).map(([id, w]) => [id, w.label]));

const isOpen = (w) => Object.keys(w.open).length > 0;
const openCases = () => casesInOrder().filter((index) => wordOf(DATA.cases[index]) && isOpen(wordOf(DATA.cases[index])));

/** Return the classes of a case: open ones first, what is worth most on top. */
function classesByWorth(w) {
  const worth = (one) => w.open[one.value] ?? -1;
  return [...CLASSES].sort((a, b) => worth(b) - worth(a) || a.index - b.index);
}

async function ask(route, body) {
  let answer, value;
  if (body !== undefined) body = { ...body, seen: REVIEW.seen };
  try {
    answer = await fetch(route, body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    value = await answer.json();
  } catch {
    throw new Error("The review does not answer, and nothing was saved. Was it ended? Start it again with nnunet_sam2 review.");
  }
  if (!answer.ok) throw new Error(`Not saved: ${value.error}.`);
  return value;
}

/** Ask one thing after another, and say what went wrong. A function says when its turn has come what to ask; null is nothing. */
function askInTurn(route, body, then) {
  word.queue = word.queue.then(async () => {
    try {
      const asked = typeof body === "function" ? body() : body;
      if (asked === null) return;
      const state = await ask(route, asked);
      takeIn(state);
      const newer = state.newer || Object.entries(state.cases).some(([id, w]) => w.label !== SEEN[id]);
      trouble(newer ? "The run has newer labels than this page shows: load it again before you go on." : "");
      if (then) then(state, asked);
    } catch (error) {
      trouble(error.message);
      await ask("state").then(takeIn, () => {});
    }
  });
}

/** Say for a while what was done, with the way back. */
function passing(text) {
  const line = byId("passing") || document.body.appendChild(make("div", { id: "passing", role: "status" }));
  line.replaceChildren(make("span", { textContent: text }), make("button", { type: "button", textContent: "Undo (u)", onclick: undo }));
  line.hidden = false;
  clearTimeout(word.passing);
  word.passing = setTimeout(() => (line.hidden = true), 8000);
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

/** Take in what stands now; the order of the table stays, so that nothing jumps under the pointer. */
function takeIn(state) {
  const before = REVIEW.cases;
  REVIEW.cases = state.cases;
  REVIEW.undo = state.undo;
  REVIEW.seen = state.seen;
  DATA.cases.forEach((c, index) => {
    if (JSON.stringify(before[c.id]) === JSON.stringify(state.cases[c.id])) return;
    for (const row of document.querySelectorAll(`#table tr[data-case="${index}"]`)) {
      const found = table.rows.find((one) => one.index === index && (one.q ? one.q.v : null) === Number(row.dataset.value));
      row.replaceWith(makeRow(found || table.rows.find((one) => one.index === index)));
    }
  });
  markChosen();
  fillStates();
  drawProgress();
  drawWord();
}

function drawProgress() {
  const all = Object.values(REVIEW.cases);
  const done = all.filter((w) => !isOpen(w)).length;
  byId("progress").max = Math.max(1, all.length);
  byId("progress").value = done;
  byId("progress-text").textContent = `${done} of ${all.length} cases decided`;
  byId("undo").disabled = !REVIEW.undo;
  byId("undo").title = REVIEW.undo ? `Take back: ${REVIEW.undo}` : "There is nothing to take back";
}

function drawWord() {
  const c = viewer.index === null ? null : DATA.cases[viewer.index];
  const w = c && wordOf(c);
  byId("word").hidden = !w;
  if (!w) return;
  const order = classesByWorth(w);
  if (!order.some((one) => one.value === word.marked)) word.marked = order[0].value;
  const drawn = new Set(w.drawn);
  const worth = isOpen(w) ? `Worth a look: ${figure(w.worth)}. ` : "";
  byId("word-why").textContent = w.taken_out ? "Taken out: no round uses this case." : isOpen(w) ? `${worth}${w.why.join("; ")}.` : "Decided.";
  // In their own order, so that no button moves under the pointer.
  byId("word-classes").replaceChildren(...CLASSES.map((one) => {
    const row = make("li", { className: one.value === word.marked ? "marked" : "" });
    row.dataset.value = one.value;
    const say = w.accepted.includes(one.value) ? "accept" : w.rejected.includes(one.value) ? "reject" : "";
    const note = drawn.has(one.value) ? "drawn by hand" : w.again.includes(one.value) ? "newer label" : "";
    row.append(
      make("button", { type: "button", className: "which", title: "mark this class" }, make("i", { className: `dot ${one.style}` }), one.name, note ? make("small", { textContent: note }) : null),
      wordButton("accept", "Accept", "a", say === "accept", drawn.has(one.value)),
      wordButton("reject", "Reject", "r", say === "reject", drawn.has(one.value)),
    );
    if (one.value === word.marked) row.setAttribute("aria-current", "true");
    return row;
  }));
  const list = byId("word-classes"), marked = list.querySelector(".marked");
  // Inside its own list: the page does not move.
  if (marked) list.scrollTop = Math.max(0, marked.offsetTop - list.offsetTop - list.clientHeight / 2);
  const out = document.querySelector('#word [data-word="take out"]');
  out.setAttribute("aria-pressed", String(w.taken_out));
  out.firstChild.textContent = w.taken_out ? "Bring the case back " : "Take the case out ";
  byId("word-edit").querySelector("pre").textContent = [`nnunet_sam2 review -d ${REVIEW.dataset} --run ${REVIEW.run} --export ${c.id}`, `nnunet_sam2 review -d ${REVIEW.dataset} --import FILE`].join("\n");
}

function wordButton(decision, text, key, pressed, disabled) {
  const button = make("button", { type: "button", disabled }, text, make("kbd", { textContent: key }));
  button.dataset.word = decision;
  button.setAttribute("aria-pressed", String(pressed));
  return button;
}

/** Return what to ask to say something of classes, or of the case (no classes); said again, it is taken back. */
function decisionOn(c, decision, classes) {
  const w = wordOf(c);
  const free = w ? classes.filter((value) => !w.drawn.includes(value)) : [];
  if (!w || (classes.length && !free.length)) return null;
  const said = decision === "take out" ? w.taken_out : free.every((value) => w[`${decision}ed`].includes(value) && !w.again.includes(value)) && !w.taken_out;
  return { case: c.id, decision: said ? "clear" : decision, classes: free, label: SEEN[c.id] ?? "" };
}

/** Say something of classes, of the case (no classes), or of the marked class (null). */
function say(decision, classes, { byKey = false } = {}) {
  const c = DATA.cases[viewer.index];
  if (!c) return;
  if (byKey) {
    const place = byId("word").getBoundingClientRect(), picture = byId("stage").getBoundingClientRect();
    const middle = (picture.top + picture.bottom) / 2;
    if (c.px && !viewer.pictures) return trouble(`The pictures of ${c.id} are not shown yet; nothing was decided.`);
    if (place.top < 0 || place.bottom > innerHeight + 1 || middle < 0 || middle > innerHeight) {
      // Nothing is decided about what is not in view: the first press shows it.
      bringIntoView();
      const now = byId("word").getBoundingClientRect();
      if (now.top < 0 || now.bottom > innerHeight) byId("word").scrollIntoView({ block: "nearest" });
      return trouble(`${c.id} is in view now; nothing was decided. Press the key again to decide.`);
    }
  }
  // A key may be quicker than the answer to the one before: it is for the class that is marked then, of this case alone.
  const body = classes ? decisionOn(c, decision, classes) : () => (DATA.cases[viewer.index] === c ? decisionOn(c, decision, [word.marked]) : null);
  askInTurn("decide", body, (state, asked) => {
    const names = CLASSES.filter((one) => asked.classes.includes(one.value)).map((one) => one.name).join(", ");
    passing(`${c.id}: ${asked.decision === "clear" ? "taken back" : asked.decision} ${names}`);
    if (asked.decision !== "clear") goOn(c);
  });
}

/** Mark the next open class, or open the next open case. */
function goOn(c) {
  if (viewer.index === null || DATA.cases[viewer.index] !== c) return;
  const w = wordOf(c);
  if (isOpen(w)) {
    word.marked = classesByWorth(w)[0].value;
    return drawWord();
  }
  const order = casesInOrder(), open = new Set(openCases());
  const at = order.indexOf(viewer.index);
  const next = [...order.slice(at + 1), ...order.slice(0, Math.max(0, at))].find((index) => open.has(index));
  if (next !== undefined) showCase(next);
}

function mark(by) {
  const c = viewer.index === null ? null : DATA.cases[viewer.index];
  if (!c || !wordOf(c)) return;
  const order = CLASSES.map((one) => one.value);
  word.marked = order[(order.indexOf(word.marked) + by + order.length) % order.length];
  drawWord();
}

function undo() {
  if (!REVIEW.undo) return;
  askInTurn("undo", {}, (state) => {
    passing(`taken back: ${state.case}`);
    const index = DATA.cases.findIndex((c) => c.id === state.case);
    if (index >= 0 && index !== viewer.index) showCase(index);
  });
}

const everyClass = () => CLASSES.map((one) => one.value);

byId("word").addEventListener("click", (event) => {
  const row = event.target.closest("li");
  if (row) word.marked = Number(row.dataset.value);
  const button = event.target.closest("[data-word]");
  if (!button) return drawWord();
  const decision = button.dataset.word;
  say(decision, decision === "take out" ? [] : button.dataset.all ? everyClass() : [word.marked]);
});
byId("undo").addEventListener("click", undo);

Object.assign(moreKeys, {
  a: () => say("accept", null, { byKey: true }),
  r: () => say("reject", null, { byKey: true }),
  A: () => say("accept", everyClass(), { byKey: true }),
  R: () => say("reject", everyClass(), { byKey: true }),
  x: () => say("take out", [], { byKey: true }),
  u: undo,
  ",": () => mark(-1),
  ".": () => mark(1),
});
onOpen.push(() => {
  word.marked = null;
  drawWord();
});
// Another tab may have decided in the meantime, and the page follows it.
setInterval(() => {
  if (document.hidden) return;
  word.queue = word.queue.then(async () => {
    try {
      if ((await ask("seen")).seen !== REVIEW.seen) takeIn(await ask("state"));
    } catch (error) {
      trouble(error.message);
    }
  });
}, 2000);
document.addEventListener("visibilitychange", () => document.hidden || askInTurn("state"));
drawProgress();
