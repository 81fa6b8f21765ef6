"""Anatomical plausibility of a short-axis segmentation, by slice and by volume.

The criteria by slice are those of Painchaud et al. (IEEE TMI 39(11), 2020): holes, gaps, fragments, structures that
touch what they cannot, and shapes beyond the normal. Those by volume are ours: what no heart does from a slice to the
next. What is normal was measured on expert segmentations, see `LIMITS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.measure import perimeter_crofton
from skimage.morphology import convex_hull_image

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES, check_labels, check_spacing

__all__ = ["CRITERIA", "LIMITS", "Plausibility", "enclosed", "plausibility", "shape_of", "stack_changes"]

RV, LVM, LV = CLASS_NAMES
LIMITS = {
    "concavity_LV": 0.106,
    "concavity_RV": 0.666,
    "concavity_LVM": 0.05,
    "circularity_LV": 0.793,
    "circularity_LVM": 0.931,
    "area_jump_LV": 0.184,
    "area_jump_RV": 0.195,
    "area_jump_LVM": 0.097,
    "centroid_jump": 11.2,  # mm
    "gap_RV_LVM": 6.33,  # mm²
}
"""What is beyond the normal: the 99.9th percentile over the slices of ACDC's references in the training folds 1-3 (the
0.1th of circularity), as ``benchmarks/plausibility_limits.py`` measures it; about one reference slice in 1000 is beyond
each. The other criteria need no limit: references hardly ever violate them."""
SMALLEST = 25
"""Pixels below which a structure has no shape to speak of."""
CRITERIA = {
    "hole_LV": "hole in the LV",
    "hole_RV": "hole in the RV",
    "hole_LVM": "hole in the LVM",
    "gap_LV_LVM": "gap between LV and LVM",
    "gap_RV_LVM": "gap between RV and LVM",
    "fragments_LV": "LV in several pieces",
    "fragments_RV": "RV in several pieces",
    "fragments_LVM": "LVM in several pieces",
    "RV_apart": "RV that does not touch the LVM",
    "LV_touches_RV": "LV that touches the RV",
    "LV_touches_background": "LV that touches the background",
    "concavity_LV": "LV more concave than normal",
    "concavity_RV": "RV more concave than normal",
    "concavity_LVM": "epicardium more concave than normal",
    "circularity_LV": "LV less circular than normal",
    "circularity_LVM": "epicardium less circular than normal",
    "vanishes_LV": "no LV between two slices that have it",
    "vanishes_RV": "no RV between two slices that have it",
    "vanishes_LVM": "no LVM between two slices that have it",
    "area_jump_LV": "LV area that stands out from both neighboring slices",
    "area_jump_RV": "RV area that stands out from both neighboring slices",
    "area_jump_LVM": "epicardial area that stands out from both neighboring slices",
    "centroid_jump": "epicardial center that stands out from both neighboring slices",
}
"""Every criterion and what it says; those from "vanishes" on look at more than one slice."""
EDGES = ndimage.generate_binary_structure(2, 1)
CORNERS = ndimage.generate_binary_structure(2, 2)


@dataclass(frozen=True)
class Plausibility:
    """The criteria that a segmentation violates.

    Attributes:
        violations: by criterion, the slices (from 0) in which it is violated; criteria without any are left out.
        n_slices: slices of the stack.
    """

    violations: dict[str, list[int]]
    n_slices: int

    @property
    def implausible_slices(self) -> list[int]:
        """Slices with a violation, in order."""
        return sorted({z for slices in self.violations.values() for z in slices})

    @property
    def count(self) -> int:
        """Violations in all."""
        return sum(map(len, self.violations.values()))


def plausibility(labels: np.ndarray, spacing: Sequence[float]) -> Plausibility:
    """Check a segmented stack.

    The first and the last slice with an LV or LVM are the base and the apex. There the myocardium may be open and a
    shape unusual: in them an LV that touches the background or the RV, and concavity and circularity are not judged,
    nor are jumps to them.

    Args:
        labels: shape (H, W, D), slices last, values 0-3.
        spacing: (row, column, slice) in mm.

    Raises:
        ValueError: for unknown labels or an invalid spacing.
    """
    labels, spacing = check_labels(labels, "labels"), check_spacing(spacing)
    depth = labels.shape[2]
    heart = np.flatnonzero((labels >= LVM).any(axis=(0, 1)))
    inner = range(heart[0] + 1, heart[-1]) if heart.size else range(0)
    found: dict[str, list[int]] = {name: [] for name in CRITERIA}
    for z in range(depth):
        names = _broken(labels[..., z], spacing[0] * spacing[1])
        if z in inner:
            names += _misplaced(labels[..., z]) + _misshapen(labels[..., z], spacing[:2])
        for name in names:
            found[name].append(z)
    for label, name in CLASS_NAMES.items():
        present = (labels == label).any(axis=(0, 1))
        span = np.flatnonzero(present)
        found[f"vanishes_{name}"] = [z for z in range(depth) if span.size and span[0] < z < span[-1] and not present[z]]
    for name, changes in stack_changes(labels, spacing).items():
        found[name] = [z for z, change in changes.items() if change > LIMITS[name]]
    return Plausibility({name: slices for name, slices in found.items() if slices}, depth)


def _broken(labels: np.ndarray, pixel_mm2: float) -> list[str]:
    """Holes, gaps, fragments and an RV apart, in one slice (H, W)."""
    names = [name for name, pixels in enclosed(labels) if pixels * pixel_mm2 > LIMITS.get(name, 0)]
    for label, name in CLASS_NAMES.items():
        if ndimage.label(labels == label, CORNERS)[1] > 1:
            names.append(f"fragments_{name}")
    rv = labels == RV
    if rv.any() and (labels == LVM).any() and not (ndimage.binary_dilation(rv, CORNERS) & (labels == LVM)).any():
        names.append("RV_apart")
    return list(dict.fromkeys(names))


def enclosed(labels: np.ndarray) -> list[tuple[str, int]]:
    """Background that structures enclose in one slice (H, W): the criterion, by what is around it, and its pixels."""
    padded = np.pad(labels, 1)
    regions, count = ndimage.label(padded == 0, EDGES)
    result = []
    for region in set(range(1, count + 1)) - {regions[0, 0]}:
        inside = regions == region
        around = set(padded[ndimage.binary_dilation(inside, EDGES) & ~inside].tolist())
        if around >= {LV, LVM}:
            name = "gap_LV_LVM"
        elif around >= {RV, LVM}:
            name = "gap_RV_LVM"
        else:
            name = f"hole_{CLASS_NAMES[max(around)]}"
        result.append((name, int(np.count_nonzero(inside))))
    return result


def _misplaced(labels: np.ndarray) -> list[str]:
    """What the LV shares an edge with, in one slice (H, W)."""
    lv = np.pad(labels == LV, 1)
    beside = np.pad(labels, 1)[ndimage.binary_dilation(lv, EDGES) & ~lv]
    return [name for name, label in (("LV_touches_RV", RV), ("LV_touches_background", 0)) if (beside == label).any()]


def _outlines(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Masks whose shape is judged; for the LVM all that the epicardium encloses."""
    return {"LV": labels == LV, "RV": labels == RV, "LVM": ndimage.binary_fill_holes(labels >= LVM)}


