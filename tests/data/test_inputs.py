"""What the pipeline takes for a scan, and under which name."""

import json
from pathlib import Path

import numpy as np
import pytest

from cardiac_qc_plugin.checkpoints import check_version
from cardiac_qc_plugin.data.folds import hold_out, read_fold
from cardiac_qc_plugin.data.inputs import NoScans, datalist_items, find_scans, input_files, phase_names
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_acdc_like, write_phantom
from cardiac_qc_plugin.data.predictions import with_predictions
from cardiac_qc_plugin.workflows.auto3dseg import check_datalist
from cardiac_qc_plugin.workflows.files import read_json, read_volume
from cardiac_qc_plugin.workflows.table import folder_rows

TINY = ShortAxisPhantom(shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))


def test_acdc_folder_gives_frames_without_references(tmp_path):
    write_acdc_like(tmp_path, 2, shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0), n_frames=3, with_cine=True)
    names = [f"patient{number:03d}_frame{frame:02d}" for number in (1, 2) for frame in (1, 2)]
    assert [scan.case for scan in find_scans(tmp_path)] == names


def test_cine_alone_gives_phases(tmp_path):
    write_acdc_like(tmp_path, 1, shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0), n_frames=3, with_cine=True)
    scans = find_scans(tmp_path / "patient001" / "patient001_4d.nii.gz")
    assert [(scan.case, scan.frame) for scan in scans] == [(f"patient001_4d/phase{i:02d}", i) for i in range(3)]


@pytest.mark.parametrize(("count", "last"), [(1, "h/phase00"), (100, "h/phase99"), (101, "h/phase100")])
def test_phases_are_in_order_by_name(count, last):
    names = phase_names("h", count)
    assert names == sorted(names) and len(names) == count and names[-1] == last


def test_suffixes_in_capitals_are_suffixes(tmp_path):
    (tmp_path / "HEART.NII.GZ").touch()
    (file,) = input_files(tmp_path)
    assert (file.path, file.name) == (tmp_path / "HEART.NII.GZ", "HEART")


def test_same_names_in_two_folders_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        write_phantom(tmp_path / folder, "heart", TINY, phases={"ed": 0.0}, with_labels=False)
    assert [scan.case for scan in find_scans(tmp_path)] == ["one_heart_ed", "two_heart_ed"]


def test_names_that_cannot_be_told_apart(tmp_path):
    for folder in ("a/same", "b/same"):
        write_phantom(tmp_path / folder, "heart", TINY, phases={"ed": 0.0}, with_labels=False)
    with pytest.raises(ValueError, match="same_heart_ed"):
        find_scans(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(NoScans, match="no NIfTI file"):
        find_scans(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        find_scans(tmp_path / "missing.nii.gz")


def test_what_an_interrupted_run_left_is_no_scan(tmp_path):
    """Its folder has no record yet. An output that is the input itself is searched, of course."""
    write_phantom(tmp_path, "heart", TINY, phases={"ed": 0.0}, with_labels=False)
    write_phantom(tmp_path / "out" / "heart_ed", "image", TINY, phases={"ed": 0.0}, with_labels=False)
    assert [scan.case for scan in find_scans(tmp_path)] == ["heart_ed", "image_ed"]
    assert [scan.case for scan in find_scans(tmp_path, output=tmp_path / "more" / ".." / "out")] == ["heart_ed"]
    assert [scan.case for scan in find_scans(tmp_path, output=tmp_path)] == ["heart_ed", "image_ed"]


@pytest.mark.parametrize("record", ["qc.json", "correction.json", "dicom.json"])
def test_what_lies_beside_a_record_of_the_pipeline_is_no_scan(tmp_path, record):
    (tmp_path / "case" / "below").mkdir(parents=True)
    for name in ("a.nii.gz", f"case/{record}", "case/image.nii.gz", "case/below/image.nii.gz"):
        (tmp_path / name).touch()
    assert [file.path.name for file in input_files(tmp_path)] == ["a.nii.gz"]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_not_a_datalist(tmp_path, content):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match="not a MONAI datalist"):
        find_scans(tmp_path / "list.json")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50, 1 << 14])
def test_a_datalist_is_read_alike_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    """Wherever a block ends: in a name, a number, or between two items."""
    items = [{"image": f"{n}.nii.gz", "fold": n, "meta": {"note": 'a "b", [c] \\ {é}'}} for n in range(9)]
    numbers = [1.4, -12, 1.5e-07, 2.5e20, True, None]
    lists = {"description": "x", "version": 1.25, "training": items, "none": [], "spacing": numbers, "test": ["t.nii"]}
    monkeypatch.setattr("cardiac_qc_plugin.data.inputs.BLOCK", block)
    for indent in (None, 2):
        (tmp_path / "list.json").write_text(json.dumps(lists, indent=indent), encoding="utf-8")
        assert list(datalist_items(tmp_path / "list.json")) == [*items, *numbers, "t.nii"]


