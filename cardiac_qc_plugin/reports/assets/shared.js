"use strict";
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
/** A threshold as a text. */
function operatingText(threshold, operating) {
  return `${threshold.toFixed(3).replace(/0$/, "")}${operating ? " (operating point)" : ""}`;
}
/** What operating_curve.json says of a threshold, between its own thresholds in a straight line; empty beyond them. */
function effortText(effort, threshold) {
  if (!effort) return "";
  const at = effort.threshold, after = at.findIndex((value) => value >= threshold);
  if (after < 0 || threshold < at[0]) return "Not measured on validation patients at this threshold.";
  const before = Math.max(after - 1, 0), width = at[after] - at[before];
  const share = width > 0 ? (threshold - at[before]) / width : 1;
  const [caught, regions] = [effort.caught, effort.regions_per_patient].map(
    (values) => values[before] + share * (values[after] - values[before]));
  return `On ${plural(effort.patients, "validation patient")} (${effort.source}) this threshold caught ` +
    `${(100 * caught).toFixed(0)} % of the failure voxels, and flagged ${regions.toFixed(1)} regions per patient.`;
}
