"""Image regions: the detector's crop of a slice and its grid of cells (paper, sections III-C and V-B).

All of it is 2-D, per slice. A `Box` is (row0, row1, col0, col1) on the slice's pixel grid, stops excluded. A
slice that is smaller than the needed crop gives a box that reaches beyond the image; the crop is padded
there. The cells, regions of `region_size` x `region_size` pixels, tile the crop without overlap from its
first row and column.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_numpy

from .spatial import failed_slices

Box = tuple[int, int, int, int]
REGION_SIZE, MIN_SIZE = 8, 80  # pixels: a cell, and the smallest crop (V-B)


def crop_box(mask_slice: np.ndarray, region_size: int = REGION_SIZE, min_size: int = MIN_SIZE) -> Box:
    """The detector's crop: the fewest cells around the automatic segmentation (paper, section V-B).

    Args:
        mask_slice: labels or mask of one slice, (H, W); foreground is > 0.
        region_size: side of a cell in pixels (the network's output spacing).
        min_size: smallest side of the crop in pixels, a multiple of `region_size`; 80 in the paper, 112 in
            the released code.

    Returns:
        Box around the foreground, or around the image's center if there is none: grown to the same amount on
        both sides of an axis, then shifted into the image, or centered on it where the image is smaller than
        the box.

    Raises:
        ValueError: the mask is not 2-D, or the sizes do not fit each other.
    """
    if mask_slice.ndim != 2:
        raise ValueError(f"mask_slice has to be (H, W), got shape {mask_slice.shape}.")
    if region_size < 1 or min_size < region_size or min_size % region_size:
        raise ValueError(f"min_size has to be a positive multiple of region_size, got {min_size} and {region_size}.")
    foreground = mask_slice > 0
    box: list[int] = []
    for axis, length in enumerate(foreground.shape):
        indices = np.flatnonzero(foreground.any(axis=1 - axis))
        first, stop = (int(indices[0]), int(indices[-1]) + 1) if indices.size else (length // 2, length - length // 2)
        size = max(min_size, -(-(stop - first) // region_size) * region_size)
        start = first - (size - (stop - first)) // 2
        start = min(max(start, 0), length - size) if size <= length else (length - size) // 2
        box += [start, start + size]
    return tuple(box)


def expected_heart(labels: np.ndarray) -> np.ndarray:
    """Where the heart has to be in slices whose segmentation failed: there or in the nearest full slices.

    A heart does not end and begin again, so an empty slice between full ones is a failure, however sure a network is
    of it (see :func:`~cardiac_qc_plugin.transforms.failed_slices`).

    Args:
        labels: automatic segmentation, (H, W, D).

    Returns:
        Booleans (H, W, D): what is labelled in a failed slice or in one of the full slices on its two sides; False in
        all other slices.
    """
    heart = np.zeros(labels.shape, dtype=bool)
    for z, (before, behind) in failed_slices(labels).items():
        heart[..., z] = (labels[..., [before, z, behind]] > 0).any(axis=-1)
    return heart


def crop_boxes(labels: np.ndarray, region_size: int = REGION_SIZE, min_size: int = MIN_SIZE) -> list[Box]:
    """The detector's crop of each slice, see `crop_box`; where a slice failed, around the heart that it should show.

    Args:
        labels: automatic segmentation, (H, W, D).
        region_size, min_size: as for `crop_box`.

    Returns:
        A box for each slice.
    """
    foreground = (labels > 0) | expected_heart(labels)
    return [crop_box(foreground[..., z], region_size, min_size) for z in range(labels.shape[2])]


def crop_slice(image: np.ndarray, box: Box) -> np.ndarray:
    """Cut `box` out of a slice (..., H, W); pixels outside the image are 0.

    Zero is the one padding rule: it is background in a mask, no failure in a label, certainty in an
    uncertainty map, and the darkest value of a scaled image, so that padding never looks like something to
    correct.

    Returns:
        Copy of shape (..., row1 - row0, col1 - col0).

    Raises:
        ValueError: the box has no pixel in common with the image.
    """
    rows, cols = _inside(box, image.shape[-2:])
    pad = [(rows.start - box[0], box[1] - rows.stop), (cols.start - box[2], box[3] - cols.stop)]
    return np.pad(image[..., rows, cols], [(0, 0)] * (image.ndim - 2) + pad)


def uncrop_slice(crop: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Put a crop (..., h, w) back on the image grid, 0 outside the box: the inverse of `crop_slice` in the image.

    Args:
        crop: what `crop_slice` cut out, or a result on the same grid.
        box: the box it was cut with.
        shape: (H, W) of the image.

    Returns:
        Array (..., H, W) of the crop's type.

    Raises:
        ValueError: the crop does not have the box's size, or the box no pixel in common with the image.
    """
    size = (box[1] - box[0], box[3] - box[2])
    if crop.shape[-2:] != size:
        raise ValueError(f"The crop has shape {crop.shape}, its box {box} asks for {size}.")
    rows, cols = _inside(box, shape)
    image = np.zeros((*crop.shape[:-2], *shape), dtype=crop.dtype)
    image[..., rows, cols] = crop[
        ..., rows.start - box[0] : rows.stop - box[0], cols.start - box[2] : cols.stop - box[2]
    ]
    return image


def _inside(box: Box, shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of the box that lie in an image of `shape` (H, W)."""
    rows = slice(max(box[0], 0), min(box[1], shape[0]))
    cols = slice(max(box[2], 0), min(box[3], shape[1]))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise ValueError(f"The box {box} has no pixel in an image of shape {tuple(shape)}.")
    return rows, cols


def region_labels(failure: NdarrayOrTensor, region_size: int) -> NdarrayOrTensor:
    """Reference label t_j of each cell: does it contain a failure voxel? (paper, section III-D)

    Args:
        failure: failure mask of a crop, (..., h, w), array or tensor; nonzero is failure.
        region_size: side of a cell in pixels.

    Returns:
        Booleans (..., h // region_size, w // region_size), of the same kind.

    Raises:
        ValueError: h or w is not a multiple of `region_size`.
    """
    *lead, height, width = failure.shape
    if height % region_size or width % region_size:
        raise ValueError(f"A crop of {height} x {width} does not split into cells of {region_size} x {region_size}.")
    tiles = (*lead, height // region_size, region_size, width // region_size, region_size)
    return (failure != 0).reshape(tiles).sum(axis=(-3, -1)) > 0


def paint_regions(cells: np.ndarray, box: Box, shape: tuple[int, int], region_size: int) -> np.ndarray:
    """Spread the values of cells over their pixels on the image grid.

    Args:
        cells: one value a cell, (rows, cols).
        box: the crop the cells tile.
        shape: (H, W) of the image.
        region_size: side of a cell in pixels.

    Returns:
        (H, W), zero outside the box.

    Raises:
        ValueError: the cells do not tile the box.
    """
    return uncrop_slice(cells.repeat(region_size, axis=0).repeat(region_size, axis=1), box, shape)


@dataclass(frozen=True, eq=False)
class RegionGrid:
    """The N regions of a volume that have a pixel of the image, in the order of slices, rows, columns.

    Attributes:
        slices: slice of each region, (N,).
        rows: first row and stop of each region, clipped to the image, (N, 2).
        cols: the same of columns, (N, 2).
    """

    slices: np.ndarray
    rows: np.ndarray
    cols: np.ndarray

    def indices(self) -> list[tuple[slice, slice, int]]:
        """What to index a volume (H, W, D) with, for each region."""
        places = zip(self.rows.tolist(), self.cols.tolist(), self.slices.tolist(), strict=True)
        return [(slice(*rows), slice(*cols), z) for rows, cols, z in places]

    def read(self, painted: np.ndarray) -> np.ndarray:
        """What `paint_regions` painted into a volume (H, W, D), of each region, (N,).

        In double precision, whatever the volume's: NumPy would round a threshold to single precision before comparing.
        """
        return painted[self.rows[:, 0], self.cols[:, 0], self.slices].astype(float)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of a map (H, W, D) over each region's pixels, (N,)."""
        return np.array([values[region].mean() for region in self.indices()])

    def counts(self, mask: np.ndarray) -> np.ndarray:
        """Number of nonzero voxels of a mask (H, W, D) in each region, (N,)."""
        return np.array([np.count_nonzero(mask[region]) for region in self.indices()])


def region_grid(boxes: Sequence[Box], shape: tuple[int, int, int], region_size: int) -> RegionGrid:
    """The detector's regions in a volume; cells that lie in the padding only are none.

    Args:
        boxes: the detector's crop of each slice.
        shape: (H, W, D) of the volume.
        region_size: side of a cell in pixels.

    Raises:
        ValueError: not one box for each slice, a box without a pixel of the image, or one that cells do not tile.
    """
    if len(boxes) != shape[2]:
        raise ValueError(f"{shape[2]} slices, but {len(boxes)} boxes.")
    corners = []
    for z, box in enumerate(boxes):
        _inside(box, shape[:2])
        if (box[1] - box[0]) % region_size or (box[3] - box[2]) % region_size:
            raise ValueError(f"Cells of {region_size} pixels do not tile the box {box} of slice {z}.")
        rows, cols = (range(box[i], box[i + 1], region_size) for i in (0, 2))
        corners += [(z, row, col) for row in rows for col in cols]
    z, row, col = np.array(corners).T
    rows, cols = (
        np.stack([start, start + region_size], axis=1).clip(0, length)
        for start, length in ((row, shape[0]), (col, shape[1]))
    )
    inside = (rows[:, 0] < rows[:, 1]) & (cols[:, 0] < cols[:, 1])
    return RegionGrid(z[inside], rows[inside], cols[inside])


def flagged_region_map(
    painted: np.ndarray, grid: RegionGrid, threshold: float
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Regions to review: the cells with a failure probability of at least `threshold`.

    Args:
        painted: P(failure) of each region on its pixels, (H, W, D).
        grid: the regions.
        threshold: operating point in [0, 1].

    Returns:
        The map, uint16 (H, W, D), 0 where nothing is flagged and the region's id elsewhere, and a record of
        each region: id, slice, row0, row1, col0, col1 (clipped to the image, stops excluded), probability.
        The ids 1, 2, ... follow descending probability, then slice, row and column.

    Raises:
        ValueError: a probability or threshold that is no number in [0, 1], or more regions than 65535.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold has to be in [0, 1], got {threshold}.")
    probabilities = grid.read(painted)
    if (bad := ~((probabilities >= 0) & (probabilities <= 1))).any():
        raise ValueError(f"The failure probabilities of slice {grid.slices[bad][0]} are not all in [0, 1].")
    flagged = np.flatnonzero(probabilities >= threshold)
    if flagged.size > np.iinfo(np.uint16).max:
        raise ValueError(f"{flagged.size} regions reach the threshold {threshold}; a map can number 65535.")

    region_map = np.zeros(painted.shape, dtype=np.uint16)
    records = []
    places = grid.indices()
    for number, i in enumerate(flagged[np.argsort(-probabilities[flagged], kind="stable")], start=1):
        rows, cols, z = places[i]
        region_map[rows, cols, z] = number
        place = {"slice": z, "row0": rows.start, "row1": rows.stop, "col0": cols.start, "col1": cols.stop}
        records.append({"id": number, **place, "probability": float(probabilities[i])})
    return region_map, records


class RegionLabelsd(MapTransform):
    """Turn failure masks (..., h, w) into labels of cells (..., h // r, w // r), 1 where a cell has a failure.

    Args:
        keys: the masks, batches of patches or single ones.
        region_size: side of a cell in pixels.
        allow_missing_keys: skip masks that are not there.
    """

    def __init__(self, keys: KeysCollection, region_size: int = REGION_SIZE, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.region_size = region_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        labels = {key: region_labels(data[key], self.region_size) for key in self.key_iterator(data)}
        return {**data, **labels}


class FlagRegionsd(MapTransform):
    """Flag the cells whose failure probability reaches the operating point.

    Args:
        keys: one key, the painted failure probabilities (1, H, W, D).
        segmentation_key: the automatic labels (1, H, W, D), around which the detector's crops lie.
        image_key: the scan, (C, H, W, D), whose metadata the results take.
        threshold: operating point in [0, 1].
        region_size: side of a cell in pixels.
        min_size: smallest side of a crop in pixels.
        regions_key: where the map of region ids goes, see `flagged_region_map`.
        result_key: where a dictionary for reports goes: threshold, region_size, boxes, n_regions,
            expected_failing_regions (the sum of the probabilities), flagged_slices, regions.

    Raises:
        ValueError: when called, for probabilities and labels of different shapes, and as `flagged_region_map`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        segmentation_key: str,
        threshold: float,
        region_size: int = REGION_SIZE,
        min_size: int = MIN_SIZE,
        image_key: str = "image",
        regions_key: str = "regions",
        result_key: str = "result",
    ) -> None:
        super().__init__(keys)
        self.segmentation_key = segmentation_key
        self.threshold = threshold
        self.region_size = region_size
        self.min_size = min_size
        self.image_key = image_key
        self.regions_key = regions_key
        self.result_key = result_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            painted, labels = convert_to_numpy(d[key])[0], convert_to_numpy(d[self.segmentation_key])[0]
            if painted.shape != labels.shape:
                raise ValueError(f"Failure probabilities of shape {painted.shape}, and labels of {labels.shape}.")
            boxes = crop_boxes(labels, self.region_size, self.min_size)
            grid = region_grid(boxes, painted.shape, self.region_size)
            regions, records = flagged_region_map(painted, grid, self.threshold)
            d[key] = convert_to_dst_type(painted[None], d[self.image_key])[0]
            # int32, since torch computes little with uint16
            d[self.regions_key] = convert_to_dst_type(regions[None].astype(np.int32), d[self.image_key], np.int32)[0]
            d[self.result_key] = {
                "threshold": self.threshold,
                "region_size": self.region_size,
                "boxes": [list(box) for box in boxes],
                "n_regions": grid.slices.size,
                "expected_failing_regions": float(grid.read(painted).sum()),
                "flagged_slices": sorted({record["slice"] for record in records}),
                "regions": records,
            }
        return d
