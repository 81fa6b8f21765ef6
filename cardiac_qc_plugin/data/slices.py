"""Training batches of random patches, cut from slices that are held in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from cardiac_qc_plugin.metrics.segmentation import check_labels
from cardiac_qc_plugin.transforms.regions import region_labels

from .degradation import ImageDegradation, uniform

__all__ = ["PatchAugmentation", "SlicePatchDataset", "positive_weight"]


@dataclass(frozen=True)
class PatchAugmentation:
    """Random rotation, scaling and intensity change of a whole batch of patches at once.

    The paper rotates by multiples of 90 degrees only, which :class:`SlicePatchDataset` always does; this is on top.

    Args:
        rotation: largest angle in degrees, to either side.
        scale: range of the magnification.
        gamma: range of the exponent of the intensities, drawn on a logarithmic scale; they have to be scaled to [0, 1],
            what lies outside is clipped.
        brightness: largest shift of the intensities, to either side.
        noise: largest standard deviation of Gaussian noise.
        degradation: what makes some of the patches worse, after all of this.
    """

    rotation: float = 30.0
    scale: tuple[float, float] = (0.8, 1.25)
    gamma: tuple[float, float] = (0.7, 1.4)
    brightness: float = 0.1
    noise: float = 0.03
    degradation: ImageDegradation | None = None

    def margin(self, patch: int) -> int:
        """Pixels to cut beyond the patch on each side, so that corners rarely turn in from outside."""
        return math.ceil(patch / 4)

    def __call__(
        self, image: torch.Tensor, label: torch.Tensor, patch: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of ``patch`` pixels from the middle of larger ones.

        Args:
            image: ``(B, C, N, N)`` with ``N = patch + 2 * margin``: scan, whose intensities change, and possibly an
                uncertainty map and a segmentation, whose label numbers are not interpolated.
            label: ``(B, 1, N, N)``.
            patch: edge of the result in pixels.
            generator: source of the random numbers.
        """
        count, size = image.shape[0], image.shape[-1]
        angle = torch.deg2rad(uniform(generator, count, -self.rotation, self.rotation))
        zoom = patch / size / uniform(generator, count, *self.scale)
        cos, sin, zero = torch.cos(angle) * zoom, torch.sin(angle) * zoom, torch.zeros(count)
        theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        grid = F.affine_grid(theta, [count, 1, patch, patch], align_corners=False)
        channels = F.grid_sample(image[:, :2], grid, mode="bilinear", align_corners=False)
        labels = F.grid_sample(image[:, 2:], grid, mode="nearest", align_corners=False)
        image = torch.cat([channels, labels], dim=1)
        label = F.grid_sample(label, grid, mode="nearest", align_corners=False)
        gamma = torch.exp(uniform(generator, count, *(math.log(g) for g in self.gamma)))
        shift = uniform(generator, count, -self.brightness, self.brightness)
        sigma = uniform(generator, count, 0.0, self.noise)
        scan = image[:, :1].clamp_min(0) ** gamma.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
        scan = scan + sigma.view(-1, 1, 1, 1) * torch.randn(scan.shape, generator=generator)
        scan = scan.clamp(0, 1)
        if self.degradation is not None:
            scan = self.degradation(scan, generator)
        return torch.cat([scan, image[:, 1:]], dim=1), label


def padded_crop(array: np.ndarray, row: int, col: int, size: int) -> np.ndarray:
    """``(C, size, size)`` from ``(C, H, W)`` with its corner at (row, col), zeros outside: `crop_slice`, but faster."""
    result = np.zeros((array.shape[0], size, size), dtype=np.float32)
    r0, r1 = max(row, 0), min(row + size, array.shape[1])
    c0, c1 = max(col, 0), min(col + size, array.shape[2])
    result[:, r0 - row : r1 - row, c0 - col : c1 - col] = array[:, r0:r1, c0:c1]
    return result


