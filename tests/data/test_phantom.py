"""The phantom: labels against geometry and volumes, images against ACDC's contrast, files against nibabel."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from cardiac_qc_plugin.data.phantom import (
    ES_PHASE,
    GROUPS,
    ShortAxisPhantom,
    contraction,
    write_acdc_like,
    write_phantom,
)

RV, LVM, LV = 1, 2, 3
SMALL = {"shape": (64, 72), "spacing": (2.5, 2.5, 10.0)}
FINE = {
    "shape": (80, 90),
    "n_slices": 40,
    "spacing": (2.0, 2.0, 2.5),
}  # slices thin enough to measure volumes


def volumes(labels, spacing):
    """RV, LVM and LV in ml."""
    return np.array([(labels == k).sum() for k in (RV, LVM, LV)]) * np.prod(spacing) / 1000


@pytest.fixture(scope="module", params=range(3))
def beat(request):
    """A phantom on ACDC's grid with its end-diastole and end-systole."""
    phantom = ShortAxisPhantom(seed=request.param)
    return phantom, phantom.frame(0.0), phantom.frame(ES_PHASE)


def test_shape_types_and_labels(beat):
    phantom, *frames = beat
    for image, labels in frames:
        assert image.shape == labels.shape == (*phantom.shape, phantom.n_slices)
        assert image.dtype == np.float32 and labels.dtype == np.uint8
        assert image.min() >= 0 and np.isfinite(image).all()
        assert set(np.unique(labels)) == {0, RV, LVM, LV}


def test_first_and_last_slice_have_no_heart(beat):
    for _, labels in beat[1:]:
        assert not labels[..., 0].any() and not labels[..., -1].any()
        assert (labels[..., 3:6] == LV).any(axis=(0, 1)).all()


def test_topology(beat):
    """One piece per structure and slice, the LV enclosed by its muscle, the RV resting on it."""
    cross, square = ndimage.generate_binary_structure(2, 1), np.ones((3, 3))
    for _, labels in beat[1:]:
        for plane in np.moveaxis(labels, -1, 0):
            for k in np.unique(plane[plane > 0]):
                assert ndimage.label(plane == k, square)[1] == 1
            around_lv = ndimage.binary_dilation(plane == LV, square) & (plane != LV)
            assert (plane[around_lv] == LVM).all()
            if (plane == RV).any():
                assert (plane[ndimage.binary_dilation(plane == RV, cross)] == LVM).any()
            ventricle = np.isin(plane, (LVM, LV))
            assert (ndimage.binary_fill_holes(plane == LVM) == ventricle).all()


def test_orientation_is_that_of_acdc(beat):
    """In ACDC's arrays the RV lies at lower rows and, nearly always, higher columns than the LV."""
    _, (image, labels), _ = beat
    rv, lv = (np.array(ndimage.center_of_mass(labels == k)) for k in (RV, LV))
    assert rv[0] < lv[0] - 10
    row, column, middle = lv.round().astype(int)
    assert image[row, column - 40 : column - 28, middle].mean() < 0.3 * image[row, column, middle]  # left lung


def test_contrast(beat):
    """LV blood > RV blood > myocardium > lung or air, away from borders, and each as in ACDC.

    ACDC's training set at end-diastole, scaled by the 1st and 99th percentile as networks see it: LV 0.72,
    RV 0.60, LVM 0.26 (standard deviations between patients 0.12, 0.12, 0.06), all voxels 0.24 (0.04), their
    median 0.16 (0.04).
    """
    for image, labels in beat[1:]:
        low, high = np.percentile(image, (1, 99))
        scaled = np.clip((image - low) / (high - low), 0, 1)
        rv, lvm, lv = (scaled[ndimage.binary_erosion(labels == k, np.ones((3, 3, 1)))].mean() for k in (RV, LVM, LV))
        assert lv > rv > 2 * lvm > 4 * np.percentile(scaled, 25)
        assert lv == pytest.approx(0.72, abs=0.24) and rv == pytest.approx(0.60, abs=0.24)
        assert lvm == pytest.approx(0.26, abs=0.12)
        assert scaled.mean() == pytest.approx(0.24, abs=0.08)
        assert np.median(scaled) == pytest.approx(0.16, abs=0.08)


