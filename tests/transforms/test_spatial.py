import contextlib
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    KeepLargestConnectedComponent,
    LoadImaged,
    SaveImage,
)
from scipy.spatial.transform import Rotation

from cardiac_qc_plugin.transforms import (
    CheckLabeld,
    CheckScan,
    CheckScand,
    InPlaneSpacingd,
    KeepLargestComponentd,
    LoadScand,
    SeenFromApexd,
    StackWriter,
    failed_slices,
)
from cardiac_qc_plugin.transforms.spatial import APEX, check_spacing, seen_from_base, spacing_of
from cardiac_qc_plugin.workflows.files import read_volume

READ = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])
STRAIGHT = np.diag([-1.5, -1.5, 8.0, 1.0])


def write(path: Path, shape=(20, 22, 5), affine=STRAIGHT, pixdim=None) -> str:
    """A NIfTI file; ``pixdim``, where given, is written into the header as it is, whatever the affine says."""
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    nib.save(nib.Nifti1Image(data, affine), path)
    if pixdim is not None:
        header = bytearray(path.read_bytes())
        struct.pack_into("<3f", header, 80, *pixdim)
        path.write_bytes(header)
    return str(path)


def image(data: np.ndarray, affine: np.ndarray = STRAIGHT) -> MetaTensor:
    return MetaTensor(torch.as_tensor(data), affine=affine, meta={"filename_or_obj": "folder/scan7.nii.gz"})


def oblique(spacing, degrees=(20, -35, 50)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-87.3, 41.0, 12.6)
    return affine


# ACDC's trap: the true voxel size in pixdim, an affine that says 1 mm


def test_reader_takes_the_voxel_size_from_pixdim(tmp_path):
    """MONAI's doing, on which CheckScan relies; a release that stops it has to fail here."""
    path = write(tmp_path / "trap.nii", affine=np.diag([-1.0, -1.0, 1.0, 1.0]), pixdim=(1.37, 1.52, 10.0))
    assert nib.load(path).affine[0, 0] == -1.0  # what a reader sees that asks the affine
    scan = CheckScand("image")(READ({"image": path}))["image"]
    np.testing.assert_allclose(spacing_of(scan), (1.37, 1.52, 10.0), rtol=1e-6)


def test_acdc_is_read_with_its_voxel_size(acdc_dir):
    path = acdc_dir / "patient001" / "patient001_frame01.nii.gz"
    expected = nib.load(path).header.get_zooms()
    assert not np.allclose(np.abs(np.diag(nib.load(path).affine))[:3], expected)
    scan = CheckScand("image")(READ({"image": str(path)}))["image"]
    np.testing.assert_allclose(spacing_of(scan), expected, rtol=1e-6)


def test_loads_as_monai_does(tmp_path):
    paths = {"image": write(tmp_path / "a.nii.gz"), "label": write(tmp_path / "b.nii.gz"), "case": "a"}
    keys = ["image", "label"]
    loaded, expected = LoadScand(keys, like="image")(paths), LoadImaged(keys)(paths)
    for key in keys:
        assert torch.equal(loaded[key], expected[key]) and torch.equal(loaded[key].affine, expected[key].affine)
        assert loaded[key].meta["filename_or_obj"] == paths[key]
    server = LoadScand("image")
    server._loader.image_only = False  # as MONAI Label does
    assert server(paths)["image_meta_dict"]["filename_or_obj"] == paths["image"]
    assert loaded["case"] == "a" and "map" not in LoadScand([*keys, "map"], allow_missing_keys=True)(paths)


@pytest.mark.parametrize("kind", ["truncated", "text", "missing"])
def test_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = Path(write(tmp_path / "a.nii.gz"))
    path.unlink() if kind == "missing" else path.write_bytes(path.read_bytes()[:500] if kind == "truncated" else b"x")
    with pytest.raises(ValueError, match=r"^.*/a\.nii\.gz: the file is truncated or damaged, or no image \(.+\)\.$"):
        LoadScand("image")({"image": str(path)})


def test_no_damaged_bit_passes(tmp_path):
    """nibabel reads most such files, with other voxels, since gzip's checksum stands after the last."""
    path = Path(write(tmp_path / "a.nii.gz"))
    whole, voxels = path.read_bytes(), nib.load(path).get_fdata()
    rng, wrong = np.random.default_rng(0), 0
    for number in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(damaged)
        with contextlib.suppress(Exception):
            wrong += not np.array_equal(nib.load(path).get_fdata(), voxels)
        for read in (lambda path: LoadScand("image")({"image": path})["image"].numpy(), lambda p: read_volume(p).data):
            try:
                np.testing.assert_array_equal(read(str(path)), voxels)  # the header of gzip holds but a name
            except ValueError as error:
                assert str(path) in str(error)
    assert wrong > 10


