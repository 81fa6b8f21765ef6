"""Building blocks shared by the dilated residual network and the failure detector."""

import torch
from torch import nn

__all__ = ["ConvBNReLU", "ResidualBlock"]


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch normalization, ReLU; keeps the size at stride 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization around a shortcut; ReLU after the sum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: stride of the first convolution; the shortcut becomes a strided 1x1 convolution when the shape changes.
        dilation: dilation of both convolutions.
        dropout: probability of dropping a whole feature map between the convolutions; 0 builds no dropout.
    """

    is_residual_block = True  # for sampling.FusedNetwork

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.first = ConvBNReLU(in_channels, out_channels, stride=stride, dilation=dilation)
        self.dropout = nn.Dropout2d(dropout) if dropout > 0 else nn.Identity()
        self.second = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.dropout(self.first(x))) + self.shortcut(x))