class SlicePatchDataset(IterableDataset):
    """Batches of random patches, rotated by random multiples of 90 degrees (section V-A).

    Volumes are read and preprocessed once; afterwards a batch costs a few array slices. Slices are drawn uniformly,
    those without any label included, with replacement. The random sequence comes from torch's generator (or from the
    seed that the loader gives each worker), so no worker repeats another's.

    Args:
        data: datalist items with the keys that ``transform`` reads.
        transform: deterministic preprocessing to channel-first ``(C, H, W, D)`` entries ``image`` and ``label``, with
            intensities scaled to [0, 1], since they are held in half precision.
        patch_size: edge of the square patches in pixels; smaller slices are padded with zeros.
        batch_size: patches per batch.
        length: batches per epoch.
        positive_share: share of a batch's patches, rounded to the nearest number, that are forced to contain a labelled
            pixel before augmentation (section V-B, detection: 1/3).
        augmentation: applied to each batch after the rotation.
        batch_transform: applied to each finished batch, a dictionary.

    Yields:
        ``{"image": (B, C, patch_size, patch_size) float, "label": (B, 1, patch_size, patch_size) float}``.

    Raises:
        ValueError: for an empty datalist, a share that is none, a label of another shape than its image's or
            with other values than 0 to 3, or if positives are asked of data without a labelled pixel.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Callable[[dict], dict],
        patch_size: int = 128,
        batch_size: int = 16,
        length: int = 250,
        positive_share: float = 0.0,
        augmentation: PatchAugmentation | None = None,
        batch_transform: Callable[[dict], dict] | None = None,
    ) -> None:
        super().__init__()
        if len(data) == 0:
            raise ValueError("The datalist has no training items. Check data_list_file_path and fold.")
        if not 0 <= positive_share <= 1:
            raise ValueError(f"positive_share is a share of the patches, between 0 and 1, got {positive_share}.")
        self.data = data
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.length = length
        self.positives = round(positive_share * batch_size)
        self.augmentation = augmentation
        self.batch_transform = batch_transform
        self.images: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        for item in tqdm(data, desc="Reading training scans", unit="scan", disable=None):
            volume = transform(item)
            sizes = [tuple(volume[key].shape[1:]) for key in ("image", "label")]
            if sizes[0] != sizes[1]:
                raise ValueError(f"{item}: the image has shape {sizes[0]} and its label {sizes[1]}.")
            # fp16 is off by 1/4096 at most on [0, 1], and halves the memory
            self.images += list(np.moveaxis(np.asarray(volume["image"], dtype=np.float16), -1, 0))
            name = item["label"] if isinstance(item.get("label"), str) else "the label"
            label = np.stack([check_labels(channel, name) for channel in np.asarray(volume["label"])])
            self.labels += list(np.moveaxis(label, -1, 0))
        self.labelled = [index for index, label in enumerate(self.labels) if label.any()]
        if self.positives and not self.labelled:
            raise ValueError("positive_share is above 0, but no training slice has a labelled pixel.")

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        seed = int(torch.randint(2**62, ()))  # each worker's generator has a seed of its own
        count = self.length if info is None else len(range(info.id, self.length, info.num_workers))
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        return (self._batch(rng, generator) for _ in range(count))

    def _corner(self, rng: np.random.Generator, index: int, positive: bool) -> tuple[int, int]:
        """Corner of a patch: anywhere in the slice, or such that a random labelled pixel lies inside."""
        size = self.patch_size
        around = rng.choice(np.argwhere(self.labels[index][0])) if positive else None
        corner = []
        for axis, extent in enumerate(self.labels[index].shape[1:]):
            low, high = min(0, extent - size), max(0, extent - size)
            if around is not None:
                low, high = max(low, around[axis] - size + 1), min(high, around[axis])
            corner.append(int(rng.integers(low, high + 1)))
        return corner[0], corner[1]

    def _batch(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        margin = self.augmentation.margin(self.patch_size) if self.augmentation else 0
        images, labels = [], []
        for number in range(self.batch_size):
            positive = number < self.positives
            index = int(rng.choice(self.labelled)) if positive else int(rng.integers(len(self.images)))
            row, col = self._corner(rng, index, positive)
            turns = int(rng.integers(4))
            for source, target in ((self.images, images), (self.labels, labels)):
                crop = padded_crop(source[index], row - margin, col - margin, self.patch_size + 2 * margin)
                target.append(np.rot90(crop, turns, axes=(1, 2)))
        image, label = (torch.from_numpy(np.stack(patches)) for patches in (images, labels))
        if self.augmentation:
            image, label = self.augmentation(image, label, self.patch_size, generator)
        batch = {"image": image, "label": label}
        return self.batch_transform(batch) if self.batch_transform else batch


def positive_weight(dataset: SlicePatchDataset, region_size: int) -> float:
    """w_pos of Eq. 6: regions without a failure over regions with one, in the slices of a training set.

    Raises:
        ValueError: if no region has a failure.
    """
    positive = total = 0
    for label in dataset.labels:
        height, width = (side // region_size * region_size for side in label.shape[1:])
        cells = region_labels(label[0, :height, :width], region_size)
        positive, total = positive + int(cells.sum()), total + cells.size
    if positive == 0:
        raise ValueError("No training region has a segmentation failure, so there is nothing to learn.")
    return (total - positive) / positive
