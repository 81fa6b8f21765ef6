import copy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates
from torch.utils.data import DataLoader

from cardiac_qc_plugin.data import ImageDegradation, PatchAugmentation, SlicePatchDataset, positive_weight
from cardiac_qc_plugin.data.degradation import uniform

IDENTITY = PatchAugmentation(rotation=0.0, scale=(1.0, 1.0), gamma=(1.0, 1.0), brightness=0.0, noise=0.0)


def coordinate_volume(number: int, shape: tuple[int, int, int]) -> dict:
    """A pixel's values tell where it is: scan and slice number, row, column, all from 1; the label is its checksum."""
    rows, cols, slices = np.indices(shape)
    image = np.stack([np.full(shape, number) * 16 + slices + 1, rows + 1, cols + 1]).astype(np.float32)
    label = ((3 * rows + 5 * cols + 7 * slices + number) % 4)[None].astype(np.float32)
    return {"image": MetaTensor(torch.from_numpy(image)), "label": MetaTensor(torch.from_numpy(label))}


def dataset(shapes=((20, 26, 3), (17, 31, 2)), **options) -> SlicePatchDataset:
    volumes = [coordinate_volume(number, shape) for number, shape in enumerate(shapes)]
    options = {"patch_size": 8, "batch_size": 6, "length": 4, **options}
    return SlicePatchDataset([{"case": n} for n in range(len(volumes))], lambda item: volumes[item["case"]], **options)


def marked(labels: np.ndarray, **options) -> SlicePatchDataset:
    """One scan ``(H, W, D)`` with given labels; the image holds a number per pixel."""
    image = np.arange(labels.size, dtype=np.float32).reshape(1, *labels.shape) / labels.size
    volume = {"image": image, "label": labels[None].astype(np.float32)}
    return SlicePatchDataset([{}], lambda item: volume, **{"patch_size": 8, "batch_size": 6, "length": 4, **options})


def corners(batch: dict) -> list[tuple[int, int, int]]:
    """Slice code, first row and first column of each patch of a coordinate volume (without padding)."""
    return [tuple(patch.flatten(1).min(dim=1).values.int().tolist()) for patch in batch["image"]]


def batches(data, **options) -> list[dict]:
    return list(DataLoader(data, batch_size=None, **options))


# Patches


def test_patches_are_parts_of_slices():
    """Every patch, turned back, is a window of its slice, and the label is that of the same pixels."""
    shapes = ((20, 26, 3), (17, 31, 2))
    data = dataset(shapes, length=30)
    turns = set()
    for batch in data:
        assert batch["image"].shape == (6, 3, 8, 8) and batch["label"].shape == (6, 1, 8, 8)
        assert batch["image"].dtype == batch["label"].dtype == torch.float32
        for image, label in zip(batch["image"].numpy(), batch["label"].numpy(), strict=True):
            code, row, col = image.reshape(3, -1).min(axis=1).astype(int) - [1, 1, 1]
            number, slice_ = divmod(code, 16)
            whole = coordinate_volume(number, shapes[number])
            window = np.s_[:, row : row + 8, col : col + 8, slice_]
            matches = [
                k
                for k in range(4)
                if np.array_equal(np.rot90(np.asarray(whole["image"])[window], k, (1, 2)), image)
                and np.array_equal(np.rot90(np.asarray(whole["label"])[window], k, (1, 2)), label)
            ]
            assert len(matches) == 1
            turns.update(matches)
    assert turns == {0, 1, 2, 3}


def test_every_offset_is_reached():
    """The last one, too, which the released code leaves out."""
    data = dataset(((11, 9, 1),), batch_size=60, length=10)
    seen = {corner[1:] for batch in data for corner in corners(batch)}
    assert seen == {(row, col) for row in range(1, 5) for col in range(1, 3)}


def test_slice_of_the_patchs_size():
    """The released code fails on it."""
    assert {corner[1:] for batch in dataset(((8, 8, 2),)) for corner in corners(batch)} == {(1, 1)}


