"""Each criterion on hearts drawn by hand."""

import numpy as np
import pytest

from cardiac_qc_plugin.metrics.plausibility import CRITERIA, LIMITS, enclosed, plausibility, shape_of, stack_changes

SPACING = (1.5, 1.5, 10.0)
RV, LVM, LV = 1, 2, 3


def disk(row, col, radius, size=96):
    rows, cols = np.indices((size, size))
    return np.hypot(rows - row, cols - col) <= radius


def heart(slices=6):
    """A healthy one, narrowing toward the apex; the RV ends before it."""
    labels = np.zeros((96, 96, slices), np.uint8)
    for z in range(slices):
        size = 1 - 0.06 * z
        if z < slices - 1:
            labels[..., z][disk(34, 44, 17 * size)] = RV
        labels[..., z][disk(50, 52, 20 * size)] = LVM
        labels[..., z][disk(50, 52, 13 * size)] = LV
    return labels


def violated(labels):
    return plausibility(labels, SPACING).violations


def test_a_healthy_heart_is_plausible():
    result = plausibility(heart(), SPACING)
    assert result.violations == {} and result.count == 0 and result.implausible_slices == []
    assert plausibility(np.zeros((20, 20, 3)), SPACING).violations == {}


def punch(labels, mask, z, value):
    labels[..., z][mask] = value
    return labels


# what is drawn into slice 2 (or elsewhere), and what it violates there
SPOILED = {
    "hole_LV": lambda x: punch(x, disk(50, 52, 1), 2, 0),
    "hole_RV": lambda x: punch(x, disk(28, 40, 1), 2, 0),
    "hole_LVM": lambda x: punch(x, disk(50, 66, 1), 2, 0),
    "gap_LV_LVM": lambda x: punch(x, disk(50, 64, 1), 2, 0),
    "gap_RV_LVM": lambda x: punch(x, disk(34, 48, 4), 2, 0),
    "fragments_LV": lambda x: punch(x, disk(80, 80, 3), 2, LV),
    "fragments_RV": lambda x: punch(x, disk(80, 80, 3), 2, RV),
    "fragments_LVM": lambda x: punch(x, disk(80, 80, 3), 2, LVM),
    "vanishes_RV": lambda x: punch(x, x[..., 2] == RV, 2, 0),
    "vanishes_LV": lambda x: punch(x, x[..., 2] == LV, 2, LVM),
    "vanishes_LVM": lambda x: punch(x, x[..., 2] == LVM, 2, 0),
}


@pytest.mark.parametrize("criterion", SPOILED)
def test_criterion(criterion):
    found = violated(SPOILED[criterion](heart()))
    assert found.get(criterion) == [2], found


def test_rv_apart():
    labels = heart()
    rv = labels[..., 1] == RV
    labels[..., 1][rv] = 0
    labels[..., 1][np.roll(rv & disk(20, 40, 12), -6, axis=0)] = RV
    assert violated(labels)["RV_apart"] == [1]


def test_lv_that_touches_what_it_cannot():
    labels = heart()
    labels[..., 2][disk(50, 52, 20) & (np.indices((96, 96))[1] > 60) & (labels[..., 2] == LVM)] = 0
    found = violated(labels)
    assert found["LV_touches_background"] == [2] and "LV_touches_RV" not in found
    labels = heart()
    labels[..., 3][disk(40, 48, 8) & (labels[..., 3] == LVM)] = LV
    assert violated(labels)["LV_touches_RV"] == [3]


def test_lv_at_the_edge_of_the_image_has_no_wall_there():
    labels = heart()[:, :52]  # the field ends in the middle of the LV
    assert violated(labels)["LV_touches_background"] == [1, 2, 3, 4]


