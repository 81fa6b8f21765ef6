"""Conformal risk control: a setting that comes with a promise (Angelopoulos et al., ICLR 2024, arXiv:2208.02814)."""

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["InfeasibleRisk", "control_risk"]

TIE = 1e-9  # 1 - 0.9 is a little less than 0.1


class InfeasibleRisk(ValueError):
    """No setting keeps the promise.

    Args:
        alpha: the mean loss that was asked for.
        smallest: the smallest mean loss that can be promised.
        n: number of calibration patients.
    """

    def __init__(self, alpha: float, smallest: float, n: int) -> None:
        self.alpha, self.smallest, self.n = alpha, smallest, n
        super().__init__(
            f"A mean loss of {alpha:.4g} cannot be promised from {n} patients: the smallest that can is {smallest:.4g}."
        )


def control_risk(losses: ArrayLike, alpha: float) -> int:
    """The least cautious setting whose mean loss is at most `alpha`, in expectation, for a patient like these.

    inf{k: n/(n+1) R_k + 1/(n+1) <= alpha}, R_k the mean loss of the n patients at setting k. If a new patient is
    exchangeable with these, the expectation of its loss at this setting, over the draw of all n + 1, is at most
    `alpha` (of the loss where the promise is made, 0 where it is refused).

    Args:
        losses: shape (n, K), in [0, 1]: a patient's loss at each setting, least cautious first, never rising. What
            the settings are must not depend on these patients.
        alpha: the mean loss to promise.

    Returns:
        Index of the setting, 0 to K - 1.

    Raises:
        InfeasibleRisk: if even the most cautious setting cannot promise it.
        ValueError: if the losses are not of that kind.
    """
    losses = np.asarray(losses, dtype=float)
    if losses.ndim != 2 or not losses.size:
        raise ValueError(f"losses have to be (patients, settings), got shape {losses.shape}.")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError("A loss is outside [0, 1].")
    if (np.diff(losses, axis=1) > TIE).any():
        raise ValueError("A loss rises from one setting to the next, more cautious one.")
    risk = (losses.sum(axis=0) + 1) / (len(losses) + 1)  # as if one more patient had the largest loss there is
    if risk[-1] > alpha + TIE:
        raise InfeasibleRisk(alpha, float(risk[-1]), len(losses))
    return int(np.argmax(risk <= alpha + TIE))
