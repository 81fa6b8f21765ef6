import { ActionQueue, close, get, getVoxels, post } from "./api.js";
import { brushed, SliceView, Volume } from "./view.js";

const $ = (id) => document.getElementById(id);
const BRUSHES = [1, 2, 3, 5, 8];
const CLUSTER_MARGIN = 28, HEART_MARGIN = 12; // mm around what is shown
const ACTIVITY = 15000; // ms between signs of activity that the server is told

const settings = await get("api/settings").catch((problem) => {
  tell(problem.message);
  return new Promise(() => {}); // nothing more can be done
});
const colors = Object.assign([], ...Object.entries(settings.classes).map(([name, label]) => ({ [label]: settings.colors[name] })));
document.querySelectorAll("[data-label]").forEach((button) =>
  button.style.setProperty("--color", colors[button.dataset.label] ?? "#fff"));
$("output").textContent = settings.output;
$("reviewer").value = settings.reviewer || localStorage.getItem("reviewer") || "";

let cases = [];
let open = null; // the case on the screen
let closing = null; // cases that were left, until the server knows
const tool = { label: 1, brush: 2, showMap: false, showLabels: true };

const within = (promise, ms = 3000) => Promise.race([promise, new Promise((resolve) => setTimeout(resolve, ms))]);

// ---- worklist

async function showWorklist() {
  if (!(await leaveCase())) return;
  history.replaceState(null, "", location.pathname);
  $("worklist").hidden = false;
  $("seat").hidden = true;
  cases = []; // until the server says how they stand now
  $("rows").replaceChildren();
  $("next-case").disabled = $("accept-unflagged").hidden = true;
  await within(closing); // or the list would say that a case is open in a window
  try {
    cases = await get("api/cases");
  } catch (problem) {
    return tell(problem.message);
  }
  const done = cases.filter((row) => row.status === "finished");
  const reviewable = cases.filter((row) => row.regions);
  const timed = done.filter((row) => row.regions);
  const mean = timed.reduce((sum, row) => sum + row.seconds, 0) / Math.max(timed.length, 1);
  $("totals").textContent = `Cases with flagged regions finished: ${timed.length} of ${reviewable.length}` +
    (timed.length ? `, ${clock(mean)} each on average.` : ".");
  $("rows").replaceChildren(...cases.map(worklistRow));
  const unflagged = unflaggedCases();
  $("accept-unflagged").hidden = !unflagged.length;
  $("accept-unflagged").textContent = `Accept the segmentations in which nothing is flagged (${unflagged.length})`;
  $("next-case").disabled = !nextCase();
}

function worklistRow(row, index) {
  const status = row.status === "broken" ? row.message : row.is_open ? `${row.status}, open in a window` :
    row.status === "open" && !row.regions ? "nothing flagged" : row.status;
  const tr = document.createElement("tr");
  tr.className = row.status.replace(" ", "-");
  const cells = [index + 1, row.case, status, row.regions === undefined ? "" : `${row.decided} of ${row.regions}`,
    row.seconds ? clock(row.seconds) : ""];
  tr.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  const button = Object.assign(document.createElement("button"), { textContent: row.status === "finished" ? "Look" : "Review" });
  button.ariaLabel = `${button.textContent} ${row.case}`;
  button.disabled = row.status === "broken";
  button.onclick = () => openCase(row.case);
  const last = document.createElement("td");
  last.append(button);
  tr.append(last);
  return tr;
}

const nextCase = () => cases.find((row) => row.regions && row.status !== "finished" && row.status !== "broken" && !row.is_open);
const unflaggedCases = () => cases.filter((row) => row.regions === 0 && row.status === "open");

async function acceptUnflagged() {
  const problems = [];
  $("accept-unflagged").hidden = true;
  for (const row of unflaggedCases()) {
    let session;
    try {
      ({ session } = await post("api/open", { case: row.case, reviewer: reviewer() }));
      await post("api/act", { case: row.case, session, action: { id: session, action: "finish" } });
    } catch (problem) {
      problems.push(`${row.case}: ${problem.message}`);
    }
    if (session) await close(row.case, session);
  }
  if (!open) await showWorklist();
  if (problems.length) tell(`Not accepted: ${problems.join(" ")}`);
}

