"""Whitening against SciPy's covariance, and its file."""

import numpy as np
import pytest
import torch

from ldm.models.whitening import VARIANCE_FLOOR, WHITENING_FILE, Whitening


def states(scales=(3.0, 1.0, 0.5)):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    return torch.randn(4000, 3, generator=generator) * torch.tensor(scales) @ mixed + 7


def covariance(x):
    return np.cov(x.numpy(), rowvar=False)


def test_every_direction_has_unit_variance():
    white = Whitening.from_states(states())(states())
    assert white.mean(0).abs().max() < 1e-4
    got = covariance(white)
    assert np.abs(got - np.diag(np.diag(got))).max() < 1e-3
    mean = np.trace(covariance(states())) / 3
    expected = [v / (v + VARIANCE_FLOOR * mean) for v in np.linalg.eigvalsh(covariance(states()))]
    np.testing.assert_allclose(np.sort(np.diag(got)), np.sort(expected), rtol=1e-3)


def test_directions_without_variance_are_not_amplified():
    whiten = Whitening.from_states(states(scales=(1.0, 1.0, 0.0)))
    assert whiten(states() * 100).isfinite().all()
    assert whiten.matrix.abs().max() < 1.5 / VARIANCE_FLOOR**0.5
    one = Whitening.from_states(torch.ones(1, 3))
    assert one(torch.ones(2, 3)).abs().max() == 0


def test_the_file_is_read_back_or_refused(tmp_path):
    whiten = Whitening.from_states(states())
    whiten.save(tmp_path)
    assert torch.equal(Whitening.load(tmp_path, width=3)(states()), whiten(states()))
    with pytest.raises(ValueError, match="not for states 4 wide"):
        Whitening.load(tmp_path, width=4)
    (tmp_path / WHITENING_FILE).write_bytes(b"not a tensor")
    with pytest.raises(OSError, match=WHITENING_FILE):
        Whitening.load(tmp_path, width=3)
