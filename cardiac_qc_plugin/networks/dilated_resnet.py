"""Bayesian dilated residual network (DRN-D-22), section III-A of the paper; Yu et al., CVPR 2017."""

import torch
from torch import nn
from torch.nn import functional as F

from .residual import ConvBNReLU, ResidualBlock

__all__ = ["DilatedResNet22"]


class DilatedResNet22(nn.Module):
    """DRN-D-22 with dropout: eight levels at output stride 8, a 1x1 classifier, bilinear upsampling of the logits.

    Levels 1 to 4 have strides 1, 2, 2, 2; levels 5 and 6 replace strides by dilations 2 and 4; levels 7 and 8
    (dilations 2 and 1, no shortcut) remove the gridding that dilation causes.

    Args:
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        dropout: probability with which a whole feature map is dropped, after each convolution or residual block.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)`` logits, any ``H`` and ``W``.

    Example::

        >>> DilatedResNet22()(torch.zeros(1, 1, 64, 50)).shape
        torch.Size([1, 4, 64, 50])
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 4, dropout: float = 0.1) -> None:
        super().__init__()

        def convolution(i: int, o: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
            return [ConvBNReLU(i, o, kernel, stride, dilation), nn.Dropout2d(dropout)]

        def blocks(i: int, o: int, stride: int, dilation: int) -> list[nn.Module]:
            return [
                ResidualBlock(i, o, stride, dilation, dropout),
                ResidualBlock(o, o, 1, dilation, dropout),
                nn.Dropout2d(dropout),
            ]

        self.features = nn.Sequential(
            *convolution(in_channels, 16, kernel=7),
            *convolution(16, 16),
            *convolution(16, 32, stride=2),
            *blocks(32, 64, stride=2, dilation=1),
            *blocks(64, 128, stride=2, dilation=1),
            *blocks(128, 256, stride=1, dilation=2),
            *blocks(256, 512, stride=1, dilation=4),
            *convolution(512, 512, dilation=2),
            *convolution(512, 512),
        )
        self.classifier = nn.Conv2d(512, out_channels, 1)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(self.features(x)).contiguous()  # NCHW, upsampled in half of the time on CPUs
        # by the stride, not to the input's size: a size that is no multiple of 8 would stretch the grid by some pixels
        logits = F.interpolate(logits, scale_factor=8.0, mode="bilinear", align_corners=False)
        return logits[:, :, : x.shape[2], : x.shape[3]]
