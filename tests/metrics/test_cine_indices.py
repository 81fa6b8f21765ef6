"""ED and ES, jumps, body surface area and intervals, by hand."""

import numpy as np
import pytest
from scipy import stats

from cardiac_qc_plugin.metrics import body_surface_area, find_ed_es, sample_interval, slice_levels, volume_jumps

BEAT = np.array([120.0, 112, 95, 75, 60, 55, 62, 78, 90, 97, 103, 115])


def test_ed_and_es():
    assert find_ed_es(BEAT) == (0, 5)
    for shift in range(12):
        assert find_ed_es(np.roll(BEAT, shift)) == (shift, (5 + shift) % 12)


def test_of_nearly_equal_phases_the_last_before_contraction():
    assert find_ed_es([72.6, 73.8, 73.7, 68.9, 63.6, 58.6, 51.9, 44.1, 40.6, 40.0, 38.8, 47.9]) == (2, 10)
    volumes = [278, 270, 263, 248, 235, 225, 223, 226, 227, 241, 261, 268, 269, 278.1, 273, 274]
    for shift in range(16):  # before end-systole in the cycle, not in the list
        assert find_ed_es(np.roll(volumes, shift)) == (shift, (6 + shift) % 16)


def test_a_large_failure_hides_no_other():
    volumes = np.array([100, 95, 85, 400, 60, 55, 60, 70, 35, 95, 97, 98.0])
    assert volume_jumps(volumes) == [3, 8] and find_ed_es(volumes) == (0, 5)
    assert volume_jumps(volumes[::-1]) == [3, 8]  # in the order of phases, not of their size


def test_a_jump_counts_as_the_mean_of_its_neighbors():
    """Of two phases with the smallest volume that whose neighbors are smaller, 66 and 74 instead of 75 and 67."""
    volumes = [100, 100, 75, 60, 200, 74, 76, 66, 60, 74, 90, 100]
    assert volume_jumps(volumes) == [4] and find_ed_es(volumes)[1] == 8


@pytest.mark.parametrize("phases", range(3, 25))
def test_a_beat_has_no_jump(phases):
    """However few phases there are, and whenever the first is."""
    for start in np.arange(0, 1, 0.1):
        beat = np.interp((start + np.arange(phases)) / phases * 12 % 12, range(13), [*BEAT, BEAT[0]])
        assert volume_jumps(beat) == []
        ed, es = find_ed_es(beat)
        assert beat[ed] >= 0.99 * beat.max() and beat[es] <= beat.min() + 0.01 * beat.max()


@pytest.mark.parametrize("phase", [0, 5, 8, 11])
@pytest.mark.parametrize("value", [0.0, 150.0])
def test_a_failed_phase_is_a_jump_and_neither_ed_nor_es(phase, value):
    volumes = BEAT.copy()
    volumes[phase] = value
    assert volume_jumps(volumes) == [phase]
    ed, es = find_ed_es(volumes)
    others = np.delete(np.arange(12), phase)
    assert ed == others[np.argmax(BEAT[others])] and es == others[np.argmin(BEAT[others])]


def test_tolerance_is_a_share_of_the_largest_volume():
    volumes = np.full(12, 100.0)
    volumes[4] = 90  # by no more than 10 %
    assert volume_jumps(volumes) == [] and volume_jumps(volumes, tolerance=0.08) == [4]


@pytest.mark.parametrize("volumes", [[1, 2], [1, np.nan, 2], [[1, 2, 3]]])
def test_volumes_that_are_no_cine(volumes):
    with pytest.raises(ValueError, match="three or more finite numbers"):
        volume_jumps(volumes)


def test_a_heart_that_does_not_beat():
    assert find_ed_es([100, 100.3, 100.5, 100.2, 100.1]) == (2, 0)
    with pytest.raises(ValueError, match="does not change"):
        find_ed_es([100.0] * 5)


def test_a_phase_without_an_lv_is_no_end_systole():
    """Also where there are too few phases to call it a jump."""
    assert find_ed_es([120, 95, 0, 60, 75, 100]) == (0, 3)


def test_no_lv():
    with pytest.raises(ValueError, match="no phase has an LV"):
        find_ed_es([0, 0, 0, 0])


def test_body_surface_area():
    assert body_surface_area(180, 80) == pytest.approx(2.0)  # sqrt(14400 / 3600)
    for height, weight in ((0, 80), (180, 0)):
        with pytest.raises(ValueError, match="positive"):
            body_surface_area(height, weight)


def test_interval_is_students():
    samples = np.array([40.0, 42, 41, 44, 43])
    low, high = sample_interval(50, samples)
    expected = stats.t.interval(0.95, 4, loc=50, scale=samples.std(ddof=1))
    assert (low, high) == pytest.approx(expected)
    assert sample_interval(50, samples, bounds=(0.99 * low + 0.5, 50)) == pytest.approx((0.99 * low + 0.5, 50))
    assert np.isnan(sample_interval(50, [40])).all() and np.isnan(sample_interval(50, [40, np.nan])).all()


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        draws = rng.normal(60, 3, 11)
        low, high = sample_interval(draws[0], draws[1:])
        inside += low <= 60 <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("flipped", [False, True])
def test_slices_beyond_the_heart_count_to_the_third_beside_them(flipped):
    labels = np.zeros((8, 8, 9), dtype=np.uint8)
    for z, size in zip(range(1, 8), (7, 7, 6, 5, 4, 3, 2), strict=True):
        labels[:size, :size, z] = 3
        labels[0, 0, z] = 2
    labels[..., 0] = 1  # an RV above the base
    expected = ["basal"] * 4 + ["mid"] * 2 + ["apical"] * 3
    if flipped:  # the slices from the apex to the base: thirds of 7 slices are 3, 2, 2 from the first
        labels, expected = labels[..., ::-1], ["apical"] * 4 + ["mid"] * 2 + ["basal"] * 3
    assert slice_levels(labels) == expected
    assert slice_levels(np.zeros((4, 4, 3))) == slice_levels(labels[..., 4:6]) == []


@pytest.mark.parametrize("flipped", [False, True])
def test_base_without_a_right_ventricle(flipped):
    """At end-systole the RV may begin below the LV, and reach as far as the apex."""
    labels = np.zeros((16, 16, 7), dtype=np.uint8)
    for z, (lv, rv) in enumerate(zip((9, 8, 8, 7, 6, 4, 0), (0, 0, 5, 5, 5, 5, 3), strict=True)):
        labels[:lv, :lv, z] = 3
        labels[:rv, 9 : 9 + rv, z] = 1
    expected = ["basal"] * 2 + ["mid"] * 2 + ["apical"] * 3
    if flipped:
        labels, expected = labels[..., ::-1], expected[::-1]
    assert slice_levels(labels) == expected