@pytest.mark.parametrize("shape", [(5, 20, 2), (20, 6, 1), (3, 4, 2)])
def test_smaller_slices_are_padded_with_zeros(shape):
    whole = coordinate_volume(0, shape)
    for batch in dataset((shape,), length=10):
        for image, label in zip(batch["image"].numpy(), batch["label"].numpy(), strict=True):
            inside = image[0] > 0
            rows, cols = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            window = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            assert inside[window].all()  # a rectangle, in one piece
            assert sorted(inside[window].shape) == sorted(min(n, 8) for n in shape[:2])
            assert (image[:, ~inside] == 0).all() and (label[0][~inside] == 0).all()
            code, row, col = image[:, inside].astype(int) - 1
            np.testing.assert_array_equal(label[0][inside], np.asarray(whole["label"])[0, row, col, code])


def test_padded_slices_move_in_the_patch():
    places = {
        tuple(np.argwhere(image[0].numpy() > 0).min(axis=0).tolist())
        for batch in dataset(((5, 6, 1),), length=40)
        for image in batch["image"]
    }
    assert len(places) > 10  # 4 x 3 offsets, and as many turned by 90 degrees


def test_slices_are_drawn_uniformly():
    """Each slice of each scan as often, whatever the scan's depth, with labels or without."""
    shapes = ((8, 8, 1), (8, 8, 7))
    data = dataset(shapes, batch_size=400, length=10)
    codes = np.concatenate([batch["image"][:, 0, 0, 0].numpy() for batch in data]).astype(int)
    values, counts = np.unique(codes, return_counts=True)
    assert values.tolist() == [1, *range(17, 24)]
    expected = codes.size / 8
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-square with 7 degrees of freedom: p = 0.0001


@pytest.mark.parametrize(("values", "named"), [([0, 256, 512], "256"), ([0, 0.5, 1], "0.5"), ([0, np.nan], "nan")])
def test_other_labels_than_the_four_are_refused(values, named):
    """Cast to bytes they would have been background, or another class."""
    labels = np.resize(np.array(values, np.float32), (1, 20, 20, 2))
    item = {"image": np.zeros((1, 20, 20, 2), np.float32), "label": labels}
    with pytest.raises(ValueError, match=rf"patient7_gt.nii.gz has the values \[{named}"):
        SlicePatchDataset([{"label": "patient7_gt.nii.gz"}], lambda _: item, patch_size=16)


def test_turns_are_drawn_uniformly():
    data = dataset(((8, 8, 1),), batch_size=400, length=10)
    first = torch.cat([batch["image"][:, 1:, 0, 0] for batch in data])  # row and column of the upper left pixel
    _, counts = first.unique(dim=0, return_counts=True)
    assert len(counts) == 4 and ((counts - 1000) ** 2 / 1000).sum() < 22


def test_half_precision_in_memory_is_exact_enough():
    """Intensities in [0, 1]: off by at most a quarter of a thousandth."""
    image = np.random.default_rng(0).random((1, 8, 8, 2)).astype(np.float32)
    data = SlicePatchDataset([{}], lambda item: {"image": image, "label": image[:1] > 2}, patch_size=8, length=1)
    for patch in next(iter(data))["image"].numpy():
        assert min(np.abs(np.rot90(patch, k, (1, 2)) - image[..., z]).max() for k in range(4) for z in (0, 1)) < 2.5e-4


# Positives


def one_pixel_in_three_slices() -> np.ndarray:
    labels = np.zeros((20, 25, 12), np.uint8)
    for slice_, (row, col, value) in {2: (0, 0, 1), 5: (19, 24, 2), 9: (10, 12, 3)}.items():
        labels[row, col, slice_] = value
    return labels


@pytest.mark.parametrize(("share", "batch_size", "expected"), [(1 / 3, 32, 11), (0.5, 6, 3), (1.0, 5, 5)])
def test_positives_hold_a_labelled_pixel(share, batch_size, expected):
    data = marked(one_pixel_in_three_slices(), positive_share=share, batch_size=batch_size, length=30)
    seen = np.zeros(4, int)
    for batch in data:
        holds = batch["label"].flatten(1).amax(dim=1).int()
        assert (holds > 0).sum() >= expected
        assert (holds[:expected] > 0).all()
        seen += np.bincount(holds[:expected].numpy(), minlength=4)
    chosen = seen[1:]
    assert (np.abs(chosen - chosen.mean()) < 5 * np.sqrt(chosen.mean())).all()  # slices as often as each other


def test_others_are_drawn_from_all_slices():
    """Two of three patches are plain random ones, which may hold a failure or not."""
    data = marked(one_pixel_in_three_slices(), positive_share=1 / 3, batch_size=30, length=40)
    rest = torch.cat([batch["label"].flatten(1).amax(dim=1)[10:] for batch in data])
    assert 0 < (rest > 0).float().mean() < 3 / 12
    assert (rest.view(40, 20)[:, 0] > 0).float().mean() < 0.5  # no eleventh is forced


