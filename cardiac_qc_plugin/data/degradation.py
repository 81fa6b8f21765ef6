"""Worse images for training: what scanners, coils and failed breath-holds do to a scan, for a whole batch at once."""

import math
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["ImageDegradation", "uniform"]

DEGREE = 3  # of the bias field's polynomials


def uniform(generator: torch.Generator, count: int, low: float, high: float) -> torch.Tensor:
    """``(count,)`` values drawn uniformly from [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def frequencies(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cycles per pixel along rows ``(N, 1)`` and columns ``(1, N)``, as ``torch.fft.fft2`` orders them."""
    line = torch.fft.fftfreq(size)
    return line[:, None], line[None]


def ghosts(scan: torch.Tensor, shift: torch.Tensor, every: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Magnitude images of a body that moved between lines of k-space.

    Args:
        scan: ``(B, N, N)``.
        shift: ``(B, 2)``, pixels along rows and columns by which the body had moved.
        every: ``(B,)``, of how many lines one was read after the motion, from 2; the middle line was read before it.
        along: ``(B,)``, axis along which the lines are counted: 0 or 1.
    """
    size = scan.shape[-1]
    rows, cols = frequencies(size)
    moved = torch.exp(-2j * math.pi * (rows * shift[:, 0, None, None] + cols * shift[:, 1, None, None]))
    line = torch.fft.fftfreq(size, 1 / size).round()  # numbers from the middle of k-space: fft2 has its ends there
    line = torch.where(along[:, None, None] == 0, line[:, None], line[None])
    late = line % every[:, None, None] == 1
    space = torch.fft.fft2(scan)
    return torch.fft.ifft2(torch.where(late, space * moved, space)).abs()


def low_resolution(scan: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Magnitude images from the middle of k-space alone, with the ringing that belongs to it.

    Args:
        scan: ``(B, N, N)``.
        keep: ``(B,)``, radius of what is kept, as a share of the highest frequency along an axis.
    """
    rows, cols = frequencies(scan.shape[-1])
    inside = rows**2 + cols**2 <= (keep[:, None, None] / 2) ** 2
    return torch.fft.ifft2(torch.fft.fft2(scan) * inside).abs()


def bias_field(coefficients: torch.Tensor, size: int) -> torch.Tensor:
    """Smooth positive fields ``(B, N, N)``: exponentials of polynomials in Legendre's basis.

    Args:
        coefficients: ``(B, 4, 4)`` of the degrees along rows and columns.
        size: N.
    """
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, size), DEGREE)
    basis = torch.from_numpy(basis.astype(np.float32))
    return torch.exp(basis @ coefficients @ basis.T)


@dataclass(frozen=True)
class ImageDegradation:
    """Ghosts of motion, low resolution, a bias field, another contrast and Rician noise, each in some of the patches.

    Networks that never saw such images fail on them. The kinds are drawn independently of each other, so a patch may
    have several; without any it stays as it is. A patch is taken for a whole slice: ringing and ghosts go round its
    edges. Pixels are the patch's, whatever their size in mm.

    Args:
        share: probability of each kind but motion, in a patch.
        motion_share: probability of ghosts.
        shift: largest motion in pixels, along each axis.
        keep: smallest radius of k-space that is left, as a share of the highest frequency along an axis; the largest
            is 1. From 1.42 on nothing is cut.
        bias: largest coefficient of the bias field's polynomials, whose total degree is at most 3.
        gamma: range of the exponent of the intensities, drawn on a logarithmic scale.
        noise: largest standard deviation of the Rician noise.

    Raises:
        ValueError: if a share is not between 0 and 1, or another setting is out of its range.

    Example:
        >>> scan = torch.rand(16, 1, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> ImageDegradation(share=0.5)(scan, torch.Generator().manual_seed(1)).shape
        torch.Size([16, 1, 128, 128])
    """

    share: float = 0.25
    motion_share: float = 0.1
    shift: float = 6.0
    keep: float = 0.25
    bias: float = 0.5
    gamma: tuple[float, float] = (0.5, 2.2)
    noise: float = 0.12

    def __post_init__(self) -> None:
        for name in ("share", "motion_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1, got {getattr(self, name)}.")
        if not 0 < self.gamma[0] <= self.gamma[1] < math.inf:
            raise ValueError(f"gamma is a range of positive exponents, the smaller first, got {self.gamma}.")
        for name in ("shift", "keep", "bias", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is 0 or more, got {getattr(self, name)}.")

    def __call__(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Degraded patches, clipped to [0, 1].

        Args:
            scan: ``(B, 1, N, N)``, float32 on the CPU, intensities in [0, 1].
            generator: source of the random numbers.
        """
        result = scan[:, 0].clone()
        for kind in (self._move, self._blur, self._shade, self._change_contrast, self._add_noise):
            share = self.motion_share if kind == self._move else self.share
            chosen = torch.rand(len(result), generator=generator) < share
            if chosen.any():
                result[chosen] = kind(result[chosen], generator)
        return result.clamp(0, 1)[:, None]

    def _move(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(scan)
        shift = uniform(generator, 2 * count, -self.shift, self.shift).view(count, 2)
        every, along = (torch.randint(*limits, (count,), generator=generator) for limits in ((2, 5), (0, 2)))
        return ghosts(scan, shift, every, along)

    def _blur(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return low_resolution(scan, uniform(generator, len(scan), self.keep, max(1.0, self.keep)))

    def _shade(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Bias field, after which the 97th percentile is scaled down to a level from 0.7 to 1.2 if it is above it."""
        count, orders = len(scan), DEGREE + 1
        coefficients = uniform(generator, count * orders**2, -self.bias, self.bias).view(count, orders, orders)
        possible = np.add.outer(np.arange(orders), np.arange(orders)) <= DEGREE
        scan = scan * bias_field(coefficients * torch.from_numpy(possible), scan.shape[-1])
        bright = torch.quantile(scan.flatten(1), 0.97, dim=1)
        return scan * (uniform(generator, count, 0.7, 1.2) / bright).clamp_max(1)[:, None, None]

    def _change_contrast(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        gamma = torch.exp(uniform(generator, len(scan), *(math.log(g) for g in self.gamma)))
        return scan.clamp(0, 1) ** gamma[:, None, None]

    def _add_noise(self, scan: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        sigma = uniform(generator, len(scan), 0.0, self.noise)[:, None, None]
        real, imaginary = sigma * torch.randn((2, *scan.shape), generator=generator)
        return torch.hypot(scan + real, imaginary)
