"use strict";
// The cohort's page: lists that search, filter, sort and page; sliders on the operating point.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE_OF_CASE = "report.html";

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const link = (name, text) =>
  element("a", { href: `${name.split("/").map(encodeURIComponent).join("/")}/${PAGE_OF_CASE}` }, text ?? name);
function cell(label, ...children) {
  const made = element("td", {}, ...children);
  made.dataset.label = label;
  return made;
}

/** A list of rows (objects), of which one page is in the document. `keep(row)` filters, `draw(row)` makes a line. */
class Listing {
  constructor(root, rows, { values, keep = () => true, draw }) {
    Object.assign(this, { root, rows, values, keep, draw, key: null, down: false, page: 0, text: "" });
    this.find = (selector) => root.querySelector(selector);
    this.find("input[type=search]").addEventListener("input", (event) => {
      this.text = event.target.value.trim().toLowerCase();
      this.refresh();
    });
    for (const select of root.querySelectorAll("select")) select.addEventListener("change", () => this.refresh());
    for (const button of root.querySelectorAll("th button"))
      button.addEventListener("click", () => this.sort(button.dataset.key));
    this.find(".back").addEventListener("click", () => this.turn(-1));
    this.find(".forward").addEventListener("click", () => this.turn(1));
    addEventListener("beforeprint", () => this.show(true));
    addEventListener("afterprint", () => this.show(false));
    this.refresh();
  }
  get size() { return Number(this.find(".size").value); }
  sort(key) {
    this.down = this.key === key ? !this.down : !["rank", "case", "phase"].includes(key);
    this.key = key;
    for (const head of this.root.querySelectorAll("th"))
      if (head.firstElementChild?.dataset.key === key) head.ariaSort = this.down ? "descending" : "ascending";
      else head.removeAttribute("aria-sort");
    this.refresh();
  }
  turn(by) { this.page += by; this.show(false); }
  /** What is found, in order; unknown values last. */
  refresh(stay = false) {
    this.found = this.rows.filter((row) => (!this.text || row.text.includes(this.text)) && this.keep(row));
    if (this.key) {
      const value = this.values(this.key), sign = this.down ? -1 : 1, known = (x) => x !== null && x !== undefined;
      this.found.sort((one, other) => {
        const a = value(one), b = value(other);
        if (!known(a) || !known(b)) return known(b) - known(a);
        return sign * (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
      });
    }
    if (!stay) this.page = 0;
    this.show(false);
  }
  show(all) {
    const pages = Math.max(1, Math.ceil(this.found.length / this.size));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const first = this.page * this.size;
    const rows = all ? this.found : this.found.slice(first, first + this.size);
    const body = this.find("tbody");
    body.replaceChildren(...rows.map(this.draw));
    if (!rows.length) body.append(element("tr", {}, element("td", { className: "none", colSpan: 99 }, "nothing found")));
    this.find(".where").textContent = this.found.length
      ? `${first + 1} to ${first + rows.length} of ${this.found.length}, page ${this.page + 1} of ${pages}` : "none";
    this.find(".back").disabled = this.page === 0;
    this.find(".forward").disabled = this.page === pages - 1;
  }
}

const failed = data.failures.map(([name, reason]) => ({ case: name, reason }));
const done = data.rows.map((row) => Object.fromEntries(data.columns.map((column, index) => [column, row[index]])));
const cases = [...failed, ...done];
cases.forEach((row, index) => {
  row.rank = index + 1;
  row.text = `${row.case} ${row.reason ?? row.why}`.toLowerCase();
});
const chosen = data.groups.map((group) => group.operating); // position of each slider
const regions = (row) => row.regions?.[chosen[row.group]];
const slices = (row) => row.slices?.[chosen[row.group]];
const top = Math.max(...done.map((row) => row.urgency), 1e-9);

const kinds = {
  all: () => true,
  flagged: (row) => regions(row) > 0,
  quiet: (row) => regions(row) === 0,
  implausible: (row) => row.implausible > 0,
  failed: (row) => row.reason !== undefined,
};
function values(key) {
  if (key === "regions") return regions;
  if (key === "slices") return slices;
  const many = key.match(/^(volume|dice)(\d)$/);
  return many ? (row) => row[many[1] === "dice" ? "dice" : "volumes"]?.[Number(many[2])] : (row) => row[key];
}

const list = document.getElementById("cases");
const show = list?.querySelector(".show"), phase = list?.querySelector(".phase");
function keep(row) {
  const other = phase?.value === "other";
  return kinds[show.value](row) && (!phase?.value || (other ? !["ED", "ES"].includes(row.phase) : row.phase === phase.value));
}
function drawCase(row) {
  const rank = element("td", { className: "rank" }, String(row.rank));
  const name = element("th", { scope: "row" }, row.reason === undefined ? link(row.case) : row.case);
  if (row.reason !== undefined)
    return element("tr", { className: "bad" }, rank, name, element("td", { colSpan: 99, className: "reason" }, row.reason));
  const meter = element("span", { className: "meter" }, element("i"));
  meter.firstChild.style.width = `${(100 * row.urgency) / top}%`;
  const odd = cell("Implausible", number(row.implausible, 0));
  if (row.implausible) Object.assign(odd, { className: "odd", title: row.why });
  return element("tr", {}, rank, name,
    phase ? Object.assign(cell("Phase", row.phase ?? "–"), { className: "left" }) : null,
    cell("Urgency", number(row.urgency, 3), meter),
    cell("Flagged regions", number(regions(row), 0)),
    cell("Flagged slices", `${slices(row)} of ${row.total}`),
    odd,
    ...data.structures.map((structure, index) => cell(`${structure} (ml)`, number(row.volumes[index], 1))),
    ...data.structures.map((structure, index) => cell(`${structure} (Dice)`, number(row.dice[index], 3))));
}
if (matchMedia("(max-width: 760px)").matches) for (const select of document.querySelectorAll(".size")) select.value = "10";
const worklist = list && new Listing(list, cases, { values, keep, draw: drawCase });

for (const heart of data.hearts) {
  heart.text = heart.case.toLowerCase();
  heart.odd = heart.jumps.length + heart.notes.length;
}
function drawHeart(heart) {
  const ways = ["ed", "es"].filter((key) => heart[key]).flatMap((key) => [" ", link(heart[key], key.toUpperCase())]);
  const notes = [...heart.notes, ...(heart.jumps.length ? [`volume jumps at phase ${heart.jumps.join(", ")}`] : [])];
  const labels = [...document.querySelectorAll("#hearts th button")].slice(1).map((button) => button.textContent);
  return element("tr", {},
    element("th", { scope: "row" }, heart.case, element("small", {}, ...ways)),
    ...heart.values.map((value, index) => {
      const ends = heart.intervals[index];
      return cell(labels[index], number(value, 0), ends ? element("small", {}, `${number(ends[0], 0)} to ${number(ends[1], 0)}`) : null);
    }),
    cell("Flagged slices", number(heart.flagged, 0)),
    cell("To note", notes.join(" ") || "–"));
}
if (data.hearts.length)
  new Listing(document.getElementById("hearts"), data.hearts, {
    values: (key) => (key.startsWith("value") ? (heart) => heart.values[Number(key.slice(5))] : (heart) => heart[key]),
    draw: drawHeart,
  });

for (const tools of document.querySelectorAll("[data-group]")) {
  const index = Number(tools.dataset.group), group = data.groups[index];
  const own = done.filter((row) => row.group === index);
  const input = tools.querySelector("input");
  const tell = () => {
    const sum = (get) => own.reduce((total, row) => total + get(row), 0), threshold = group.grid[chosen[index]];
    const text = operatingText(threshold, input.value == group.operating);
    tools.querySelector("b").textContent = text;
    input.setAttribute("aria-valuetext", text);
    tools.querySelector("p").textContent =
      `${plural(sum(regions), "region")} on ${sum(slices)} of ${plural(sum((row) => row.total), "slice")} flagged, in ` +
      `${own.filter((row) => regions(row) > 0).length} of ${plural(own.length, "case")}. ${effortText(group.effort, threshold)}`;
  };
  const choose = () => { chosen[index] = Number(input.value); tell(); worklist.refresh(true); };
  input.addEventListener("input", choose);
  tools.querySelector("button").addEventListener("click", () => { input.value = group.operating; choose(); });
  tell();
}
})();
