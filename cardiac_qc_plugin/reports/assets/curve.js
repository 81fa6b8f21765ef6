"use strict";
// Volumes over the heart cycle.
(() => {
const data = JSON.parse(document.getElementById("volumes").textContent), root = document.getElementById("curve");
const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
const LINES = { LV: ["--lv", []], RV: ["--rv", [8, 4]], LVM: ["--lvm", [2, 3]] };
const names = Object.keys(data.volumes);

function mark(plot) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio;
  const line = (x, text, dash) => {
    const at = Math.round(plot.valToPos(x, "x", true));
    ctx.setLineDash(dash);
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(text, at, bbox.top - 5 * ratio);
  };
  ctx.save();
  Object.assign(ctx, { strokeStyle: color("--soft"), fillStyle: color("--ink"), lineWidth: ratio, textAlign: "center", font: `${12 * ratio}px sans-serif` });
  for (const { x, label } of data.marks) line(x, label, []);
  if (!data.marks.some(({ x }) => x === data.here)) line(data.here, "here", [2 * ratio, 2 * ratio]);
  ctx.setLineDash([]);
  Object.assign(ctx, { strokeStyle: color("--warn"), lineWidth: 2 * ratio });
  for (const { x, structure } of data.jumps) {
    ctx.beginPath();
    ctx.arc(plot.valToPos(x, "x", true), plot.valToPos(data.volumes[structure][data.x.indexOf(x)], "y", true), 7 * ratio, 0, 7);
    ctx.stroke();
  }
  ctx.restore();
}
const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
const size = () => ({ width: Math.min(root.clientWidth, 760), height: 280 });
const plot = new uPlot({
  ...size(),
  padding: [22, 12, 0, 0],
  scales: { x: { time: false }, y: { range: (_, low, high) => [0, 1.05 * high] } },
  axes: [{ ...axis, label: data.axis, labelSize: 22 }, { ...axis, label: "volume (ml)", labelSize: 22 }],
  series: [{ label: data.axis }, ...names.map((name) => ({ label: `${name} (ml)`, stroke: color(LINES[name][0]), dash: LINES[name][1], width: 2, points: { show: true, size: 5 } }))],
  hooks: { draw: [mark] },
}, [data.x, ...names.map((name) => data.volumes[name])], root);
addEventListener("resize", () => plot.setSize(size()));
})();
