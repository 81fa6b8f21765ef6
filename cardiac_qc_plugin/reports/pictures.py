"""Pictures of the slices with flagged regions: the image and the uncertainty map, side by side.

Display: the first array axis runs to the right and the second one down, as the scanner shows a slice. An axis
that the affine says is mirrored against that (toward the patient's right, front or head) is turned round. So
ACDC's files, and files of converters that mirror the rows, give the usual short-axis view: septum and RV on
the left, anterior wall above, diaphragm below.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cardiac_qc_plugin.data.predictions import MAP_FILES
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.workflows.files import read_json, read_volume, write_file

__all__ = ["CONTOURS", "FLAG_COLOR", "MAP_COLORS", "MAP_NAMES", "MAP_TOP", "regions_by_slice", "write_pictures"]

# Color and dashes (points on, off) of each class's contour; the colors stay apart for the color-blind
CONTOURS = {"RV": ("#56B4E9", (4, 1.5)), "LVM": ("#F0E442", ()), "LV": ("#00D9A3", (1.2, 1.2))}
FLAG_COLOR = "#FF5A36"
MAP_NAMES = {"bmap": "b-map", "emap": "e-map"}
MAP_COLORS = "viridis"
MAP_TOP = 0.5  # both maps reach it where two of the four classes are equally likely
GRAYS = colormaps["gray"].resampled(64)  # a third off the file, and no difference to be seen
BACKGROUND = "#14171C"
PANEL_WIDTH, GAP, DPI = 380, 6, 100  # pixels, pixels, pixels per inch


def regions_by_slice(qc: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """The flagged regions of a ``qc.json`` by slice (from 0, ascending)."""
    slices: dict[int, list[Mapping[str, Any]]] = {}
    for region in sorted(qc["detection"]["regions"], key=lambda region: region["slice"]):
        slices.setdefault(region["slice"], []).append(region)
    return slices


def write_pictures(folder: Path) -> list[Path]:
    """Draw each slice with a flagged region to ``<folder>/review/slice07.png`` (slices counted from 1).

    Pictures that are all younger than ``qc.json`` are left as they are; those of other slices, from an earlier run,
    are removed.

    Args:
        folder: a case folder with ``qc.json``, the segmentation and the map that the detection used. The image is
            read from where ``qc.json`` says that the input lies.

    Returns:
        The pictures, by slice.

    Raises:
        ValueError: if a file is missing or damaged, or the files differ in shape.
    """
    record = folder / "qc.json"
    qc = read_json(record)
    slices = regions_by_slice(qc)
    pictures = {index: folder / "review" / f"slice{index + 1:02d}.png" for index in slices}
    for stale in set((folder / "review").glob("slice*.png")).difference(pictures.values()):
        stale.unlink()
    made = record.stat().st_mtime_ns
    if not all(path.is_file() and path.stat().st_mtime_ns > made for path in pictures.values()):
        for index, figure in _draw_slices(folder, qc, slices):
            write_file(pictures[index], FigureCanvasAgg(figure).print_png)
    return list(pictures.values())


def _draw_slices(
    folder: Path, qc: Mapping[str, Any], slices: Mapping[int, list[Mapping[str, Any]]]
) -> Iterator[tuple[int, Figure]]:
    """Figures of the flagged slices, with their indices."""
    detection = qc["detection"]
    scan = read_volume(qc["input"]["path"], qc["input"]["frame"])
    labels = _read_like(folder / "segmentation.nii.gz", scan.data)
    uncertainty = _read_like(folder / MAP_FILES[detection["map"]], scan.data)
    dark, bright = np.percentile(scan.data, (1, 99))
    gray = {"cmap": GRAYS, "vmin": dark, "vmax": bright, "interpolation": "bicubic"}
    viridis = {"cmap": MAP_COLORS, "vmin": 0, "vmax": MAP_TOP, "interpolation": "nearest"}
    mirrored = [code in ("R", "A", "S") for code in nib.aff2axcodes(scan.image.affine)[:2]]
    for index, regions in slices.items():
        figure = Figure(facecolor=BACKGROUND, dpi=DPI)
        view = _view(detection["boxes"][index], detection["region_size"], labels.shape)
        left, right = _panels(figure, view, scan.spacing, mirrored)
        left.imshow(scan.data[..., index].T, aspect="auto", **gray)
        right.imshow(uncertainty[..., index].T, aspect="auto", **viridis)
        _draw_contours(left, labels[..., index])
        titles = f"slice {index + 1} of {labels.shape[2]}", MAP_NAMES[detection["map"]]
        for panel, title in zip((left, right), titles, strict=True):
            _draw_regions(panel, regions, detection["threshold"])
            _draw_title(panel, title)
        yield index, figure


def _read_like(path: Path, scan: np.ndarray) -> np.ndarray:
    array = read_volume(path).data
    if array.shape != scan.shape:
        raise ValueError(f"{path}: its shape is {array.shape}, that of the scan {scan.shape}. Run the case again.")
    return array


def _view(box: Sequence[int], margin: int, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Rows and columns to show: the detector's box with a margin, inside the image (stops excluded)."""
    row0, row1, col0, col1 = box
    rows = max(row0 - margin, 0), min(row1 + margin, shape[0])
    cols = max(col0 - margin, 0), min(col1 + margin, shape[1])
    return *rows, *cols


