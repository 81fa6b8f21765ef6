"""Worse images: against MONAI's transforms, numpy, and what each kind is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import GibbsNoise, RandBiasField

from cardiac_qc_plugin.data import ImageDegradation, degradation
from cardiac_qc_plugin.data.degradation import bias_field, ghosts, low_resolution

NOTHING = {"share": 1.0, "motion_share": 1.0, "shift": 0.0, "keep": 1.5, "bias": 0.0, "gamma": (1.0, 1.0), "noise": 0.0}


def patches(count: int = 4, size: int = 24, seed: int = 0) -> torch.Tensor:
    """Random patches with a smooth part, in [0, 0.65]: dark enough for nothing to be clipped or scaled."""
    rng = np.random.default_rng(seed)
    smooth = np.outer(np.hanning(size), np.hanning(size))
    return torch.from_numpy((0.4 * smooth + 0.25 * rng.random((count, 1, size, size))).astype(np.float32))


def degrade(scan: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    return ImageDegradation(**options)(scan, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
def test_low_resolution_is_monais_gibbs_noise(keep):
    scan = patches(size=31)[:, 0]  # odd: for an even size MONAI's disk lies half a line off the middle of k-space
    expected = GibbsNoise(alpha=1 - keep / 2**0.5)(scan[:, None].reshape(4, 31, 31)).abs()
    found = low_resolution(scan, torch.full((4,), keep))
    # MONAI's radius counts lines from the middle of k-space, which has size / 2 of them to either side, as here
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=0)


def test_each_patch_has_its_own_resolution():
    scan = patches()[:, 0]
    keep = torch.tensor([0.2, 0.5, 0.9, 1.5])
    together = low_resolution(scan, keep)
    for number in range(4):
        torch.testing.assert_close(together[number], low_resolution(scan[[number]], keep[[number]])[0])
    torch.testing.assert_close(together[3], scan[3])  # all of k-space
    sharpness = [float(patch.diff(dim=0).square().mean()) for patch in low_resolution(scan[[0] * 3], keep[:3])]
    assert sharpness == sorted(sharpness)


@pytest.mark.parametrize("size", [24, 31, 32])
@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("along", [0, 1])
def test_ghosts_exchange_lines_of_k_space(size, every, along):
    """Every second, third or fourth line, counted from the middle; nowhere do two of them lie closer together."""
    scan = patches(size=size)[:, 0]
    lines = np.flatnonzero((np.arange(size) - size // 2) % every == 1)
    late = (lines, slice(None)) if along == 0 else (slice(None), lines)
    shift = np.array([[2, 0], [-3, 1], [0, 5], [0, 0]])
    found = ghosts(scan, torch.from_numpy(shift).float(), torch.full((4,), every), torch.full((4,), along))
    for patch, (rows, cols), result in zip(scan.numpy(), shift, found.numpy(), strict=True):
        both = (patch, np.roll(patch, (rows, cols), axis=(0, 1)))
        space, moved = (np.fft.fftshift(np.fft.fft2(image)) for image in both)
        space[late] = moved[late]
        np.testing.assert_allclose(result, np.abs(np.fft.ifft2(np.fft.ifftshift(space))), atol=1e-5)


def test_bias_field_is_monais():
    rng = np.random.default_rng(0)
    coefficients = rng.uniform(-0.5, 0.5, (3, 10))
    matrices = np.zeros((3, 4, 4), dtype=np.float32)
    rows, cols = np.tril_indices(4)
    matrices[:, rows, cols] = coefficients
    expected = [RandBiasField(degree=3)._generate_random_field((17, 17), 3, list(row)) for row in coefficients]
    np.testing.assert_allclose(bias_field(torch.from_numpy(matrices), 17), np.exp(expected), rtol=1e-5)


def test_bias_field_has_a_total_degree_of_three():
    """Along any line it is the exponential of a cubic: its logarithm's fourth differences vanish."""
    flat = torch.full((50, 1, 32, 32), 0.05)  # so dark that the scaling to 1 does nothing
    field = degrade(flat, **{**NOTHING, "motion_share": 0.0, "bias": 0.4}).double().log()[:, 0]
    diagonal = torch.diagonal(field, dim1=1, dim2=2)
    assert float(diagonal.diff(n=4).abs().max()) < 1e-4 < float(diagonal.diff(n=3).abs().max())
    assert field.std() > 0.1


def test_what_is_bright_after_the_bias_field_is_scaled_down():
    """4 % of the pixels have 1, and get the drawn level where it is lower; 2 % do not reach the 97th percentile."""
    scan = torch.full((1000, 1, 10, 10), 0.5)
    scan[:, 0, :4, 0] = 1.0
    found = degrade(scan, **{**NOTHING, "motion_share": 0.0})
    bright = found[:, 0, 0, 0]
    assert 0.7 <= bright.min() < 0.71 and abs((bright == 1).float().mean() - 0.4) < 0.05
    torch.testing.assert_close(found[:, 0, 9, 9], bright / 2)
    scan[:, 0, 2:4, 0] = 0.5
    torch.testing.assert_close(degrade(scan, **{**NOTHING, "motion_share": 0.0}), scan, atol=1e-5, rtol=0)