def test_epicardium_of_an_open_ring_is_closed_by_the_lv():
    """What the epicardium encloses is judged, LV and all: a narrow opening of the LVM is no concavity."""
    labels = heart()
    labels[..., 2][(np.indices((96, 96))[0] == 50) & (np.indices((96, 96))[1] > 60) & (labels[..., 2] == LVM)] = 0
    found = violated(labels)
    assert found["LV_touches_background"] == [2] and "concavity_LVM" not in found


@pytest.mark.parametrize("z", [0, 1, 5])
def test_base_and_apex_may_be_open(z):
    """The base is the first slice with an LV or LVM; the RV may begin before it."""
    labels = heart()
    if z == 1:
        labels[..., 0][labels[..., 0] >= LVM] = 0
    opened = (np.indices((96, 96))[1] > 60) & (labels[..., z] == LVM)
    labels[..., z][opened] = 0
    assert violated(labels) == {}


def test_concave_and_stretched_shapes():
    labels = heart()
    bite = disk(50, 70, 12) & (labels[..., 2] >= LVM)
    labels[..., 2][bite] = 0
    found = violated(labels)
    assert found["concavity_LVM"] == [2] and found["circularity_LVM"] == [2]
    labels = heart()
    rows, cols = np.indices((96, 96))
    labels[..., 3][labels[..., 3] == LV] = LVM
    labels[..., 3][(abs(rows - 50) <= 2) & (abs(cols - 52) <= 13)] = LV
    found = violated(labels)
    assert found["circularity_LV"] == [3] and "concavity_LV" not in found
    for length in (24, 25):  # pixels: too few for a shape, and enough
        labels[..., 3][labels[..., 3] == LV] = LVM
        labels[50, 40 : 40 + length, 3] = LV
        assert ("circularity_LV" in violated(labels)) == (length == 25)


def test_shape_of_known_figures():
    big = disk(48, 48, 40)
    assert shape_of(big)["circularity"] == pytest.approx(1, abs=0.03)
    assert shape_of(big)["concavity"] == pytest.approx(0, abs=0.02)
    rows, cols = np.indices((96, 96))
    ellipse = ((rows - 48) / 40) ** 2 + ((cols - 48) / 20) ** 2 <= 1  # of perimeter 193.8
    assert shape_of(ellipse)["circularity"] == pytest.approx(4 * np.pi * np.pi * 800 / 193.8**2, abs=0.03)
    for shape, spacing in ((ellipse, (1.0, 2.0)), (ellipse.T, (1.6, 0.8))):  # of pixels that make it a disk
        disk_like = shape_of(shape, spacing)
        assert disk_like["circularity"] == pytest.approx(1, abs=0.05)
        assert disk_like["concavity"] == pytest.approx(0, abs=0.02)
    line = np.zeros((40, 40), bool)
    line[5:35, 7] = True
    for spacing in ((1.0, 1.0), (2.0, 0.8), (1.0, 1.9), (1.9, 1.0)):
        assert 0 <= shape_of(line, spacing)["circularity"] < 1
    corner = np.zeros((60, 60), bool)
    corner[10:50, 10:50] = True
    corner[30:, 30:] = False  # hull: the square less a triangle of half the missing quarter
    assert shape_of(corner)["concavity"] == pytest.approx(1 - 0.75 / 0.875, abs=0.02)


def test_jumps_between_slices():
    labels = heart(8)
    labels[..., 3] = np.roll(labels[..., 3], 14, axis=1)  # 21 mm
    changes = stack_changes(labels, (0.7, 1.5, 10.0))["centroid_jump"]
    assert changes[3] == pytest.approx(21, abs=0.5) and changes[4] == pytest.approx(0, abs=0.5)
    assert violated(labels)["centroid_jump"] == [3]
    labels = heart(8)
    labels[..., 3][labels[..., 3] >= LVM] = 0
    labels[..., 3][disk(50, 52, 9)] = LVM
    labels[..., 3][disk(50, 52, 5)] = LV
    found = violated(labels)
    assert found["area_jump_LV"] == [3] and found["area_jump_LVM"] == [3]
    areas = [(labels[..., z] == LV).sum() for z in range(8)]
    expected = (areas[4] - areas[3]) / max(areas)
    assert stack_changes(labels, SPACING)["area_jump_LV"][3] == pytest.approx(expected)
    labels = heart(8)
    labels[..., 3][disk(50, 52, 16)] = LV  # above both
    areas = [(labels[..., z] == LV).sum() for z in range(8)]
    expected = (areas[3] - areas[2]) / areas[3]
    assert stack_changes(labels, SPACING)["area_jump_LV"][3] == pytest.approx(expected)
    assert stack_changes(SPOILED["vanishes_RV"](heart()), SPACING)["area_jump_RV"] == {}  # none of nothing