function reviewer() {
  const name = $("reviewer").value.trim();
  if (name) localStorage.setItem("reviewer", name);
  return name;
}

// ---- a case

let opening = false; // a second click meanwhile would be another window's
async function openCase(name, takeOver = false) {
  if (opening) return;
  opening = true;
  try {
    await load(name, takeOver);
  } finally {
    opening = false;
  }
}

async function load(name, takeOver) {
  if (!reviewer()) {
    await showWorklist();
    $("reviewer").focus();
    return toast("Fill in who reviews; the audit trail names the reviewer.");
  }
  const key = `session ${name}`; // is there after a reload only: a duplicated tab is another window
  let answer, voxels;
  try {
    const previous = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    answer = await post("api/open", { case: name, reviewer: reviewer(), previous, take_over: takeOver });
    const fetched = (volume, Type) => getVoxels(`api/volume?case=${encodeURIComponent(name)}&name=${volume}`, Type);
    voxels = await Promise.all([fetched("image", Uint16Array), fetched("uncertainty", Uint8Array),
      fetched("automatic", Uint8Array), fetched("regions", Uint16Array)]);
  } catch (problem) {
    if (answer) closing = Promise.all([closing, close(name, answer.session)]);
    await showWorklist();
    if (problem.status !== 409) return tell(problem.message);
    return ask(problem.message, { "Take over": () => openCase(name, true), "Leave it": () => {} });
  }
  history.replaceState(null, "", `#case=${encodeURIComponent(name)}`);
  $("worklist").hidden = true;
  $("seat").hidden = false;
  const volume = new Volume(answer, ...voxels);
  const here = (then) => (...values) => open?.queue === queue && then(...values); // not of a case that was left
  const queue = new ActionQueue(name, answer.session, {
    onState: here(adopt), onStatus: here(showSaved), onProblem: here((problem, lost) => refused(name, problem, lost)),
  });
  open = { name, volume, queue, view: new SliceView($("view"), volume, colors), state: answer.state, z: 0, stroke: null,
    whole: false, level: 0, width: 0, shownAt: 0, ticked: Date.now() };
  $("case-name").textContent = name;
  $("map").title = `${settings.maps[answer.map]} (M)`;
  $("context").replaceChildren(...[-1, 0, 1].map((step) => {
    const canvas = document.createElement("canvas");
    canvas.onclick = () => showSlice(open.z + step);
    return canvas;
  }));
  volume.setLabels(open.state.labels);
  showSaved("saved");
  showRegion();
}

// Leaves the case when all is saved, or when the user gives up what is not. Resolves to whether it was left.
async function leaveCase() {
  const queue = open?.queue;
  if (!queue) return true;
  if (queue.waiting.length) await within(queue.run());
  if (open?.queue !== queue) return !open; // left by another way meanwhile
  const unsaved = queue.waiting.length;
  if (unsaved && !(await confirmed(`Actions that are not saved yet: ${unsaved}.`, "Leave without them"))) return false;
  closing = Promise.all([closing, queue.end()]);
  open = null;
  return true;
}

const currentRegion = () => open.state.regions.find((region) => region.id === open.state.position);
const openRegions = (z) => open.state.regions.filter((region) => region.slice === z && !region.decision);

// the server's state; labels only when nothing is under way
function adopt(state, isLast) {
  if (!open) return;
  const [before, wasFinished] = [open.state.position, open.state.finished];
  open.state = state;
  open.ticked = Date.now();
  if (isLast && !open.stroke) open.volume.setLabels(state.labels);
  if (isLast && state.finished && !wasFinished) return showSummary();
  if (state.position !== before) showRegion();
  else refresh();
}

async function refused(name, problem, lost) {
  const notSaved = lost > 1 ? ` ${lost} actions were not saved.` : "";
  if (problem.status === 409 || problem.status === 403) {
    const text = problem.message + notSaved;
    open.stroke = null; // nobody will have it
    open.volume.setLabels(open.state.labels);
    refresh();
    if (problem.status === 403) return tell(text);
    return ask(text, { "Take it over again": () => openCase(name, true), "All cases": showWorklist });
  }
  toast(problem.message + notSaved);
  adopt(await get(`api/state?case=${encodeURIComponent(name)}`), true);
}

