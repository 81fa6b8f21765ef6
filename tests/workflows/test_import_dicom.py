"""DICOM folders through the pipeline: files, names, what is left out, and no patient's name anywhere."""

import errno
import gzip
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmwrite
from test_run import bundles  # noqa: F401 (a fixture)

from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_phantom
from cardiac_qc_plugin.workflows import import_dicom
from cardiac_qc_plugin.workflows.files import OutputError, read_volume, write_json
from cardiac_qc_plugin.workflows.import_dicom import gather_scans

sys.path.append(str(Path(__file__).parents[1] / "data"))
from dicom_files import GAP, PHASES, ROOT, cine, enhanced, position, set_pixels, value, write  # noqa: E402


def test_phases_as_nifti(tmp_path):
    write(tmp_path / "in", cine())
    inputs = gather_scans(tmp_path / "in", tmp_path / "out")
    assert len(inputs.scans) == PHASES and not inputs.failures and not inputs.skipped
    (case,) = {scan.case.split("/")[0] for scan in inputs.scans}
    for t, scan in enumerate(inputs.scans):
        assert scan.case == f"{case}/phase{t:02d}" and scan.frame is None
        image = nib.load(scan.path)
        np.testing.assert_array_equal(np.asarray(image.dataobj), np.stack([value(z, t).T for z in range(5)], axis=-1))
        np.testing.assert_allclose(image.affine[:3, 3], position(0) * (-1, -1, 1), atol=1e-3)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        np.testing.assert_allclose(image.header.get_zooms(), (1.25, 1.5, GAP), atol=1e-4)
    record = json.loads((tmp_path / "out" / case / "dicom.json").read_text())
    assert record["images"][3][2]["uid"] == f"{ROOT}1.3.4"
    assert record["subject"] == {"height_cm": 165.0, "weight_kg": 60.0}


def test_a_second_run_writes_nothing_and_another_image_does(tmp_path):
    images = cine()
    files = write(tmp_path / "in", images)
    scans = gather_scans(tmp_path / "in", tmp_path / "out").scans
    before = [scan.path.stat().st_mtime_ns for scan in scans]
    again = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert again == scans and [scan.path.stat().st_mtime_ns for scan in scans] == before
    set_pixels(images[0], value(0, 0) + 5)
    images[0].save_as(files[0], enforce_file_format=True)
    gather_scans(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(nib.load(scans[0].path).dataobj)[..., 0], value(0, 0).T + 5)


@pytest.mark.parametrize("files", ["one", "one per slice"])
def test_a_multi_frame_file_is_decoded_once(tmp_path, monkeypatch, files):
    pairs = [(z, t) for z in range(5) for t in range(PHASES)]
    images = [enhanced(pairs)] if files == "one" else [enhanced(pairs[n * PHASES : (n + 1) * PHASES]) for n in range(5)]
    for i, ds in enumerate(images):
        ds.SOPInstanceUID = f"{ROOT}5.{i}"
        del ds.file_meta
        (tmp_path / "in").mkdir(exist_ok=True)
        dcmwrite(tmp_path / "in" / f"{i}", ds, implicit_vr=False, little_endian=True)
    decoded, decode = [], import_dicom.decode_frames
    monkeypatch.setattr(import_dicom, "decode_frames", lambda file: (decoded.append(file.name), decode(file))[1])
    scans = gather_scans(tmp_path / "in", tmp_path / "out").scans
    for t, scan in enumerate(scans):
        expected = np.stack([value(z, t).T for z in range(5)], axis=-1)
        np.testing.assert_array_equal(np.asarray(nib.load(scan.path).dataobj), expected)
    assert len(scans) == PHASES and sorted(decoded) == [f"{i}" for i in range(len(images))]


def results_in(output):
    """Cases with a segmentation, in order."""
    return sorted(path.parent.relative_to(output).as_posix() for path in output.rglob("segmentation.nii.gz"))


def as_run(scans, output):
    """What a run leaves of the scans, in short."""
    for scan in scans:
        write_json(output / scan.case / "qc.json", {"case": scan.case, "stages": {"segmentation": {}}})
        (output / scan.case / "segmentation.nii.gz").touch()


def gather_unless_nothing(folder, output, **options):
    with suppress(ValueError):  # no short-axis cine
        gather_scans(folder, output, **options)


