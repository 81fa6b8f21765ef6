from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cardiac_qc_plugin.metrics.detection import operating_point
from cardiac_qc_plugin.transforms.regions import (
    crop_box,
    crop_boxes,
    crop_slice,
    expected_heart,
    flagged_region_map,
    paint_regions,
    region_grid,
    region_labels,
    uncrop_slice,
)
from cardiac_qc_plugin.workflows.operating_point import volume_detection


@st.composite
def masked_slices(draw):
    """A slice with a foreground rectangle's two opposite corners set, and the sizes of the crop."""
    shape = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    region_size = draw(st.sampled_from([4, 8, 16]))
    mask = np.zeros(shape, np.uint8)
    for _ in range(2):
        mask[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = draw(st.integers(1, 3))
    return mask, region_size, region_size * draw(st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(masked_slices())
def test_crop_box_properties(drawn):
    mask, region_size, min_size = drawn
    box = crop_box(mask, region_size, min_size)
    for axis, (start, stop) in enumerate([box[:2], box[2:]]):
        length, indices = mask.shape[axis], np.argwhere(mask)[:, axis]
        first, last = indices.min(), indices.max()
        size, extent = stop - start, last - first + 1
        assert size % region_size == 0
        assert size == min_size or size - region_size < extent <= size  # as small as it can be
        assert start <= first and last < stop
        if size <= length:
            assert 0 <= start and stop <= length
            if start > 0 and stop < length:  # not shifted: grown on both sides alike
                assert abs((first - start) - (stop - 1 - last)) <= 1
        else:
            assert abs(-start - (stop - length)) <= 1  # the image in the middle of the box


@pytest.mark.parametrize(
    ("shape", "rows", "cols", "options", "box"),
    [
        ((216, 256), (100, 140), (90, 151), {}, (80, 160, 81, 161)),
        ((216, 256), (100, 181), (90, 178), {}, (97, 185, 90, 178)),  # 81 -> 88 rows; 88 columns stay
        ((216, 256), (0, 40), (200, 256), {}, (0, 80, 176, 256)),  # shifted into the image
        ((216, 256), (100, 140), (90, 150), {"min_size": 112}, (64, 176, 64, 176)),
        ((216, 256), (100, 140), (90, 150), {"region_size": 16, "min_size": 16}, (96, 144, 88, 152)),
        ((70, 83), (0, 10), (0, 81), {}, (-5, 75, -3, 85)),  # smaller than 80, smaller than 88
        ((216, 255), None, None, {}, (68, 148, 88, 168)),  # no foreground: the center
        ((70, 256), None, None, {}, (-5, 75, 88, 168)),
    ],
)
def test_crop_box_examples(shape, rows, cols, options, box):
    mask = np.zeros(shape, np.uint8)
    if rows:
        mask[slice(*rows), slice(*cols)] = 2
    assert crop_box(mask, **options) == box
    assert all(type(edge) is int for edge in crop_box(mask, **options))  # they go into JSON


def test_the_heart_of_a_failed_slice_is_that_of_its_neighbors():
    labels = np.zeros((100, 100, 6), np.uint8)
    labels[2:22, 4:24, 1] = 3
    labels[10:30, 4:24, 4] = 1
    labels[95, 95, 2] = 2  # a speck, so slices 2 and 3 failed
    heart = np.zeros(labels.shape, bool)
    heart[2:30, 4:24, 2:4] = True
    heart[95, 95, 2] = True
    np.testing.assert_array_equal(expected_heart(labels), heart)
    center, corner = (10, 90, 10, 90), (0, 80, 0, 80)
    assert crop_boxes(labels) == [center, corner, (1, 97, 2, 98), corner, corner, center]
    np.testing.assert_array_equal(expected_heart(labels[..., ::-1]), heart[..., ::-1])


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 4, 12, 36]), min_size=1, max_size=8))
def test_a_stack_is_cropped_slice_by_slice_where_none_failed(areas):
    labels = np.zeros((20, 20, len(areas)), np.uint8)
    for z, area in enumerate(areas):
        labels[7:13, 9:15, z].flat[:area] = 1
    heart = expected_heart(labels)
    full = [z for z, area in enumerate(areas) if area >= max(areas) / 3]
    boxes = crop_boxes(labels, 4, 4)
    for z in range(len(areas)):
        failed = any(a < z for a in full) and any(a > z for a in full) and z not in full
        assert heart[..., z].any() == failed
        assert not heart[..., z][labels.max(axis=2) == 0].any()
        if not failed:
            assert boxes[z] == crop_box(labels[..., z], 4, 4)


@pytest.mark.parametrize(
    ("mask", "region_size", "min_size", "message"),
    [
        (np.zeros((9, 9, 1)), 8, 80, r"\(9, 9, 1\)"),
        (np.zeros((9, 9)), 16, 88, "88 and 16"),
        (np.zeros((9, 9)), 8, 0, "0 and 8"),
        (np.zeros((9, 9)), 0, 80, "80 and 0"),
    ],
)
def test_crop_box_errors(mask, region_size, min_size, message):
    with pytest.raises(ValueError, match=message):
        crop_box(mask, region_size, min_size)


