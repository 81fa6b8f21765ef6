// One slice on a canvas: image, uncertainty map, labels, flagged regions. Voxels lie as in a NIfTI file: i fastest.
// (i, j) are a voxel's indices on the first two axes; i runs to the right and j down, unless the axis is mirrored.

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const VIRIDIS_256 = Array.from({ length: 256 }, (_, n) => {
  const at = (n / 255) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const [a, b] = [rgb(VIRIDIS[low]), rgb(VIRIDIS[low + 1])];
  return a.map((value, k) => value + (at - low) * (b[k] - value));
});

export class Volume {
  constructor({ shape, spacing, mirrored }, image, uncertainty, automatic, regions) {
    Object.assign(this, { shape, spacing, image, uncertainty, automatic, regions });
    this.sign = mirrored.map((is) => (is ? -1 : 1));
    this.labels = automatic.slice();
    this.flagged = []; // indices of all flagged voxels, ascending
    regions.forEach((number, index) => number && this.flagged.push(index));
    this.heart = this.box((label) => label > 0, automatic) ?? [0, shape[0], 0, shape[1]];
  }

  index(i, j, z) {
    return i + this.shape[0] * (j + this.shape[1] * z);
  }

  setLabels(digits) {
    this.flagged.forEach((index, n) => (this.labels[index] = digits.charCodeAt(n) - 48));
  }

  // i0, i1, j0, j1 of the voxels of all slices that pass a test
  box(test, array) {
    const [height, width] = this.shape;
    let [i0, i1, j0, j1] = [height, -1, width, -1];
    array.forEach((value, index) => {
      if (test(value)) {
        const i = index % height, j = Math.floor(index / height) % width;
        [i0, i1, j0, j1] = [Math.min(i0, i), Math.max(i1, i), Math.min(j0, j), Math.max(j1, j)];
      }
    });
    return i1 < 0 ? null : [i0, i1 + 1, j0, j1 + 1];
  }

  // intensities of a slice between which the contrast window lies: the 1st and 99th percentile around the heart
  window(z) {
    const [i0, i1, j0, j1] = this.heart, values = [];
    for (let j = j0; j < j1; j++) for (let i = i0; i < i1; i++) values.push(this.image[this.index(i, j, z)]);
    values.sort((a, b) => a - b);
    return [values[Math.floor(0.01 * values.length)], values[Math.floor(0.99 * (values.length - 1))]];
  }

  // a canvas of a slice's size, a pixel per voxel
  plane(z, color) {
    const [height, width] = this.shape, size = height * width;
    const canvas = new OffscreenCanvas(height, width), context = canvas.getContext("2d");
    const picture = context.createImageData(height, width);
    for (let k = 0; k < size; k++) picture.data.set(color(z * size + k), 4 * k);
    context.putImageData(picture, 0, 0);
    return canvas;
  }

  imagePlane(z, [low, high]) {
    const scale = 255 / Math.max(high - low, 1);
    return this.plane(z, (k) => {
      const gray = (this.image[k] - low) * scale;
      return [gray, gray, gray, 255];
    });
  }

  mapPlane(z) {
    return this.plane(z, (k) => [...VIRIDIS_256[this.uncertainty[k]], 255]);
  }
}

export class SliceView {
  constructor(canvas, volume, colors) {
    Object.assign(this, { canvas, volume, colors });
    this.context = canvas.getContext("2d");
    this.center = [0, 0];
    this.scale = 1; // canvas pixels per mm
    this.planes = new Map();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1, box = this.canvas.getBoundingClientRect();
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    this.ratio = ratio;
  }

  // show the voxels i0..i1, j0..j1 with a margin in mm
  fit([i0, i1, j0, j1], margin) {
    this.resize();
    const [si, sj] = this.volume.spacing;
    this.center = [(i0 + i1) / 2, (j0 + j1) / 2];
    this.scale = Math.min(
      this.canvas.width / ((i1 - i0) * si + 2 * margin),
      this.canvas.height / ((j1 - j0) * sj + 2 * margin),
    );
  }

  // canvas pixels per voxel along both axes, and the position of the voxel corner (0, 0)
  transform() {
    const { spacing, sign } = this.volume;
    const [a, d] = [this.scale * spacing[0] * sign[0], this.scale * spacing[1] * sign[1]];
    return [a, d, this.canvas.width / 2 - a * this.center[0], this.canvas.height / 2 - d * this.center[1]];
  }