function act(action) {
  if (open.state.finished && !["reopen", "visit"].includes(action.action)) {
    return ask("This case is finished.", { "Open it again": () => act({ action: "reopen" }), "Leave it": () => {} });
  }
  open.queue.send(action);
}

function active() {
  if (open && !open.state.finished && !open.queue.lost && Date.now() - open.shownAt > ACTIVITY) {
    open.shownAt = Date.now();
    open.queue.send({ action: "active" });
  }
}

// ---- what is shown

function showRegion() {
  const region = currentRegion();
  open.z = region?.slice ?? Math.floor(open.volume.shape[2] / 2);
  fit();
}

function fit() {
  const region = currentRegion();
  if (open.whole || !region || region.slice !== open.z) open.view.fit(open.volume.heart, HEART_MARGIN);
  else open.view.fit(cluster(region), CLUSTER_MARGIN);
  refresh();
}

// i0, i1, j0, j1 of a region and all that hang together with it, so that the view stays while they are reviewed
function cluster(region) {
  const near = (a, b) => a.row0 <= b.row1 && b.row0 <= a.row1 && a.col0 <= b.col1 && b.col0 <= a.col1;
  const rest = new Set(open.state.regions.filter((one) => one.slice === region.slice)), found = [region];
  for (const one of found) for (const other of rest) if (near(one, other)) found.push(other), rest.delete(other);
  const least = (key) => Math.min(...found.map((one) => one[key])), most = (key) => Math.max(...found.map((one) => one[key]));
  return [least("row0"), most("row1"), least("col0"), most("col1")];
}

function showSlice(z) {
  if (z < 0 || z >= open.volume.shape[2]) return;
  open.z = z;
  refresh();
}

// brightness and contrast move and stretch the window, by parts of its width
function contrast(z) {
  const [low, high] = open.volume.window(z), width = (high - low) * 2 ** (-open.width / 50);
  const middle = (low + high) / 2 - (open.level / 100) * (high - low);
  return [Math.round(middle - width / 2), Math.round(middle + width / 2)];
}

const shown = (z) => ({ z, contrast: contrast(z), showMap: tool.showMap, showLabels: tool.showLabels,
  regions: open.state.regions, current: open.state.position, flagColor: settings.flag_color });

let drawing = 0;
function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    if (!open) return;
    open.view.draw({ ...shown(open.z), cursor: open.cursor });
    document.body.dataset.drawn = Number(document.body.dataset.drawn ?? 0) + 1;
  });
}

function drawContext() {
  [...$("context").children].forEach((canvas, n) => {
    const z = open.z + n - 1, exists = z >= 0 && z < open.volume.shape[2];
    canvas.style.visibility = exists ? "visible" : "hidden";
    canvas.title = `Slice ${z + 1}`;
    canvas.classList.toggle("here", n === 1);
    if (!exists) return;
    const view = new SliceView(canvas, open.volume, colors);
    view.fit(open.volume.heart, HEART_MARGIN);
    view.draw({ ...shown(z), showMap: false });
    view.drawText(String(z + 1));
  });
}

function refresh() {
  const { state, z, volume } = open, region = currentRegion(), depth = volume.shape[2];
  const decided = state.regions.filter((one) => one.decision).length, total = state.regions.length;
  $("which").textContent = region ? `Region ${region.id} of ${total}` : "Nothing flagged";
  $("about").textContent = region ? `probability ${region.probability.toFixed(2)} · ${decided} decided` : "";
  $("slice-label").textContent = `slice ${z + 1} of ${depth}` + (region && region.slice !== z ? ` (region in ${region.slice + 1})` : "");
  $("progress").replaceChildren(...state.regions.map((one) => {
    const mark = document.createElement("button");
    mark.className = [one.decision ?? "undecided", one.id === state.position ? "current" : ""].join(" ");
    mark.title = `Region ${one.id}, slice ${one.slice + 1}: ${one.decision ?? "not decided"}`;
    mark.setAttribute("aria-label", mark.title);
    mark.onclick = () => visit(one.id);
    return mark;
  }));
  const here = openRegions(z), same = here.filter((one) => !one.changed), edited = here.filter((one) => one.changed);
  const isDone = decided === total;
  $("accept").disabled = !region || region.changed || region.decision === "accepted";
  $("corrected").disabled = !region || !region.changed || region.decision === "corrected";
  $("accept-slice").hidden = here.length < 2;
  $("accept-slice").textContent = edited.length ? `Slice done: ${edited.length} corrected, ${same.length} accepted` : `Accept all ${same.length} in this slice`;
  $("finish").firstChild.textContent = state.finished ? "Summary " : "Finish case ";
  $("finish").classList.toggle("primary", isDone);
  $("undo").disabled = !state.can_undo;
  $("redo").disabled = !state.can_redo;
  $("brush").textContent = `${BRUSHES[tool.brush]} px`;
  document.querySelectorAll("[data-label]").forEach((button) =>
    button.setAttribute("aria-checked", Number(button.dataset.label) === tool.label));
  for (const [id, on] of [["map", tool.showMap], ["contours", tool.showLabels], ["zoom", open.whole]]) {
    $(id).setAttribute("aria-pressed", on);
  }
  draw();
  drawContext();
}