@settings(max_examples=200, deadline=None)
@given(masked_slices(), st.sampled_from([(), (2,), (3, 2)]), st.sampled_from(["uint8", "float32", "bool"]))
def test_crop_and_uncrop_are_inverse_inside_the_image(drawn, lead, dtype):
    mask, region_size, min_size = drawn
    box = crop_box(mask, region_size, min_size)
    image = np.random.default_rng(0).integers(1, 200, (*lead, *mask.shape)).astype(dtype)
    crop = crop_slice(image, box)
    assert crop.shape == (*lead, box[1] - box[0], box[3] - box[2]) and crop.dtype == image.dtype

    rows, cols = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    in_box = ((box[0] <= rows) & (rows < box[1]))[:, None] & ((box[2] <= cols) & (cols < box[3]))
    back = uncrop_slice(crop, box, mask.shape)
    np.testing.assert_array_equal(back, np.where(in_box, image, 0))
    assert back.dtype == image.dtype
    np.testing.assert_array_equal(crop_slice(back, box), crop)
    assert np.count_nonzero(crop) == np.count_nonzero(image[..., in_box])  # the padding is 0


def test_crop_is_a_copy():
    image = np.ones((4, 4), np.float32)
    crop_slice(image, (1, 3, 1, 3))[:] = 5
    assert (image == 1).all()


def test_crop_errors():
    with pytest.raises(ValueError, match=r"\(5, 9, 0, 4\).*\(4, 4\)"):
        crop_slice(np.zeros((4, 4)), (5, 9, 0, 4))
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(0, 4, 0, 4\)"):
        uncrop_slice(np.zeros((2, 2)), (0, 4, 0, 4), (4, 4))


@pytest.mark.parametrize("region_size", [4, 8, 16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1)])
def test_region_labels_agree_with_loops(region_size, lead):
    failure = np.random.default_rng(region_size).random((*lead, 32, 48)) < 0.01
    expected = np.zeros((*lead, 32 // region_size, 48 // region_size), bool)
    for *first, row, col in np.argwhere(failure):
        expected[(*first, row // region_size, col // region_size)] = True
    assert 0 < np.count_nonzero(expected) < expected.size or region_size == 16
    for kind in (np.asarray, torch.as_tensor):
        labels = region_labels(kind(failure), region_size)
        assert type(labels) is type(kind(failure)) and str(labels.dtype).endswith("bool")
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(region_labels(kind(failure.astype(np.uint8) * 200), region_size), expected)


def test_regions_have_to_tile_the_crop():
    with pytest.raises(ValueError, match="80 x 84.*8 x 8"):
        region_labels(np.zeros((80, 84)), 8)


@settings(max_examples=50, deadline=None)
@given(masked_slices())
def test_paint_regions(drawn):
    mask, region_size, min_size = drawn
    box = crop_box(mask, region_size, min_size)
    grid = (box[1] - box[0]) // region_size, (box[3] - box[2]) // region_size
    cells = np.random.default_rng(0).random(grid)
    painted = paint_regions(cells, box, mask.shape, region_size)
    assert painted.shape == mask.shape
    tiles = np.kron(cells, np.ones((region_size, region_size)))
    for row, col in np.ndindex(mask.shape):
        in_box = box[0] <= row < box[1] and box[2] <= col < box[3]
        assert painted[row, col] == (tiles[row - box[0], col - box[2]] if in_box else 0)
    if box[0] >= 0 and box[2] >= 0:  # whole crop in the image: labels of a painted selection are that selection
        selected = paint_regions(cells > 0.5, box, mask.shape, region_size)
        np.testing.assert_array_equal(region_labels(crop_slice(selected, box), region_size), cells > 0.5)
    with pytest.raises(ValueError, match="asks for"):
        paint_regions(cells, box, mask.shape, region_size + 1)


def flagged(cells, boxes, shape, threshold, region_size):
    """The map and records of cells, painted as a detector paints them."""
    painted = [paint_regions(*slice_, shape[:2], region_size) for slice_ in zip(cells, boxes, strict=True)]
    return flagged_region_map(np.stack(painted, axis=-1), region_grid(boxes, shape, region_size), threshold)


@settings(max_examples=50, deadline=None)
@given(masked_slices())
def test_region_grid_has_the_cells_with_a_pixel_of_the_image(drawn):
    mask, region_size, min_size = drawn
    box = crop_box(mask, region_size, min_size)
    sides = (box[1] - box[0]) // region_size, (box[3] - box[2]) // region_size
    ids = np.arange(1, sides[0] * sides[1] + 1).reshape(sides)
    painted = paint_regions(ids, box, mask.shape, region_size)[..., None]
    grid = region_grid([box], painted.shape, region_size)
    found = grid.read(painted)
    assert found.tolist() == sorted(set(painted[painted > 0].tolist()))
    for number, region in zip(found, grid.indices(), strict=True):
        assert (painted[region] == number).all() and painted[region].size == (painted == number).sum()
    assert grid.counts(mask[..., None]).tolist() == [
        int(mask[painted[..., 0] == number].astype(bool).sum()) for number in found
    ]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(0, 8, 0, 8)] * 2, "1 slices.*2 boxes"),
        ([(0, 8, 0, 6)], "4 pixels do not tile.*slice 0"),
        ([(0, 6, 0, 8)], "4 pixels do not tile.*slice 0"),
        ([(8, 16, 0, 8)], "no pixel"),
        ([(0, 8, 8, 16)], "no pixel"),
    ],
)
def test_region_grid_errors(boxes, message):
    with pytest.raises(ValueError, match=message):
        region_grid(boxes, (8, 8, 1), 4)


