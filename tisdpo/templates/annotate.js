"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["chosen", "rejected"], CYCLE = [null, 1, 2, -1, -2], LETTERS = { a: -2, s: -1, d: 0, f: 1, g: 2 };
const KEY = ["tisdpo", page.version, page.set, page.pairs.map(pair => pair.row).join(",")].join("/");
const $ = id => document.getElementById(id);
const shown = rating => rating > 0 ? "+" + rating : rating < 0 ? "−" + -rating : "0";

// State: what is kept, and what only this visit knows

const fresh = () => ({
  rater: "", at: 0,
  pairs: page.pairs.map(pair => ({ done: false, ...Object.fromEntries(SIDES.map(side => [side, pair[side].map(() => null)])) })),
});
let state = fresh(), current = { side: "chosen", i: 0 }, past = [];

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY));
    if (kept) state = kept;
    else document.querySelector(".how").open = true; // on the first visit
  } catch { unkept(); }
}

function keep() {
  try { localStorage.setItem(KEY, JSON.stringify(state)); } catch { unkept(); }
}

function unkept() { say("This browser keeps nothing for this page: export before you close it."); }

function say(text, good = false) {
  $("message").textContent = text;
  $("message").classList.toggle("good", good);
}

const pair = () => state.pairs[state.at];
const get = (side, i) => pair()[side][i];

function change(act) {
  past.push(JSON.stringify({ at: state.at, current, pair: pair() }));
  act(pair());
  keep();
}

function rate(value) {
  const { side, i } = current;
  change(pair => { pair[side][i] = value; });
  paint(side, i);
  refresh();
  $("said").textContent = label(side, i);
}

function undo() {
  if (!past.length) return;
  const before = JSON.parse(past.pop());
  state.pairs[before.at] = before.pair;
  state.at = before.at;
  current = before.current;
  keep();
  draw();
  focusToken();
  $("said").textContent = "undone; " + label(current.side, current.i);
}

function setDone(done) {
  if (pair().done !== done) change(pair => { pair.done = done; });
}

function go(at) {
  state.at = Math.max(0, Math.min(page.pairs.length - 1, at));
  current = { side: "chosen", i: 0 };
  keep();
  draw();
  focusToken();
}

function finish() {
  setDone(true);
  const open = state.pairs.findIndex(pair => !pair.done);
  if (open < 0) say("All pairs are done. Export writes them to a file.", true);
  else say("");
  if (state.at + 1 < page.pairs.length) go(state.at + 1);
  else refresh();
}

// Drawing: texts are only ever set as text

const token = (side, i) => $(side).querySelector(`[data-i="${i}"]`);

function label(side, i) {
  const rating = get(side, i);
  return `${page.pairs[state.at][side][i].trim() || "space"}: ${rating === null ? "not rated" : shown(rating)}`;
}

function paint(side, i) {
  const span = token(side, i), rating = get(side, i), here = side === current.side && i === current.i;
  if (rating === null) { delete span.dataset.rating; delete span.dataset.shown; }
  else { span.dataset.rating = rating; span.dataset.shown = shown(rating); }
  span.setAttribute("aria-label", label(side, i));
  span.setAttribute("aria-current", here);
  span.tabIndex = here || (side !== current.side && i === 0) ? 0 : -1;
}

function draw() {
  const content = page.pairs[state.at];
  $("prompt").textContent = content.prompt;
  for (const side of SIDES) {
    const box = $(side);
    box.replaceChildren();
    content[side].forEach((text, i) => {
      const [, lead, core, tail] = /^( *)([^]*?)(\n*)$/.exec(text);
      const span = document.createElement("span");
      span.className = "tok" + (/^<.*>$/.test(core) ? " special" : "");
      span.dataset.i = i;
      span.setAttribute("role", "button");
      span.textContent = core || "␣".repeat(lead.length);
      box.append(core ? lead : "", span, tail);
    });
    content[side].forEach((_, i) => paint(side, i));
  }
  refresh();
}