def test_papillary_muscles_are_dark_and_labeled_lv():
    image, labels = ShortAxisPhantom(seed=1, noise=0.0).frame(0.0)
    cavity = ndimage.binary_erosion(labels[..., 5] == LV, iterations=3)
    blood, muscle = np.median(image[..., 5][cavity]), np.median(image[..., 5][labels[..., 5] == LVM])
    dark = cavity & (image[..., 5] < (blood + muscle) / 2)
    assert 0.01 < dark.sum() / cavity.sum() < 0.3


@pytest.mark.parametrize("group", GROUPS)
def test_volumes_follow_the_stated_ejection_fraction_and_keep_the_muscle(group):
    phantom = ShortAxisPhantom(seed=5, group=group, **FINE)
    ed, es = (volumes(phantom.frame(phase)[1], phantom.spacing) for phase in (0.0, ES_PHASE))
    ejection = 1 - es[2] / ed[2]
    assert phantom.anatomy.group == group
    assert ed[2] == pytest.approx(phantom.anatomy.lv_volume / 1000, rel=0.05)
    assert ejection == pytest.approx(phantom.anatomy.ejection, abs=0.04)
    assert GROUPS[group]["ejection"][0] - 0.04 < ejection < GROUPS[group]["ejection"][1] + 0.04
    assert es[0] < 0.9 * ed[0]
    assert es[1] == pytest.approx(ed[1], rel=0.05)


def test_thick_slices_keep_volumes_within_the_error_of_a_slice(beat):
    phantom, (_, ed), (_, es) = beat
    ed, es = volumes(ed, phantom.spacing), volumes(es, phantom.spacing)
    assert 1 - es[2] / ed[2] == pytest.approx(phantom.anatomy.ejection, abs=0.1)
    assert es[1] == pytest.approx(ed[1], rel=0.15)


def test_contraction_is_smooth_periodic_and_peaks_at_end_systole():
    phases = np.linspace(0, 1, 2001)[:-1]
    curve = np.array([contraction(phase) for phase in phases])
    assert curve[0] == 0 and curve.max() == pytest.approx(1, abs=1e-5)
    assert phases[curve.argmax()] == pytest.approx(ES_PHASE, abs=1e-3)
    assert (np.sign(np.diff(curve))[[0, -1]] == (1, -1)).all() and (np.diff(np.sign(np.diff(curve))) != 0).sum() == 1
    assert np.abs(np.diff(curve, append=curve[0])).max() < 0.005  # at most 10 per cycle: a beat, no jump


def test_cine_moves_one_anatomy():
    phantom = ShortAxisPhantom(seed=2, n_slices=3, **SMALL)
    images, labels = phantom.cine(10)
    assert images.shape == labels.shape == (64, 72, 3, 10)
    cavity = [volumes(labels[..., t], phantom.spacing)[2] for t in range(10)]
    assert np.argmax(cavity) == 0 and np.argmin(cavity) in (3, 4)
    assert (images[..., 3] == phantom.frame(0.3)[0]).all()
    air = (slice(0, 5), slice(0, 5))
    other = ShortAxisPhantom(seed=3, n_slices=3, **SMALL).frame(0.0)[0]
    alike, unlike = (np.corrcoef(images[..., 0].ravel(), x.ravel())[0, 1] for x in (images[..., 1], other))
    assert alike > 0.85 > unlike
    assert (images[..., 0][air] != images[..., 1][air]).any()  # each phase has its own noise


def test_the_seed_alone_decides():
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    first, again, other = (ShortAxisPhantom(seed, n_slices=3, **SMALL).frame(0.2) for seed in (7, 7, 8))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).mean() > 0.5 and (first[1] != other[1]).any()
    assert (np.random.get_state()[1] == state).all()
    assert ShortAxisPhantom(7).anatomy == ShortAxisPhantom(7, n_slices=3, **SMALL).anatomy


