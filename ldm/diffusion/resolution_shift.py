"""The shift of a noise schedule by the size of the data: larger images need more noise."""

import math


def compute_shift(elements: int, base: int) -> float:
    """The shift sqrt(m / n) of a schedule for data of m `elements` in place of n, the `base`.

    Neighbouring elements say much the same, so that averages over them undo noise: m / n times as
    many need a noise that is sqrt(m / n) times as strong at the same time ("Scaling rectified flow
    transformers", Esser et al. 2024, arXiv:2403.03206, equation 23; the shift of log SNR by
    2 log(64 / d) of Hoogeboom et al. 2023, arXiv:2301.11093, is the same). Elements are those of
    the latents, channels counted (Zheng et al. 2025, arXiv:2510.11690, whose base is 4096: those
    of 256 x 256 pixels in Stable Diffusion's autoencoder).
    """
    return math.sqrt(elements / base)
