"""Reading of a scan with checks, the network's in-plane spacing with an exact way back, and what becomes a result."""

import gzip
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, MetaTensor, NibabelReader, NibabelWriter
from monai.transforms import Flip, InvertibleTransform, LoadImage, LoadImaged, MapTransform, Spacingd, Transform
from monai.utils import TraceKeys, convert_to_dst_type, convert_to_numpy
from scipy import ndimage

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES, check_labels, check_order

__all__ = [
    "CheckLabeld",
    "CheckScan",
    "CheckScand",
    "InPlaneSpacingd",
    "KeepLargestComponentd",
    "LoadScand",
    "SeenFromApexd",
    "StackWriter",
    "check_checksum",
    "check_spacing",
    "failed_slices",
    "says_how_it_lies",
    "seen_from_base",
    "spacing_of",
]

APEX = np.array([-1.0, 1.0, -1.0]) / 3**0.5  # where it lies from the base: left, front, feet
MIN_SHARE = 0.99  # of a rectangular voxel's volume
LABELS = 8  # a label map has no more values; an image has hundreds
FULL = 0.33  # share of the fullest slice's labels, below which a slice between others has failed
CODES = ("qform_code", "sform_code")  # both 0: the file does not say how it lies in the patient


def check_checksum(path: str | Path) -> None:
    """Read a compressed file to its end, where the checksum stands: nibabel stops at the last voxel.

    Raises:
        OSError, EOFError, zlib.error: if the file is damaged.
    """
    if str(path).lower().endswith(".gz"):
        state = Path(path).stat()
        _read_to_end(Path(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_to_end(path: Path, size: int, changed: int) -> None:
    """Once for all phases of a cine."""
    with gzip.open(path) as stream:
        while stream.read(1 << 20):
            pass


def check_spacing(spacing: Sequence[float], name: str, affine: np.ndarray | None = None) -> None:
    """Refuse voxel sizes that no short-axis stack has.

    Args:
        spacing: voxel size in mm of (row, column, slice).
        name: the file, for the message.
        affine: of the stack, (4, 4), if its angles are to be checked too.

    Raises:
        ValueError: if a size is not positive and finite, or not one in millimetres, or if slices are 1 mm apart: such a
            header lost its spacing; or if voxels are not rectangular, so that volumes would be 1 % or more too large.
    """
    listed = " x ".join(f"{size:g}" for size in spacing)
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        raise ValueError(f"{name}: the voxel size of {listed} mm is not positive. Correct the header's pixdim.")
    if not all(0.05 < size < 100 for size in spacing):
        raise ValueError(
            f"{name}: the header says {listed} mm, which no short-axis stack has. If it is in another unit, such as "
            "metres, write millimetres (pixdim and affine)."
        )
    if np.isclose(spacing[2], 1.0):  # what nibabel puts for a size of 0, too
        raise ValueError(
            f"{name}: the header says {listed} mm, so the true voxel size was lost: short-axis slices are "
            "5 to 10 mm apart. Write the scan's voxel size into the header (pixdim and affine)."
        )
    axes = np.eye(3) if affine is None else affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if (share := abs(np.linalg.det(axes))) < MIN_SHARE:
        raise ValueError(
            f"{name}: its axes are not at right angles (a sheared affine): a voxel holds {share:.1%} of what its edges "
            "multiply to. Resample the scan to slices that lie straight over each other."
        )


def spacing_of(image: MetaTensor) -> tuple[float, float, float]:
    """Voxel size in mm of (row, column, slice) of a channel-first ``(C, H, W, D)`` image, from its affine."""
    return tuple(float(norm) for norm in image.affine[:3, :3].norm(dim=0))


class _NiftiReader(NibabelReader):
    """MONAI's, which loses that a stack is mirrored where the sform has no voxel size and the qform is not coded.

    It then takes the axes of that qform, which say nothing; here they are the sform's.
    """

    def read(self, data: Sequence[str], **kwargs: Any) -> nib.Nifti1Image:
        image, stored = super().read(data, **kwargs), nib.load(*data)
        header, affine = stored.header, stored.affine.copy()
        if not header["qform_code"] and seen_from_base(affine, header) != seen_from_base(image.affine, header):
            affine[:3, :3] *= header.get_zooms()[:3] / np.linalg.norm(affine[:3, :3], axis=0)
            image.set_sform(affine)
        return image


class _LoadImage(LoadImage):
    """:class:`monai.transforms.LoadImage` that names the file which it cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.register(_NiftiReader())

    def __call__(self, filename: str, reader: ImageReader | None = None) -> Any:
        try:
            check_checksum(filename)
            return super().__call__(filename, reader)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{filename}: the file is truncated or damaged, or no image ({type(error).__name__}: {reason})."
            ) from error


class LoadScand(LoadImaged):
    """:class:`monai.transforms.LoadImaged` that names the file which it cannot read, or which lies on another grid.

    Args:
        keys: files of a case; they become ``MetaTensor``.
        like: one of the keys, or an image that was read before: all files have to have as many voxels as its file, of
            the same size, and axes that run as its do.
        allow_missing_keys: leave out files that are not there.

    Raises:
        ValueError: for a file that is damaged or no image, or on another grid.
    """

    def __init__(self, keys: KeysCollection, like: str | None = None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys=allow_missing_keys)
        self._loader = _LoadImage()
        self.like = like

    def __call__(self, data: Mapping[Hashable, str], reader: ImageReader | None = None) -> dict[Hashable, torch.Tensor]:
        d = super().__call__(data, reader)
        for key in self.key_iterator(d) if self.like is not None else ():
            path, own, like = data[key], d[key], d[self.like]
            shape, wanted = (tuple(map(int, image.meta["spatial_shape"])) for image in (own, like))
            if shape != wanted:
                raise ValueError(
                    f"{path}: shape {shape}, but {like.meta['filename_or_obj']} has {wanted}. Give the {key} of this "
                    "scan, on its own grid."
                )
            # of the file: a transform may have turned the image since
            affines = [convert_to_numpy(i.meta.get("original_affine", i.affine)) for i in (own, like)]
            sizes = [np.linalg.norm(affine[:3, :3], axis=0) for affine in affines]
            if not np.allclose(*sizes, rtol=0.01):  # distances in mm would be wrong
                size, wanted = (" x ".join(f"{edge:g}" for edge in edges) for edges in sizes)
                raise ValueError(
                    f"{path}: voxels of {size} mm, but {like.meta['filename_or_obj']} has {wanted} mm. Give the {key} "
                    "of this scan, on its own grid; if its voxels are in the image's order, give it the image's affine."
                )
            axes, wanted = ("".join(nib.aff2axcodes(affine)) for affine in affines)
            if axes != wanted:
                raise ValueError(
                    f"{path}: its axes run otherwise than the image's ({axes}, not {wanted}). Save it on the image's "
                    "grid; if its voxels are in the image's order, give it the image's affine."
                )
            own.meta.update({code: like.meta[code] for code in CODES if code in like.meta})
        return d


class StackWriter(NibabelWriter):
    """Writer of :class:`monai.transforms.SaveImaged` for volumes ``(1, H, W, D)``, as ``(H, W, D)`` also where D is 1.

    MONAI's own drops that axis too, and with it the slice's thickness and place, or else keeps the channel.
    """

    def set_data_array(self, data_array: torch.Tensor, **_: Any) -> None:
        (self.data_obj,) = data_array  # other channels would be lost


class CheckScan(Transform):
    """Refuse a scan that cannot be a short-axis stack, with a message that names the file.

    MONAI's NIfTI reader takes the voxel size from the header's ``pixdim`` where the affine disagrees with it (in
    ACDC the affine says 1 mm), so the affine can be trusted here.

    Raises:
        ValueError: for another shape than ``(1, H, W, D)``, NaN or infinite voxels, an image that is constant
            (its 1st and 99th percentile are the same), a label map, or a voxel size that is zero, 1 mm across slices,
            far from square within them (the slices lie on another axis), or of pixels that no cine has.
    """

    def __call__(self, image: MetaTensor) -> MetaTensor:
        name = str(image.meta.get("filename_or_obj", "image"))
        if image.ndim != 4 or image.shape[0] != 1:
            raise ValueError(
                f"{name}: expected one 3-D stack of slices, got an image of shape {tuple(image.shape[1:])} with "
                f"{image.shape[0]} channel(s). A cine has to be given one phase at a time."
            )
        if not bool(torch.isfinite(image).all()):
            count = int((~torch.isfinite(image)).sum())
            raise ValueError(f"{name}: {count} voxel(s) NaN or infinite. Repair or re-export the scan.")
        low, high = np.percentile(image.numpy(), (1, 99))
        if low == high:
            raise ValueError(f"{name}: at least 98 % of the voxels are {low:g}. The file holds no image.")
        if (count := len(np.unique(image.numpy()))) <= LABELS:
            raise ValueError(
                f"{name}: its voxels have {count} different values, so it is a label map. Give the scan, and labels "
                "as a reference."
            )
        spacing = spacing_of(image)
        check_spacing(spacing, name, convert_to_numpy(image.affine))
        if max(spacing[:2]) > 2 * min(spacing[:2]):
            listed = " x ".join(f"{size:g}" for size in spacing)
            raise ValueError(
                f"{name}: the header says {listed} mm, so the slices do not lie on the third axis: their pixels are "
                "square. Bring the axes into the order row, column, slice."
            )
        if not all(0.3 < size < 5 for size in spacing[:2]):
            raise ValueError(
                f"{name}: the header says pixels of {spacing[0]:g} x {spacing[1]:g} mm, and those of a cine are 0.5 to "
                "3 mm. Write the scan's voxel size into the header (pixdim and affine)."
            )
        return image


class CheckScand(MapTransform):
    """Dictionary form of :class:`CheckScan`."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        check = CheckScan()
        return {**data, **{key: check(data[key]) for key in self.key_iterator(data)}}


class CheckLabeld(MapTransform):
    """Refuse label maps ``(1, H, W, D)`` with other values than 0 to 3, or with RV and LV exchanged.

    Values are rounded, since a file with a scale gives 1.00000002 for 1.

    Args:
        keys: labels (1, H, W, D).
        references: they are an expert's; a network's may be anything, also exchanged.
        allow_missing_keys: pass over keys that are not there.

    Raises:
        ValueError: the message names the file.
    """

    def __init__(self, keys: KeysCollection, references: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.references = references

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            name = str(d[key].meta.get("filename_or_obj", key))
            labels = check_labels(convert_to_numpy(d[key])[0], name)
            if self.references:
                check_order(labels, name)
            d[key] = convert_to_dst_type(labels[None], d[key])[0]
        return d


def says_how_it_lies(codes: Mapping[str, Any]) -> bool:
    """Whether a NIfTI header, or an image's ``meta``, says how the image lies in the patient: not with both codes 0."""
    return any(np.any(convert_to_numpy(codes.get(code, 1))) for code in CODES)


def seen_from_base(affine: np.ndarray, codes: Mapping[str, Any]) -> bool:
    """Whether slices, first axis to the right and second down, are seen from the base: mirrored, to a reader's eye.

    The usual view is from the apex, as scanners store it and as in ACDC. Converters that turn the second axis, as
    dcm2niix does, store the other.

    Args:
        affine: of the stack, (4, 4), to RAS.
        codes: ``qform_code`` and ``sform_code`` of a NIfTI header, see `says_how_it_lies`.
    """
    if not says_how_it_lies(codes):
        return False
    axes = convert_to_numpy(affine)[:3, :2].astype(float)
    normal = np.cross(*(axes / np.linalg.norm(axes, axis=0)).T)
    return bool(normal @ APEX > 0.2)


class SeenFromApexd(MapTransform, InvertibleTransform):
    """Mirror stacks whose header says that they are seen from the base, see `seen_from_base`; others stay as they are.

    A network knows the heart as it saw it in training: in a mirrored one it takes part of the right ventricle for
    something else. The inverse, through :class:`monai.transforms.Invertd`, returns to the stored order.

    Args:
        keys: images or labels, channel-first ``(C, H, W, D)``.
        allow_missing_keys: leave out what is not there.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.flip = Flip(spatial_axis=1)  # the one that dcm2niix turned

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            if seen_from_base(d[key].affine, d[key].meta):
                d[key] = self.flip(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            operations = d[key].applied_operations
            if operations and operations[-1][TraceKeys.CLASS_NAME] == Flip.__name__:
                d[key] = self.flip.inverse(d[key])
        return d


class InPlaneSpacingd(Spacingd):
    """Resample slices to a square in-plane voxel size; the slices stay where they are (section II).

    The inverse, through :class:`monai.transforms.Invertd`, returns to the original grid, whatever its size.
    MONAI 1.6's ``Spacingd`` touches every dictionary entry whose name starts with a key and an underscore
    (``image_path`` of a server's request, say); this one hands it its own keys only.

    Args:
        keys: images or labels, channel-first ``(C, H, W, D)``.
        spacing: voxel size in mm of the first two axes.
        mode: interpolation, ``"bilinear"`` or ``"nearest"``, one or one per key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float = 1.4,
        mode: str | Sequence[str] = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        if spacing <= 0:
            raise ValueError(f"spacing has to be positive, in mm, got {spacing}.")
        super().__init__(
            keys,
            pixdim=(spacing, spacing, -1.0),
            mode=mode,
            padding_mode="border",
            allow_missing_keys=allow_missing_keys,
        )

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        own = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(own, lazy=lazy)}


def failed_slices(labels: np.ndarray, full: float = FULL) -> dict[int, tuple[int, int]]:
    """Slices in which much less is labelled than in the fullest one, between others that are full.

    Args:
        labels: (H, W, D).
        full: share of the fullest slice's labels, of all structures, from which a slice is full.

    Returns:
        Of each failed slice, the nearest full slices before and behind it.

    Raises:
        ValueError: if the labels are of another rank, or the share is not between 0 and 1.
    """
    if labels.ndim != 3 or not 0 <= full <= 1:
        raise ValueError(f"Expected labels (H, W, D) and a share of 0 to 1, got shape {labels.shape} and {full}.")
    area = np.count_nonzero(labels, axis=(0, 1))
    slices = np.flatnonzero(area >= full * area.max()).tolist()
    return {z: (before, behind) for before, behind in pairwise(slices) for z in range(before + 1, behind)}


class KeepLargestComponentd(MapTransform):
    """Keep the largest 26-connected component of each structure (section IV), over slices whose segmentation failed.

    MONAI's ``KeepLargestConnectedComponentd`` ends at a slice that lacks the structure: after one failed slice all that
    is right beyond it is removed, and nothing is left that shows the gap. Here what lies before a failed slice is
    joined to what lies behind it, see :func:`failed_slices`; where a single structure is missing, its component ends.

    Args:
        keys: label maps ``(1, H, W, D)``.
        full: as for :func:`failed_slices`; 0 for the component alone.
        allow_missing_keys: pass over keys that are not there.

    Example:
        >>> labels = torch.zeros(1, 8, 8, 6)
        >>> labels[:, 2:6, 2:6, [0, 1, 3]] = 3  # an LV, without which slice 2 has failed
        >>> labels[:, 0, 0, 5] = 3
        >>> KeepLargestComponentd("pred")({"pred": labels})["pred"].sum(dim=(0, 1, 2)).tolist()
        [48.0, 48.0, 0.0, 48.0, 0.0, 0.0]
    """

    def __init__(self, keys: KeysCollection, full: float = FULL, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.full = full

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            labels = convert_to_numpy(d[key])[0]
            failed = sorted(failed_slices(labels, self.full))
            kept = [self._largest(labels == label, failed) for label in CLASS_NAMES]
            d[key] = convert_to_dst_type(np.where(np.any(kept, axis=0), labels, 0)[None], d[key])[0]
        return d

    @staticmethod
    def _largest(mask: np.ndarray, failed: Sequence[int]) -> np.ndarray:
        joined = mask.copy()
        for z in failed:
            joined[..., z] |= joined[..., z - 1]
        components, _ = ndimage.label(joined, np.ones((3, 3, 3)))
        return mask & (components == np.bincount(components[mask], minlength=1).argmax())