def test_anatomy_varies_over_the_stated_ejection_fractions():
    ejections = [ShortAxisPhantom(seed).anatomy.ejection for seed in range(60)]
    assert 0.25 <= min(ejections) < 0.35 and 0.6 < max(ejections) <= 0.7
    assert {ShortAxisPhantom(seed).anatomy.group for seed in range(60)} == set(GROUPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": "XYZ"}, "XYZ"),
        ({"n_slices": 0}, "n_slices 0"),
        ({"spacing": (1.0, -1.0, 1.0)}, "-1.0"),
        ({"noise": -0.1}, "-0.1"),
    ],
)
def test_bad_arguments_are_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShortAxisPhantom(**arguments)


@pytest.mark.parametrize("phase", [-0.1, 1.0])
def test_phase_outside_the_cycle(phase):
    with pytest.raises(ValueError, match=str(phase)):
        ShortAxisPhantom().frame(phase)


def test_write_phantom(tmp_path):
    phantom = ShortAxisPhantom(seed=1, n_slices=3, shape=(64, 72), spacing=(2.25, 2.5, 10.0))
    files = write_phantom(tmp_path / "new", "case", phantom, cine_frames=4)
    assert set(files) == {"ed", "ed_gt", "es", "es_gt", "4d", "4d_gt"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(f"case_{end}.nii.gz" for end in files)
    image, labels = phantom.frame(ES_PHASE)
    for path, expected in ((files["es"], image), (files["es_gt"], labels)):
        nifti = nib.load(path)
        assert (np.asarray(nifti.dataobj) == expected).all()
        assert nifti.header.get_zooms() == (2.25, 2.5, 10.0) and nifti.header["sform_code"] == 1
        assert nib.affines.voxel_sizes(nifti.affine) == pytest.approx((2.25, 2.5, 10.0))
    assert nib.load(files["4d"]).shape == nib.load(files["4d_gt"]).shape == (64, 72, 3, 4)
    assert (nib.load(files["4d_gt"]).get_fdata()[..., 0] == nib.load(files["ed_gt"]).get_fdata()).all()


def test_write_phantom_at_chosen_phases_without_labels(tmp_path):
    files = write_phantom(tmp_path, "case", ShortAxisPhantom(n_slices=2, **SMALL), {"mid": 0.7}, with_labels=False)
    assert files == {"mid": tmp_path / "case_mid.nii.gz"} and files["mid"].exists()


def test_write_acdc_like(tmp_path):
    folders = write_acdc_like(tmp_path, 6, n_frames=12, with_cine=True)
    assert [folder.name for folder in folders] == [f"patient{i:03d}" for i in range(1, 7)]
    groups = []
    for folder in folders:
        info = dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())
        assert (info["ED"], info["ES"], info["NbFrame"]) == ("1", "5", "12")
        assert 100 < float(info["Height"]) < 220 and 40 < float(info["Weight"]) < 150
        groups.append(info["Group"])
        ed, es = (f"{folder.name}_frame{int(info[key]):02d}" for key in ("ED", "ES"))
        names = {f"{folder.name}_4d.nii.gz", "Info.cfg"}
        names |= {f"{frame}{end}.nii.gz" for frame in (ed, es) for end in ("", "_gt")}
        assert {path.name for path in folder.iterdir()} == names
        cavity = [(nib.load(folder / f"{frame}_gt.nii.gz").get_fdata() == LV).sum() for frame in (ed, es)]
        assert cavity[0] > cavity[1] > 0
        cine, frame = nib.load(folder / f"{folder.name}_4d.nii.gz"), nib.load(folder / f"{es}.nii.gz")
        assert cine.shape == (64, 72, 4, 12) and (cine.get_fdata()[..., 4] == frame.get_fdata()).all()
    assert groups == [*GROUPS, next(iter(GROUPS))]


def test_acdc_header_has_the_spacing_in_pixdim_only(tmp_path):
    (folder,) = write_acdc_like(tmp_path, 1, spacing=(2.5, 2.25, 20.0))
    for path in folder.glob("*.nii.gz"):
        nifti = nib.load(path)
        assert nifti.header.get_zooms() == (2.5, 2.25, 20.0)
        assert (nifti.affine == np.diag([-1, -1, 1, 1])).all() and nifti.header["sform_code"] == 2


def test_acdc_needs_an_end_systole(tmp_path):
    with pytest.raises(ValueError, match="n_frames 2"):
        write_acdc_like(tmp_path, 1, n_frames=2)