  // voxel position (i, j), with fractions, of a point of the page
  voxelAt(x, y) {
    const box = this.canvas.getBoundingClientRect(), [a, d, e, f] = this.transform();
    return [((x - box.left) * this.ratio - e) / a, ((y - box.top) * this.ratio - f) / d];
  }

  // the point of the page at a voxel position
  pointAt(i, j) {
    const box = this.canvas.getBoundingClientRect(), [a, d, e, f] = this.transform();
    return [box.left + (a * i + e) / this.ratio, box.top + (d * j + f) / this.ratio];
  }

  move(dx, dy) {
    const [a, d] = this.transform();
    this.center = [this.center[0] - (dx * this.ratio) / a, this.center[1] - (dy * this.ratio) / d];
  }

  zoomAt(factor, x, y) {
    const before = this.voxelAt(x, y);
    this.scale = Math.min(Math.max(this.scale * factor, 0.5), 200);
    const after = this.voxelAt(x, y);
    this.center = this.center.map((value, axis) => value + before[axis] - after[axis]);
  }

  cached(key, make) {
    if (!this.planes.has(key)) {
      if (this.planes.size > 24) this.planes.clear();
      this.planes.set(key, make());
    }
    return this.planes.get(key);
  }

  draw({ z, contrast, showMap, showLabels, regions, current, flagColor, cursor }) {
    this.resize();
    const key = [z, contrast, showMap, ...this.transform(), this.canvas.width, this.canvas.height].join();
    if (key !== this.baseKey) this.drawBase(z, contrast, showMap); // it stays while one paints
    this.baseKey = key;
    this.context.setTransform(1, 0, 0, 1, 0, 0);
    this.context.drawImage(this.base, 0, 0);
    if (showLabels) this.drawLabels(z, showMap);
    for (const region of regions) if (region.slice === z) this.drawRegion(region, region.id === current, flagColor);
    const here = regions.find((region) => region.id === current);
    if (here && here.slice !== z) this.drawRegion(here, false, flagColor, [2, 4]);
    if (cursor) this.drawCursor(cursor);
  }

