"""Correction of detected failures: simulated with the reference, or an expert's edits (section V-C)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_dst_type, ensure_tuple_rep

from cardiac_qc_plugin.transforms.failure_labels import CLASSES, as_label_volumes, channel_first_volume

Rule = Literal["paper", "released_code", "upper_bound"]


def simulate_correction(
    prediction: np.ndarray,
    reference: np.ndarray,
    flagged: np.ndarray | None = None,
    failures: np.ndarray | None = None,
    rule: Rule = "paper",
) -> np.ndarray:
    """Replace predicted by reference labels, as a faultless expert would (paper, section V-C).

    Args:
        prediction: automatic labels 0-3, (H, W, D).
        reference: manual labels 0-3, same shape.
        flagged: nonzero in the detected regions (a mask or a map of region ids), same shape; unused by
            "upper_bound".
        failures: nonzero at segmentation failures (see `failure_mask`), same shape; unused by "paper".
        rule: which voxels take the reference: "paper" all those of a flagged region, "released_code" the
            failures in a flagged region, "upper_bound" all failures, as if each was detected.

    Returns:
        Corrected labels, uint8 (H, W, D).

    Raises:
        ValueError: an unknown rule, a mask that the rule needs is missing, or wrong shapes or labels.
    """
    check_rule(rule)
    prediction, reference = as_label_volumes(prediction=prediction, reference=reference)
    replaced = np.ones(prediction.shape, dtype=bool)
    if rule != "upper_bound":
        replaced &= _mask(flagged, "flagged", prediction.shape)
    if rule != "paper":
        replaced &= _mask(failures, "failures", prediction.shape)
    return np.where(replaced, reference, prediction)


def check_rule(rule: str) -> None:
    """Raise ValueError for an unknown rule of correction."""
    if rule not in get_args(Rule):
        raise ValueError(f"Unknown correction rule {rule!r}; choose one of {list(get_args(Rule))}.")


def check_on_outside(on_outside: str) -> None:
    """Raise ValueError for an unknown answer to edits outside the flagged regions."""
    if on_outside not in ("error", "drop"):
        raise ValueError(f"on_outside has to be 'error' or 'drop', got {on_outside!r}.")


@dataclass(frozen=True)
class EditReport:
    """What an expert's edits did.

    Args:
        n_changed_inside: voxels in flagged regions whose label changed.
        n_outside: edited voxels outside the flagged regions; none of them is applied.
        slices_changed: indices of the slices with a change inside.
        slices_outside: indices of the slices with an edit outside.
        gained: voxels that became RV (1), LVM (2), LV (3).
        lost: voxels that were RV (1), LVM (2), LV (3), and are no longer.
    """

    n_changed_inside: int
    n_outside: int
    slices_changed: tuple[int, ...]
    slices_outside: tuple[int, ...]
    gained: dict[int, int]
    lost: dict[int, int]


def apply_edits(
    prediction: np.ndarray,
    edited: np.ndarray,
    flagged: np.ndarray,
    on_outside: Literal["error", "drop"] = "error",
) -> tuple[np.ndarray, EditReport]:
    """Accept an expert's edits inside flagged regions only (paper, section V-C).

    Args:
        prediction: automatic labels 0-3, (H, W, D).
        edited: the labels after editing, same shape.
        flagged: nonzero in the detected regions, same shape.
        on_outside: "error" refuses edits outside the flagged regions; "drop" ignores and counts them.

    Returns:
        Corrected labels, uint8 (H, W, D), and the report of the changes.

    Raises:
        ValueError: wrong shapes or labels, an unknown `on_outside`, or edits outside with "error".
    """
    check_on_outside(on_outside)
    prediction, edited = as_label_volumes(prediction=prediction, edited=edited)
    flagged = _mask(flagged, "flagged", prediction.shape)
    changed = edited != prediction
    inside, outside = changed & flagged, changed & ~flagged
    report = EditReport(
        n_changed_inside=int(inside.sum()),
        n_outside=int(outside.sum()),
        slices_changed=_slices(inside),
        slices_outside=_slices(outside),
        gained={label: int((edited[inside] == label).sum()) for label in CLASSES},
        lost={label: int((prediction[inside] == label).sum()) for label in CLASSES},
    )
    if report.n_outside and on_outside == "error":
        raise ValueError(
            f"{report.n_outside} voxel(s) edited outside the flagged regions, in slice(s) "
            f"{', '.join(str(z + 1) for z in report.slices_outside)} (counted from 1): undo these edits, or drop them "
            "(--on_outside drop)."
        )
    return np.where(inside, edited, prediction), report


def _mask(mask: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        raise ValueError(f"This correction needs the mask {name!r}, which is missing.")
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}, the prediction {shape}: bring them to one grid.")
    return mask != 0


def _slices(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask.any(axis=(0, 1))).tolist())


class SimulateCorrection(Transform):
    """Simulated correction of a prediction (paper, section V-C), see `simulate_correction`.

    Args:
        rule: "paper", "released_code" or "upper_bound".

    Raises:
        ValueError: the rule is unknown.
    """

    def __init__(self, rule: Rule = "paper") -> None:
        check_rule(rule)
        self.rule = rule

    def __call__(
        self,
        prediction: NdarrayOrTensor,
        reference: NdarrayOrTensor,
        flagged: NdarrayOrTensor | None = None,
        failures: NdarrayOrTensor | None = None,
    ) -> NdarrayOrTensor:
        """Corrected labels, of the prediction's kind, type and metadata; all volumes are (1, H, W, D).

        Raises:
            ValueError: as `simulate_correction`.
        """
        volumes = {"prediction": prediction, "reference": reference, "flagged": flagged, "failures": failures}
        arrays = {name: channel_first_volume(x, name) for name, x in volumes.items() if x is not None}
        return convert_to_dst_type(simulate_correction(**arrays, rule=self.rule)[None], prediction)[0]


class SimulateCorrectiond(MapTransform):
    """Dictionary form of `SimulateCorrection`; a prediction is replaced by its correction.

    Args:
        keys: predictions, (1, H, W, D) each.
        ref_key: the manual labels.
        flagged_key: the flagged regions, one key for all predictions or one for each; None with
            "upper_bound".
        failure_key: the failures, likewise; None with "paper".
        rule: "paper", "released_code" or "upper_bound".
        allow_missing_keys: skip predictions that are not there.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ref_key: str,
        flagged_key: KeysCollection | None = None,
        failure_key: KeysCollection | None = None,
        rule: Rule = "paper",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ref_key = ref_key
        self.flagged_keys = ensure_tuple_rep(flagged_key, len(self.keys))
        self.failure_keys = ensure_tuple_rep(failure_key, len(self.keys))
        self.correct = SimulateCorrection(rule)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        for key, flagged_key, failure_key in self.key_iterator(d, self.flagged_keys, self.failure_keys):
            flagged = None if flagged_key is None else d[flagged_key]
            failures = None if failure_key is None else d[failure_key]
            d[key] = self.correct(d[key], d[self.ref_key], flagged, failures)
        return d
