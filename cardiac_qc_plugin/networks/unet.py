"""Bayesian U-net, section III-A of the paper; Ronneberger et al., MICCAI 2015."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["BayesianUNet"]


class _DoubleConvolution(nn.Sequential):
    """Two 3x3 convolutions with LeakyReLU, with instance normalization in the contracting path only."""

    def __init__(self, in_channels: int, out_channels: int, normalize: bool, dropout: float) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            if normalize:
                layers.append(nn.InstanceNorm2d(out_channels))
            layers.append(nn.LeakyReLU(0.01))
        if dropout > 0:  # the bottleneck has none
            layers.append(nn.Dropout2d(dropout))
        super().__init__(*layers)


class JoiningConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution whose output is joined to the features of the contracting path."""

    joins_skip = True  # for sampling.FusedNetwork

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        settings = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return torch.cat([skip, F.conv_transpose2d(x, self.weight, self.bias, *settings)], dim=1)


class BayesianUNet(nn.Module):
    """U-net with instance normalization in the contracting path and dropout last in every block of both paths.

    The input is padded by edge replication to a multiple of 16 (and to at least 32, the smallest size that
    instance normalization can handle at the bottleneck), and the logits are cropped back.

    Args:
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        features: kernels per level, the bottleneck last.
        dropout: probability with which a whole feature map is dropped.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)`` logits, any ``H`` and ``W``.

    Example::

        >>> BayesianUNet(features=(4, 8, 16))(torch.zeros(1, 1, 70, 33)).shape
        torch.Size([1, 4, 70, 33])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 4,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.divisor = 2 ** (len(features) - 1)
        *path, bottleneck = features
        inputs = [in_channels, *path]
        self.contracting = nn.ModuleList(
            _DoubleConvolution(i, o, True, dropout) for i, o in zip(inputs[:-1], path, strict=True)
        )
        self.bottleneck = _DoubleConvolution(path[-1], bottleneck, True, 0.0)
        widths = list(reversed(features))
        self.upsampling = nn.ModuleList(
            JoiningConvTranspose2d(i, o, 2, stride=2) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.expanding = nn.ModuleList(_DoubleConvolution(2 * o, o, False, dropout) for o in widths[1:])
        self.classifier = nn.Conv2d(features[0], out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2], x.shape[3]
        d = self.divisor
        bottom = max(-height % d, 2 * d - height)
        right = max(-width % d, 2 * d - width)
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        skips: list[torch.Tensor] = []
        for block in self.contracting:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for upsample, block in zip(self.upsampling, self.expanding):  # noqa: B905 (TorchScript knows no strict)
            x = block(upsample(x, skips.pop()))
        return self.classifier(x)[:, :, :height, :width]
