"""Networks of the paper. All take and return ``(B, C, H, W)``, and return logits."""

from .dilated_cnn import DilatedCNN
from .dilated_resnet import DilatedResNet22
from .failure_resnet import FailureResNet
from .unet import BayesianUNet

__all__ = ["BayesianUNet", "DilatedCNN", "DilatedResNet22", "FailureResNet"]
