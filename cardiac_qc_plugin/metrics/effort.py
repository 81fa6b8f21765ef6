"""What reviewing regions is worth: scores of a volume while its regions take the reference, one after another.

A region changes the voxels of one cell of the detector's grid. So the overlap of every structure after any number of
regions is a running sum, and the Hausdorff distance is measured again only for structures that changed.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.transforms.regions import RegionGrid

__all__ = ["ReviewedVolume"]


class ReviewedVolume:
    """Scores of a segmentation while its regions take the reference labels (the paper's rule, V-C).

    Args:
        prediction: automatic labels 0-3, (H, W, D).
        reference: manual labels 0-3 on the same grid, at least one voxel of a structure.
        spacing: (row, column, slice) in mm.
        grid: the N regions.

    Attributes:
        overlap_gain: what each region adds to the voxels that prediction and reference have in common, (N, 3).
        size_gain: what it adds to the voxels of the prediction, (N, 3).
        wrong: voxels of each region whose label is wrong, (N,).
    """

    def __init__(
        self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], grid: RegionGrid
    ) -> None:
        self.grid = grid
        masks = [(prediction == label, reference == label) for label in CLASS_NAMES]
        self.sizes, self.reference_sizes = (np.array([np.count_nonzero(pair[i]) for pair in masks]) for i in (0, 1))
        self.overlap = np.array([np.count_nonzero(ours & true) for ours, true in masks])
        ours, true, common = (
            np.stack([grid.counts(mask(*pair)) for pair in masks], axis=1)
            for mask in (lambda ours, true: ours, lambda ours, true: true, np.logical_and)
        )
        self.size_gain, self.overlap_gain = true - ours, true - common
        self.wrong = grid.counts(prediction != reference)

        # all that is outside this box is background, and stays so; a region with a wrong voxel has one in it
        box = ndimage.find_objects(((prediction | reference) > 0).astype(np.int8))[0]
        self.prediction, self.reference = prediction[box], reference[box]
        self.regions = [_shifted(region, box) for region in grid.indices()]
        diagonal = float(np.linalg.norm(np.multiply(spacing, prediction.shape)))
        self.distances = [_DistanceTo(self.reference == label, spacing, diagonal) for label in CLASS_NAMES]

    @property
    def dice_gain(self) -> np.ndarray:
        """What each region, reviewed alone, adds to the mean Dice coefficient of the volume's structures, (N,)."""
        alone = _dice(self.overlap + self.overlap_gain, self.sizes + self.size_gain, self.reference_sizes)
        return np.nanmean(alone, axis=1) - np.nanmean(_dice(self.overlap, self.sizes, self.reference_sizes))

    def dice(self, order: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Dice coefficient of each structure after the first regions of an order.

        Args:
            order: indices of regions, each at most once.
            counts: how many of them are reviewed, (K,).

        Returns:
            (K, 3); nan where prediction and reference lack the structure.
        """
        overlap, sizes = (
            start + np.vstack([np.zeros_like(start), gain[order].cumsum(axis=0)])[counts]
            for start, gain in ((self.overlap, self.overlap_gain), (self.sizes, self.size_gain))
        )
        return _dice(overlap, sizes, self.reference_sizes)

    def hausdorff(self, order: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Hausdorff distance in mm of each structure after the first regions of an order.

        Args:
            order: indices of regions, each at most once.
            counts: how many of them are reviewed, ascending, (K,).

        Returns:
            (K, 3), as `StructureScore.hausdorff_penalized`: nan where prediction and reference lack the structure, the
            diagonal of the scan where only one of them does.
        """
        labels, changed = self.prediction.copy(), set(CLASS_NAMES)
        result, current = np.empty((len(counts), len(CLASS_NAMES))), np.empty(len(CLASS_NAMES))
        for row, (done, count) in enumerate(pairwise([0, *counts])):
            todo = order[done:count]
            for number in todo[self.wrong[todo] > 0]:
                region = self.regions[number]
                old, new = labels[region], self.reference[region]
                wrong = old != new
                changed |= {*old[wrong].tolist(), *new[wrong].tolist()}
                labels[region] = new
            for column, label in enumerate(CLASS_NAMES):
                if label in changed:
                    current[column] = self.distances[column](labels == label)
            result[row], changed = current, set()
        return result


def _dice(overlap: np.ndarray, sizes: np.ndarray, reference_sizes: np.ndarray) -> np.ndarray:
    total = sizes + reference_sizes
    return np.divide(2 * overlap, total, out=np.full(total.shape, np.nan), where=total > 0)


def _shifted(region: tuple[slice, slice, int], box: tuple[slice, slice, slice]) -> tuple[slice, slice, int]:
    """A region's index in a cropped volume, for regions with a voxel in the crop."""
    rows, cols = (
        slice(max(part.start - edge.start, 0), max(part.stop - edge.start, 0))
        for part, edge in zip(region[:2], box[:2], strict=True)
    )
    return rows, cols, region[2] - box[2].start


class _DistanceTo:
    """Hausdorff distance of masks to one reference mask (H, W, D), as `dice_and_hausdorff` has it, but faster.

    The distance of every voxel to the reference's surface is known from the start; of the reference's surface only
    what does not lie on the mask's surface has to be looked up.
    """

    def __init__(self, reference: np.ndarray, spacing: Sequence[float], diagonal: float) -> None:
        self.spacing, self.diagonal = np.asarray(spacing), diagonal
        self.surface = _surface(reference)
        self.to_reference = ndimage.distance_transform_edt(~self.surface, sampling=spacing)

    def __call__(self, mask: np.ndarray) -> float:
        surface = _surface(mask)
        empty = not surface.any(), not self.surface.any()
        if any(empty):
            return np.nan if all(empty) else self.diagonal
        distance = self.to_reference[surface].max()
        uncovered = np.argwhere(self.surface & ~surface)
        if len(uncovered):
            tree = KDTree(np.argwhere(surface) * self.spacing, compact_nodes=False, balanced_tree=False)
            distance = max(distance, tree.query(uncovered * self.spacing)[0].max())
        return float(distance)


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a face neighbor that is not in it; what is beyond the edge is not."""
    return mask & ~ndimage.binary_erosion(mask)