function refresh() {
  const done = state.pairs.filter(pair => pair.done).length, all = page.pairs.length;
  $("place").textContent = `Pair ${state.at + 1} of ${all}`;
  $("share").textContent = `${done} done`;
  $("progress").setAttribute("aria-valuemax", all);
  $("progress").setAttribute("aria-valuenow", done);
  $("progress").firstElementChild.style.width = `${100 * done / all}%`;
  $("done").checked = pair().done;
  $("undo").disabled = !past.length;
  $("back").disabled = state.at === 0;
  $("next").textContent = state.at + 1 < all ? "Done, next" : "Done";
  [...$("pairs").children].forEach((button, i) => {
    button.classList.toggle("done", state.pairs[i].done);
    button.setAttribute("aria-current", i === state.at);
    button.setAttribute("aria-label", `pair ${i + 1}${state.pairs[i].done ? ", done" : ""}`);
  });
}

function select(side, i) {
  const before = current;
  current = { side, i };
  if (token(before.side, before.i)) paint(before.side, before.i);
  for (const other of SIDES) paint(other, 0);
  paint(side, i);
}

function focusToken() { token(current.side, current.i).focus(); }

// Moving

function step(by) {
  const all = SIDES.flatMap(side => page.pairs[state.at][side].map((_, i) => ({ side, i })));
  const here = all.findIndex(one => one.side === current.side && one.i === current.i);
  const { side, i } = all[Math.max(0, Math.min(all.length - 1, here + by))];
  select(side, i);
  focusToken();
}

function line(by) { // the token nearest to this one on the line above or below
  const middle = box => (box.left + box.right) / 2, here = token(current.side, current.i).getClientRects()[0];
  const beyond = [...document.querySelectorAll(".tok")].map(span => ({ span, box: span.getClientRects()[0] }))
    .filter(({ box }) => by * (box.top - here.top) > here.height / 2);
  if (!beyond.length) return;
  const top = by * Math.min(...beyond.map(({ box }) => by * box.top));
  const near = beyond.filter(({ box }) => Math.abs(box.top - top) < here.height / 2)
    .reduce((a, b) => Math.abs(middle(a.box) - middle(here)) <= Math.abs(middle(b.box) - middle(here)) ? a : b);
  select(near.span.parentElement.id, +near.span.dataset.i);
  focusToken();
}

// Files

function exported() {
  const touched = ratings => ratings.some(rating => rating !== null);
  const pairs = state.pairs.map((kept, n) => ({ row: page.pairs[n].row, done: kept.done, chosen: kept.chosen, rejected: kept.rejected }));
  return { ...page, rater: state.rater.trim(), pairs: pairs.filter(pair => pair.done || touched(pair.chosen) || touched(pair.rejected)) };
}

