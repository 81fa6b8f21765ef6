"""Failure labels: which segmentation errors have to be corrected, which are tolerated (section III-D)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_dst_type, convert_to_numpy, ensure_tuple
from scipy import ndimage

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES, check_labels

from .spatial import spacing_of

CLASSES = tuple(CLASS_NAMES)
# (3, 3, 3): the 4 in-plane neighbors, none across slices
IN_PLANE_CROSS = np.pad(ndimage.generate_binary_structure(2, 1)[:, :, None], [(0, 0), (0, 0), (1, 1)])
TIE = 1e-5  # distances this close to the tolerance equal it: spacings carry float32 noise


@dataclass(frozen=True)
class FailureCriterion:
    """When an erroneous voxel is a segmentation failure; the defaults are the paper's (section III-D).

    An error of class c is a voxel that is c in exactly one of prediction and reference. Its distance to the
    boundary of c in the reference slice decides whether it is beyond tolerance, the size of its 4-connected
    in-plane cluster of errors of class c whether it counts. If the reference slice has no voxel of c, all its
    errors are beyond tolerance.

    Args:
        tolerance_outside: largest tolerated distance of an error outside the reference structure, in `unit`.
        tolerance_inside: the same for an error inside the structure; its boundary voxels have distance 0.
        unit: "voxel" (distances on the pixel grid) or "mm" (scaled by the in-plane spacing).
        strict: a voxel is beyond tolerance if distance > tolerance (True) or distance >= tolerance (False).
        min_cluster: smallest cluster of errors that counts, in voxels.
        whole_component: a cluster that counts and has a voxel beyond tolerance is a failure as a whole, its
            tolerated voxels included; otherwise only its voxels beyond tolerance are failures.
        apex_min_cluster: replaces `min_cluster` in the apical slice (1: no size rule).
        apex_ignores_distance: in the apical slice every error is beyond tolerance.
        absent_min_cluster: replaces `min_cluster` where the reference slice has no voxel of the class, as
            above the base and below the apex (1: no size rule). In the apical slice `apex_min_cluster` has
            precedence.

    Raises:
        ValueError: a tolerance is negative or not finite, a cluster size is below 1, or the unit is unknown.
    """

    tolerance_outside: float = 3.0
    tolerance_inside: float = 2.0
    unit: Literal["voxel", "mm"] = "voxel"
    strict: bool = True
    min_cluster: int = 10
    whole_component: bool = False
    apex_min_cluster: int = 1
    apex_ignores_distance: bool = False
    absent_min_cluster: int = 1

    def __post_init__(self) -> None:
        for name in ("tolerance_outside", "tolerance_inside"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} has to be a finite distance >= 0, got {value!r}.")
        for name in ("min_cluster", "apex_min_cluster", "absent_min_cluster"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise ValueError(f"{name} has to be a whole number of voxels >= 1 (1: no size rule), got {value!r}.")
        if self.unit not in ("voxel", "mm"):
            raise ValueError(f"unit has to be 'voxel' or 'mm', got {self.unit!r}.")

    @classmethod
    def preset(cls, name: str) -> FailureCriterion:
        """A published rule: "paper" (the text) or "released_code" (what the authors' code computes).

        The code subtracts 4.6 mm (outside) and 3.1 mm (inside) and truncates the rest to whole millimeters,
        so a voxel has to be at least 5.6 mm or 4.1 mm away. It keeps whole clusters, and at the apex those of
        15 voxels or more.

        Raises:
            ValueError: there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"Unknown failure criterion {name!r}; choose one of {sorted(_PRESETS)}.")
        return cls(**_PRESETS[name])

    @classmethod
    def parse(cls, value: FailureCriterion | str | Mapping[str, Any]) -> FailureCriterion:
        """The criterion itself, a preset by its name, or the fields that differ from the paper's.

        Raises:
            ValueError: an unknown preset or field, a wrong value, or another type.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.preset(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"A failure criterion is a FailureCriterion, a preset name or fields, got {value!r}.")
        if unknown := set(value) - set(cls.__dataclass_fields__):
            raise ValueError(f"Unknown fields {sorted(unknown)}; a criterion has {list(cls.__dataclass_fields__)}.")
        return cls(**value)


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released_code": {
        "tolerance_outside": 5.6,
        "tolerance_inside": 4.1,
        "unit": "mm",
        "strict": False,
        "whole_component": True,
        "apex_min_cluster": 15,
        "apex_ignores_distance": True,
        "absent_min_cluster": 10,
    },
}


def failure_mask(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | None = None,
    criterion: FailureCriterion | str | Mapping[str, Any] = "paper",
    apex: Literal["last", "first"] = "last",
) -> np.ndarray:
    """The set S_I of segmentation failures (paper, section III-D), as the union over RV, LVM and LV.

    Distances and clusters are 2-D, per slice and class; the boundary of a structure is its outermost layer of
    voxels (4-neighbor erosion). The apical slice is the outermost slice with any reference label at the
    `apex` end.

    Args:
        prediction: automatic labels 0-3, (H, W, D) with slices last.
        reference: manual labels 0-3, same shape.
        spacing: in-plane spacing (row, column) in mm; not needed if the criterion's unit is "voxel".
        criterion: a `FailureCriterion`, a preset name, or the fields that differ from the paper's.
        apex: end of the slice axis at which the apex lies; "last" for slices from base to apex, as usual in
            ACDC.

    Returns:
        Boolean (H, W, D), True where a voxel is a failure.

    Raises:
        ValueError: wrong shapes or labels, a reference without any label, an unknown criterion or `apex`, or
            a criterion in mm without a valid spacing.
    """
    return np.logical_or.reduce(list(failures_by_class(prediction, reference, spacing, criterion, apex).values()))


def failures_by_class(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] | None = None,
    criterion: FailureCriterion | str | Mapping[str, Any] = "paper",
    apex: Literal["last", "first"] = "last",
) -> dict[int, np.ndarray]:
    """The failures of each class by itself, boolean (H, W, D) by label; arguments and errors as `failure_mask`."""
    criterion = FailureCriterion.parse(criterion)
    prediction, reference = as_label_volumes(prediction=prediction, reference=reference)
    check_apex(apex)
    labeled_slices = np.flatnonzero(reference.any(axis=(0, 1)))
    if not labeled_slices.size:
        raise ValueError("The reference has no label at all: failures are undefined; check the file it came from.")
    apical_slice = labeled_slices[-1 if apex == "last" else 0]
    sampling = (1.0, 1.0) if criterion.unit == "voxel" else _in_plane_spacing(spacing)

    # no error and no boundary lies outside this box
    heart = ndimage.find_objects(((prediction | reference) > 0).astype(int))[0][:2]
    failures = {label: np.zeros(reference.shape, dtype=bool) for label in CLASSES}
    for label, mask in failures.items():
        predicted, target = prediction[heart] == label, reference[heart] == label
        mask[heart] = _class_failures(predicted, target, sampling, criterion, apical_slice)
    return failures


def _class_failures(
    predicted: np.ndarray,
    target: np.ndarray,
    sampling: Sequence[float],
    criterion: FailureCriterion,
    apical_slice: int,
) -> np.ndarray:
    """Failures of one class; masks are (H, W, D)."""
    errors = predicted != target
    beyond = np.zeros_like(errors)
    for index in np.flatnonzero(errors.any(axis=(0, 1))):
        beyond[..., index] = errors[..., index] & _beyond_tolerance(target[..., index], sampling, criterion)
    if criterion.apex_ignores_distance:
        beyond[..., apical_slice] = errors[..., apical_slice]

    min_cluster = np.where(target.any(axis=(0, 1)), criterion.min_cluster, criterion.absent_min_cluster)
    min_cluster[apical_slice] = criterion.apex_min_cluster
    clusters, n_clusters = ndimage.label(errors, IN_PLANE_CROSS)
    failures = beyond & (np.bincount(clusters.ravel())[clusters] >= min_cluster)
    if criterion.whole_component:
        hit = np.zeros(n_clusters + 1, dtype=bool)
        hit[clusters[failures]] = True
        failures = hit[clusters]
    return failures


def _beyond_tolerance(target: np.ndarray, sampling: Sequence[float], criterion: FailureCriterion) -> np.ndarray:
    """Pixels (H, W) of one slice that may not be wrong, for the class with reference mask `target`."""
    if not target.any():
        return np.ones_like(target)
    boundary = target ^ ndimage.binary_erosion(target)
    distance = ndimage.distance_transform_edt(~boundary, sampling=sampling)
    tolerance = np.where(target, criterion.tolerance_inside, criterion.tolerance_outside)
    return distance > tolerance + TIE if criterion.strict else distance >= tolerance - TIE


def _in_plane_spacing(spacing: Sequence[float] | None) -> tuple[float, float]:
    if spacing is None:
        raise ValueError("The criterion is in mm: give the in-plane spacing (row, column) in mm.")
    values = tuple(float(value) for value in spacing)
    if len(values) != 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"spacing has to be two positive numbers (row, column) in mm, got {values}.")
    return values


def check_apex(apex: str) -> None:
    """Refuse an end of the slice axis that there is not.

    Raises:
        ValueError: if it is neither "last" nor "first".
    """
    if apex not in ("last", "first"):
        raise ValueError(f"apex is 'last' or 'first', got {apex!r}.")


def as_label_volumes(**volumes: np.ndarray) -> list[np.ndarray]:
    """Check named label volumes, and return them as uint8 in the order given.

    Args:
        **volumes: label maps of one shape (H, W, D) with the labels 0 background, 1 RV, 2 LVM, 3 LV;
            floating-point values are fine if they are whole, or within 0.001 of it.

    Raises:
        ValueError: a volume is not 3-D, has another shape than the first one, or another value than 0-3.
    """
    arrays = {name: check_labels(volume, name) for name, volume in volumes.items()}
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if array.shape != first.shape:
            raise ValueError(f"{name} has shape {array.shape}, {first_name} {first.shape}: bring them to one grid.")
    return list(arrays.values())


def channel_first_volume(volume: NdarrayOrTensor, name: str) -> np.ndarray:
    """The (H, W, D) array of a channel-first (1, H, W, D) array or tensor.

    Raises:
        ValueError: the shape is not (1, H, W, D).
    """
    if volume.ndim != 4 or volume.shape[0] != 1:
        raise ValueError(f"{name} has to be one channel first, (1, H, W, D), got shape {tuple(volume.shape)}.")
    return convert_to_numpy(volume)[0]


class FailureLabel(Transform):
    """Mask of the segmentation failures of a prediction (paper, section III-D), see `failure_mask`.

    Args:
        criterion: a `FailureCriterion`, a preset name ("paper", "released_code"), or fields that differ from
            the paper's.
        apex: end of the slice axis at which the apex lies, "last" or "first".

    Raises:
        ValueError: the criterion is unknown.
    """

    def __init__(
        self,
        criterion: FailureCriterion | str | Mapping[str, Any] = "paper",
        apex: Literal["last", "first"] = "last",
    ) -> None:
        self.criterion = FailureCriterion.parse(criterion)
        self.apex = apex

    def __call__(self, prediction: NdarrayOrTensor, reference: NdarrayOrTensor) -> NdarrayOrTensor:
        """
        Args:
            prediction: automatic labels, (1, H, W, D).
            reference: manual labels on the same grid, (1, H, W, D).

        Returns:
            uint8 (1, H, W, D), 1 at failures, of the prediction's kind and with its metadata.

        Raises:
            ValueError: as `failure_mask`; also if the criterion is in mm and neither input is a MetaTensor,
                whose affine gives the spacing, or both are and differ. (Repair headers such as ACDC's, whose
                affine says 1 mm, first.)
        """
        failures = failure_mask(
            channel_first_volume(prediction, "prediction"),
            channel_first_volume(reference, "reference"),
            _spacing_of(prediction, reference) if self.criterion.unit == "mm" else None,
            self.criterion,
            self.apex,
        )
        return convert_to_dst_type(failures[None], prediction, dtype=np.uint8)[0]


def _spacing_of(*volumes: NdarrayOrTensor) -> np.ndarray:
    spacings = [np.array(spacing_of(volume)[:2]) for volume in volumes if isinstance(volume, MetaTensor)]
    if not spacings:
        raise ValueError("The criterion is in mm, which needs the spacing of a MetaTensor: load images with metadata.")
    if not np.allclose(spacings, spacings[0], rtol=1e-4):
        raise ValueError(f"Prediction and reference differ in spacing, {spacings} mm: bring them to one grid.")
    return spacings[0]


class FailureLabeld(MapTransform):
    """Dictionary form of `FailureLabel`.

    Args:
        keys: predictions, (1, H, W, D) each; for example with and without MC dropout.
        ref_key: the manual labels, (1, H, W, D).
        label_key: where the failure masks go, one key for each of `keys`.
        criterion: see `FailureLabel`.
        apex: see `FailureLabel`.
        allow_missing_keys: skip predictions that are not there.

    Raises:
        ValueError: `keys` and `label_key` differ in number, or the criterion is unknown.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ref_key: str,
        label_key: KeysCollection,
        criterion: FailureCriterion | str | Mapping[str, Any] = "paper",
        apex: Literal["last", "first"] = "last",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ref_key = ref_key
        self.label_keys = ensure_tuple(label_key)
        if len(self.label_keys) != len(self.keys):
            raise ValueError(f"Give one label_key for each of the keys {self.keys}, got {self.label_keys}.")
        self.label = FailureLabel(criterion, apex)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        for key, label_key in self.key_iterator(d, self.label_keys):
            d[label_key] = self.label(d[key], d[self.ref_key])
        return d