def test_file_on_another_grid_is_named(tmp_path):
    paths = {"image": write(tmp_path / "a.nii.gz"), "label": write(tmp_path / "b.nii.gz", shape=(20, 22, 4))}
    with pytest.raises(ValueError, match=r"b\.nii\.gz: shape \(20, 22, 4\), but .*a\.nii\.gz has \(20, 22, 5\)"):
        LoadScand(["image", "label"], like="image")(paths)
    turned = nib.as_closest_canonical(nib.load(paths["image"]))
    nib.save(turned, tmp_path / "c.nii.gz")
    with pytest.raises(ValueError, match=r"c\.nii\.gz: its axes run otherwise than the image's \(RAS, not LPS\)"):
        LoadScand(["image", "label"], like="image")({**paths, "label": str(tmp_path / "c.nii.gz")})
    nib.save(nib.Nifti1Image(nib.load(paths["image"]).get_fdata(), np.diag([-1, -1, 1, 1])), tmp_path / "d.nii.gz")
    with pytest.raises(ValueError, match=r"d\.nii\.gz: voxels of 1 x 1 x 1 mm, but .*a\.nii\.gz has"):
        LoadScand(["image", "label"], like="image")({**paths, "label": str(tmp_path / "d.nii.gz")})
    near, far = (
        write(tmp_path / f"{factor}.nii.gz", affine=STRAIGHT @ np.diag([factor] * 3 + [1])) for factor in (1.005, 1.015)
    )
    LoadScand(["image", "label"], like="image")({**paths, "label": near})  # the same size, rounded
    with pytest.raises(ValueError, match=r"1\.015\.nii\.gz: voxels of 1\.5225 x 1\.5225 x 8\.12 mm, but .*a\.nii"):
        LoadScand(["image", "label"], like="image")({**paths, "label": far})
    read = Compose([LoadScand("image"), EnsureChannelFirstd("image"), InPlaneSpacingd("image", 1.0)])
    with pytest.raises(ValueError, match="Give the label of this scan"):  # the image's own grid, not the network's
        LoadScand("label", like="image")({**read({"image": paths["image"]}), "label": paths["label"]})


def test_labels_are_whole_and_known():
    labels = image(np.float32([0, 1, 2.0000002, 3]).reshape(1, 2, 2, 1))
    checked = CheckLabeld("label")({"label": labels})["label"]
    assert checked.dtype == torch.float32 and checked.flatten().tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(checked.affine, labels.affine)
    with pytest.raises(ValueError, match=r"folder/scan7\.nii\.gz has the values \[4\.0\]"):
        CheckLabeld("label")({"label": labels + labels.eq(3)})


def test_exchanged_ventricles_of_references_only():
    labels = np.zeros((1, 9, 12, 1), np.float32)
    labels[:, 1:8, 1:8] = 2
    labels[:, 3:6, 3:6] = 1
    labels[:, 1:8, 8:11] = 3
    exchanged = image(labels)
    with pytest.raises(ValueError, match=r"folder/scan7\.nii\.gz: label 1 lies in the myocardium and label 3 does not"):
        CheckLabeld("label")({"label": exchanged})
    CheckLabeld("label", references=False)({"label": exchanged})
    CheckLabeld("label")({"label": image(np.float32([0, 3, 2, 1])[labels.astype(int)])})


def test_spacing_of_an_oblique_scan():
    scan = image(np.zeros((1, 4, 5, 6)), oblique((1.2, 1.7, 9.0)))
    np.testing.assert_allclose(spacing_of(scan), (1.2, 1.7, 9.0))


# Scans that are refused, by file


def refusal(path: str) -> str:
    with pytest.raises(ValueError) as error:
        CheckScand("image")(READ({"image": path}))
    assert str(error.value).startswith(path)
    return str(error.value)


@pytest.mark.parametrize("shape", [(20, 22), (20, 22, 5, 3)])
def test_other_than_one_stack(shape, tmp_path):
    assert "3-D stack" in refusal(write(tmp_path / "scan.nii", shape))


