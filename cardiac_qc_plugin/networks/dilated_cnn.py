"""Bayesian dilated CNN (DN), section III-A of the paper."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DilatedCNN"]


def joined_edges(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``(B, C, H, W)`` padded on every side by copies of its outermost pixels, as ``mode="replicate"`` does."""
    left, right = x[..., :1].expand(-1, -1, -1, columns), x[..., -1:].expand(-1, -1, -1, columns)
    x = torch.cat([left, x, right], dim=3)
    top, bottom = x[:, :, :1].expand(-1, -1, rows, -1), x[:, :, -1:].expand(-1, -1, rows, -1)
    return torch.cat([top, x, bottom], dim=2)


class _EdgePaddedConv2d(nn.Conv2d):
    """Convolution with ``padding_mode="replicate"``, whose gradient is fast on GPUs as well.

    The gradient of torch's own padding is a sum by atomic operations there, and took 19 of the 27 ms of a training step
    of the DN on an H200. On CPUs torch's own is the faster one.
    """

    same_as_conv2d = True  # for sampling.FusedNetwork

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.is_cuda:
            return self._conv_forward(input, self.weight, self.bias)
        padded = joined_edges(input, self.padding[0], self.padding[1])
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class DilatedCNN(nn.Module):
    """Ten convolutions, eight of them dilated, with dropout after all but the last one.

    The logits lie on the input's grid, whatever its size: they are those of valid convolutions, as in the paper, of an
    input zero-padded on every side by the sum of the dilations (65 pixels by default). Far enough outside the image
    such a network's features are constant, so one pixel of them is computed and replicated where a later layer needs
    more: a training step on patches of 151 pixels takes 0.6 of the time, and fewer pixels of its batch statistics are
    padding.

    Args:
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        features: kernels of each 3x3 convolution (paper: eight times 32).
        dilations: dilation of each 3x3 convolution, as many as ``features``. The receptive field is
            ``1 + 2 * sum(dilations)``: 131 pixels by default, 18.3 cm at 1.4 mm.
        classifier_features: kernels of the 1x1 convolution before the last one.
        dropout: probability with which a whole feature map is dropped (Monte Carlo dropout, section III-B).

    Attributes:
        border: pixels on every side by which the logits of an image would be smaller without any padding.

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
        self.border = sum(dilations)
        layers: list[nn.Module] = []
        channels, reach, margin = in_channels, 0, 0
        for index, (width, dilation) in enumerate(zip(features, dilations, strict=True)):
            reach += dilation  # how far outside the image its pixels are felt
            needed = min(reach + 1, self.border - reach)  # with one constant pixel, unless later layers need less
            padding = dilation + needed - margin
            kind, mode = (nn.Conv2d, "zeros") if index == 0 else (_EdgePaddedConv2d, "replicate")
            layers += [kind(channels, width, 3, 1, padding, dilation, padding_mode=mode), nn.ReLU()]
            if index > 0:  # batch normalization in layers 2 to 9
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.Dropout2d(dropout))
            channels, margin = width, needed
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
        return self.layers(x)
