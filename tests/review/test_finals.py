"""Final labels in MONAI Label's folders, written as 3D Slicer does: accepted by `correct --edited`."""

import itk
import nibabel as nib
import numpy as np
import pytest
from seats import SHAPE, automatic, flagged, write_predictions

from cardiac_qc_plugin.workflows.correct import correct

CASES = ("p1_ed", "p1_es")


@pytest.fixture
def studies(tmp_path):
    """`cardiac_qc` has run on two scans: its results, and the labels that the datastore keeps of each."""
    studies = tmp_path / "studies"
    results = studies / "cardiac_qc" / "results"
    results.parent.mkdir(parents=True)
    write_predictions(tmp_path).rename(results)
    for case in CASES:
        (tmp_path / "scans" / f"{case}.nii.gz").rename(studies / f"{case}.nii.gz")
        for tag, file in (("original", "segmentation"), ("bmap", "bayesian"), ("failure", "failure_regions")):
            (studies / "labels" / tag).mkdir(parents=True, exist_ok=True)
            content = (results / case / f"{file}.nii.gz").read_bytes()
            (studies / "labels" / tag / f"{case}.nii.gz").write_bytes(content)
    (studies / "labels" / "final").mkdir()
    return studies


def submit(studies, case, labels):
    """ITK writes 16-bit labels on the scan's grid, as Slicer's exporter does."""
    image = itk.imread(str(studies / "labels" / "original" / f"{case}.nii.gz"), itk.SS)
    itk.array_view_from_image(image)[:] = labels.T
    itk.imwrite(image, str(studies / "labels" / "final" / f"{case}.nii.gz"))


def edited(*voxels):
    labels = automatic()
    for voxel in voxels:
        labels[voxel] = 3
    return labels


INSIDE, OUTSIDE = (16, 16, 1), (5, 5, 2)


def run(studies):
    return correct(studies / "cardiac_qc" / "results", studies.parent / "out", edited=studies / "labels" / "final")


def corrected(studies, case):
    return np.asanyarray(nib.load(studies.parent / "out" / case / "segmentation.nii.gz").dataobj)


def test_finals_are_accepted(studies):
    for case in CASES:
        submit(studies, case, edited(INSIDE))
    assert not run(studies).failures
    for case in CASES:
        labels = corrected(studies, case)
        np.testing.assert_array_equal(labels, edited(INSIDE))
        assert labels.dtype == np.uint8 and not ((labels != automatic()) & (flagged() == 0)).any()


def test_a_final_that_edits_outside_is_refused_and_the_others_go_on(studies):
    submit(studies, "p1_ed", edited(INSIDE, OUTSIDE))
    submit(studies, "p1_es", edited(INSIDE))
    failures = run(studies).failures
    assert list(failures) == ["p1_ed"]
    assert "final/p1_ed.nii.gz: 1 voxel(s) edited outside the flagged regions" in failures["p1_ed"]
    assert not (studies.parent / "out" / "p1_ed" / "segmentation.nii.gz").exists()
    np.testing.assert_array_equal(corrected(studies, "p1_es"), edited(INSIDE))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "PSR"])
def test_a_final_with_turned_axes_is_turned_back(studies, axes):
    """An editor may store the same labels with other axes first, or mirrored, and says so in the affine."""
    for case in CASES:
        submit(studies, case, edited(INSIDE))
        path = studies / "labels" / "final" / f"{case}.nii.gz"
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        turned = image.as_reoriented(turn)
        content = turned.to_bytes()
        path.unlink()
        path.with_suffix("").write_bytes(content)
    assert not run(studies).failures
    np.testing.assert_array_equal(corrected(studies, "p1_ed"), edited(INSIDE))


def test_a_final_on_another_grid_is_refused(studies):
    for case in CASES:
        submit(studies, case, edited(INSIDE))
        path = studies / "labels" / "final" / f"{case}.nii.gz"
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[..., :-1], image.affine), path)
    failures = run(studies).failures
    assert set(failures) == set(CASES) and f"{SHAPE[:2]}"[:-1] in failures["p1_ed"] and "shape" in failures["p1_ed"]


def test_the_folder_of_all_labels_is_ambiguous(studies):
    for case in CASES:
        submit(studies, case, edited(INSIDE))
    outcome = correct(studies / "cardiac_qc" / "results", studies.parent / "out", edited=studies / "labels")
    assert "label files for p1_ed" in outcome.failures["p1_ed"] and "final" in outcome.failures["p1_ed"]