@pytest.mark.parametrize("shape", [(20, 22, 1), (20, 22, 5, 1)])
def test_one_slice_or_one_phase_is_a_stack(shape, tmp_path):
    path = write(tmp_path / "scan.nii", shape)
    assert CheckScand("image")(READ({"image": path}))["image"].shape == (1, *shape[:3])


def test_unit_spacing(tmp_path):
    assert "1 x 1 x 1 mm" in refusal(write(tmp_path / "lost.nii", affine=np.diag([-1.0, -1.0, 1.0, 1.0])))


@pytest.mark.parametrize("pixdim", [(0.0, 0.0, 0.0), (1.5, 1.5, 0.0)])
@pytest.mark.parametrize("affine", [STRAIGHT, None], ids=["affine", "no affine"])
def test_spacing_of_zero_in_the_header(pixdim, affine, tmp_path):
    """nibabel reads 0 as 1, and MONAI then puts that 1 into the affine, too, even where the affine was right."""
    assert "mm" in refusal(write(tmp_path / "zero.nii", affine=affine, pixdim=pixdim))


@pytest.mark.parametrize("axis", range(3))
def test_spacing_of_zero_in_the_affine(axis):
    affine = STRAIGHT.copy()
    affine[axis, axis] = 0
    with pytest.raises(ValueError, match="scan7.nii.gz: .* is not positive"):
        CheckScan()(image(np.random.default_rng(0).random((1, 6, 7, 3)), affine))


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((1.5, 1.5, 0.0), "1.5 x 1.5 x 0 mm is not positive"),
        ((1.5, -1.5, 8.0), "not positive"),
        ((1.5, np.nan, 8.0), "not positive"),
        ((1.5, 1.5, np.inf), "not positive"),
        ((1.0, 1.0, 1.0), "1 x 1 x 1 mm"),
        (
            (0.0015, 0.0015, 0.008),
            "0.0015 x 0.0015 x 0.008 mm, which no short-axis stack has. If it is in another unit",
        ),
        ((1500.0, 1500.0, 8000.0), "write millimetres"),
        ((0.05, 1.5, 8.0), "0.05 x 1.5 x 8 mm, which no"),
        ((1.5, 1.5, 100.0), "1.5 x 1.5 x 100 mm, which no"),
    ],
)
def test_refused_spacings(spacing, message):
    with pytest.raises(ValueError, match=f"case3: .*{message}"):
        check_spacing(spacing, "case3")


def test_sheared_axes_are_refused(tmp_path):
    """Slices 8 mm apart whose origins drift by so many mm to the side: the edge is longer than the distance."""
    for drift, refused in ((0, False), (1, False), (1.2, True), (3, True)):
        affine = oblique((1.5, 1.5, 8.0))
        affine[:3, 2] += drift / 1.5 * affine[:3, 0]
        scan = image(np.random.default_rng(0).random((1, 20, 22, 5)).astype(np.float32), affine)
        path = write(tmp_path / f"{drift}.nii", affine=affine)
        if refused:
            with pytest.raises(ValueError, match=r"nii: its axes are not at right angles"):
                read_volume(path)
            with pytest.raises(ValueError, match=r"folder/scan7\.nii\.gz: its axes are not at right angles"):
                CheckScand("image")({"image": scan})
        else:
            CheckScand("image")({"image": scan})
            read_volume(path)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 8.0), (0.7, 0.7, 5.0), (1.2, 1.7, 6.0), (0.06, 1.5, 99.0)])
def test_accepted_spacings(spacing):
    check_spacing(spacing, "case3")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, r"1 voxel\(s\) NaN"), (np.inf, r"1 voxel\("), (-np.inf, r"1 voxel\(")]
)
def test_values_that_are_no_number(value, message):
    data = np.random.default_rng(0).random((1, 6, 7, 3))
    data[0, 2, 3, 1] = value
    with pytest.raises(ValueError, match=f"folder/scan7.nii.gz: {message}"):
        CheckScan()(image(data))


@pytest.mark.parametrize("value", [0.0, 37.5])
def test_constant_image(value):
    with pytest.raises(ValueError, match=f"folder/scan7.nii.gz: at least 98 % of the voxels are {value:g}"):
        CheckScan()(image(np.full((1, 6, 7, 3), value)))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_few_bright_or_dark_voxels_are_no_image(sign):
    """Less than 1 % of them, as an overlay leaves on an empty field."""
    data = np.zeros(2000)
    data[:19] = sign * np.arange(1, 20)
    with pytest.raises(ValueError, match="at least 98 % of the voxels are 0"):
        CheckScan()(image(data.reshape(1, 20, 20, 5)))
    data[19] = sign
    CheckScan()(image(data.reshape(1, 20, 20, 5)))


