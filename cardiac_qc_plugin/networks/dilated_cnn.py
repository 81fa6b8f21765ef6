"""Bayesian dilated CNN (DN), section III-A of the paper."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DilatedCNN"]


class DilatedCNN(nn.Module):
    """Ten convolutions, eight of them dilated, with dropout after all but the last one.

    The convolutions are valid, as in the paper; the module zero-pads its input on every side by the sum of
    the dilations (65 pixels by default), so that the logits lie on the input's grid, whatever its size.

    Args:
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        features: kernels of each 3x3 convolution (paper: eight times 32).
        dilations: dilation of each 3x3 convolution, as many as ``features``. The receptive field is
            ``1 + 2 * sum(dilations)``: 131 pixels by default, 18.3 cm at 1.4 mm.
        classifier_features: kernels of the 1x1 convolution before the last one.
        dropout: probability with which a whole feature map is dropped (Monte Carlo dropout, section III-B).

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)`` logits.

    Example::

        >>> DilatedCNN()(torch.zeros(1, 1, 40, 50)).shape
        torch.Size([1, 4, 40, 50])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 4,
        features: Sequence[int] = (32,) * 8,
        dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 32, 1),
        classifier_features: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(features) != len(dilations):
            raise ValueError(f"features and dilations need the same length, got {len(features)} and {len(dilations)}.")
        self.padding = sum(dilations)
        layers: list[nn.Module] = []
        channels = in_channels
        for index, (width, dilation) in enumerate(zip(features, dilations, strict=True)):
            layers += [nn.Conv2d(channels, width, 3, dilation=dilation), nn.ReLU()]
            if index > 0:  # batch normalization in layers 2 to 9
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.Dropout2d(dropout))
            channels = width
        layers += [
            nn.Conv2d(channels, classifier_features, 1),
            nn.ReLU(),
            nn.BatchNorm2d(classifier_features),
            nn.Dropout2d(dropout),
            nn.Conv2d(classifier_features, out_channels, 1),
        ]
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.padding
        return self.valid(F.pad(x, (p, p, p, p)))

    def valid(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of an image without its outer ``padding`` pixels."""
        return self.layers(x)
