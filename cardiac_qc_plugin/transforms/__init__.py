"""Transforms in MONAI's array and dictionary (``…d``) forms; volumes are ``(C, H, W, D)``, slices last."""

from .correction import EditReport, SimulateCorrection, SimulateCorrectiond, apply_edits, simulate_correction
from .failure_labels import FailureCriterion, FailureLabel, FailureLabeld, failure_mask
from .regions import (
    CropAroundSegmentationd,
    FlagRegionsd,
    RegionLabelsd,
    crop_box,
    crop_slice,
    flagged_region_map,
    paint_regions,
    read_regions,
    region_counts,
    region_labels,
    uncrop_slice,
)
from .spatial import CheckScan, CheckScand, InPlaneSpacingd
from .uncertainty import (
    BayesianMap,
    BayesianMapd,
    PairwiseDiced,
    PredictiveEntropy,
    PredictiveEntropyd,
    SplitUncertaintyd,
    bayesian_map,
    pairwise_dice,
    predictive_entropy,
)

__all__ = [
    "BayesianMap",
    "BayesianMapd",
    "CheckScan",
    "CheckScand",
    "CropAroundSegmentationd",
    "EditReport",
    "FailureCriterion",
    "FailureLabel",
    "FailureLabeld",
    "FlagRegionsd",
    "InPlaneSpacingd",
    "PairwiseDiced",
    "PredictiveEntropy",
    "PredictiveEntropyd",
    "RegionLabelsd",
    "SimulateCorrection",
    "SimulateCorrectiond",
    "SplitUncertaintyd",
    "apply_edits",
    "bayesian_map",
    "crop_box",
    "crop_slice",
    "failure_mask",
    "flagged_region_map",
    "paint_regions",
    "pairwise_dice",
    "predictive_entropy",
    "read_regions",
    "region_counts",
    "region_labels",
    "simulate_correction",
    "uncrop_slice",
]