  // image and map, on a canvas of their own
  drawBase(z, contrast, showMap) {
    const { width, height } = this.canvas, { volume } = this;
    this.base = new OffscreenCanvas(width, height);
    const context = this.base.getContext("2d");
    context.fillStyle = "#0b0d10";
    context.fillRect(0, 0, width, height);
    const [a, d, e, f] = this.transform();
    context.setTransform(a, 0, 0, d, e, f);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.cached(`image ${z} ${contrast}`, () => volume.imagePlane(z, contrast)), 0, 0);
    if (!showMap) return;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 0.7;
    context.drawImage(this.cached(`map ${z}`, () => volume.mapPlane(z)), 0, 0);
  }

  // fill of each class, and a line along its voxel edges, a little within them
  drawLabels(z, linesOnly) {
    const { context, volume } = this, [a, d, e, f] = this.transform(), [height, width] = volume.shape;
    const line = Math.max(1.5 * this.ratio, Math.min(2.2 * this.ratio, Math.abs(a) / 6));
    const at = (i, j) => (i < 0 || j < 0 || i >= height || j >= width ? 0 : volume.labels[volume.index(i, j, z)]);
    const [di, dj] = [(0.6 * line) / Math.abs(a), (0.6 * line) / Math.abs(d)];
    this.colors.forEach((color, label) => {
      if (!label) return;
      const fill = new Path2D(), edge = new Path2D();
      for (let j = 0; j < width; j++) {
        for (let i = 0, start = 0; i < height; i++) {
          if (at(i, j) !== label) continue;
          if (at(i - 1, j) !== label) start = i;
          if (at(i + 1, j) !== label) fill.rect(start, j, i + 1 - start, 1);
          const [left, right, top, bottom] = [i + di, i + 1 - di, j + dj, j + 1 - dj];
          const open = [at(i - 1, j), at(i + 1, j), at(i, j - 1), at(i, j + 1)].map((other) => other !== label);
          const segment = (x0, y0, x1, y1) => { edge.moveTo(x0, y0); edge.lineTo(x1, y1); };
          if (open[0]) segment(left, open[2] ? top : j, left, open[3] ? bottom : j + 1);
          if (open[1]) segment(right, open[2] ? top : j, right, open[3] ? bottom : j + 1);
          if (open[2]) segment(open[0] ? left : i, top, open[1] ? right : i + 1, top);
          if (open[3]) segment(open[0] ? left : i, bottom, open[1] ? right : i + 1, bottom);
        }
      }
      context.setTransform(a, 0, 0, d, e, f);
      context.fillStyle = context.strokeStyle = color;
      if (!linesOnly) {
        context.globalAlpha = 0.18;
        context.fill(fill);
        context.globalAlpha = 1;
      }
      this.stroke(edge, line);
    });
  }

  // a path in voxels, with a line width in canvas pixels
  stroke(path, width) {
    const [a, d, e, f] = this.transform(), scaled = new Path2D();
    scaled.addPath(path, new DOMMatrix([a, 0, 0, d, e, f]));
    this.context.setTransform(1, 0, 0, 1, 0, 0);
    this.context.lineWidth = width;
    this.context.lineCap = "square";
    this.context.stroke(scaled);
  }

  drawRegion({ row0, row1, col0, col1, decision }, isCurrent, flagColor, dash = []) {
    const { context, ratio } = this, path = new Path2D();
    path.rect(row0, col0, row1 - row0, col1 - col0);
    context.setLineDash(dash.map((length) => length * ratio));
    if (isCurrent) {
      context.strokeStyle = "#000";
      this.stroke(path, 6 * ratio);
      context.strokeStyle = "#fff";
      this.stroke(path, 4.5 * ratio);
    }
    context.strokeStyle = decision ? "#9aa4b1" : flagColor;
    this.stroke(path, (isCurrent ? 2.5 : 1.5) * ratio);
    context.setLineDash([]);
    const corners = [this.corner(row0, col0), this.corner(row1, col1)];
    if (decision && !dash.length && Math.abs(corners[1][0] - corners[0][0]) > 28 * ratio) {
      const [x, y] = [0, 1].map((axis) => Math.max(corners[0][axis], corners[1][axis]) - 4 * ratio);
      this.drawText(decision === "accepted" ? "✓" : "✎", x, y, "right");
    }
  }

  // white letters with a black edge, by default in the lower left corner
  drawText(text, x = 5 * this.ratio, y = this.canvas.height - 5 * this.ratio, align = "left") {
    const { context, ratio } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    Object.assign(context, { font: `bold ${13 * ratio}px sans-serif`, textAlign: align, lineWidth: 3 * ratio });
    Object.assign(context, { strokeStyle: "#000", fillStyle: "#fff" });
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }

  corner(i, j) {
    const [a, d, e, f] = this.transform();
    return [a * i + e, d * j + f];
  }

  drawCursor({ position: [i, j], diameter, color }) {
    const [a, d] = this.transform(), [x, y] = this.corner(i, j), { context, ratio } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    for (const [style, width] of [["#000", 3.5], [color, 1.75]]) {
      context.beginPath();
      context.ellipse(x, y, (Math.abs(a) * diameter) / 2, (Math.abs(d) * diameter) / 2, 0, 0, 2 * Math.PI);
      context.strokeStyle = style;
      context.lineWidth = width * ratio;
      context.stroke();
    }
  }
}

// voxels [i, j] of a round brush moved from one position to another
export function brushed([i0, j0], [i1, j1], diameter, [height, width]) {
  const found = new Map(), radius = diameter / 2, steps = Math.max(1, Math.ceil(2 * Math.hypot(i1 - i0, j1 - j0)));
  for (let step = 0; step <= steps; step++) {
    const [ci, cj] = [i0 + ((i1 - i0) * step) / steps, j0 + ((j1 - j0) * step) / steps];
    const add = (i, j) => i >= 0 && j >= 0 && i < height && j < width && found.set(i + height * j, [i, j]);
    add(Math.floor(ci), Math.floor(cj));
    for (let j = Math.floor(cj - radius); j <= cj + radius; j++) {
      for (let i = Math.floor(ci - radius); i <= ci + radius; i++) {
        if (Math.hypot(i + 0.5 - ci, j + 0.5 - cj) <= radius) add(i, j);
      }
    }
  }
  return [...found.values()];
}
