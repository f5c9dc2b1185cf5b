"""Predictions: the row (a, b) of each network output a x0 + b eps, from alpha and sigma."""

from torch import Tensor

from ldm.diffusion.schedules import expand_dims_like

PREDICTIONS = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans and Ho 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al. 2023: dx_t/dt on the flow schedule
}


class Prediction:
    """The quantity that the network predicts: "eps", "x0", "v" or "flow"."""

    def __init__(self, kind: str) -> None:
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction '{kind}' is none of {', '.join(PREDICTIONS)}")
        self.kind = kind
        self.row = PREDICTIONS[kind]

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The right output of the network; x0 and eps (B, ...), alpha and sigma () or (B,)."""
        a, b = self.row(expand_dims_like(alpha, x0), expand_dims_like(sigma, x0))
        return a * x0 + b * eps

    def to_x0(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat from the network's output; shapes as in `target`."""
        alpha, sigma = expand_dims_like(alpha, x_t), expand_dims_like(sigma, x_t)
        a, b = self.row(alpha, sigma)
        return (b * x_t - sigma * out) / (b * alpha - a * sigma)

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The squared error of the output per squared error of x0_hat, at the same x_t.

        With eps = (x_t - alpha x0) / sigma, out = (a - b alpha / sigma) x0 + (b / sigma) x_t.
        """
        a, b = self.row(alpha, sigma)
        return ((b * alpha - a * sigma) / sigma).square()