def test_positive_pixels_lie_anywhere_in_the_patch():
    labels = np.zeros((30, 30, 1), np.uint8)
    labels[15, 14] = 1
    data = marked(labels, positive_share=1.0, batch_size=200, length=10)
    places = torch.cat([batch["label"][:, 0].flatten(1).argmax(dim=1) for batch in data])
    assert len(places.unique()) == 64


def test_each_labelled_pixel_can_be_the_forced_one():
    labels = np.zeros((30, 30, 1), np.uint8)
    labels[3, 3] = labels[25, 25] = 1
    data = marked(labels, positive_share=1.0, batch_size=50, length=4, patch_size=5)
    mean = torch.cat([batch["image"].flatten(1).mean(dim=1) for batch in data])  # pixel numbers over 900
    assert 60 < (mean < 0.5).sum() < 140


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match=f"positive_share .* between 0 and 1, got {share}"):
        marked(one_pixel_in_three_slices(), positive_share=share)


def test_positives_in_a_small_slice():
    labels = np.zeros((5, 30, 2), np.uint8)
    labels[4, 29, 1] = 2
    for batch in marked(labels, positive_share=1.0):
        assert (batch["label"].flatten(1).amax(dim=1) == 2).all()


def test_positives_need_a_labelled_pixel():
    with pytest.raises(ValueError, match="no training slice has a labelled pixel"):
        marked(np.zeros((9, 9, 2)), positive_share=0.5)
    batch = next(iter(marked(np.zeros((9, 9, 2)))))
    assert batch["label"].max() == 0


def test_positive_weight_by_hand():
    """4 x 4 regions of two slices; rows and columns beyond the last whole region do not count."""
    labels = np.zeros((10, 13, 2))  # 2 x 3 regions a slice
    labels[0, 0, 0] = labels[3, 3, 0] = 1  # one region
    labels[4, 11, 0] = 1
    labels[9, 12, 1] = 1  # beyond
    assert positive_weight(marked(labels, patch_size=4), 4) == (12 - 2) / 2


def test_positive_weight_needs_a_failure():
    with pytest.raises(ValueError, match="No training region"):
        positive_weight(marked(np.zeros((9, 9, 2))), 4)


# Random sequences


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_seed_decides(workers):
    data, runs = dataset(augmentation=PatchAugmentation()), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(batches(data, num_workers=workers))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_nothing_is_replayed(options):
    """Neither by another worker (as in the released code) nor in the next epoch."""
    loader = DataLoader(dataset(length=5), batch_size=None, **options)
    epochs = [list(loader), list(loader)]
    assert [len(epoch) for epoch in epochs] == [5, 5] and len(loader) == 5
    drawn = [tuple(corners(batch)) for epoch in epochs for batch in epoch]
    assert len(set(drawn)) == 10


def test_augmentations_are_not_replayed():
    data = dataset(((8, 8, 1),), length=4, batch_size=1, augmentation=PatchAugmentation())  # one place for a patch
    means = [float(batch["image"].mean()) for _ in range(2) for batch in data]
    assert len(set(means)) == 8


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_length(workers):
    data = dataset(length=4)
    assert len(data) == 4 and len(batches(data, num_workers=workers)) == 4


def test_numpys_generator_is_not_used():
    data = dataset()
    torch.manual_seed(1)
    np.random.seed(1)
    first = batches(data)
    torch.manual_seed(1)
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    assert same(first, batches(data))
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_volumes_are_not_changed():
    data = dataset(augmentation=PatchAugmentation())
    before = copy.deepcopy((data.images, data.labels))
    for batch in data:
        batch["image"] += 1
        batch["label"] += 1
    for was, now in zip(before, (data.images, data.labels), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(was, now, strict=True))


def test_volumes_are_read_once():
    calls = []

    def read(item: dict) -> dict:
        calls.append(item["case"])
        return coordinate_volume(item["case"], (9, 9, 2))

    data = SlicePatchDataset([{"case": n} for n in range(3)], read, patch_size=8, batch_size=2, length=3)
    list(data), list(data)
    assert calls == [0, 1, 2]