@pytest.mark.parametrize("name_by", ["study", "patient_id"])
@pytest.mark.parametrize("missing", [(2, 3), (0, 1, 2, 3, 4)])
def test_results_of_a_series_that_gives_no_cine_any_more_are_removed(tmp_path, missing, name_by):
    """It failed, of slices at unequal distances, or was skipped, of too few."""
    files = write(tmp_path / "in" / "a", cine(slices=7))
    uids = {"StudyInstanceUID": f"{ROOT}22", "SeriesInstanceUID": f"{ROOT}23", "PatientID": "MRN4712"}
    write(tmp_path / "in" / "b", cine(lambda z, t: uids | {"SOPInstanceUID": f"{ROOT}9.{z}.{t}"}))
    scans = gather_scans(tmp_path / "in", tmp_path / "out", name_by=name_by).scans
    as_run(scans, tmp_path / "out")
    assert results_in(tmp_path / "out") == sorted(scan.case for scan in scans)
    for z in missing:
        for t in range(PHASES):
            files[z * PHASES + t].unlink()
    gather_unless_nothing(tmp_path / "in" / "a", tmp_path / "out", name_by=name_by, series=(8,))  # not asked for
    assert results_in(tmp_path / "out") == sorted(scan.case for scan in scans)
    kept = gather_scans(tmp_path / "in", tmp_path / "out", name_by=name_by).scans
    assert len(kept) == PHASES and results_in(tmp_path / "out") == sorted(scan.case for scan in kept)


def test_results_of_a_series_without_any_valid_image_are_removed(tmp_path):
    write(tmp_path / "in", cine())
    as_run(gather_scans(tmp_path / "in", tmp_path / "out").scans, tmp_path / "out")
    write(tmp_path / "in", cine(lambda z, t: {"PixelSpacing": None}))
    gather_unless_nothing(tmp_path / "in", tmp_path / "out")
    assert results_in(tmp_path / "out") == []


def test_results_of_a_second_stack_that_a_series_has_no_more_are_removed(tmp_path):
    for number in (1, 2):
        images = cine(lambda z, t, n=number: {"SOPInstanceUID": f"{ROOT}1.{z + 1}.{t + 1}.{n}"})
        for image in images:
            set_pixels(image, np.zeros((6, 4 + number), np.int16))
        write(tmp_path / "in" / f"{number}", images)
    as_run(gather_scans(tmp_path / "in", tmp_path / "out").scans, tmp_path / "out")
    assert len(results_in(tmp_path / "out")) == 2 * PHASES
    shutil.rmtree(tmp_path / "in" / "2")
    scans = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert results_in(tmp_path / "out") == [scan.case for scan in scans]


def test_names_of_cases(tmp_path):
    write(tmp_path / "Emilia G", cine())
    for name_by, start in (("patient_id", "MRN4711"), ("patient_name", "Goldmann_Emilia"), ("folder", "Emilia_G")):
        inputs = gather_scans(tmp_path / "Emilia G", tmp_path / name_by, name_by=name_by)
        assert inputs.scans[0].case == f"{start}_series7/phase00"
    assert gather_scans(tmp_path / "Emilia G", tmp_path / "study").scans[0].case.startswith("study_")
    with pytest.raises(ValueError, match="--name_by is one of"):
        gather_scans(tmp_path / "Emilia G", tmp_path / "out", name_by="birthday")


def test_another_patient_of_the_same_name_is_refused(tmp_path):
    """Two runs into one output, as the workers of a cohort are: their images must not mix."""
    for patient, number in (("A", "1"), ("B", "2")):
        images = cine(lambda z, t, number=number: {"StudyInstanceUID": f"{ROOT}9.{number}"})
        write(tmp_path / patient / "SAX", images)
    first = gather_scans(tmp_path / "A", tmp_path / "out", name_by="folder").scans
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = gather_scans(tmp_path / "B", tmp_path / "out", name_by="folder")
    assert first and not second.scans
    assert "SAX_series7 holds another series of that name" in second.failures[0][1]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    assert gather_scans(tmp_path / "A", tmp_path / "out", name_by="folder").scans == first


def test_a_full_disk_leaves_no_half_written_record(tmp_path, monkeypatch):
    write(tmp_path / "in", cine())

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cardiac_qc_plugin.workflows.import_dicom.json.dumps", full)
        with pytest.raises(OutputError, match="No space left"):
            gather_scans(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("dicom.json"))
    assert len(gather_scans(tmp_path / "in", tmp_path / "out").scans) == PHASES


def test_a_kill_while_the_folder_is_claimed_leaves_it_to_the_next_run(tmp_path):
    write(tmp_path / "in", cine())
    pid = os.fork()
    if pid == 0:
        json.dumps = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
        gather_scans(tmp_path / "in", tmp_path / "out")
    os.waitpid(pid, 0)
    assert len(list((tmp_path / "out").iterdir())) == 1  # killed within the case's folder
    assert len(gather_scans(tmp_path / "in", tmp_path / "out").scans) == PHASES


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links(tmp_path, monkeypatch, code):
    def refuse(*paths):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.link", refuse)
    test_another_patient_of_the_same_name_is_refused(tmp_path)