setInterval(() => {
  if (!open) return;
  const since = Math.min(Date.now() - open.ticked, settings.pause * 1000) / 1000;
  $("time").textContent = clock(open.state.seconds + (open.state.finished ? 0 : since));
}, 500);

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

function showSaved(status, reason) {
  $("saved").className = status;
  $("saved").textContent = { saved: "saved", saving: "saving…", unsaved: `NOT SAVED: ${reason} Trying again.`,
    lost: "NOT SAVED: this window no longer has the case." }[status];
}

function showSummary() {
  const { state, name } = open, { before, after } = state.volume_ml;
  const counts = (decision) => state.regions.filter((region) => region.decision === decision).length;
  const rows = Object.keys(before).map((key) => [`${key} (ml)`, before[key], after[key]]);
  const indices = state.indices?.before ? state.indices : null; // where the patient's other phase is there
  for (const side of indices ? ["lv", "rv"] : []) {
    const key = `${side}_ef_percent`;
    rows.push([`${side.toUpperCase()} ejection fraction (%)`, indices.before[key], indices.after[key]]);
  }
  const box = document.createElement("div");
  const title = Object.assign(document.createElement("h2"), { textContent: `${name} is finished` });
  const text = document.createElement("p");
  text.textContent = `Regions corrected: ${counts("corrected")}, accepted as correct: ${counts("accepted")}, in ${clock(state.seconds)}.`;
  const table = document.createElement("table");
  for (const cells of [["", "automatic", "reviewed"], ...rows]) {
    const row = table.insertRow();
    cells.forEach((cell) => (row.insertCell().textContent = typeof cell === "number" ? cell.toFixed(1) : cell ?? "–"));
  }
  box.append(title, text, table);
  refresh();
  return ask(box, { "Next case": goToNextCase, "All cases": showWorklist, "Open it again": () => open.queue.send({ action: "reopen" }) });
}

async function goToNextCase() {
  await showWorklist();
  const next = nextCase();
  if (next) openCase(next.case);
}

// ---- deciding

const visit = (id) => act({ action: "visit", region: id });

function step(by) {
  const { regions, position } = open.state, at = regions.findIndex((region) => region.id === position);
  const next = regions[at + by];
  if (next) visit(next.id);
}

function decide(decision, regions) {
  if (regions.length) act({ action: "decide", decision, regions: regions.map((region) => region.id) });
}

function decideSlice() {
  const here = openRegions(open.z);
  decide("corrected", here.filter((region) => region.changed));
  decide("accepted", here.filter((region) => !region.changed));
}

function decideCurrent(decision) {
  const region = currentRegion();
  if (!region) return;
  if ((decision === "corrected") !== region.changed) {
    return toast(region.changed ? "This region was edited: it is corrected, not accepted." : "Nothing was changed in this region: accept it as correct, or paint.");
  }
  decide(decision, [region]);
}

function finish() {
  if (open.state.finished) return showSummary();
  const left = open.state.regions.filter((region) => !region.decision).length;
  if (left) return ask(`Regions that are not decided: ${left}.`, { "Go on": () => {}, "Finish all the same": () => act({ action: "finish", incomplete: true }) });
  act({ action: "finish" });
}

// ---- painting

const pointers = new Map();
let gesture = null; // two fingers, or a button that moves or sets the contrast