def test_datalist_is_relative_to_its_folder(tmp_path):
    write_phantom(tmp_path / "sub", "heart", TINY, phases={"ed": 0.0}, with_labels=False)
    items = {"description": "text is no list", "testing": [{"image": "sub/heart_ed.nii.gz"}]}
    (tmp_path / "list.json").write_text(json.dumps(items))
    (scan,) = find_scans(tmp_path / "list.json")
    assert scan.path == (tmp_path / "sub" / "heart_ed.nii.gz").resolve()


def test_one_fold_of_a_datalist(tmp_path):
    write_phantom(tmp_path, "heart", TINY, with_labels=False)
    items = [{"image": "heart_ed.nii.gz", "fold": 0}, {"image": "heart_es.nii.gz", "fold": 1}]
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))
    assert [scan.case for scan in find_scans(tmp_path / "list.json", fold=1)] == ["heart_es"]
    with pytest.raises(NoScans, match="no item in fold 7"):
        find_scans(tmp_path / "list.json", fold=7)


def test_no_fold_is_left_out_on_request(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [{"image": name, "label": name, "fold": fold} for fold, name in enumerate("ab")]})
    )
    others, left_out = read_fold(tmp_path / "list.json", tmp_path, -1)
    assert [Path(item["image"]).name for item in others] == ["a", "b"] and left_out == []
    others, left_out = read_fold(tmp_path / "list.json", tmp_path, 1)
    assert [Path(item["image"]).name for item in others + left_out] == ["a", "b"] and len(left_out) == 1


def test_a_fold_needs_two_sides_and_all_files(tmp_path):
    """Images and labels of the patients that are left out, too."""
    items = [{"image": f"{n}.nii", "label": f"{n}_gt.nii", "fold": n} for n in range(2)]
    names = [item[key] for item in items for key in ("image", "label")]
    for fold, listed in ((7, items), (0, items[:1])):
        (tmp_path / "list.json").write_text(json.dumps({"training": listed}))
        with pytest.raises(ValueError, match=f"fold {fold} would leave nothing on one side"):
            read_fold(tmp_path / "list.json", tmp_path, fold)
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))
    for missing in names:
        for name in names:
            (tmp_path / name).touch()
        (tmp_path / missing).unlink()
        with pytest.raises(ValueError, match=f"/{missing}: no such file, but .*list.json lists it"):
            read_fold(tmp_path / "list.json", tmp_path, 1)


def test_manifests_with_numbers(tmp_path):
    """As a data frame with gaps writes them: cases and folds as numbers."""
    for name in "ab":
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "list.csv").write_text("image,case,fold\na.nii.gz,0,1.0\nb.nii.gz,,0.0\n")
    assert [scan.case for scan in find_scans(tmp_path / "list.csv")] == ["0", "b"]
    assert [scan.case for scan in find_scans(tmp_path / "list.csv", fold=1)] == ["0"]
    arrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    columns = {"image": ["a.nii.gz", "b.nii.gz"], "case": [101, 0], "fold": [1.0, None]}
    parquet.write_table(arrow.table(columns), tmp_path / "list.parquet")
    assert [scan.case for scan in find_scans(tmp_path / "list.parquet")] == ["101", "0"]
    assert [scan.case for scan in find_scans(tmp_path / "list.parquet", fold=1)] == ["101"]


@pytest.mark.parametrize("rows", ["a.nii.gz,x\n,y\n", "a.nii.gz,x\n\n\n,\n"])
def test_a_row_without_an_image_is_named(tmp_path, rows):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "list.csv").write_text(f"image,case\n{rows}")
    with pytest.raises(ValueError, match="list.csv: item 2 names no image. Give its file"):
        list(input_files(tmp_path / "list.csv"))
    (tmp_path / "list.json").write_text('{"a": [{"image": "a.nii.gz", "fold": 0}, {"image": null, "fold": 1}]}')
    with pytest.raises(ValueError, match="list.json: item 2 names no image"):
        list(input_files(tmp_path / "list.json"))
    assert [file.name for file in input_files(tmp_path / "list.json", fold=0)] == ["a"]