def test_batch_transform_comes_last():
    seen = []

    def halve(batch: dict) -> dict:
        seen.append(batch["image"].shape)
        return {"image": batch["image"][:3], "extra": 1}

    batch = next(iter(dataset(batch_transform=halve, augmentation=PatchAugmentation())))
    assert seen == [(6, 3, 8, 8)] and batch["image"].shape == (3, 3, 8, 8) and batch["extra"] == 1


# Errors


def test_empty_datalist():
    with pytest.raises(ValueError, match="no training items"):
        SlicePatchDataset([], dict)


def test_labels_of_a_scaled_file_are_rounded():
    labels = np.arange(4.0).reshape(2, 2, 1)
    assert np.array(marked(labels - 1e-4).labels).ravel().tolist() == [0, 1, 2, 3]


def test_image_and_label_of_different_shapes():
    """Otherwise the slices of all later scans would get the labels of others."""
    volume = coordinate_volume(0, (9, 9, 3))
    volume["label"] = volume["label"][..., :2]
    with pytest.raises(ValueError, match=r"\(9, 9, 3\).*\(9, 9, 2\)"):
        SlicePatchDataset([{"image": "scan7.nii.gz"}], lambda item: volume)


# Augmentation


def checkered(count: int, size: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(count, channels, size, size, generator=generator)
    return image, torch.randint(0, 4, (count, 1, size, size), generator=generator).float()


def augment(augmentation: PatchAugmentation, image, label, patch: int, seed: int = 0):
    return augmentation(image, label, patch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch", [8, 11])
def test_identity_is_the_central_crop(patch):
    margin = IDENTITY.margin(patch)
    image, label = checkered(3, patch + 2 * margin, channels=2)
    window = np.s_[:, :, margin : margin + patch, margin : margin + patch]
    new_image, new_label = augment(IDENTITY, image, label, patch)
    torch.testing.assert_close(new_image, image[window], rtol=0, atol=1e-5)
    assert torch.equal(new_label, label[window])


def test_identity_in_the_dataset():
    """Cut with a margin and cropped again: the patches are those without augmentation."""
    options = {"shapes": ((20, 26, 3),), "length": 5}
    torch.manual_seed(3)
    plain = list(dataset(**options))
    torch.manual_seed(3)
    for batch, expected in zip(dataset(**options, augmentation=IDENTITY), plain, strict=True):
        assert torch.equal(batch["label"], expected["label"])
        torch.testing.assert_close(batch["image"][:, 1:], expected["image"][:, 1:], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(batch["image"][:, :1], expected["image"][:, :1].clamp(0, 1), rtol=0, atol=1e-5)


def test_margin_is_real_image():
    """What turns in at the corners is the slice, not zeros."""
    augmentation = PatchAugmentation(scale=(1.0, 1.2))
    whole = torch.ones(200, 1, *[16 + 2 * augmentation.margin(16)] * 2)
    assert (augment(augmentation, whole, whole, 16)[1] == 1).all()
    turned = PatchAugmentation(scale=(1.0, 1.0))
    data = marked(np.ones((200, 200, 1)), patch_size=16, augmentation=turned, length=20)  # few patches at the edge
    assert (torch.cat([batch["label"] for batch in data]) == 1).float().mean() > 0.99


def test_label_numbers_of_the_input_are_not_interpolated():
    """The third channel, a segmentation, turns with the label, voxel by voxel."""
    image, label = checkered(6, 24, channels=2)
    new_image, new_label = augment(PatchAugmentation(), torch.cat([image, label], dim=1), label, 16)
    assert torch.equal(new_image[:, 2:], new_label)


def test_uniform_covers_its_range():
    values = uniform(torch.Generator().manual_seed(0), 10_000, -2.0, 3.0)
    assert values.shape == (10_000,) and -2 <= values.min() < -1.99 and 2.99 < values.max() < 3
    assert values.mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("angle", "zoom"), [(90.0, 1.0), (25.0, 1.0), (0.0, 1.25), (-40.0, 0.8)])
def test_rotation_and_scale_against_scipy(angle, zoom, monkeypatch):
    """About the center, image bilinear and label nearest at the same places."""
    drawn = iter([torch.tensor([angle]), torch.tensor([zoom]), torch.zeros(1), torch.zeros(1), torch.zeros(1)])
    monkeypatch.setattr("cardiac_qc_plugin.data.slices.uniform", lambda *_: next(drawn))
    image, label = checkered(1, 24)
    new_image, new_label = augment(PatchAugmentation(), image, label, 16)
    y, x = np.mgrid[:16, :16] - 7.5
    c, s = np.cos(np.radians(angle)) / zoom, np.sin(np.radians(angle)) / zoom
    places = [s * x + c * y + 11.5, c * x - s * y + 11.5]
    expected = map_coordinates(image[0, 0].numpy(), places, order=1, mode="grid-constant")
    np.testing.assert_allclose(new_image[0, 0], expected, atol=1e-4)
    nearest = map_coordinates(label[0, 0].numpy(), places, order=0, mode="grid-constant")
    assert (new_label[0, 0].numpy() == nearest).mean() > (0.95 if angle % 90 else 0.99)  # ties aside


def test_intensity_change_against_its_formula(monkeypatch):
    """One power and one shift a patch, within their ranges; powers on a logarithmic scale."""
    powers, shifts, ranges = np.array([0.7, 1.0, 1.4]), np.array([0.1, -0.1, 0.05]), []
    drawn = iter([np.zeros(3), np.ones(3), np.log(powers), shifts, np.zeros(3)])

    def uniform(generator, count, low, high):
        ranges.append((low, high))
        return torch.from_numpy(next(drawn)).float()

    monkeypatch.setattr("cardiac_qc_plugin.data.slices.uniform", uniform)
    image, label = checkered(3, 12)
    result, _ = augment(PatchAugmentation(), image, label, 8)
    expected = image[:, 0, 2:10, 2:10].numpy() ** powers[:, None, None] + shifts[:, None, None]
    np.testing.assert_allclose(result[:, 0], np.clip(expected, 0, 1), atol=1e-5)
    wanted = [(-30, 30), (0.8, 1.25), (np.log(0.7), np.log(1.4)), (-0.1, 0.1), (0, 0.03)]
    np.testing.assert_allclose(ranges, wanted)


def test_noise_has_no_more_than_the_largest_deviation():
    augmentation = PatchAugmentation(rotation=0.0, scale=(1.0, 1.0), gamma=(1.0, 1.0), brightness=0.0, noise=0.03)
    image = torch.full((300, 2, 40, 40), 0.5)
    result, _ = augment(augmentation, image, torch.zeros(300, 1, 40, 40), 32)
    deviation = result[:, 0].flatten(1).std(dim=1)
    assert 0.027 < deviation.max() < 0.032 and deviation.min() < 0.003
    assert deviation.mean() == pytest.approx(0.015, abs=0.002)
    assert torch.equal(result[:, 1], torch.full((300, 32, 32), 0.5))


@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_the_results(seed):
    image, label = checkered(40, 24, channels=2)
    new_image, new_label = augment(PatchAugmentation(brightness=0.5, noise=0.3), image, label, 16, seed)
    assert new_image.shape == (40, 2, 16, 16) and new_label.shape == (40, 1, 16, 16)
    assert new_image.min() >= 0 and new_image.max() <= 1
    assert set(new_label.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    # the other channels move with the image, but keep their values
    flat = torch.full_like(image, 0.5)
    moved, _ = augment(PatchAugmentation(brightness=0.5, noise=0.3, rotation=5, scale=(1, 1)), flat, label, 12, seed)
    torch.testing.assert_close(moved[:, 1], torch.full_like(moved[:, 1], 0.5))
    assert (moved[:, 0] - 0.5).abs().max() > 0.2


def test_generator_decides():
    image, label = checkered(4, 24)
    first, again, other = (augment(PatchAugmentation(), image, label, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    augment(PatchAugmentation(), image, label, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_degradation_is_of_the_scan_and_comes_last():
    """The uncertainty map and the labels stay as the rest of the augmentation leaves them."""
    image = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    label = torch.ones(6, 1, 24, 24)
    generator = torch.Generator().manual_seed(0)
    plain, plain_label = PatchAugmentation()(image, label, 16, generator)
    degradation = ImageDegradation(share=1.0, motion_share=1.0)
    expected = degradation(plain[:, :1], generator)  # with the numbers that come after the augmentation's
    worse, worse_label = augment(PatchAugmentation(degradation=degradation), image, label, 16)
    assert torch.equal(worse[:, 1:], plain[:, 1:]) and torch.equal(worse_label, plain_label)
    assert torch.equal(worse[:, :1], expected) and (expected != plain[:, :1]).flatten(1).any(dim=1).all()
