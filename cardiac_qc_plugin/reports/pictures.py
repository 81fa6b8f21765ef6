"""The slices of a case as layers that a page puts on top of one another: image, uncertainty map, contours, regions.

Display: the first array axis runs to the right and the second one down, as the scanner shows a slice. By the affine
axes are turned round (`mirrored_axes`), so that a slice is seen from the apex. So ACDC's files, and files of converters
that mirror the rows, give the usual short-axis view: septum and RV on the left, anterior wall above, diaphragm below.

Contours and regions are in quarters of a pixel from the view's upper left corner (`GRID`), all of them integers.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from skimage.measure import find_contours

from cardiac_qc_plugin.data.predictions import MAP_FILES, PROBABILITY_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.transforms.regions import flagged_region_map, region_grid
from cardiac_qc_plugin.transforms.spatial import says_how_it_lies, seen_from_base
from cardiac_qc_plugin.workflows.files import Volume, read_like, read_volume

__all__ = ["GRID", "MAP_TOP", "Sheet", "draw_sheet", "map_colors", "mirrored_axes", "operating_grid"]

GRID = 4  # units of a contour in a pixel
MAP_TOP = 0.5  # both maps reach it where two of the four classes are equally likely
MAP_STEPS = 32
SIDE = 320  # pixels, the longer side of a slice's picture where the scan has fewer
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, *(round(0.8 + 0.01 * k, 2) for k in range(20)), 0.995, 0.999]


@dataclass(frozen=True)
class Sheet:
    """All slices of a case, in one view.

    Attributes:
        size: pixels of the view, to the right and down.
        aspect: its width in mm divided by its height.
        slices: of each slice ``image`` and ``map`` (data URIs), ``contours`` (SVG path by class) and ``regions``.
        grid: thresholds that a reader may choose from, ascending; the operating point is one of them.
        regions: how many regions reach each threshold.
        flagged_slices: how many slices have one that does.
    """

    size: tuple[int, int]
    aspect: float
    slices: list[dict[str, Any]]
    grid: list[float]
    regions: list[int]
    flagged_slices: list[int]


class View:
    """The surroundings of all crops of the detector, turned as a slice is displayed.

    Args:
        boxes: the crops, by slice.
        margin: pixels to show around them.
        scan: the scan.
    """

    def __init__(self, boxes: Sequence[Sequence[int]], margin: int, scan: Volume) -> None:
        first, last = np.min(boxes, axis=0) - margin, np.max(boxes, axis=0) + margin
        self.starts = [int(max(first[axis], 0)) for axis in (0, 2)]
        self.stops = [int(min(last[axis], length)) for axis, length in zip((1, 3), scan.data.shape[:2], strict=True)]
        self.mirrored = mirrored_axes(scan.image)
        self.size = tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))
        self.size_mm = tuple(length * mm for length, mm in zip(self.size, scan.spacing[:2], strict=True))

    def crop(self, volume: np.ndarray) -> np.ndarray:
        """(H, W, D) to (width, height, D) as displayed."""
        edges = zip(self.starts, self.stops, strict=True)
        step = (slice(None, None, -1 if mirrored else 1) for mirrored in self.mirrored)
        return volume[tuple(slice(*pair) for pair in edges)][tuple(step)]

    def place(self, region: Mapping[str, Any]) -> dict[str, int]:
        """Corner and size of a region, a quarter pixel within its pixels, so that neighbors stay apart."""
        placed = {}
        for axis, side, low, high in ((0, "width", "row0", "row1"), (1, "height", "col0", "col1")):
            first, length = region[low] - self.starts[axis], region[high] - region[low]
            corner = self.size[axis] - first - length if self.mirrored[axis] else first
            placed |= {"xy"[axis]: GRID * corner + 1, side: GRID * length - 2}
        return placed


def mirrored_axes(image: nib.Nifti1Image) -> list[bool]:
    """Which of the first two axes to turn round, so that a slice is seen from the apex.

    Of the two ways the one that has more of the patient's left and back to the right, and of back and feet below. A
    stack that lies a quarter turn from that, as some scanners store it, has it neither way, and is shown as a reader
    knows it from the scanner; converters turn the second axis only. As stored, where the header does not say how the
    image lies in the patient.
    """
    if not says_how_it_lies(image.header):
        return [False, False]
    axes = image.affine[:3, :2] / np.linalg.norm(image.affine[:3, :2], axis=0)
    right, down = axes[:, 0] @ (-1, -1, 0), axes[:, 1] @ (0, -1, -1)
    mirrored = seen_from_base(image.affine, image.header)
    turned = bool(right + (-down if mirrored else down) < -1)  # 2 or more in the usual view, about 0 a quarter turn off
    return [turned, turned != mirrored]


def operating_grid(threshold: float) -> list[float]:
    """The thresholds of the slider, with the operating point among them."""
    return sorted({*LEVELS, threshold})


def map_colors() -> list[tuple[int, int, int, int]]:
    """Colors (RGBA, 0 to 255) of the uncertainty map from 0 to `MAP_TOP`: purple to white, which no line has."""
    shares = np.linspace(0, 1, MAP_STEPS)
    colors = np.array(colormaps["RdPu_r"](shares))
    colors[:, 3] = np.minimum(4 * shares, 0.95)
    return [tuple(color) for color in (255 * colors).round().astype(int).tolist()]


def map_hex() -> list[str]:
    """The same for CSS."""
    return [to_hex([part / 255 for part in color], keep_alpha=True) for color in map_colors()]


def draw_sheet(folder: Path, qc: Mapping[str, Any]) -> Sheet:
    """Draw all slices of a case.

    Args:
        folder: the case's folder, with the segmentation, the map that the detection used, and the failure
            probability.
        qc: content of its ``qc.json``; the image is read from where it says that the input lies.

    Raises:
        ValueError: if a file is missing or damaged, or the files differ in shape; the message names the file.
    """
    detection = qc["detection"]
    scan = read_volume(qc["input"]["path"], qc["input"]["frame"])
    files = SEGMENTATION_FILE, MAP_FILES[detection["map"]], PROBABILITY_FILE
    labels, uncertainty, probability = (read_like(folder / name, scan, "scan") for name in files)
    view = View(detection["boxes"], detection["region_size"], scan)
    grid = operating_grid(detection["threshold"])
    regions = _regions(probability, detection, grid)
    levels = np.array([region["level"] for region in regions], int)
    by_slice = np.zeros(labels.shape[2], int)  # the highest level on each slice
    np.maximum.at(by_slice, [region["slice"] for region in regions], levels)
    images, maps, shown = _grays(view, scan.data), _maps(view.crop(uncertainty)), view.crop(labels)
    slices = [
        {
            "image": images[z],
            "map": maps[z],
            "contours": {name: _path(shown[..., z] == label) for label, name in CLASS_NAMES.items()},
            "regions": [region | view.place(region) for region in regions if region["slice"] == z],
        }
        for z in range(labels.shape[2])
    ]
    steps = np.arange(len(grid))
    counts = ((reached[:, None] > steps).sum(axis=0).tolist() for reached in (levels, by_slice))
    return Sheet(view.size, view.size_mm[0] / view.size_mm[1], slices, grid, *counts)


def _regions(painted: np.ndarray, detection: Mapping[str, Any], grid: Sequence[float]) -> list[dict[str, Any]]:
    """Regions that reach the lowest threshold, the most probable failure first, with ``level``: how many they reach."""
    cells = region_grid(detection["boxes"], painted.shape, detection["region_size"])
    _, regions = flagged_region_map(painted, cells, grid[0])
    probabilities = np.array([region["probability"] for region in regions])
    levels = sum((probabilities >= threshold).astype(int) for threshold in grid)
    return [region | {"level": level} for region, level in zip(regions, levels.tolist(), strict=True)]


def _grays(view: View, scan: np.ndarray) -> list[str]:
    """Slices between the 1st and the 99th percentile of the scan, on square pixels."""
    dark, bright = np.percentile(scan, (1, 99))
    scaled = np.clip((view.crop(scan).astype(np.float32) - dark) / max(bright - dark, 1e-6), 0, 1)
    width, height = view.size_mm
    scale = max(SIDE, *view.size) / max(width, height)
    size = round(width * scale), round(height * scale)
    uint8 = (255 * scaled).round().astype(np.uint8)
    return [
        _uri(Image.fromarray(uint8[..., z].T).resize(size, Image.Resampling.BICUBIC), "webp", quality=75, method=2)
        for z in range(uint8.shape[2])
    ]


def _maps(uncertainty: np.ndarray) -> list[str]:
    """Slices of the map in `MAP_STEPS` colors, a pixel for each of the scan's."""
    colors = np.array(map_colors(), np.uint8)
    steps = (np.clip(uncertainty / MAP_TOP, 0, 1) * (MAP_STEPS - 1)).round().astype(np.uint8)
    pictures = []
    for z in range(steps.shape[2]):
        picture = Image.fromarray(steps[..., z].T)
        picture.putpalette(colors[:, :3].tobytes())
        pictures.append(_uri(picture, "png", transparency=colors[:, 3].tobytes()))
    return pictures


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _path(mask: np.ndarray) -> str:
    """Contours of a mask (width, height) as an SVG path, a quarter pixel within it, so that neighbors stay apart."""
    parts = []
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.75):
        points = (GRID * (contour[:-1] - 0.5)).round().astype(int)  # -1 for the padding, + 1/2 for the pixel's corner
        steps = np.roll(points, -1, axis=0) - points
        turns = (np.roll(steps, 1, axis=0) * steps[:, ::-1]) @ (1, -1) != 0
        corners = points[turns]
        moves = np.diff(corners, axis=0).ravel()
        parts.append(f"M{corners[0, 0]} {corners[0, 1]}l{' '.join(map(str, moves.tolist()))}z")
    return "".join(parts)
