"""Losses of the paper that MONAI and torch do not have as such.

:func:`segmentation_loss` builds the three segmentation losses by name.
"""

import torch
from monai.losses import DiceLoss
from torch import nn
from torch.nn import functional as F

__all__ = ["BrierLoss", "FailureLoss", "segmentation_loss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy (Eq. 4), mean over batch and pixels, for MONAI's ``(B, 1, H, W)`` label maps."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, target[:, 0].long())


class BrierLoss(nn.Module):
    """Brier loss (Eq. 5): squared distance between softmax and one-hot reference.

    Summed over classes, and averaged over batch and pixels, so that its scale does not depend on the patch size
    (the paper's equation sums over pixels).

    Shape:
        logits ``(B, C, H, W)``, target ``(B, 1, H, W)`` labels in ``0 ... C-1``; returns a scalar in [0, 2].

    Example::

        >>> float(BrierLoss()(torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 2, 2)))
        0.75
    """

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        reference = F.one_hot(target[:, 0].long(), logits.shape[1]).movedim(-1, 1)
        return (logits.softmax(dim=1) - reference).square().sum(dim=1).mean()


def segmentation_loss(name: str) -> nn.Module:
    """Loss on ``(B, C, H, W)`` logits and ``(B, 1, H, W)`` labels by its name in the paper.

    Args:
        name: ``"ce"``, ``"brier"``, or ``"soft_dice"`` (Eq. 3 with the usual factor 2, as ``1 - mean``; sums run
            over batch and pixels and all classes count, so that a class that an image lacks still gets a gradient).

    Raises:
        ValueError: for another name.
    """
    if name == "ce":
        return CrossEntropyLoss()
    if name == "brier":
        return BrierLoss()
    if name == "soft_dice":
        return DiceLoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=0.0)
    raise ValueError(f"Unknown segmentation loss '{name}': choose 'ce', 'soft_dice' or 'brier'.")


class FailureLoss(nn.Module):
    """Weighted binary cross-entropy of the detection network (Eq. 6), mean over batch and regions.

    Args:
        positive_weight: w_pos, the ratio of regions without to regions with a failure.

    Shape:
        logits ``(B, 2, h, w)``, target ``(B, 1, h, w)`` in {0, 1}; returns a scalar.
    """

    def __init__(self, positive_weight: float) -> None:
        super().__init__()
        if positive_weight <= 0:
            raise ValueError(f"positive_weight has to be positive, got {positive_weight}.")
        self.register_buffer("positive_weight", torch.tensor(float(positive_weight)), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # softmax over two channels is the sigmoid of their difference
        return F.binary_cross_entropy_with_logits(
            logits[:, 1] - logits[:, 0],
            target[:, 0].to(logits.dtype),
            pos_weight=self.positive_weight.to(logits.device),
        )
