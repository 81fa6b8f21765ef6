"use strict";
// A case's page: slider on the operating point, next flagged region, layers on and off.
(() => {
const byId = (id) => document.getElementById(id);
const record = JSON.parse(byId("record").textContent);
const effort = byId("effort") && JSON.parse(byId("effort").textContent);
const sheet = byId("sheet"), slider = byId("threshold");
const figures = [...sheet.querySelectorAll("figure")];
let shown = [], current = -1;

function flag() {
  const step = Number(slider.value), operating = step === record.operating;
  shown = [];
  for (const figure of figures) {
    const own = [...figure.querySelectorAll("rect")].filter((rect) => {
      const on = Number(rect.dataset.level) > step;
      rect.classList.toggle("on", on);
      return on;
    });
    shown.push(...own);
    figure.classList.toggle("flagged", own.length > 0);
    figure.querySelector(".count").textContent = own.length ? ` ${plural(own.length, "region")}, up to ${own[0].dataset.p}` : "";
  }
  const text = operatingText(record.grid[step], operating);
  byId("value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  byId("flagged").textContent = `${plural(record.regions[step], "region")} on ${record.slices[step]} of ` +
    `${plural(figures.length, "slice")} flagged. ${effortText(effort, record.grid[step])}`;
  select(-1);
}
function select(index) {
  shown[current]?.classList.remove("current");
  sheet.querySelector("rect.current")?.classList.remove("current");
  current = index;
  const rect = shown[current];
  byId("region").textContent = rect
    ? `Region ${current + 1} of ${shown.length}: slice ${figures.indexOf(rect.closest("figure")) + 1}, probability of failure ${rect.dataset.p}.` : "";
  if (!rect) return;
  rect.classList.add("current");
  const figure = rect.closest("figure"), large = sheet.querySelector(".large");
  if (large && large !== figure) enlarge(figure);
  figure.scrollIntoView({ block: large ? "end" : "center" });
}
function step(by) {
  if (!shown.length) byId("region").textContent = "No region is flagged.";
  else select(current < 0 ? (by > 0 ? 0 : shown.length - 1) : (current + by + shown.length) % shown.length);
}
function toggle(name) {
  const on = byId(name).getAttribute("aria-pressed") !== "true";
  byId(name).setAttribute("aria-pressed", on);
  sheet.classList.toggle(name === "map" ? "with-map" : "without-contours", name === "map" ? on : !on);
}
function enlarge(figure) {
  for (const other of figures) {
    const large = other === figure && !other.classList.contains("large");
    other.classList.toggle("large", large);
    other.querySelector(".zoom").setAttribute("aria-expanded", large);
  }
  figure?.scrollIntoView({ block: figure.classList.contains("large") ? "end" : "nearest" });
}
function reset() { slider.value = record.operating; flag(); }

const keys = { n: () => step(1), p: () => step(-1), m: () => toggle("map"), c: () => toggle("contours"), 0: reset, Escape: () => enlarge(null) };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});
byId("next").addEventListener("click", () => step(1));
byId("previous").addEventListener("click", () => step(-1));
byId("map").addEventListener("click", () => toggle("map"));
byId("contours").addEventListener("click", () => toggle("contours"));
byId("reset").addEventListener("click", reset);
slider.addEventListener("input", flag);
for (const figure of figures)
  for (const part of figure.querySelectorAll(".layers, .zoom")) part.addEventListener("click", () => enlarge(figure));
flag();
})();