def test_a_name_that_is_taken_meanwhile(tmp_path, monkeypatch):
    """By another process, after the look whether it is free."""
    for patient, number in (("A", "1"), ("B", "2")):
        write(tmp_path / patient / "SAX", cine(lambda z, t, number=number: {"StudyInstanceUID": f"{ROOT}9.{number}"}))
    link = os.link

    def later(temporary, path):
        monkeypatch.setattr("os.link", link)
        assert gather_scans(tmp_path / "B", tmp_path / "out", name_by="folder").scans
        link(temporary, path)

    monkeypatch.setattr("os.link", later)
    inputs = gather_scans(tmp_path / "A", tmp_path / "out", name_by="folder")
    assert not inputs.scans and "holds another series of that name" in inputs.failures[0][1]


def test_three_stacks_of_one_series_are_three_cases(tmp_path):
    """None takes another's place; a second run finds each where it is."""
    for number in range(3):
        rows = value(0, 0).shape[0] + number
        images = cine(lambda z, t, n=number: {"SOPInstanceUID": f"{ROOT}1.{z + 1}.{t + 1}.{n}"})
        for image in images:
            set_pixels(image, np.full((rows, 5), 100 + number, np.int16))
        write(tmp_path / "in" / str(number), images)
    scans = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert len({scan.case for scan in scans}) == len(scans) == 3 * PHASES
    assert {int(np.unique(nib.load(scan.path).dataobj).item()) for scan in scans} == {100, 101, 102}
    assert gather_scans(tmp_path / "in", tmp_path / "out").scans == scans


def test_phases_that_are_gone_leave_no_folder(tmp_path):
    write(tmp_path / "in", cine())
    gather_scans(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    write(tmp_path / "in", cine(phases=PHASES - 1))
    scans = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert len(list((tmp_path / "out").glob("*/phase*"))) == len(scans) == PHASES - 1


def test_other_errors_than_no_nifti_files_are_told(tmp_path):
    """Also of a folder whose name reads like the message of one without."""
    folder = tmp_path / "no NIfTI file"
    write(folder / "dicom", cine())
    for name in ("a/same/x.nii.gz", "b/same/x.nii.gz"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    with pytest.raises(ValueError, match="several files would give the case 'same_x'"):
        gather_scans(folder, tmp_path / "out")


def test_beside_nifti_files(tmp_path):
    write(tmp_path / "in" / "dicom", cine())
    phantom = ShortAxisPhantom(shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))
    write_phantom(tmp_path / "in", "heart", phantom, phases={"ed": 0.0}, with_labels=False)
    cases = [scan.case for scan in gather_scans(tmp_path / "in", tmp_path / "in" / "out").scans]
    assert len(cases) == PHASES + 1 and cases[-1] == "heart_ed"
    again = [scan.case for scan in gather_scans(tmp_path / "in", tmp_path / "in" / "out").scans]
    assert again == cases  # the output lies in the input, and is not taken for scans


@pytest.fixture
def locked(monkeypatch):
    """Files of this name cannot be opened, as without the permission; root, who may run the tests, has it always."""

    def refuse(file, *arguments, opened=open, **options):
        if str(file).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    return "locked"


@pytest.mark.parametrize("dicom", [True, False])
def test_a_file_that_cannot_be_opened_is_skipped(tmp_path, locked, dicom):
    if dicom:
        write(tmp_path / "in" / "dicom", cine())
    phantom = ShortAxisPhantom(shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))
    write_phantom(tmp_path / "in", "heart", phantom, phases={"ed": 0.0}, with_labels=False)
    (tmp_path / "in" / locked).touch()
    inputs = gather_scans(tmp_path / "in", tmp_path / "out")
    assert len(inputs.scans) == dicom * PHASES + 1 and not inputs.failures
    assert list(map(str, inputs.skipped)) == ["file locked (1 image): cannot be read (Permission denied)"]