@pytest.mark.parametrize("count", [4, 8])
def test_label_map_is_no_scan(count):
    voxels = np.arange(6 * 7 * 3).reshape(1, 6, 7, 3)
    with pytest.raises(ValueError, match=f"scan7.nii.gz: its voxels have {count} different values, so it is a label"):
        CheckScan()(image(voxels % count))
    CheckScan()(image(voxels % 9))


@pytest.mark.parametrize("shape", [(2, 6, 7, 3), (1, 6, 7), (1, 6, 7, 3, 2), (6, 7, 3)])
def test_other_shapes(shape):
    with pytest.raises(ValueError, match="folder/scan7.nii.gz: expected one 3-D stack"):
        CheckScan()(image(np.random.default_rng(0).random(shape)))


@pytest.mark.parametrize("size", [0.14, 0.29, 5.1, 12.0])
def test_pixels_of_no_cine(size):
    """In centimetres, or of a preview."""
    with pytest.raises(ValueError, match=rf"folder/scan7\.nii\.gz: the header says pixels of {size:g} x {size:g} mm"):
        CheckScan()(image(np.random.default_rng(0).random((1, 6, 7, 3)), np.diag([-size, -size, 8.0, 1.0])))


@pytest.mark.parametrize("pixel", [(0.31, 0.31), (4.9, 4.9), (1.5, 2.9), (2.9, 1.5)])
def test_pixels_of_a_cine(pixel):
    """Of which one edge is at most twice the other: slices that lie on another axis have others."""
    data = np.random.default_rng(0).random((1, 6, 7, 3))
    CheckScan()(image(data, np.diag([*pixel, 8.0, 1.0])))
    if pixel[0] != pixel[1]:
        stretched = np.diag([*(edge + 0.2 * (edge > 2) for edge in pixel), 8.0, 1.0])
        with pytest.raises(ValueError, match=r"the slices do not lie on the third axis"):
            CheckScan()(image(data, stretched))


def test_good_scan_passes_unchanged():
    scan = image(np.random.default_rng(0).random((1, 6, 7, 3)))
    data = {"image": scan, "image_path": "a", "label": 3}
    done = CheckScand("image")(data)
    assert done["image"] is scan and done["image_path"] == "a" and done["label"] == 3
    assert CheckScand(["image", "other"], allow_missing_keys=True)(data)["image"] is scan
    with pytest.raises(KeyError, match="other"):
        CheckScand(["image", "other"])(data)


# In-plane spacing


GRIDS = {
    "odd": ((31, 37, 3), STRAIGHT),
    "even": ((32, 40, 2), np.diag([-1.5625, -1.5625, 10.0, 1.0])),
    "finer": ((61, 45, 2), np.diag([0.7, 0.7, 5.0, 1.0])),
    "same": ((20, 21, 4), np.diag([1.4, 1.4, 6.0, 1.0])),
    "anisotropic": ((35, 26, 3), np.diag([-1.2, 1.9, 7.0, 1.0])),
    "oblique": ((33, 27, 4), oblique((1.3, 1.7, 9.0))),
    "one slice": ((23, 29, 1), oblique((1.8, 1.8, 8.0))),
}


def smooth_wave(shape, affine) -> np.ndarray:
    """A wave of period 40 mm or more in plane, another phase in each slice; channel first."""
    rows, cols, slices = np.indices(shape).astype(float)
    row_mm, col_mm = (np.linalg.norm(affine[:3, axis]) for axis in (0, 1))
    return np.sin(rows * row_mm / 8 + slices)[None] + np.cos(cols * col_mm / 7 - slices)[None]


@pytest.mark.parametrize("grid", GRIDS)
def test_resampled_grid(grid):
    shape, affine = GRIDS[grid]
    done = InPlaneSpacingd("image")({"image": image(smooth_wave(shape, affine), affine)})["image"]
    through_plane = np.linalg.norm(affine[:3, 2])
    np.testing.assert_allclose(spacing_of(done), (1.4, 1.4, through_plane), rtol=1e-12)
    np.testing.assert_allclose(done.affine[:3, 2], affine[:3, 2], atol=1e-9)
    assert done.shape[3] == shape[2]
    for axis in (0, 1):
        size = np.linalg.norm(affine[:3, axis])
        np.testing.assert_allclose(done.affine[:3, axis], affine[:3, axis] / size * 1.4, atol=1e-9)
        assert abs(done.shape[1 + axis] * 1.4 - shape[axis] * size) <= max(size, 1.4)  # the same extent


