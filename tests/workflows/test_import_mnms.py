"""M&Ms and M&Ms-2, made of phantoms in ACDC's layout: back in that layout, the same volumes come out."""

import csv
import re

import nibabel as nib
import numpy as np
import pytest

from cardiac_qc_plugin.data import acdc_datalist
from cardiac_qc_plugin.data.acdc import read_info
from cardiac_qc_plugin.data.phantom import write_acdc_like
from cardiac_qc_plugin.workflows.import_mnms import import_mnms

EXCHANGE = {0: 0, 1: 3, 2: 2, 3: 1}
TURN = np.array([[0, 1], [1, 1], [2, -1]])  # nibabel's: slices in the other order, each at its place


@pytest.fixture(scope="module")
def acdc(tmp_path_factory):
    root = tmp_path_factory.mktemp("acdc")
    write_acdc_like(root, 2, n_slices=5, n_frames=6, with_cine=True)
    for path in root.rglob("*.nii.gz"):  # a place in the patient, oblique and with an offset, as scanners write it
        image = nib.load(path)
        zooms = image.header.get_zooms()
        turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0.5, 0.2) @ np.diag(zooms[:3]), (10, -20, 30))
        data = np.asanyarray(image.dataobj)
        placed = nib.Nifti1Image(data, turn)
        placed.set_sform(turn, 1)
        placed.set_qform(turn, 1)
        placed.header.set_zooms(zooms)
        nib.save(placed, path)
    return root


def frames(patient):
    info = read_info(patient / "Info.cfg")
    return {phase: f"{patient.name}_frame{int(info[phase]):02d}" for phase in ("ED", "ES")}, info


def load(path):
    image = nib.load(path)
    return np.asanyarray(image.dataobj), image


def as_the_challenges(labels):
    return np.vectorize(EXCHANGE.get)(labels).astype(np.uint8)


def write_mnms(acdc, root, turn=False):
    rows = []
    for patient in sorted(acdc.glob("patient*")):
        names, info = frames(patient)
        code = f"A{patient.name[-3:]}"
        folder = root / "Training" / "Labeled" / code
        folder.mkdir(parents=True)
        cine, image = load(patient / f"{patient.name}_4d.nii.gz")
        labels = np.zeros(cine.shape, np.uint8)
        for phase in ("ED", "ES"):
            labels[..., int(info[phase]) - 1] = as_the_challenges(load(patient / f"{names[phase]}_gt.nii.gz")[0])
        for data, name in ((cine, "sa"), (labels, "sa_gt")):
            out = nib.Nifti1Image(data, image.affine, image.header, dtype=data.dtype)
            nib.save(out.as_reoriented(TURN) if turn else out, folder / f"{code}_{name}.nii.gz")
        row = {"": len(rows), "External code": code, "VendorName": "Siemens", "Vendor": "A", "Centre": 1}
        rows.append(row | {"Pathology": "DCM", "Height": info["Height"], "Weight": "N/A"})
    with open(root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


def write_mnms2(acdc, root):
    for number, patient in enumerate(sorted(acdc.glob("patient*")), start=1):
        names, _ = frames(patient)
        folder = root / "dataset" / f"{number:03d}"
        folder.mkdir(parents=True)
        for phase, name in names.items():
            for ending in ("", "_gt"):
                data, image = load(patient / f"{name}{ending}.nii.gz")
                data = as_the_challenges(data) if ending else data
                nib.save(
                    nib.Nifti1Image(data, image.affine, image.header),
                    folder / f"{number:03d}_SA_{phase}{ending}.nii.gz",
                )
                long_axis = nib.Nifti1Image(data[..., :1], None, image.header)
                nib.save(long_axis, folder / f"{number:03d}_LA_{phase}{ending}.nii.gz")
    (root / "dataset_information.csv").write_text("SUBJECT_CODE,DISEASE,VENDOR\n1,NOR,Philips\n2,FALL,GE\n")
    return root


def same_stack(one, other):
    data, image = load(one)
    wanted, reference = load(other)
    np.testing.assert_array_equal(data, wanted)
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-4)
    np.testing.assert_allclose(image.header.get_zooms(), reference.header.get_zooms(), rtol=1e-6)
    assert image.header["sform_code"] > 0  # says where it lies