@pytest.mark.parametrize("case", ["../evil", "/tmp/evil", "."])
def test_a_case_outside_the_output_is_refused(tmp_path, case):
    (tmp_path / "list.csv").write_text(f"image,case\na.nii.gz,{case}\n")
    with pytest.raises(ValueError, match=f"list.csv: the case '{case}' is no name of a folder below"):
        find_scans(tmp_path / "list.csv")


def test_names_of_classes_are_no_scans(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "list.json").write_text('{"labels": ["rv", "lv"], "test": ["a.nii.gz"]}')
    assert [scan.case for scan in find_scans(tmp_path / "list.json")] == ["a"]


def test_hold_out_needs_to_know_the_patients():
    with pytest.raises(ValueError, match="needs 'meta' with 'patient' and 'group'"):
        hold_out([{"image": "a.nii.gz", "label": "b.nii.gz", "fold": 1}])


def test_predictions_of_images_that_are_named_by_their_folder(tmp_path):
    for name in ("segmentation.nii.gz", "entropy.nii.gz"):
        (tmp_path / "p1_sax").mkdir(exist_ok=True)
        (tmp_path / "p1_sax" / name).touch()
    (item,) = with_predictions([{"image": "/data/p1/sax.nii.gz"}], tmp_path, "emap", "drn")
    with pytest.raises(ValueError, match="of /data/p1/sax.nii.gz or /elsewhere/p1/sax.nii.gz"):
        with_predictions([{"image": f"/{a}/p1/sax.nii.gz"} for a in ("data", "elsewhere")], tmp_path, "emap", "drn")
    assert item["segmentation"] == str(tmp_path / "p1_sax" / "segmentation.nii.gz")


def test_hold_out_keeps_patients_together_and_groups_balanced():
    rng = np.random.default_rng(0)
    items = [
        {"image": f"{p}_{phase}", "meta": {"patient": f"p{p:02d}", "group": "ABCDE"[p % 5]}}
        for p in range(75)
        for phase in ("ED", "ES")
    ]
    rng.shuffle(items)
    training, validation = hold_out(items)
    assert len(training) == 120 and len(validation) == 30
    assert not {i["meta"]["patient"] for i in training} & {i["meta"]["patient"] for i in validation}
    assert sorted(i["meta"]["group"] for i in validation) == sorted("ABCDE" * 6)
    for count in (2, 3):  # two patients are too few to hold one out
        few = [item for item in items if item["meta"]["patient"] < f"p{count:02d}"]
        assert len(hold_out(few)[1]) == (0 if count == 2 else 2)


def test_hold_out_keeps_the_scan_that_occurs_twice_together():
    items = [{"meta": {"patient": f"patient{n:03d}", "group": "NOR"}} for n in range(60, 80)]
    for every in range(2, 8):
        training, _ = hold_out(items, every)
        names = {item["meta"]["patient"] for item in training}
        assert ("patient074" in names) == ("patient076" in names)


def test_predictions_for_the_other_map(tmp_path):
    folder = tmp_path / "case1"
    folder.mkdir()
    for name in ("segmentation", "bayesian", "entropy"):
        (folder / f"{name}.nii.gz").write_text("")
    items = [{"image": "x/case1.nii.gz"}]
    assert with_predictions(items, tmp_path, "emap", "drn")[0]["uncertainty"].endswith("entropy.nii.gz")
    (folder / "qc.json").write_text(json.dumps({"segmentation": {"map": "bmap", "samples": 10}}))
    with pytest.raises(ValueError, match="segmented for the bmap"):
        with_predictions(items, tmp_path, "emap", "drn")
    assert with_predictions(items, tmp_path, "bmap", "drn")
    made = {"map": "bmap", "samples": 10, "bundle": "cardiac_drn_segmentation"}
    (folder / "qc.json").write_text(json.dumps({"segmentation": made}))
    assert with_predictions(items, tmp_path, "bmap", "drn")
    with pytest.raises(ValueError, match="segmented by the drn, .* or maps of the dn"):
        with_predictions(items, tmp_path, "bmap", "dn")


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.nii.gz").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "site")
    (tmp_path / "site" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked_again").symlink_to(tmp_path / "site")
    for name in ("itself", "itself.nii.gz"):
        (tmp_path / "in" / name).symlink_to(name)
    nowhere, scan = find_scans(tmp_path / "in")
    assert scan.case == "a"
    with pytest.raises(ValueError, match="in/itself.nii.gz: no such file"):
        read_volume(nowhere.path)


def test_lists_whose_files_lie_elsewhere(tmp_path):
    (tmp_path / "list.json").write_text('{"training": [{"image": "p/a.nii.gz"}, {"image": "p/b.nii.gz"}]}')
    with pytest.raises(ValueError, match=r"list\.json: of its 2 files none is there, .*p/a\.nii\.gz.*--root"):
        find_scans(tmp_path / "list.json")
    (tmp_path / "data" / "p").mkdir(parents=True)
    (tmp_path / "data" / "p" / "b.nii.gz").touch()
    assert len(find_scans(tmp_path / "list.json", tmp_path / "data")) == 2  # the other is named where it is read


def test_predictions_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"case1.*segmentation\.nii\.gz is missing"):
        with_predictions([{"image": "x/case1.nii.gz"}], tmp_path, "bmap", "drn")
    with pytest.raises(ValueError, match="Unknown uncertainty map 'std'"):
        with_predictions([], tmp_path, "std", "drn")