@pytest.mark.parametrize("grid", GRIDS)
def test_values_lie_where_the_affine_says(grid):
    """Each resampled pixel against bilinear interpolation in its own slice at the same place in mm."""
    shape, affine = GRIDS[grid]
    source = np.random.default_rng(1).random((1, *shape))
    done = InPlaneSpacingd("image")({"image": image(source, affine)})["image"]
    index = np.indices(done.shape[1:]).reshape(3, -1)
    world = np.asarray(done.affine) @ np.vstack([index, np.ones(index.shape[1])])
    row, col, slice_ = (np.linalg.inv(affine) @ world)[:3]
    np.testing.assert_allclose(slice_, index[2], atol=1e-6)  # slices do not move
    row, col = np.clip(row, 0, shape[0] - 1), np.clip(col, 0, shape[1] - 1)
    r0, c0 = np.minimum(row.astype(int), shape[0] - 2), np.minimum(col.astype(int), shape[1] - 2)
    dr, dc, z = row - r0, col - c0, index[2]
    expected = (
        source[0, r0, c0, z] * (1 - dr) * (1 - dc)
        + source[0, r0 + 1, c0, z] * dr * (1 - dc)
        + source[0, r0, c0 + 1, z] * (1 - dr) * dc
        + source[0, r0 + 1, c0 + 1, z] * dr * dc
    )
    np.testing.assert_allclose(np.asarray(done).ravel(), expected, atol=1e-5)


@pytest.mark.parametrize("grid", ["odd", "oblique"])
def test_slices_do_not_mix(grid):
    shape, affine = GRIDS[grid]
    source = np.random.default_rng(1).random((1, *shape))
    other = source.copy()
    other[..., 1] = 1e4
    a, b = (InPlaneSpacingd("image")({"image": image(data, affine)})["image"] for data in (source, other))
    kept = [0, *range(2, shape[2])]
    np.testing.assert_allclose(np.asarray(a)[..., kept], np.asarray(b)[..., kept], atol=1e-6)
    np.testing.assert_allclose(np.asarray(b)[..., 1], 1e4, rtol=1e-6)


def inverted(shape, affine, data, mode, nearest) -> tuple[MetaTensor, MetaTensor]:
    """The scan's resampled copy as a prediction, and that prediction on the scan's own grid."""
    transform = Compose([InPlaneSpacingd("image", mode=mode)])
    done = transform({"image": image(data, affine)})
    done["pred"] = MetaTensor(done["image"].as_tensor().clone())  # Invertd passes over a plain tensor
    back = Invertd("pred", transform, orig_keys="image", nearest_interp=nearest)(done)["pred"]
    assert back.shape == (1, *shape)
    np.testing.assert_allclose(back.affine, affine, atol=1e-9)
    return done["image"], back


@pytest.mark.parametrize("grid", GRIDS)
def test_inverse_returns_to_the_scans_grid(grid):
    shape, affine = GRIDS[grid]
    source = smooth_wave(shape, affine)
    _, back = inverted(shape, affine, source, "bilinear", False)
    inner = np.s_[:, 2:-2, 2:-2]
    np.testing.assert_allclose(np.asarray(back)[inner], source[inner], atol=0.05)


@pytest.mark.parametrize("grid", GRIDS)
def test_labels_stay_labels(grid):
    shape, affine = GRIDS[grid]
    rows, cols, _ = np.indices(shape)
    center = np.hypot(rows - shape[0] / 2, cols - shape[1] / 2)
    label = (3 * (center < 4) + 2 * ((center >= 4) & (center < 7)) + 1 * ((center >= 7) & (center < 9)))[None]
    resampled, back = inverted(shape, affine, label.astype(np.uint8), "nearest", True)
    for result in (resampled, back):
        assert set(np.unique(np.asarray(result))) == {0, 1, 2, 3}
    assert (np.asarray(back) == label).mean() > 0.95


def test_one_mode_per_key():
    data = np.random.default_rng(0).integers(0, 4, (1, 20, 24, 2))
    done = InPlaneSpacingd(["image", "label"], mode=["bilinear", "nearest"])(
        {"image": image(data.astype(float)), "label": image(data)}
    )
    assert done["image"].shape == done["label"].shape
    assert set(np.unique(np.asarray(done["label"]))) <= {0, 1, 2, 3}
    assert len(np.unique(np.asarray(done["image"]))) > 100