@pytest.mark.parametrize("dicom", [True, False])
def test_a_folder_that_cannot_be_read_is_a_failed_case(tmp_path, monkeypatch, dicom):
    if dicom:
        write(tmp_path / "in" / "dicom", cine())
    phantom = ShortAxisPhantom(shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))
    write_phantom(tmp_path / "in", "heart", phantom, phases={"ed": 0.0}, with_labels=False)
    (tmp_path / "in" / "locked").mkdir()

    def refuse(path, listed=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", refuse)
    *others, locked = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert [scan.case for scan in others][-1] == "heart_ed" and len(others) == dicom * PHASES + 1
    with pytest.raises(ValueError, match=r"in/locked: this folder cannot be read \(Permission denied\)"):
        read_volume(locked.path)


def test_no_short_axis(tmp_path):
    write(tmp_path / "in", cine(slices=2))
    with pytest.raises(ValueError, match=r"no short-axis cine among its 16 DICOM files(.|\n)*series 7 'cine SAX' \(16"):
        gather_scans(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "skipped_series.csv").read_text().count("\n") == 2
    (scan,) = gather_scans(tmp_path / "in", tmp_path / "out", series=(7,)).scans[:1]
    assert scan.case.endswith("/phase00")
    write_phantom(tmp_path / "in", "heart", ShortAxisPhantom(), phases={"ed": 0.0}, with_labels=False)
    (scan,) = gather_scans(tmp_path / "in", tmp_path / "out").scans
    assert scan.case == "heart_ed"
    with pytest.raises(ValueError, match=r"no short-axis cine(.|\n)*series 7 'cine SAX'.*not among the series asked"):
        gather_scans(tmp_path / "in", tmp_path / "out", series=(98,))  # and not heart_ed in its place


def test_one_phase_that_is_asked_for(tmp_path):
    write(tmp_path / "in", cine(phases=1))
    (scan,) = gather_scans(tmp_path / "in", tmp_path / "out", series=(7,)).scans
    assert "/" not in scan.case and nib.load(scan.path).shape == (5, 6, 5)


def test_a_cine_that_cannot_be_read_is_a_failure(tmp_path):
    files = write(tmp_path / "in", cine())
    files[3].write_bytes(files[3].read_bytes()[:-20])
    inputs = gather_scans(tmp_path / "in", tmp_path / "out")
    assert not inputs.scans
    ((case, reason),) = inputs.failures
    assert case.startswith("study_") and "IM0003" in reason
    assert not list((tmp_path / "out").glob("*/dicom.json"))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_no_patient_name_in_the_reason_of_damaged_pixels(tmp_path, monkeypatch, damage):
    """Neither from the file's name nor from its folder's; what else the file is called is told."""
    names = [f"GOLDMANN_{number:02d}" for number in range(5 * PHASES)]
    files = write(tmp_path / "Emilia G", cine(), names)
    if damage == "truncated":
        files[3].write_bytes(files[3].read_bytes()[:-20])
    else:
        digest = import_dicom.stack_digest
        monkeypatch.setattr(import_dicom, "stack_digest", lambda stack: (digest(stack), files[3].unlink())[0])
    ((_, reason),) = gather_scans(tmp_path / "Emilia G", tmp_path / "out").failures
    assert reason.startswith("..._03: its pixels cannot be read (")
    assert "goldmann" not in reason.lower() and "emilia" not in reason.lower()


def test_run_command(bundles, tmp_path, command):  # noqa: F811
    """One command from DICOM to report; the patient's name is in the files read, and in none written."""
    phantom, _ = ShortAxisPhantom(seed=1, shape=(64, 72), n_slices=5, spacing=(2.5, 2.5, 8.0)).cine(6)
    images = cine(phases=6)
    for ds in images:
        z, t = divmod(ds.InstanceNumber - 1, PHASES)
        set_pixels(ds, phantom[..., z, t].T.astype(np.int16))
        ds.PixelSpacing = [2.5, 2.5]
        ds.SeriesDescription = "SAX Goldmann"

    def other(z, t):
        uids = {"SeriesInstanceUID": f"{ROOT}9", "SOPInstanceUID": f"{ROOT}9.{z}.{t}"}
        return uids | {"SeriesNumber": 9, "ImagePositionPatient": (position(z) + z * z).tolist()}

    broken = cine(other)
    write(tmp_path / "in" / "Goldmann", images)
    write(tmp_path / "in" / "broken", broken)
    settings = ("--model", "dn", "--samples", 2, "--device", "cpu", "--bundle_dir", bundles)
    done = command("run", "--input", tmp_path / "in", "--output", tmp_path / "out", *settings)
    assert done.returncode == 1 and "6 scan(s)" in done.stdout, done.stderr
    assert "1 case(s) could not be processed" in done.stderr and "series 9" in done.stderr
    texts = [done.stdout, done.stderr]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            texts += [str(path), (gzip.decompress(content) if path.suffix == ".gz" else content).decode("latin-1")]
    assert not [text for text in texts if "goldmann" in text.lower() or "MRN4711" in text]