function startStroke(event) {
  if (open.state.finished || open.queue.lost) return act({ action: "paint" });
  open.stroke = { z: open.z, label: tool.label, last: open.view.voxelAt(event.clientX, event.clientY), voxels: new Map(), outside: false };
  extendStroke(event);
}

function extendStroke(event) {
  const { stroke, view, volume } = open, to = view.voxelAt(event.clientX, event.clientY);
  for (const [i, j] of brushed(stroke.last, to, BRUSHES[tool.brush], volume.shape)) {
    const index = volume.index(i, j, stroke.z);
    if (!volume.regions[index]) stroke.outside = true;
    else if (volume.labels[index] !== stroke.label) {
      stroke.voxels.set(index, { at: [i, j], before: volume.labels[index] });
      volume.labels[index] = stroke.label;
    }
  }
  stroke.last = to;
  draw();
}

function endStroke(keep) {
  const { stroke, volume } = open;
  open.stroke = null;
  if (!stroke) return;
  if (!keep) stroke.voxels.forEach(({ before }, index) => (volume.labels[index] = before));
  else if (stroke.voxels.size) {
    const voxels = [...stroke.voxels.values()].map(({ at }) => at);
    act({ action: "paint", slice: stroke.z, label: stroke.label, voxels, shape: volume.shape });
  } else if (stroke.outside) toast("Only flagged regions (framed) can be painted.");
  draw();
}

function moveCursor(event) {
  const position = open.view.voxelAt(event.clientX, event.clientY), [i, j] = position.map(Math.floor);
  const { volume } = open, [height, width] = volume.shape;
  const inside = i >= 0 && j >= 0 && i < height && j < width && volume.regions[volume.index(i, j, open.z)];
  open.cursor = event.pointerType === "touch" ? null :
    { position, diameter: BRUSHES[tool.brush], color: inside ? colors[tool.label] ?? "#fff" : "#777" };
}

const canvas = $("view");
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size === 2) {
    endStroke(false); // a second finger: no stroke, but a gesture
    gesture = { kind: "pinch" };
  } else if (event.button === 2) gesture = { kind: "contrast" };
  else if (event.button === 1 || spaceDown) gesture = { kind: "move" };
  else if (event.button === 0 && !gesture) startStroke(event);
});
canvas.addEventListener("pointermove", (event) => {
  if (!open) return;
  active();
  moveCursor(event);
  const before = pointers.get(event.pointerId);
  if (gesture && before) {
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    if (gesture.kind === "contrast") setContrast(open.level - dy / 2, open.width + dx / 2);
    else {
      open.view.move(dx / pointers.size, dy / pointers.size);
      const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
      if (gesture.kind === "pinch" && other) {
        const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
        open.view.zoomAt(distance(event) / Math.max(distance(before), 1), other.clientX, other.clientY);
      }
    }
  } else if (open.stroke) event.getCoalescedEvents?.().concat(event).forEach(extendStroke);
  if (before) pointers.set(event.pointerId, event);
  draw();
});
for (const [kind, keep] of [["pointerup", true], ["pointercancel", false]]) {
  canvas.addEventListener(kind, (event) => {
    pointers.delete(event.pointerId);
    if (!pointers.size) gesture = null;
    if (open) endStroke(keep);
  });
}
canvas.addEventListener("pointerleave", () => {
  if (open) open.cursor = null;
  draw();
});
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  active();
  open.view.zoomAt(1.0015 ** -event.deltaY, event.clientX, event.clientY);
  draw();
}, { passive: false });

function setContrast(level, width) {
  Object.assign(open, { level: Math.max(-100, Math.min(100, level)), width: Math.max(-100, Math.min(100, width)) });
  $("level").value = open.level;
  $("width").value = open.width;
  draw();
}

// ---- buttons and keys