def test_a_slice_between_its_neighbors_is_no_jump():
    """The RV that ends early, and the base, where areas change fast, in one direction."""
    changes = stack_changes(heart(8), SPACING)
    assert all(value == 0 for value in changes["area_jump_LV"].values()) and set(changes["area_jump_LV"]) == {
        2,
        3,
        4,
        5,
    }


def test_enclosed_background_is_told_apart():
    labels = np.zeros((9, 9), np.uint8)
    labels[1:8, 1:8] = LVM
    labels[3, 3] = 0
    assert enclosed(labels) == [("hole_LVM", 1)]
    labels[3, 4] = LV
    assert enclosed(labels) == [("gap_LV_LVM", 1)]
    labels[0, :] = 0
    labels[1:3, 3] = 0  # a channel to the outside
    assert enclosed(labels) == []
    labels[4] = LVM  # from edge to edge of the image: what it divides is not enclosed
    labels[1:4] = labels[5:] = 0
    assert enclosed(labels) == []


@pytest.mark.parametrize(
    ("around", "criterion"),
    [
        ((LVM,) * 4, "hole_LVM"),
        ((RV, LVM, LV, LVM), "gap_LV_LVM"),
        ((RV, LVM, RV, RV), "gap_RV_LVM"),
        ((RV, LV) * 2, "hole_LV"),
    ],
)
def test_what_is_closed_by_corners_is_enclosed(around, criterion):
    labels = np.zeros((5, 5), np.uint8)
    labels[(1, 2, 3, 2), (2, 3, 2, 1)] = around
    assert enclosed(labels) == [(criterion, 1)]


def test_structures_hold_together_by_corners_and_touch_by_edges():
    labels = np.zeros((9, 9, 3), np.uint8)
    labels[4, 3:6] = labels[3:6, 4] = LVM  # four pixels
    labels[4, 4] = LV
    labels[3, 3, 1] = RV  # beside the LVM, and at a corner of the LV, as the background is
    labels[2, 2, 2] = labels[1, 1, 2] = RV
    labels[3, 3, 2] = LVM  # at a corner of the RV
    assert violated(labels) == {}


@pytest.mark.parametrize("z", [1, 4])
def test_what_vanishes_beside_the_last_slice(z):
    assert violated(punch(heart(), heart()[..., z] == LV, z, LVM))["vanishes_LV"] == [z]


def test_small_gaps_of_rv_and_lvm_are_normal():
    """The limit is an area in mm², between one pixel and five."""
    for radius, pixels in ((0, 1), (1, 5)):
        labels = punch(heart(), disk(33, 48, radius), 2, 0)
        assert enclosed(labels[..., 2]) == [("gap_RV_LVM", pixels)]
        assert ("gap_RV_LVM" in violated(labels)) == (pixels == 5)
        assert "gap_RV_LVM" not in plausibility(labels, (1.5, 0.8, 10.0)).violations  # 6 mm² at most


def test_limits_belong_to_criteria():
    assert set(LIMITS) <= set(CRITERIA)


def test_bad_labels():
    with pytest.raises(ValueError, match="labels"):
        plausibility(np.full((4, 4, 2), 7), SPACING)