def test_motion_and_resolution_are_drawn_from_the_whole_range(monkeypatch):
    drawn = []
    for name in ("ghosts", "low_resolution"):
        monkeypatch.setattr(degradation, name, lambda scan, *values: drawn.append(values) or scan)
    degrade(torch.full((2000, 1, 2, 2), 0.5), **{**NOTHING, "shift": 6.0, "keep": 0.25})
    (shift, every, along), (keep,) = drawn
    assert -6 <= shift.min() < -5.9 and 5.9 < shift.max() <= 6 and (shift[0] != shift[1]).all()
    assert set(every.tolist()) == {2, 3, 4} and set(along.tolist()) == {0, 1}
    assert 0.25 <= keep.min() < 0.26 and 0.99 < keep.max() <= 1


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gamma(gamma):
    scan = patches()
    found = degrade(scan, **{**NOTHING, "motion_share": 0.0, "gamma": (gamma, gamma)})
    torch.testing.assert_close(found, scan**gamma, atol=1e-5, rtol=0)


def test_gamma_lies_in_its_range_and_darkens_as_often_as_it_brightens():
    found = degrade(torch.full((2000, 1, 2, 2), 0.5), **{**NOTHING, "motion_share": 0.0, "gamma": (0.5, 2.0)})
    exponent = found[:, 0, 0, 0].log2().neg()
    assert 0.5 <= exponent.min() < 0.52 and 1.93 < exponent.max() <= 2.0
    assert abs((exponent > 1).float().mean() - 0.5) < 0.04


def test_noise_is_rician():
    """Without signal its square has the mean 2 sigma^2 (Rayleigh), with much signal its deviation is sigma."""
    option = {**NOTHING, "motion_share": 0.0, "noise": 0.2}  # sigma is uniform: the mean of sigma^2 is 0.04 / 3
    dark = degrade(torch.zeros(400, 1, 32, 32), **option, seed=1)
    assert float(dark.square().mean()) == pytest.approx(2 * 0.04 / 3, rel=0.08)
    after_contrast = degrade(torch.zeros(400, 1, 32, 32), **{**option, "gamma": (2.0, 2.0)}, seed=1)
    assert float(after_contrast.square().mean()) == pytest.approx(2 * 0.04 / 3, rel=0.08)
    bright = degrade(torch.full((400, 1, 32, 32), 0.5), **option)[:, 0].flatten(1)
    assert float(bright.var(dim=1).mean()) == pytest.approx(0.04 / 3, rel=0.1)
    assert bright.std(dim=1).max() < 0.22 and bright.std(dim=1).min() < 0.01


@pytest.mark.parametrize(
    "option", [{"shift": 5.0}, {"keep": 0.3}, {"bias": 0.8}, {"gamma": (2.0, 2.0)}, {"noise": 0.1}], ids=str
)
def test_share_is_that_of_the_patches(option):
    """Each kind by itself; the others do nothing. Motion has a share of its own."""
    scan = patches(1000, 12)
    found = degrade(scan, **{**NOTHING, "share": 0.3, "motion_share": 0.1, **option})
    changed = ((found - scan).abs().flatten(1).max(dim=1).values > 1e-3).float().mean()
    assert abs(changed - (0.1 if "shift" in option else 0.3)) < 0.05


def test_kinds_are_drawn_independently():
    scan = patches(3000, 12)
    options = {**NOTHING, "motion_share": 0.0, "share": 0.5, "bias": 0.0, "gamma": (2.0, 2.0), "noise": 0.05}
    found = degrade(scan, **options)
    contrast = (found - scan**2).abs().flatten(1).mean(dim=1)
    plain = (found - scan).abs().flatten(1).mean(dim=1)
    unchanged, gamma_alone = plain < 1e-4, contrast < 1e-4
    assert abs(unchanged.float().mean() - 0.25) < 0.03 and abs(gamma_alone.float().mean() - 0.25) < 0.03


def test_without_a_share_nothing_changes():
    scan = patches()
    assert torch.equal(degrade(scan, share=0.0, motion_share=0.0), scan)
    torch.testing.assert_close(degrade(scan, **NOTHING), scan, atol=1e-5, rtol=0)


@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.integers(1, 5), st.integers(4, 33))
@settings(max_examples=40, deadline=None)
def test_patches_stay_patches(seed, share, count, size):
    scan = patches(count, size)
    before = scan.clone()
    found = degrade(scan, seed, share=share, motion_share=share)
    assert found.shape == scan.shape and found.dtype == scan.dtype and torch.equal(scan, before)
    assert found.isfinite().all() and 0 <= found.min() and found.max() <= 1
    assert torch.equal(found, degrade(scan, seed, share=share, motion_share=share))


def test_a_black_patch_stays_one_but_for_noise():
    black = torch.zeros(50, 1, 16, 16)
    assert float(degrade(black, share=1.0, motion_share=1.0, noise=0.0).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["share", "motion_share"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_is_a_probability(name, value):
    with pytest.raises(ValueError, match=f"{name} is a probability"):
        ImageDegradation(**{name: value})


@pytest.mark.parametrize(
    "option",
    [{"gamma": (0.0, 2.0)}, {"gamma": (2.0, 0.5)}, {"gamma": (0.5, float("inf"))}]
    + [{name: value} for name in ("shift", "keep", "bias", "noise") for value in (-0.1, float("nan"), float("inf"))],
    ids=str,
)
def test_what_is_out_of_range_is_known_before_a_training(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ImageDegradation(**option)
