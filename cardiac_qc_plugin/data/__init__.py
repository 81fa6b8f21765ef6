"""Data sets, datalists and training batches."""

from .acdc import acdc_datalist
from .phantom import ShortAxisPhantom
from .predictions import hold_out, with_predictions
from .slices import PatchAugmentation, SlicePatchDataset, positive_weight

__all__ = [
    "PatchAugmentation",
    "ShortAxisPhantom",
    "SlicePatchDataset",
    "acdc_datalist",
    "hold_out",
    "positive_weight",
    "with_predictions",
]
