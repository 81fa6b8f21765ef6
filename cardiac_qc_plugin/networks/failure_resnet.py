"""Detection network for local segmentation failures (S-ResNet), section III-D of the paper."""

import torch
from torch import nn
from torch.nn import functional as F

from .residual import ConvBNReLU, ResidualBlock

__all__ = ["FailureResNet"]


class ByteDropout(nn.Dropout):
    """Dropout of single values, on CPUs by one random byte for each, if these give its probability (1/2, say) exactly.

    torch's own random numbers took two fifths of a training step of the detector.
    """

    same_as_dropout = True  # for sampling.FusedNetwork

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # which has no views as another type
            dropped = int(256 * self.p)
            exact = dropped == 256 * self.p and dropped < 256
            dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
            if self.training and exact and dense and x.device.type == "cpu":
                words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
                kept = torch.as_strided(words.view(torch.uint8), x.shape, x.stride()) >= dropped
                return x * kept.to(x.dtype).mul_(256 / (256 - dropped))
        return F.dropout(x, self.p, self.training)


class FailureResNet(nn.Module):
    """Shallow residual network that gives each region of ``region_size`` pixels two logits: correct, failure.

    Args:
        in_channels: 2 for image and uncertainty map; 3 with the automatic segmentation.
        region_size: edge of a region in pixels, equal to the output stride: 8 (paper), 4 or 16. The paper does not
            say how the other two were built (Fig. 7): here 4 leaves the last block at stride 1, and 16 appends a
            block of 128 kernels at stride 2.
        dropout: probability of element-wise dropout between the blocks and in the classifier.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, 2, H / region_size, W / region_size)`` logits.

    Raises:
        ValueError: for another region size, or an input whose size is no multiple of it.

    Example::

        >>> FailureResNet()(torch.zeros(1, 2, 80, 96)).shape
        torch.Size([1, 2, 10, 12])
    """

    def __init__(self, in_channels: int = 2, region_size: int = 8, dropout: float = 0.5) -> None:
        super().__init__()
        strides = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 2, 2)}
        if region_size not in strides:
            raise ValueError(f"region_size is one of {sorted(strides)}, got {region_size}.")
        self.region_size = region_size
        layers: list[nn.Module] = [
            ConvBNReLU(in_channels, 16, kernel=7),
            ConvBNReLU(16, 32),
            ByteDropout(dropout),
        ]
        channels = 32
        for width, stride in zip((32, 64, 128, 128), strides[region_size]):  # noqa: B905 (three or four blocks)
            layers += [ResidualBlock(channels, width, stride), ByteDropout(dropout)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Conv2d(128, 128, 1),
            nn.ReLU(),
            ByteDropout(dropout),
            nn.Conv2d(128, 128, 1),
            nn.ReLU(),
            ByteDropout(dropout),
            nn.Conv2d(128, 2, 1),
        )
        for module in self.classifier:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] % self.region_size != 0 or x.shape[3] % self.region_size != 0:
            raise ValueError(
                f"Input of {x.shape[2]} x {x.shape[3]} pixels is no multiple of the region size {self.region_size}."
            )
        return self.classifier(self.features(x))