def test_flagged_regions_are_numbered_by_probability_then_place():
    first = np.array([[0.9, 0.2], [0.5, 0.7]])
    second = np.array([[0.7, 0.49], [0.7, 0.95]], np.float32)
    region_map, records = flagged([first, second], [(0, 8, 2, 10), (4, 12, 0, 8)], (12, 12, 2), 0.5, 4)
    assert region_map.shape == (12, 12, 2) and region_map.dtype == np.uint16
    keys = ("id", "slice", "row0", "row1", "col0", "col1")
    assert [tuple(record[key] for key in keys) for record in records] == [
        (1, 1, 8, 12, 4, 8),
        (2, 0, 0, 4, 2, 6),
        (3, 0, 4, 8, 6, 10),  # 0.7 is a little more than float32(0.7)
        (4, 1, 4, 8, 0, 4),  # equal: row by row
        (5, 1, 8, 12, 0, 4),
        (6, 0, 4, 8, 2, 6),  # the threshold itself counts
    ]
    np.testing.assert_allclose([r["probability"] for r in records], [0.95, 0.9, 0.7, 0.7, 0.7, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(
        region_map[..., 0], paint_regions(np.array([[2, 0], [6, 3]]), (0, 8, 2, 10), (12, 12), 4)
    )
    np.testing.assert_array_equal(
        region_map[..., 1], paint_regions(np.array([[4, 0], [5, 1]]), (4, 12, 0, 8), (12, 12), 4)
    )


def test_ties_are_broken_by_slice_row_and_column():
    cells = 0.5 + np.indices((6, 6)).sum(axis=0) % 2 / 4  # NumPy's default sort is stable for few or equal values
    _, records = flagged([cells, cells], [(0, 24, 0, 24)] * 2, (24, 24, 2), 0.0, 4)
    places = [(-r["probability"], r["slice"], r["row0"], r["col0"]) for r in records]
    assert places == sorted(places) and len(places) == 72
    assert [r["id"] for r in records] == list(range(1, 73))


def test_regions_are_clipped_and_never_in_the_padding():
    cells = np.ones((3, 3))
    region_map, records = flagged([cells], [(-5, 7, -3, 9)], (2, 6, 1), 1.0, 4)  # the highest threshold there is
    # rows -5..-2 and 3..6 are padding only, rows -1..2 hold the image
    assert {(r["row0"], r["row1"]) for r in records} == {(0, 2)}
    assert [(r["col0"], r["col1"]) for r in records] == [(0, 1), (1, 5), (5, 6)]
    np.testing.assert_array_equal(region_map[..., 0], [[1, 2, 2, 2, 2, 3]] * 2)


def test_nothing_flagged():
    region_map, records = flagged([np.zeros((2, 2))], [(0, 8, 0, 8)], (8, 8, 1), 0.5, 4)
    assert not region_map.any() and records == []


@pytest.mark.parametrize(
    ("probability", "threshold", "message"),
    [
        (np.nan, 0.5, r"slice 1 .*\[0, 1\]"),
        (1.1, 0.5, r"slice 1 .*\[0, 1\]"),
        (-0.1, 0.5, r"slice 1 .*\[0, 1\]"),
        (0, 50, "threshold.*50"),
        (0, float("nan"), "threshold.*nan"),
    ],
)
def test_flagged_region_map_errors(probability, threshold, message):
    with pytest.raises(ValueError, match=message):
        flagged([np.zeros((2, 2)), np.full((2, 2), probability)], [(0, 8, 0, 8)] * 2, (8, 8, 2), threshold, 4)


def test_too_many_regions_for_the_map():
    with pytest.raises(ValueError, match="65536 regions"):
        flagged([np.ones((256, 256))], [(0, 256, 0, 256)], (256, 256, 1), 0.5, 1)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.9])  # of these, 0.7 and 0.9 are above the nearest float32
def test_what_is_flagged_is_what_is_judged(threshold):
    """At a tie in single precision, which files and networks have, against exact arithmetic."""
    painted = np.full((8, 8, 1), threshold, np.float32)
    expected = Fraction(float(np.float32(threshold))) >= Fraction(threshold)
    assert expected == (threshold < 0.5)
    region_map, records = flagged_region_map(painted, region_grid([(0, 8, 0, 8)], painted.shape, 8), threshold)
    assert bool(records) == bool(region_map.any()) == expected
    judged = volume_detection(painted, np.ones(painted.shape), [(0, 8, 0, 8)], 8)
    assert operating_point([judged], threshold).regions_flagged == expected
