import json
from collections import Counter

import pytest
from monai.auto3dseg.utils import datafold_read
from monai.data import load_decathlon_datalist

from cardiac_qc_plugin.data import acdc_datalist
from cardiac_qc_plugin.data.acdc import read_info, stratified_folds

GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")  # 20 patients each, as in ACDC


def group_of(number: int) -> str:
    return GROUPS[(number - 1) // 20]


def add_patient(root, number: int, ed: int = 1, es: int = 12) -> None:
    folder = root / f"patient{number:03d}"
    folder.mkdir()
    (folder / "Info.cfg").write_text(
        f"ED: {ed}\nES: {es}\nGroup: {group_of(number)}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
    )
    for frame in (ed, es):
        for ending in (".nii.gz", "_gt.nii.gz"):
            (folder / f"{folder.name}_frame{frame:02d}{ending}").touch()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All 100 patients with empty files, and what else lies in the real folder."""
    folder = tmp_path_factory.mktemp("training")
    for number in range(1, 101):
        add_patient(folder, number, ed=1 + number % 4, es=9 + number % 5)
    (folder / "MANDATORY_CITATION.md").touch()
    (folder / "patient090" / "patient090_4d.nii.gz").touch()
    return folder


def fold_of(datalist: dict) -> dict[int, int]:
    """Fold by patient number; both phases have to lie in one fold."""
    folds: dict[int, set[int]] = {}
    for item in datalist["training"]:
        folds.setdefault(int(item["meta"]["patient"][-3:]), set()).add(item["fold"])
    assert all(len(fold) == 1 for fold in folds.values())
    return {number: fold.pop() for number, fold in folds.items()}


def test_items(root):
    datalist = acdc_datalist(root)
    items = datalist["training"]
    assert len(items) == 200
    assert items[0] == {
        "image": "patient001/patient001_frame02.nii.gz",
        "label": "patient001/patient001_frame02_gt.nii.gz",
        "fold": items[0]["fold"],
        "meta": {"patient": "patient001", "phase": "ED", "group": "DCM"},
    }
    assert Counter(item["meta"]["phase"] for item in items) == {"ED": 100, "ES": 100}
    assert len({item["image"] for item in items}) == 200
    for item in items:
        number = int(item["meta"]["patient"][-3:])
        frame = {"ED": 1 + number % 4, "ES": 9 + number % 5}[item["meta"]["phase"]]
        assert item["image"] == f"patient{number:03d}/patient{number:03d}_frame{frame:02d}.nii.gz"
        assert item["label"] == item["image"].replace(".nii.gz", "_gt.nii.gz")
        assert item["meta"]["group"] == group_of(number)
    assert json.loads(json.dumps(datalist)) == datalist


def folds_of_groups(folds: int, seed: int) -> dict[int, int]:
    """The assignment alone, without files."""
    result = stratified_folds({f"patient{n:03d}": group_of(n) for n in range(1, 101)}, folds, seed)
    return {int(patient[-3:]): fold for patient, fold in result.items()}


@pytest.mark.parametrize("folds", [2, 3, 4, 5, 7, 10])
def test_folds_are_stratified_and_balanced(folds):
    for seed in range(40):
        fold = folds_of_groups(folds, seed)
        assert sorted(fold) == list(range(1, 101))
        assert fold[74] == fold[76], seed  # one scan, labelled twice
        for group in GROUPS:
            counts = [sum(group_of(n) == group and fold[n] == f for n in fold) for f in range(folds)]
            assert max(counts) - min(counts) <= 1, (seed, group, counts)
        totals = [list(fold.values()).count(f) for f in range(folds)]
        assert max(totals) - min(totals) <= 1, (seed, totals)


def test_folds_of_the_files_are_those_of_the_groups(root):
    for folds, seed in ((4, 0), (5, 3)):
        assert fold_of(acdc_datalist(root, folds=folds, seed=seed)) == folds_of_groups(folds, seed)


def test_seed_decides_and_is_recorded(root):
    first, again, other = (acdc_datalist(root, seed=seed) for seed in (5, 5, 6))
    assert first == again and first["seed"] == 5 and other["seed"] == 6
    assert first["split"] == "stratified"
    same = sum(fold_of(first)[n] == fold_of(other)[n] for n in range(1, 101))
    assert same < 60  # 25 expected by chance


def test_every_fold_can_hold_any_patient():
    """The twins, too: no patient is tied to a fold by its number."""
    seen = {n: {folds_of_groups(4, seed)[n] for seed in range(40)} for n in (1, 50, 74, 100)}
    assert all(folds == {0, 1, 2, 3} for folds in seen.values())


@pytest.mark.parametrize("numbers", [(73, 74, 75), (73, 75, 76), (1, 2, 3, 21, 22, 41, 61)])
def test_part_of_the_patients(numbers, tmp_path):
    for number in numbers:
        add_patient(tmp_path, number)
    fold = fold_of(acdc_datalist(tmp_path, folds=2))
    assert sorted(fold) == sorted(numbers)
    assert set(fold.values()) == {0, 1}


def test_released_code_folds(root):
    datalist = acdc_datalist(root, split="released_code", seed=3)
    fold = fold_of(datalist)
    assert datalist["split"] == "released_code"
    for start, expected in ((1, 3), (6, 2), (11, 1), (16, 0)):
        numbers = [n for block in range(start, 101, 20) for n in range(block, block + 5)]
        assert [n for n in fold if fold[n] == expected] == numbers
    assert [n for n in fold if fold[n] == 0] == [
        *range(16, 21), *range(36, 41), *range(56, 61), *range(76, 81), *range(96, 101)
    ]  # fmt: skip


def test_monais_readers_take_the_datalist(root, tmp_path):
    path = tmp_path / "folds.json"
    path.write_text(json.dumps(acdc_datalist(root)))
    training, validation = datafold_read(str(path), str(root), fold=1)
    assert (len(training), len(validation)) == (150, 50)
    assert {item["fold"] for item in validation} == {1} and {item["fold"] for item in training} == {0, 2, 3}
    items = load_decathlon_datalist(str(path), data_list_key="training", base_dir=str(root))
    assert len(items) == 200
    for item in (*training, *validation, *items):
        for key in ("image", "label"):
            assert item[key].startswith(str(root)) and (root / item[key]).is_file()
        assert set(item["meta"]) == {"patient", "phase", "group"} and "/" not in item["meta"]["patient"]


# Errors


@pytest.mark.parametrize("options", [{"folds": 1}, {"split": "random"}, {"split": "released_code", "folds": 5}])
def test_unknown_settings(root, options):
    with pytest.raises(ValueError, match="got") as error:
        acdc_datalist(root, **options)
    assert str(*list(options.values())[-1:]) in str(error.value)


def test_folder_without_patients(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        acdc_datalist(tmp_path)


@pytest.mark.parametrize("name", ["patient002_frame01.nii.gz", "patient002_frame12_gt.nii.gz"])
def test_missing_frame(name, tmp_path):
    for number in (1, 2):
        add_patient(tmp_path, number)
    (tmp_path / "patient002" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*patient002/Info.cfg"):
        acdc_datalist(tmp_path)


def test_fewer_patients_than_folds(tmp_path):
    for number in (1, 2):
        add_patient(tmp_path, number)
    assert {item["fold"] for item in acdc_datalist(tmp_path, folds=2)["training"]} == {0, 1}
    with pytest.raises(ValueError, match="2 patients cannot be put into 3 folds"):
        acdc_datalist(tmp_path, folds=3)


def test_patient_without_info(tmp_path):
    """It must not just be left out."""
    for number in (1, 2):
        add_patient(tmp_path, number)
    (tmp_path / "patient002" / "Info.cfg").unlink()
    with pytest.raises(ValueError, match="patient002"):
        acdc_datalist(tmp_path)


@pytest.mark.parametrize("entry", ["ED", "ES", "Group"])
def test_info_without_an_entry(entry, tmp_path):
    add_patient(tmp_path, 3)
    path = tmp_path / "patient003" / "Info.cfg"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(entry)))
    with pytest.raises(ValueError, match=f"patient003/Info.cfg: no entry for {entry}"):
        acdc_datalist(tmp_path)


def test_info_with_a_frame_that_is_no_number(tmp_path):
    add_patient(tmp_path, 3)
    path = tmp_path / "patient003" / "Info.cfg"
    path.write_text(path.read_text().replace("ES: 12", "ES: twelve"))
    with pytest.raises(ValueError, match="patient003/Info.cfg.*twelve"):
        acdc_datalist(tmp_path)


def test_info_is_read_with_spaces_and_further_entries(tmp_path):
    path = tmp_path / "Info.cfg"
    path.write_text("ED : 1\r\n ES:9 \n\nGroup:RV\nNote: a: b\nno entry\n")
    assert read_info(path) == {"ED": "1", "ES": "9", "Group": "RV", "Note": "a: b"}


def test_acdc_itself(acdc_dir):
    datalist = acdc_datalist(acdc_dir)
    fold = fold_of(datalist)
    assert len(datalist["training"]) == 200 and sorted(fold) == list(range(1, 101))
    assert fold[74] == fold[76]
    count = Counter((item["meta"]["group"], item["fold"]) for item in datalist["training"])
    assert set(count.values()) == {10} and len(count) == 20  # five patients, two phases