def _panels(
    figure: Figure, view: tuple[int, int, int, int], spacing: Sequence[float], mirrored: Sequence[bool]
) -> list[Axes]:
    """Two panels in array coordinates (x: first axis, y: second axis), to scale in mm; sizes the figure."""
    row0, row1, col0, col1 = (edge - 0.5 for edge in view)
    width = 2 * PANEL_WIDTH + GAP
    height = round(PANEL_WIDTH * (col1 - col0) * spacing[1] / ((row1 - row0) * spacing[0]))
    figure.set_size_inches(width / DPI, height / DPI)
    panels = []
    for start in (0, PANEL_WIDTH + GAP):
        panel = figure.add_axes((start / width, 0, PANEL_WIDTH / width, 1))
        panel.set_axis_off()
        panel.set_autoscale_on(False)
        panel.set_xlim((row1, row0) if mirrored[0] else (row0, row1))
        panel.set_ylim((col0, col1) if mirrored[1] else (col1, col0))
        panels.append(panel)
    return panels


def _draw_contours(panel: Axes, labels: np.ndarray) -> None:
    """A contour in each class of a slice (H, W), a quarter pixel within it, so that neighbors stay apart."""
    for label, name in CLASS_NAMES.items():
        mask = labels == label
        if mask.any():
            color, dashes = CONTOURS[name]
            contour = panel.contour(mask.T, levels=[0.75], colors=[color], linewidths=1.4)
            contour.set_linestyle((0, dashes) if dashes else "solid")


def _draw_regions(panel: Axes, regions: Sequence[Mapping[str, Any]], threshold: float) -> None:
    """Frame the flagged cells, each within its pixels: the more probable a failure, the wider the line."""
    cells = [
        Rectangle((r["row0"] - 0.2, r["col0"] - 0.2), r["row1"] - r["row0"] - 0.6, r["col1"] - r["col0"] - 0.6)
        for r in regions
    ]
    widths = [1.2 + 1.6 * (r["probability"] - threshold) / max(1 - threshold, 1e-6) for r in regions]
    panel.add_collection(PatchCollection(cells, facecolor="none", edgecolor=FLAG_COLOR, linewidth=widths))


def _draw_title(panel: Axes, title: str) -> None:
    shade = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.65, "pad": 3}
    panel.text(0.015, 0.98, title, transform=panel.transAxes, color="white", fontsize=10, va="top", bbox=shade)
