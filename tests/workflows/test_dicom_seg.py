"""DICOM Segmentations, read back by highdicom and bit by bit from their own tags, against the NIfTI masks."""

import shutil
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import config, dcmread, dcmwrite
from pydicom.uid import EnhancedMRImageStorage

from cardiac_qc_plugin.workflows.dicom_seg import write_dicom_seg
from cardiac_qc_plugin.workflows.import_dicom import gather_scans

sys.path.append(str(Path(__file__).parents[1] / "data"))
from dicom_files import GAP, PHASES, ROOT, SLICES, cine, enhanced, write  # noqa: E402

hd = pytest.importorskip("highdicom")


def run_on(folder, output):
    """Masks at random on what was imported, as run would leave them; by case."""
    rng = np.random.default_rng(0)
    masks = {}
    for scan in gather_scans(folder, output).scans:
        image = nib.load(scan.path)
        labels = rng.integers(0, 4, image.shape).astype(np.uint8)
        regions = (rng.random(image.shape) > 0.7).astype(np.uint16) * 5
        for name, array in (("segmentation", labels), ("failure_regions", regions)):
            nib.save(nib.Nifti1Image(array, image.affine), scan.path.with_name(f"{name}.nii.gz"))
        masks[scan.path.parent] = labels, regions
    return masks


def test_read_back_equal_to_the_nifti_masks(tmp_path):
    write(tmp_path / "in", cine())
    masks = run_on(tmp_path / "in", tmp_path / "out")
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {} and outcome.text.startswith("16 DICOM Segmentation(s)")
    for t, (folder, (labels, regions)) in enumerate(masks.items()):
        segmentation = hd.seg.segread(folder / "segmentation.dcm")
        uids = [f"{ROOT}1.{z + 1}.{t + 1}" for z in range(SLICES)]
        read = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
        np.testing.assert_array_equal(read.transpose(2, 1, 0), labels)  # (slice, row, column)
        assert [segmentation.get_segment_description(n).segment_label for n in (1, 2, 3)] == [
            "RV cavity", "LV myocardium", "LV cavity",
        ]  # fmt: skip
        failure = hd.seg.segread(folder / "failure_regions.dcm")
        read = failure.get_pixels_by_source_instance(uids)[..., 0]
        np.testing.assert_array_equal(read.transpose(2, 1, 0), regions > 0)


def test_old_files_without_a_preamble(tmp_path):
    """They are read, so they get Segmentations."""
    (tmp_path / "in").mkdir()
    for i, ds in enumerate(cine()):
        del ds.file_meta
        dcmwrite(tmp_path / "in" / f"{i}", ds, implicit_vr=False, little_endian=True)
    masks = run_on(tmp_path / "in", tmp_path / "out")
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {} and all((folder / "segmentation.dcm").is_file() for folder in masks)


def test_frames_lie_where_the_voxels_are(tmp_path):
    """Without highdicom: each frame's own position and segment number, and the affine of the NIfTI file."""
    write(tmp_path / "in", cine())
    (folder, (labels, _)), *_ = run_on(tmp_path / "in", tmp_path / "out").items()
    write_dicom_seg(tmp_path / "out", tmp_path / "in")
    ds, affine = dcmread(folder / "segmentation.dcm"), nib.load(folder / "image.nii.gz").affine
    orientation = np.array(
        ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, float
    ).reshape(2, 3)
    down, across = map(float, ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing)
    found = np.zeros_like(labels)
    for frame, pixels in zip(ds.PerFrameFunctionalGroupsSequence, ds.pixel_array, strict=True):
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(pixels):
            lps = corner + column * across * orientation[0] + row * down * orientation[1]
            index = np.linalg.solve(affine, [*(lps * (-1, -1, 1)), 1])[:3].round().astype(int)
            found[tuple(index)] = number
    np.testing.assert_array_equal(found, labels)


def leading_zeros(z, t):
    uids = {"StudyInstanceUID": "2.16.0124.1", "SeriesInstanceUID": "2.16.0124.2"}
    dates = {"StudyDate": "20120000", "PatientBirthDate": "00000000", "PatientName": "Goldmann"}
    return uids | dates | {"SOPInstanceUID": f"2.16.0124.00{z}.0{t}", "FrameOfReferenceUID": f"2.16.9.0{z}.{t}"}