@pytest.mark.parametrize("turn", [False, True])
def test_mnms(acdc, tmp_path, turn):
    outcome = import_mnms(write_mnms(acdc, tmp_path / "mnms", turn), tmp_path / "out")
    assert not outcome.failures and f"2 patients, {2 * turn} of them" in outcome.text
    for patient in acdc.glob("patient*"):
        names, info = frames(patient)
        code = f"A{patient.name[-3:]}"
        ours, written = frames(tmp_path / "out" / code)
        for phase in ("ED", "ES"):
            assert ours[phase] == names[phase].replace(patient.name, code)
            for ending in (".nii.gz", "_gt.nii.gz"):
                same_stack(tmp_path / "out" / code / f"{ours[phase]}{ending}", patient / f"{names[phase]}{ending}")
        expected = {name: info[name] for name in ("ED", "ES", "Height")}
        assert written == expected | {"Group": "DCM", "Vendor": "Siemens", "Centre": "1"}
    datalist = acdc_datalist(tmp_path / "out", folds=2)
    assert {item["meta"]["patient"] for item in datalist["training"]} == {"A001", "A002"}
    assert datalist["name"] == "out" and "reference" not in datalist
    with pytest.raises(ValueError, match="ACDC's patients only"):
        acdc_datalist(tmp_path / "out", split="released_code")


def test_mnms2(acdc, tmp_path):
    assert not import_mnms(write_mnms2(acdc, tmp_path / "mnms2"), tmp_path / "out").failures
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001", "002"]  # no long axis
    for number, patient in enumerate(sorted(acdc.glob("patient*")), start=1):
        folder = tmp_path / "out" / f"{number:03d}"
        for frame, name in enumerate(frames(patient)[0].values(), start=1):
            for ending in (".nii.gz", "_gt.nii.gz"):
                same_stack(folder / f"{number:03d}_frame{frame:02d}{ending}", patient / f"{name}{ending}")
    info = read_info(folder / "Info.cfg")
    assert info == {"ED": "1", "ES": "2", "Group": "FALL", "Vendor": "GE"}


def test_a_heart_whose_end_systole_comes_first(acdc, tmp_path):
    """Which phase is end-diastole is told by the LV, not by the order of phases."""
    root = write_mnms(acdc, tmp_path / "mnms")
    for path in root.rglob("A001_sa*.nii.gz"):
        data, image = load(path)
        nib.save(nib.Nifti1Image(data[..., ::-1], None, image.header), path)
    import_mnms(root, tmp_path / "out")
    names, info = frames(acdc / "patient001")
    _, written = frames(tmp_path / "out" / "A001")
    assert (int(written["ED"]), int(written["ES"])) == (6 + 1 - int(info["ED"]), 6 + 1 - int(info["ES"]))
    ours = tmp_path / "out" / "A001" / f"A001_frame{int(written['ED']):02d}.nii.gz"
    same_stack(ours, acdc / "patient001" / f"{names['ED']}.nii.gz")


def three_phases(path):
    data, image = load(path)
    data[..., 1] = data[..., 0]
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def acdc_numbers(path):
    data, image = load(path)
    nib.save(nib.Nifti1Image(as_the_challenges(data), None, image.header), path)


def shorter(path):
    data, image = load(path)
    nib.save(nib.Nifti1Image(data[:, :, :-1], None, image.header), path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("A001_sa_gt.nii.gz", three_phases, "A001_sa_gt.nii.gz: 3 phase(s) with labels, but end-diastole"),
        ("A001_sa_gt.nii.gz", acdc_numbers, "numbered as in ACDC"),
        ("A001_sa_gt.nii.gz", shorter, "Give the labels of this scan, on its own grid"),
        ("A001_sa.nii.gz", truncated, "A001_sa.nii.gz: the file is truncated or damaged"),
        ("A001_sa.nii.gz", lambda path: path.unlink(), "A001_sa.nii.gz: no such file"),
    ],
)
def test_a_broken_patient_is_named_and_the_other_is_imported(acdc, tmp_path, name, harm, message):
    root = write_mnms(acdc, tmp_path / "mnms")
    harm(next(root.rglob(name)))
    outcome = import_mnms(root, tmp_path / "out")
    assert list(outcome.failures) == ["A001"] and re.search(re.escape(message), outcome.failures["A001"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["A002"]


def test_without_its_table(acdc, tmp_path, capsys):
    root = write_mnms2(acdc, tmp_path / "mnms2")
    (root / "dataset_information.csv").unlink()
    import_mnms(root, tmp_path / "out")
    assert "001, 002 (2 in all)" in capsys.readouterr().err
    assert read_info(tmp_path / "out" / "002" / "Info.cfg")["Group"] == "unknown"


def test_another_folder(tmp_path):
    with pytest.raises(ValueError, match="no labels of M&Ms"):
        import_mnms(tmp_path, tmp_path / "out")


def test_command(acdc, tmp_path, command):
    """From the challenge's files to scores, by the commands of the docs."""
    root = write_mnms(acdc, tmp_path / "mnms", turn=True)
    done = command("import_mnms", "--input", root, "--output", tmp_path / "data")
    assert done.returncode == 0 and "2 patients" in done.stdout
    done = command("datalist", "--root", tmp_path / "data", "--output", tmp_path / "folds.json", "--folds", 2)
    assert done.returncode == 0 and "4 scans in 2 folds" in done.stdout