let spaceDown = false;
const choose = (change) => { Object.assign(tool, change); refresh(); };
const zoom = (factor) => { const box = canvas.getBoundingClientRect(); open.view.zoomAt(factor, box.left + box.width / 2, box.top + box.height / 2); draw(); };
const commands = {
  smaller: () => choose({ brush: Math.max(tool.brush - 1, 0) }),
  larger: () => choose({ brush: Math.min(tool.brush + 1, BRUSHES.length - 1) }),
  undo: () => open.state.can_undo && act({ action: "undo" }),
  redo: () => open.state.can_redo && act({ action: "redo" }),
  map: () => choose({ showMap: !tool.showMap }),
  contours: () => choose({ showLabels: !tool.showLabels }),
  zoom: () => { open.whole = !open.whole; fit(); },
  more: () => $("panel").showModal(),
  previous: () => step(-1),
  next: () => step(1),
  accept: () => decideCurrent("accepted"),
  corrected: () => decideCurrent("corrected"),
  "accept-slice": decideSlice,
  finish,
  back: showWorklist,
};
for (const [id, command] of Object.entries(commands)) {
  $(id).onclick = (event) => {
    if (event.detail) event.currentTarget.blur(); // clicked, not pressed by a key: Enter is free again
    active();
    command();
  };
}
document.querySelectorAll("[data-label]").forEach((button) => (button.onclick = () => choose({ label: Number(button.dataset.label) })));
$("next-case").onclick = () => nextCase() && openCase(nextCase().case);
$("accept-unflagged").onclick = () => reviewer() ? acceptUnflagged() : toast("Fill in who reviews.");
$("level").oninput = $("width").oninput = () => setContrast(Number($("level").value), Number($("width").value));

const keys = {
  "[": commands.smaller, "]": commands.larger, z: commands.undo, y: commands.redo, Z: commands.redo,
  m: commands.map, s: commands.contours, f: commands.zoom, "?": commands.more,
  n: commands.next, ArrowRight: commands.next, p: commands.previous, ArrowLeft: commands.previous,
  ArrowUp: () => showSlice(open.z - 1), ArrowDown: () => showSlice(open.z + 1),
  a: commands.accept, A: decideSlice, c: commands.corrected,
  C: () => decide("corrected", openRegions(open.z).filter((region) => region.changed)),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8),
  Enter: finish, Escape: showWorklist,
};
for (const label of [0, 1, 2, 3]) keys[label] = () => choose({ label });
keys.e = keys[0];

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, dialog *") || event.altKey || document.querySelector("dialog[open]")) return;
  if (!open) {
    if (event.key === "Enter" && !event.target.matches("button")) $("next-case").click();
    return;
  }
  if (event.target.matches("button") && [" ", "Enter"].includes(event.key)) return;
  if (event.key === " ") spaceDown = true;
  // by Shift, not by the letter's case: Caps Lock changes that too
  const typed = /^[a-z]$/i.test(event.key) ? event.key[event.shiftKey ? "toUpperCase" : "toLowerCase"]() : event.key;
  const key = event.ctrlKey || event.metaKey ? { z: "z", Z: "y", y: "y" }[typed] : typed;
  const command = keys[key];
  if (!command && key !== " ") return;
  event.preventDefault();
  active();
  command?.();
});
document.addEventListener("keyup", (event) => event.key === " " && (spaceDown = false));
new ResizeObserver(() => open && refresh()).observe($("stage"));
window.addEventListener("beforeunload", (event) => open?.queue.waiting.length && event.preventDefault());
window.addEventListener("pagehide", () => {
  if (!open) return;
  sessionStorage.setItem(`session ${open.name}`, open.queue.session);
  open.queue.end();
});

// ---- messages

function ask(content, choices) {
  $("message-text").replaceChildren(content);
  $("message-buttons").replaceChildren(...Object.entries(choices).map(([text, then], n) => {
    const button = Object.assign(document.createElement("button"), { textContent: text, className: n ? "" : "primary" });
    button.onclick = () => setTimeout(then);
    return button;
  }));
  if (!$("message").open) $("message").showModal();
}

function confirmed(text, yes) {
  return new Promise((resolve) => ask(text, { "Stay": () => resolve(false), [yes]: () => resolve(true) }));
}

function tell(text) {
  ask(text, { Close: () => {} });
}

let toastTimer;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 4000);
}

// for tests: the point of the page at a voxel's middle, and the labels that the page holds
window.review = {
  point: (i, j) => open.view.pointAt(i + 0.5, j + 0.5),
  label: (i, j, z) => open.volume.labels[open.volume.index(i, j, z)],
};

const asked = new URLSearchParams(location.hash.slice(1)).get("case");
if (asked) await openCase(asked);
else await showWorklist();