@pytest.mark.filterwarnings("ignore:Invalid value")
def test_de_identified_images(tmp_path, capfd):
    """Sunnybrook's kind: invalid UIDs and dates, a frame of reference per file, a name of one part."""
    with config.disable_value_validation():
        write(tmp_path / "in", cine(leading_zeros))
    masks = run_on(tmp_path / "in", tmp_path / "out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {}
    said = outcome.text + "".join(map(str, caught)) + "".join(capfd.readouterr())
    assert "Goldmann" not in said
    folder, (labels, _) = list(masks.items())[3]
    with config.disable_value_validation():
        segmentation = hd.seg.segread(folder / "segmentation.dcm")
        read = segmentation.get_pixels_by_source_instance(
            [f"2.16.0124.00{z}.03" for z in range(SLICES)], combine_segments=True
        )
    np.testing.assert_array_equal(read.transpose(2, 1, 0), labels)


def test_a_series_for_each_slice(tmp_path):
    """The Segmentation lists each image under its own series, also for a file that two cases came from."""
    write(tmp_path / "in", cine(lambda z, t: {"SeriesInstanceUID": f"{ROOT}3.{z + 1}", "SeriesNumber": 10 + z}))
    masks = run_on(tmp_path / "in", tmp_path / "out")
    (case,) = (folder.parent for folder in list(masks)[:1])
    shutil.copytree(case, case.with_name("again"))
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {} and outcome.text.startswith(f"{4 * PHASES} DICOM Segmentation(s)")
    for folder in (case, case.with_name("again")):
        for t, labels in enumerate(labels for labels, _ in masks.values()):
            segmentation = hd.seg.segread(folder / f"phase{t:02d}" / "segmentation.dcm")
            listed = {
                series.SeriesInstanceUID: [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence]
                for series in segmentation.ReferencedSeriesSequence
            }
            assert listed == {f"{ROOT}3.{z + 1}": [f"{ROOT}1.{z + 1}.{t + 1}"] for z in range(SLICES)}
            uids = [uid for (uid,) in listed.values()]
            read = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
            np.testing.assert_array_equal(read.transpose(2, 1, 0), labels)


def test_the_copy_of_a_missing_slice_is_left_out(tmp_path):
    write(tmp_path / "in", cine(lambda z, t: None if z == 2 else {}))
    masks = run_on(tmp_path / "in", tmp_path / "out")
    assert write_dicom_seg(tmp_path / "out", tmp_path / "in").failures == {}
    folder, (labels, _) = next(iter(masks.items()))
    uids = [f"{ROOT}1.{z + 1}.1" for z in (0, 1, 3, 4)]
    read = hd.seg.segread(folder / "segmentation.dcm").get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(read.transpose(2, 1, 0), labels[..., [0, 1, 3, 4]])


def test_an_empty_mask_is_not_written_and_an_old_file_removed(tmp_path):
    write(tmp_path / "in", cine())
    folder = next(iter(run_on(tmp_path / "in", tmp_path / "out")))
    write_dicom_seg(tmp_path / "out", tmp_path / "in")
    image = nib.load(folder / "image.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), folder / "failure_regions.nii.gz")
    write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert not (folder / "failure_regions.dcm").exists() and (folder / "segmentation.dcm").exists()


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no dicom\.json"):
        write_dicom_seg(tmp_path, tmp_path)
    files = write(tmp_path / "in", cine())
    run_on(tmp_path / "in", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for folder in ("nosuch", "empty"):
        with pytest.raises(ValueError, match=f"{folder}: no such folder, or no DICOM file in it"):
            write_dicom_seg(tmp_path / "out", tmp_path / folder)
    files[0].unlink()
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    ((case, message),) = outcome.failures.items()
    assert case.endswith("phase00") and "1 of its 5 source images" in message
    (record,) = (tmp_path / "out").glob("*/dicom.json")
    record.write_text('{"images": [')
    ((case, message),) = write_dicom_seg(tmp_path / "out", tmp_path / "in").failures.items()
    assert case == record.parent.name and f"{record}: cannot be read as JSON" in message


def test_a_tag_that_highdicom_cannot_do_without_fails_its_case_alone(tmp_path):
    write(tmp_path / "in", cine())
    run_on(tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in", cine(lambda z, t: {"PixelSpacing": None} if t == 0 else {}))
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.text.startswith(f"{2 * (PHASES - 1)} DICOM Segmentation(s)")
    ((case, message),) = outcome.failures.items()
    assert case.endswith("phase00") and "PixelSpacing" in message


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize(
    ("changes", "keyword", "expected"),
    [
        ({"Modality": None}, "Modality", "SEG"),
        ({"PatientSex": "U"}, "PatientSex", ""),
        ({"PatientSex": "F"}, "PatientSex", "F"),
        ({"SliceThickness": None}, "SliceThickness", GAP),
        ({"SliceThickness": 0}, "SliceThickness", GAP),
        ({"SliceThickness": 6}, "SliceThickness", 6),
    ],
)
@pytest.mark.parametrize("multi_frame", [True, False])
def test_what_highdicom_needs_or_refuses(tmp_path, changes, keyword, expected, multi_frame):
    images = cine(lambda z, t: changes)
    if multi_frame:
        images = [enhanced([(z, t) for z in range(SLICES) for t in range(PHASES)])]
        (measures,) = images[0].SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        for name, content in changes.items():
            ds = measures if name == "SliceThickness" else images[0]
            measures.pop(name, None)
            images[0].pop(name, None)
            if content is not None:
                setattr(ds, name, content)
    write(tmp_path / "in", images)
    (folder, _), *_ = run_on(tmp_path / "in", tmp_path / "out").items()
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {} and outcome.text.startswith(f"{2 * PHASES} DICOM Segmentation(s)")
    ds = dcmread(folder / "segmentation.dcm")
    if keyword == "SliceThickness":
        (ds,) = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert ds[keyword].value == expected


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["ISO_IR 100", "ISO 2022 IR 87"], "Müller=山田"),
        ("ISO 2022 IR 100", "Müller^Jörg"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 6", "Goldmann^Emilia"),
        ("", "Goldmann^Emilia"),
        (None, "Goldmann^Emilia"),
    ],
)
@pytest.mark.parametrize("multi_frame", [True, False])
def test_names_in_any_character_set(tmp_path, character_set, name, multi_frame):
    images = [enhanced([(z, t) for z in range(SLICES) for t in range(PHASES)])] if multi_frame else cine()
    for ds in images:
        if character_set is not None:
            ds.SpecificCharacterSet = character_set
        ds.PatientName = name
    write(tmp_path / "in", images)
    (folder, _), *_ = run_on(tmp_path / "in", tmp_path / "out").items()
    assert write_dicom_seg(tmp_path / "out", tmp_path / "in").failures == {}
    ds = dcmread(folder / "segmentation.dcm")
    assert str(ds.PatientName) == name and ds.SpecificCharacterSet == "ISO_IR 192"


def test_an_image_that_cannot_be_opened_is_missing(tmp_path, monkeypatch):
    files = write(tmp_path / "in", cine())
    run_on(tmp_path / "in", tmp_path / "out")

    def refuse(file, *arguments, opened=open, **options):
        if str(file) == str(files[0]):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    ((case, message),) = outcome.failures.items()
    assert case.endswith("phase00") and "1 of its 5 source images are not in the DICOM folder, or cannot" in message


@pytest.mark.parametrize("files", ["one", "one per slice"])
def test_frames_of_enhanced_mr(tmp_path, files):
    """Segments refer to the frames of the multi-frame files, in whatever order these have them."""
    pairs = [(z, t) for z in range(SLICES) for t in range(PHASES)]
    order = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))]
    parts = [order] if files == "one" else [[pair for pair in order if pair[0] == z] for z in range(SLICES)]
    images = [enhanced(part) for part in parts]
    for number, ds in enumerate(images):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}5.{number + 1}"
    write(tmp_path / "in", images)
    masks = run_on(tmp_path / "in", tmp_path / "out")
    outcome = write_dicom_seg(tmp_path / "out", tmp_path / "in")
    assert outcome.failures == {} and outcome.text.startswith(f"{2 * PHASES} DICOM Segmentation(s)")
    for t, (folder, (labels, _)) in enumerate(masks.items()):
        segmentation = hd.seg.segread(folder / "segmentation.dcm")
        references = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert [item.ReferencedSOPInstanceUID for item in references] == [ds.SOPInstanceUID for ds in images]
        assert {item.ReferencedSOPClassUID for item in references} == {EnhancedMRImageStorage}
        assert not any("ReferencedFrameNumber" in item for item in references)
        read = [
            segmentation.get_pixels_by_source_frame(ds.SOPInstanceUID, [part.index((z, t)) + 1], combine_segments=True)
            for z in range(SLICES)
            for ds, part in zip(images, parts, strict=True)
            if (z, t) in part
        ]
        np.testing.assert_array_equal(np.concatenate(read).transpose(2, 1, 0), labels)