function download() {
  if (!state.rater.trim()) {
    say("Write your name first: ratings without a rater cannot be compared.");
    $("rater").focus();
    return;
  }
  const content = exported(), link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content) + "\n"], { type: "application/json" }));
  link.download = `ratings-${content.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  const done = content.pairs.filter(pair => pair.done).length;
  say(`Exported ${content.pairs.length} pairs, ${done} of them done.`, true);
}

function problem(content) {
  if (content?.format !== page.format || content.version !== page.version) return "it is no file of ratings of this version";
  if (content.set !== page.set || content.tokenizer !== page.tokenizer) return "it belongs to another set of pairs";
  if (typeof content.rater !== "string" || !Array.isArray(content.pairs)) return "it has no rater or no pairs";
  const known = new Map(page.pairs.map(pair => [pair.row, pair]));
  for (const pair of content.pairs) {
    const mine = known.get(pair?.row);
    const fits = (ratings, side) => Array.isArray(ratings) && ratings.length === mine[side].length
      && ratings.every(rating => rating === null || (Number.isInteger(rating) && Math.abs(rating) <= 2));
    if (mine && !SIDES.every(side => fits(pair[side], side))) return `row ${pair.row} has other tokens, or a rating that is none`;
  }
  return "";
}

async function upload(file) {
  let content;
  try { content = JSON.parse(await file.text()); } catch { content = null; }
  const wrong = problem(content);
  if (wrong) { say(`${file.name} was not imported: ${wrong}.`); return; }
  const places = new Map(page.pairs.map((pair, n) => [pair.row, n]));
  let left = 0;
  for (const { row, done, chosen, rejected } of content.pairs) {
    if (places.has(row)) state.pairs[places.get(row)] = { done: done === true, chosen, rejected };
    else left += 1;
  }
  state.rater = $("rater").value = content.rater;
  past = [];
  keep();
  draw();
  say(`Imported ${content.pairs.length - left} pairs of ${content.rater}` + (left ? `; ${left} are not on this page.` : "."), true);
}

// Events

function key(event) {
  const inText = event.target.matches("input[type=text]"), onToken = event.target.matches(".tok");
  if (inText || event.ctrlKey || event.altKey || event.metaKey) return;
  if (!onToken && event.target.matches("button, input, summary") && ["Enter", " "].includes(event.key)) return; // it does its own
  const letter = event.key.toLowerCase(), digit = /^(?:Digit|Numpad)([012])$/.exec(event.code), now = get(current.side, current.i);
  if (event.key === "ArrowRight") step(1);
  else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowDown") line(1);
  else if (event.key === "ArrowUp") line(-1);
  else if (event.key === "Enter" || letter === "n") finish();
  else if (letter === "p") go(state.at - 1);
  else if (letter === "u") undo();
  else if (letter in LETTERS) rate(LETTERS[letter]);
  else if (event.key === "+" || event.key === "=") rate(Math.min(2, (now ?? 0) + 1));
  else if (event.key === "-" || event.key === "−") rate(Math.max(-2, (now ?? 0) - 1));
  else if (digit) rate(event.shiftKey && digit[1] > 0 ? -digit[1] : +digit[1]);
  else if (event.key === "Backspace" || event.key === "Delete") rate(null);
  else if (event.key === " " && onToken) cycle();
  else return;
  event.preventDefault();
}

function cycle() {
  const now = get(current.side, current.i);
  rate(CYCLE[(CYCLE.indexOf(now) + 1) % CYCLE.length]); // 0 stands outside and is followed by no rating
}

document.addEventListener("keydown", key);
for (const side of SIDES) {
  $(side).addEventListener("click", event => {
    if (!event.target.matches(".tok")) return;
    select(side, +event.target.dataset.i);
    focusToken();
    cycle();
  });
  $(side).addEventListener("focusin", event => {
    const i = +event.target.dataset.i;
    if (side !== current.side || i !== current.i) select(side, i);
  });
}
for (const button of document.querySelectorAll(".palette [data-value]"))
  button.addEventListener("click", () => {
    rate(button.dataset.value === "" ? null : +button.dataset.value);
    focusToken();
  });
$("undo").addEventListener("click", undo);
$("next").addEventListener("click", finish);
$("back").addEventListener("click", () => go(state.at - 1));
$("done").addEventListener("change", event => { setDone(event.target.checked); refresh(); });
$("rater").addEventListener("input", event => { state.rater = event.target.value; keep(); });
$("export").addEventListener("click", download);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", event => {
  if (event.target.files.length) upload(event.target.files[0]);
  event.target.value = "";
});
$("restart").addEventListener("click", () => {
  if (!confirm("Forget all ratings on this page, and the name?")) return;
  state = fresh();
  past = [];
  $("rater").value = "";
  keep();
  go(0);
});
page.pairs.forEach((_, n) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = n + 1;
  button.addEventListener("click", () => go(n));
  $("pairs").append(button);
});
load();
$("rater").value = state.rater;
draw();