@pytest.mark.parametrize(
    "content", [b'{"segmentation": {"map": "bm', b"[1]", b"{}", b'{"segmentation": 3}', b"\xff\xfe"]
)
def test_damaged_records_are_named(content, tmp_path):
    """Truncated, no object, without what is needed, no text."""
    case, metadata = tmp_path / "heart", tmp_path / "bundle" / "configs" / "metadata.json"
    for path in (case / "segmentation.nii.gz", case / "bayesian.nii.gz", case / "qc.json", metadata):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"heart/qc.json: .*Remove it, and segment again\."):
        with_predictions([{"image": str(tmp_path / "heart.nii.gz")}], tmp_path, "bmap", "drn")
    with pytest.raises(ValueError, match=r"metadata.json: not the metadata of a bundle"):
        check_version(tmp_path / "bundle")
    if content not in (b"{}", b'{"segmentation": 3}'):
        with pytest.raises(ValueError, match=r"qc.json: cannot be read as JSON .*remove it and run that again"):
            read_json(case / "qc.json")


@pytest.mark.parametrize("item", [5, "heart.nii.gz", None, {"image": "a"}, {"image": "a", "label": ["a", "a"]}])
def test_an_item_of_a_datalist_that_cannot_be_trained_on_is_named(item, tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a", "label": "a"}, item]}))
    with pytest.raises(ValueError, match=r"list.json: item 2 of 'training' has to name a file .* and is "):
        read_fold(tmp_path / "list.json", tmp_path, -1)


@pytest.mark.parametrize("fold", [[0], "0", {"a": 1}, 0.5, True])
def test_a_fold_that_is_no_number_is_named(fold, tmp_path):
    """Also where the other folds are sound: its scans would be trained on where they are to be left out."""
    (tmp_path / "a").touch()
    items = [{"image": "a", "label": "a", "fold": 0}, {"image": "a", "label": "a", "fold": fold}]
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))
    for left_out in (-1, 0, 1):
        with pytest.raises(ValueError) as caught:
            read_fold(tmp_path / "list.json", tmp_path, left_out)
        assert f"list.json: item 2 of 'training' has the fold {json.dumps(fold)}. " in str(caught.value)
        assert "one whole number" in str(caught.value)
    with pytest.raises(ValueError, match="item 2 of 'training' has the fold"):
        check_datalist(tmp_path / "list.json", tmp_path)


def test_lists_that_are_no_items(tmp_path):
    """Names and numbers of classes, as datalists have them; and an item without an image."""
    items = {"classes": [0, 1, 2], "names": ["LV"], "spacing": [1.4, 1.4], "training": [{"image": "a.nii.gz"}]}
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "list.json").write_text(json.dumps(items))
    assert [scan.case for scan in find_scans(tmp_path / "list.json")] == ["a"]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz"}, {"label": "a.nii.gz"}]}))
    with pytest.raises(ValueError, match=r"list.json: item 2 has no 'image', only \['label'\]. This has to be a MONAI"):
        find_scans(tmp_path / "list.json")


def test_a_damaged_table_is_named(tmp_path):
    """The csv module's own error, which is no ValueError."""
    line = "x" * 200_000
    (tmp_path / "list.csv").write_text(f"image\na.nii.gz\n{line}\n")
    with pytest.raises(ValueError, match=r"list.csv: not a manifest.*field larger than"):
        find_scans(tmp_path / "list.csv")
    (tmp_path / "worklist.csv").write_text(f"case,status,message\nheart,failed,{line}\n")
    with pytest.raises(ValueError, match=r"worklist.csv: cannot be read as CSV .*field larger than.*Remove it"):
        list(folder_rows(tmp_path, {}))
