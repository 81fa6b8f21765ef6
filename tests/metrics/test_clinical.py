import math

import numpy as np
import pytest
from scipy.stats import linregress

from cardiac_qc_plugin.metrics import agreement, indices_of_volumes, structure_volumes

NAN = float("nan")


def labels(rv, lvm, lv, shape=(10, 10, 6)):
    """A volume with these numbers of voxels of each structure, scattered."""
    flat = np.zeros(math.prod(shape), np.uint8)
    flat[: rv + lvm + lv] = np.repeat([1, 2, 3], (rv, lvm, lv))
    return np.random.default_rng(0).permutation(flat).reshape(shape)


def test_volumes_by_hand():
    assert structure_volumes(labels(20, 30, 50), (2.0, 1.0, 10.0)) == {"RV": 0.4, "LVM": 0.6, "LV": 1.0}


def test_indices_by_hand():
    ed = structure_volumes(labels(100, 60, 200), (2.0, 1.0, 10.0))
    indices = indices_of_volumes(ed, structure_volumes(labels(60, 70, 80), (2.0, 1.0, 8.0)))
    assert (indices.rv_edv, indices.lv_edv) == (pytest.approx(2.0), pytest.approx(4.0))
    assert (indices.rv_esv, indices.lv_esv) == (pytest.approx(0.96), pytest.approx(1.28))
    assert indices.rv_ef == pytest.approx(52.0)
    assert indices.lv_ef == pytest.approx(68.0)
    assert indices.lvm_mass == pytest.approx(1.2 * 1.05)  # at end-diastole


def test_ejection_fraction_without_cavity_and_below_zero():
    volumes = (structure_volumes(mask, (1, 1, 10)) for mask in (labels(0, 10, 20), labels(5, 10, 30)))
    indices = indices_of_volumes(*volumes)
    assert indices.rv_edv == 0 and math.isnan(indices.rv_ef)
    assert indices.lv_ef == pytest.approx(-50)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"has the values \[5\]"):
        structure_volumes(np.full((2, 2, 2), 5), (1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        structure_volumes(labels(1, 1, 1), (1, 1))


def test_agreement_by_hand():
    result = agreement([10.0, 18.0, 30.0, NAN, 7.0], [12.0, 20.0, 27.0, 5.0, NAN])
    assert (result.n, result.n_excluded) == (3, 2)
    assert result.bias == pytest.approx(-1 / 3)  # automatic - reference: -2, -2, 3
    assert result.mae == pytest.approx(7 / 3)
    assert result.sd == pytest.approx(math.sqrt((2 * (5 / 3) ** 2 + (10 / 3) ** 2) / 2))


def test_agreement_against_regression():
    rng = np.random.default_rng(1)
    reference = rng.normal(60, 15, 50)
    automatic = 0.9 * reference + rng.normal(2, 5, 50)
    result = agreement(automatic, reference)
    assert result.r == pytest.approx(linregress(reference, automatic).rvalue)
    assert result.bias == pytest.approx(automatic.mean() - reference.mean())
    assert agreement(reference, automatic).bias == pytest.approx(-result.bias)


@pytest.mark.parametrize("automatic, reference", [([3.0], [2.0]), ([1.0, 2.0], [5.0, 5.0]), ([NAN], [1.0]), ([], [])])
def test_agreement_where_correlation_is_undefined(automatic, reference):
    assert math.isnan(agreement(automatic, reference).r)


def test_agreement_needs_pairs():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        agreement([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="inf"):
        agreement([1.0, np.inf], [1.0, 2.0])