def test_other_entries_are_untouched(tmp_path):
    """MONAI's own Spacingd wants to update every entry that is named as the key and an underscore."""
    data = READ({"image": write(tmp_path / "scan.nii")})
    data |= {"image_path": "/data/scan.nii", "image_name": ["a"], "label": "none"}
    done = InPlaneSpacingd("image")(data)
    assert {key: value for key, value in done.items() if key != "image"} == {
        "image_path": "/data/scan.nii",
        "image_name": ["a"],
        "label": "none",
    }
    assert data["image"].shape == (1, 20, 22, 5)  # the caller's own


def test_missing_keys():
    data = {"image": image(smooth_wave((8, 8, 2), STRAIGHT))}
    with pytest.raises(KeyError, match="label"):
        InPlaneSpacingd(["image", "label"])(data)
    assert set(InPlaneSpacingd(["image", "label"], allow_missing_keys=True)(data)) == {"image"}


@pytest.mark.parametrize("spacing", [0.0, -1.4])
def test_spacing_is_positive(spacing):
    with pytest.raises(ValueError, match=f"got {spacing}"):
        InPlaneSpacingd("image", spacing=spacing)


DIRECTIONS = {"L": (-1, 0, 0), "R": (1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@pytest.mark.parametrize(
    ("right", "down", "base"),
    [("L", "P", False), ("P", "R", False), ("R", "A", False)]  # ACDC's header, what it holds, and turned by 180 degrees
    + [("L", "A", True), ("R", "P", True), ("P", "L", True)]  # dcm2niix's order, and others that are mirrored
    + [("L", "I", False), ("P", "I", False), ("A", "I", True), ("P", "S", True)],  # upright slices, heart to the left
)
def test_side_that_slices_are_seen_from(right, down, base):
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = 1.5 * np.array(DIRECTIONS[right]), 1.5 * np.array(DIRECTIONS[down])
    assert seen_from_base(affine, {}) is base
    assert not seen_from_base(affine, {"qform_code": np.array(0), "sform_code": 0})  # the file does not say


def test_side_of_a_scanners_short_axis():
    """Row and column of a Sunnybrook cine's kind (LPS to RAS): the usual view, which dcm2niix turns over."""
    lps = np.array([(-0.104592, 0.346381, -0.932245), (-0.733192, -0.660188, -0.163037)])
    affine = np.eye(4)
    affine[:3, :2] = (lps * (-1, -1, 1)).T
    assert not seen_from_base(affine, {})
    affine[:3, 1] *= -1
    assert seen_from_base(affine, {})


@pytest.mark.parametrize("lean", [-0.25, -0.15, 0.15, 0.25])
def test_side_of_slices_that_a_header_lays_along_the_heart(lean):
    """Too close to call, whatever the pixel size: taken as stored."""
    normal = np.sqrt((1 - lean**2) / 2) * np.array([1, 1, 0]) + lean * APEX  # of which (1, 1, 0) is at right angles
    right = np.cross(normal, (0, 0, 1)) / np.linalg.norm(np.cross(normal, (0, 0, 1)))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = 3 * right, 3 * np.cross(normal, right)
    assert seen_from_base(affine, {}) == (lean == 0.25)


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (0, 0)])
def test_mirrored_stacks_are_turned_over_and_back(tmp_path, codes):
    """Prepared as the stack that is not mirrored, and inverted to the stored order; not where codes say nothing."""
    rows, columns, slices = np.indices((21, 24, 4))
    data = (rows + 3 * columns + 10 * slices).astype(np.float32)
    labels = (data // 30).astype(np.uint8)
    files = {}
    for name, step in (("usual", 1), ("mirrored", -1)):
        affine = STRAIGHT @ np.diag([1.0, step, 1.0, 1.0])
        affine[1, 3] = 0 if step == 1 else -1.5 * 23
        for key, array in (("image", data), ("label", labels)):
            stored = nib.Nifti1Image(np.ascontiguousarray(array[:, ::step]), affine if any(codes) else None)
            if any(codes):
                stored.header.set_qform(affine, codes[0] if key == "image" else 1)  # the label's own do not matter
                stored.header.set_sform(affine, codes[1] if key == "image" else 1)
            files[name, key] = str(tmp_path / f"{name}_{key}.nii")
            nib.save(stored, files[name, key])
    keys = ["image", "label"]
    prepare = Compose(
        [
            LoadScand(keys, like="image"),
            EnsureChannelFirstd(keys),
            SeenFromApexd(keys),
            InPlaneSpacingd(keys, 2.0, mode=("bilinear", "nearest")),
        ]
    )
    usual, mirrored = (prepare({key: files[name, key] for key in keys}) for name in ("usual", "mirrored"))
    for key in keys:
        found, expected = (prepared[key].as_subclass(torch.Tensor) for prepared in (mirrored, usual))
        if any(codes):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        else:
            assert not any(operation["class"] == "Flip" for operation in mirrored[key].applied_operations)
        back = Invertd("pred", prepare, orig_keys=key)(mirrored | {"pred": mirrored[key].clone()})["pred"]
        reference = LoadImaged(key)({key: files["mirrored", key]})[key]
        assert back.shape[1:] == reference.shape
        np.testing.assert_allclose(back.affine, reference.affine, atol=1e-6)
        assert np.abs(back[0].numpy() - reference.numpy()).max() <= (4 if key == "image" else 1)  # nearest


@pytest.mark.parametrize(("step", "turned"), [(1, False), (-1, True)])
def test_the_axes_of_an_sform_without_voxel_size_count_where_the_qform_is_not_coded(tmp_path, step, turned):
    """In ACDC's manner; MONAI's reader alone takes the axes of the qform, which are nobody's."""
    affine = np.diag([-1.0, -1.0 * step, 1.0, 1.0])
    stored = nib.Nifti1Image(np.random.default_rng(0).random((20, 22, 5)).astype(np.float32), affine)
    stored.header.set_sform(affine, 1)
    stored.header.set_qform(np.eye(4), 0)
    stored.header.set_zooms((1.5, 1.25, 8.0))
    nib.save(stored, tmp_path / "a.nii.gz")
    read = Compose([LoadScand("image"), EnsureChannelFirstd("image"), SeenFromApexd("image")])
    image = read({"image": str(tmp_path / "a.nii.gz")})["image"]
    assert bool(image.applied_operations) == turned == seen_from_base(affine, stored.header)
    np.testing.assert_array_equal(image[0], stored.get_fdata()[:, ::step])
    assert spacing_of(image) == pytest.approx((1.5, 1.25, 8.0))


def test_labels_are_turned_over_with_their_image_only(tmp_path):
    """An image whose header does not say how it lies stays as it is, whatever that of its label says."""
    labels = np.random.default_rng(0).integers(0, 4, (20, 22, 5), dtype=np.uint8)
    scan = nib.Nifti1Image(labels.astype(np.float32), None)
    scan.header.set_zooms((1.5, 1.5, 8.0))
    paths = {key: str(tmp_path / f"{key}.nii") for key in ("image", "label")}
    nib.save(scan, paths["image"])
    nib.save(nib.Nifti1Image(labels, np.diag([-1.5, 1.5, 8.0, 1.0])), paths["label"])
    for keys, stored in ((["image", "label"], labels), (["label"], labels[:, ::-1])):
        read = Compose([LoadScand(keys, like=keys[0]), EnsureChannelFirstd(keys), SeenFromApexd(keys)])
        np.testing.assert_array_equal(read({key: paths[key] for key in keys})["label"][0], stored)


def test_channels_are_not_dropped_in_writing(tmp_path):
    save = SaveImage(tmp_path, writer=StackWriter, resample=False, separate_folder=False)
    with pytest.raises(RuntimeError, match="too many values to unpack"):  # as MONAI tells it
        save(MetaTensor(torch.zeros(2, 4, 5, 3)))
    save(MetaTensor(torch.ones(1, 4, 5, 1)))
    (file,) = tmp_path.iterdir()
    assert nib.load(file).shape == (4, 5, 1)


def broken_stack(failed, speck=0):
    """LV and RV in nine slices but the failed ones, which have a speck of LV; and the same with what is too much."""
    labels = torch.zeros(1, 16, 16, 10)
    labels[:, 4:8, 4:8, :9] = 3
    labels[:, 4:8, 9:12, :9] = 1
    labels[..., failed] = 0
    labels[:, 5, 5 : 5 + speck, failed] = 3
    extra = labels.clone()
    extra[:, 10:15, 10:15, 0] = 3  # a blob, larger than a slice of the LV
    extra[:, 0, 0, 9] = 1  # a speck beyond the apex
    return labels, extra


@pytest.mark.parametrize(
    ("areas", "failed"),
    [
        ([9, 9, 9], {}),
        ([0, 9, 0, 9, 0], {2: (1, 3)}),
        ([9, 2, 0, 3, 9], {1: (0, 3), 2: (0, 3)}),  # 3 of 9 are a third, more than the share
        ([9, 2, 0, 2, 1], {}),  # nothing full behind them
        ([2, 9, 1, 6, 0, 0, 4], {2: (1, 3), 4: (3, 6), 5: (3, 6)}),
        ([0, 0], {}),
    ],
)
def test_failed_slices_lie_between_full_ones(areas, failed):
    labels = np.zeros((3, 3, len(areas)), dtype=np.uint8)
    for z, area in enumerate(areas):
        labels[..., z].flat[:area] = 1 + z % 3  # whatever the structure
    assert failed_slices(labels) == failed


@pytest.mark.parametrize(("shape", "full"), [((1, 4, 4, 3), 0.3), ((4, 4), 0.3), ((4, 4, 3), -0.1), ((4, 4, 3), 1.5)])
def test_failed_slices_need_a_label_map_and_a_share(shape, full):
    with pytest.raises(ValueError, match=r"Expected labels \(H, W, D\) and a share"):
        failed_slices(np.ones(shape), full)


@pytest.mark.parametrize("speck", [0, 3])
@pytest.mark.parametrize("failed", [[], [1], [4], [3, 4], [2, 3, 4, 5], [2, 6]])
def test_what_lies_beyond_failed_slices_is_kept(failed, speck):
    labels, extra = broken_stack(failed, speck)
    given = extra.clone()
    torch.testing.assert_close(KeepLargestComponentd("pred")({"pred": extra})["pred"], labels)
    assert (extra == given).all()  # the input stays as it is
    parts = np.split(np.arange(9), failed)  # without a speck, the longest part alone, as the paper has it
    if failed and not speck:
        alone = KeepLargestComponentd("pred", full=0)({"pred": extra})["pred"]
        longest = max((part[~np.isin(part, failed)] for part in parts), key=len)
        assert np.flatnonzero(alone.numpy().any(axis=(0, 1, 2))).tolist() == longest.tolist()


def test_a_structure_ends_where_it_alone_is_missing():
    labels, _ = broken_stack([])
    labels[:, :, 9:, 6] = 0  # no RV in a slice with its LV
    kept = KeepLargestComponentd("pred")({"pred": labels})["pred"]
    expected = labels.clone()
    expected[:, :, 9:, 7:] = 0
    torch.testing.assert_close(kept, expected)


def test_slices_beyond_the_heart_have_not_failed():
    """A blob above the base is not joined to the heart over the empty slices between, unless it is as large as one."""
    labels = torch.zeros(1, 12, 12, 8)
    labels[:, 2:10, 2:10, 3:] = 3
    labels[:, 4:8, 4:8, 0] = 3  # a quarter of a slice
    assert not KeepLargestComponentd("pred")({"pred": labels})["pred"][..., 0].any()
    labels[:, 4:10, 4:8, 0] = 3
    torch.testing.assert_close(KeepLargestComponentd("pred")({"pred": labels})["pred"], labels)


@settings(deadline=None)
@given(arrays(np.uint8, (4, 5, 6), elements=st.sampled_from([0, 0, 1, 2, 3])))
def test_without_failed_slices_it_is_monais_largest_component(labels):
    kept = KeepLargestComponentd("pred", full=0)({"pred": torch.tensor(labels[None])})["pred"][0].numpy()
    monai = KeepLargestConnectedComponent(applied_labels=[1, 2, 3])(torch.tensor(labels[None]))[0].numpy()
    for label in (1, 2, 3):
        assert (kept == label).sum() == (monai == label).sum()  # which of two that are equally large may differ
        assert set(np.unique(kept[labels == label])) <= {0, label}
    joined = KeepLargestComponentd("pred", full=1)({"pred": torch.tensor(labels[None])})["pred"][0].numpy()
    assert all((joined == label).sum() >= (kept == label).sum() for label in (1, 2, 3))


def test_a_single_slice_and_an_empty_stack():
    labels = torch.zeros(1, 8, 8, 1)
    keep = KeepLargestComponentd("pred")
    assert not keep({"pred": labels})["pred"].any()
    labels[:, 2:4, 2:4] = 2
    torch.testing.assert_close(keep({"pred": labels})["pred"], labels)