def _misshapen(labels: np.ndarray, spacing: Sequence[float]) -> list[str]:
    names = []
    for structure, mask in _outlines(labels).items():
        if np.count_nonzero(mask) >= SMALLEST:
            shape = shape_of(mask, spacing)
            if shape["concavity"] > LIMITS[f"concavity_{structure}"]:
                names.append(f"concavity_{structure}")
            if shape["circularity"] < LIMITS.get(f"circularity_{structure}", 0):
                names.append(f"circularity_{structure}")
    return names


def shape_of(mask: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> dict[str, float]:
    """Concavity and circularity of a mask in one slice, counted in pixels, which are made square if they are not.

    Concavity is the share of the convex hull that the mask leaves free. Circularity is 4 pi times the area over the
    squared perimeter (Crofton's formula in four directions): about 1 for a disk.

    Args:
        mask: shape (H, W), bool, not empty.
        spacing: (row, column) in mm.
    """
    box = ndimage.find_objects(mask.view(np.int8))[0]
    mask = np.pad(mask[box], 1)
    if max(spacing) > 1.05 * min(spacing):  # fewer of the small ones: more of the large ones would be stairs
        factors = np.divide(spacing, max(spacing))
        square = ndimage.zoom(mask.astype(float), factors, order=1, grid_mode=True, mode="nearest") >= 0.5
        mask = square if square.any() else mask  # a line may vanish
    area = np.count_nonzero(mask)
    hull = np.count_nonzero(convex_hull_image(mask))
    return {
        "concavity": 1 - area / hull,
        "circularity": float(4 * np.pi * area / perimeter_crofton(mask, directions=4) ** 2),
    }


def stack_changes(labels: np.ndarray, spacing: Sequence[float]) -> dict[str, dict[int, float]]:
    """How far a slice stands out from both its neighbors, where all three have the structure.

    Args:
        labels: shape (H, W, D), values 0-3.
        spacing: (row, column, slice) in mm.

    Returns:
        By criterion and slice: how far the area is above or below those of both neighbors, as a share of the
        structure's largest area (0 if it lies between them); how far the center of what the epicardium encloses is
        from that of the nearer neighbor, in mm. The first and the last slice of the heart are left out, and so
        are the slices beside them, whose neighbors they are.
    """
    outlines = [_outlines(labels[..., z]) for z in range(labels.shape[2])]
    heart = [z for z, masks in enumerate(outlines) if masks["LVM"].any()]
    inner = heart[2:-2]
    result: dict[str, dict[int, float]] = {}
    for name in ("LV", "RV", "LVM"):
        jumps = result[f"area_jump_{name}"] = {}
        areas = [np.count_nonzero(masks[name]) for masks in outlines]
        for z in inner:
            before, area, after = areas[z - 1 : z + 2]
            if min(before, area, after) > 0:
                beyond = max(area - max(before, after), min(before, after) - area, 0)
                jumps[z] = beyond / max(areas)
    centers = {z: np.array(ndimage.center_of_mass(outlines[z]["LVM"])) * spacing[:2] for z in heart}
    result["centroid_jump"] = {
        z: float(min(np.linalg.norm(centers[z] - centers[other]) for other in (z - 1, z + 1)))
        for z in inner
        if {z - 1, z + 1} <= centers.keys()
    }
    return result
