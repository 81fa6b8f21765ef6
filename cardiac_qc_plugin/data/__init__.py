"""Data sets, datalists and training batches."""

from .acdc import acdc_datalist
from .degradation import ImageDegradation
from .folds import check_scans, hold_out, read_fold
from .phantom import ShortAxisPhantom
from .predictions import scan_items, with_predictions
from .slices import PatchAugmentation, SlicePatchDataset, positive_weight

__all__ = [
    "ImageDegradation",
    "PatchAugmentation",
    "ShortAxisPhantom",
    "SlicePatchDataset",
    "acdc_datalist",
    "check_scans",
    "hold_out",
    "positive_weight",
    "read_fold",
    "scan_items",
    "with_predictions",
]
