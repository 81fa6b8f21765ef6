"""Cines from run to indices, against volumes counted by hand."""

import csv
import json

import numpy as np
import pytest
from test_run import bundles  # noqa: F401 (a fixture)

from cardiac_qc_plugin.bundle import BundlePredictor
from cardiac_qc_plugin.data.inputs import Scan, find_scans
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_phantom
from cardiac_qc_plugin.reports.cine import describe_cine
from cardiac_qc_plugin.workflows.cine import (
    choose_phases,
    group_cines,
    index_intervals,
    named_indices,
    plan_phases,
    table_row,
    write_cines,
)
from cardiac_qc_plugin.workflows.files import write_json, write_rows
from cardiac_qc_plugin.workflows.run import CaseFailures, load_predictors, run

LV = [120, 108, 90, 60, 64, 75, 92, 110]


def case(name, lv, path="/nowhere/x.nii.gz", samples=None, flagged=()):
    volumes = {"RV": 1.1 * lv, "LVM": 100.0, "LV": float(lv)}
    entry = {"volume_ml": volumes, "map": "bmap"}
    if samples:
        entry["sample_volume_ml"] = samples
    return {
        "case": name,
        "input": {"path": path},
        "segmentation": entry,
        "detection": {"flagged_slices": list(flagged)},
    }


def cine(folder, lv=LV, **more):
    return [case(f"heart/phase{t:02d}", ml, **more) for t, ml in enumerate(lv)]


def written(cases, tmp_path, given=(None, None)):
    cines = group_cines(cases, tmp_path, given)
    records = write_cines(cines, {one.name: choose_phases(one) for one in cines})
    write_rows(tmp_path / "indices.csv", [table_row(record) for record in records])
    return records


def test_a_cine_beside_its_own_ed_and_es_is_measured_itself(tmp_path):
    (record,) = written([*cine(tmp_path), case("heart_ed", 120), case("heart_es", 108)], tmp_path)
    assert (record["es_phase"], record["indices"]["lv_esv_ml"]) == (3, 60)


@pytest.mark.parametrize("name", ["heart_ed", "heart_es"])
def test_one_phase_alone_is_no_heart_to_measure(tmp_path, name):
    assert group_cines([case(name, 120)], tmp_path) == []


def test_indices_of_a_cine(tmp_path):
    write_json(
        tmp_path / "heart" / "dicom.json",
        {
            "subject": {"height_cm": 180.0, "weight_kg": 80.0},
            "notes": ["Odd."],
            "trigger_times_ms": [0, 50, 100, 150, 200],
        },
    )
    (record,) = written(cine(tmp_path)[::-1], tmp_path)
    assert (record["ed_phase"], record["es_phase"], record["ed_es"]) == (0, 3, "found from the LV volume")
    indices = record["indices"]
    assert indices["lv_edv_ml"] == 120 and indices["lv_esv_ml"] == 60 and indices["lv_sv_ml"] == 60
    assert indices["rv_sv_ml"] == 66
    assert indices["lv_ef_percent"] == 50 and indices["rv_ef_percent"] == 50
    assert indices["lvm_mass_g"] == 105  # 1.05 g/ml
    assert record["body_surface_area_m2"] == 2 and indices["lv_edv_ml_per_m2"] == 60
    assert indices["lvm_mass_g_per_m2"] == 52.5 and "lv_ef_percent_per_m2" not in indices
    assert record["notes"] == ["Odd."] and record["intervals"] == {} and record["jumps"] == []
    assert record["cases"] == [f"heart/phase{t:02d}" for t in range(8)]
    assert record == json.loads((tmp_path / "heart" / "cine.json").read_text())
    with open(tmp_path / "heart" / "volumes.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["LV_ml"]) for row in rows] == LV and rows[3]["trigger_time_ms"] == "150"
    with open(tmp_path / "indices.csv") as stream:
        (row,) = csv.DictReader(stream)
    assert row["case"] == "heart" and float(row["lv_ef_percent"]) == 50


@pytest.mark.parametrize(("lv", "found"), [([120, 60], (None, None)), ([90, 120, 60], (1, 2))])
def test_ed_and_es_take_three_phases(tmp_path, lv, found):
    (record,) = written(cine(tmp_path, lv), tmp_path)
    assert (record["ed_phase"], record["es_phase"]) == found


def test_given_phases_are_respected(tmp_path):
    (record,) = written(cine(tmp_path), tmp_path, given=(7, None))
    assert (record["ed_phase"], record["es_phase"]) == (7, 3)
    assert record["ed_es"] == "ED given, ES found from the LV volume"
    assert record["indices"]["lv_edv_ml"] == 110 and record["found"] == {"ed_phase": 0, "es_phase": 3}
    (record,) = written(cine(tmp_path), tmp_path, given=(4, 0))  # phase 0 is given, too
    assert (record["ed_phase"], record["es_phase"]) == (4, 0)
    with pytest.raises(ValueError, match="no phase 9 among its 8"):
        written(cine(tmp_path), tmp_path, given=(9, None))


@pytest.mark.parametrize(("given", "phase", "which"), [((3, None), 3, "ED given"), ((None, 0), 0, "ES given")])
def test_one_phase_is_not_both(tmp_path, given, phase, which):
    """An ejection fraction of 0 % would look like a finding."""
    with pytest.raises(ValueError, match=f"heart: phase {phase} would be both .*{which}.* Give both, --ed and --es"):
        written(cine(tmp_path), tmp_path, given)


def test_acdc_tells_phases_height_and_weight(tmp_path):
    """Info.cfg counts frames from 1."""
    (tmp_path / "Info.cfg").write_text("ED: 8\nES: 4\nGroup: RV\nHeight: 150.0\nNbFrame: 8\nWeight: 66.0\n")
    (record,) = written(cine(tmp_path, path=str(tmp_path / "heart.nii.gz")), tmp_path)
    assert (record["ed_phase"], record["es_phase"], record["ed_es"]) == (7, 3, "given")
    assert record["body_surface_area_m2"] == pytest.approx(np.sqrt(150 * 66 / 3600), abs=1e-3)
    pair = [case(f"heart_frame{f:02d}", ml, path=str(tmp_path / "x.nii.gz")) for f, ml in ((8, 110), (4, 60))]
    (record,) = written(pair, tmp_path)
    assert record["case"] == "heart" and record["indices"]["lv_edv_ml"] == 110


@pytest.mark.parametrize(("given", "expected"), [((5, None), (5, 6)), ((None, 5), (1, 5)), ((5, 4), (5, 4))])
def test_acdc_tells_the_phase_that_no_option_gives(tmp_path, given, expected):
    (tmp_path / "Info.cfg").write_text("ED: 2\nES: 7\n")
    (record,) = written(cine(tmp_path, path=str(tmp_path / "heart.nii.gz")), tmp_path, given)
    assert (record["ed_phase"], record["es_phase"], record["ed_es"]) == (*expected, "given")


def test_a_jump_is_flagged(tmp_path):
    lv = [120, 119, 110, 95, 80, 65, 60, 5, 70, 85, 100, 110]
    (record,) = written(cine(tmp_path, lv), tmp_path)
    assert {"phase": 7, "structure": "LV"} in record["jumps"] and record["es_phase"] == 6
    assert "volume jumps at phase 7" in describe_cine(record)
    with open(tmp_path / "indices.csv") as stream:
        assert next(csv.DictReader(stream))["phases_with_jumps"] == "1"  # RV and LV in the same one


def test_phases_are_found_by_the_lv_and_keep_their_numbers(tmp_path):
    """Without phase 1, and with an RV that moves against the LV, but for a jump."""
    lv = [120, 118, 108, 90, 75, 60, 62, 64, 70, 75, 92, 105, 110]
    cases = [qc for qc in cine(tmp_path, lv) if qc["case"] != "heart/phase01"]
    for qc in cases:
        volumes = qc["segmentation"]["volume_ml"]
        volumes["RV"] = 200 - volumes["LV"]
    cases[5]["segmentation"]["volume_ml"]["RV"] = 20.0
    (record,) = written(cases, tmp_path)
    assert (record["ed_phase"], record["es_phase"]) == (0, 5)
    assert record["jumps"] == [{"phase": 6, "structure": "RV"}]


def test_a_weight_of_zero_is_none(tmp_path):
    write_json(tmp_path / "heart" / "dicom.json", {"subject": {"height_cm": 180.0, "weight_kg": 0.0}})
    (record,) = written(cine(tmp_path), tmp_path)
    assert record["subject"] == {"height_cm": 180.0} and record["body_surface_area_m2"] is None


def test_intervals_come_from_pairs_of_samples(tmp_path):
    """Samples that are all larger by the same share have different volumes and one EF."""
    scale = [0.9, 1.0, 1.1]
    cases = [
        case(n, lv, samples={name: [lv * s for s in scale] for name in ("LV", "RV", "LVM")}, flagged=(0, 3))
        for n, lv in (("heart_ed", 100), ("heart_es", 40))
    ]
    (record,) = written(cases, tmp_path)
    low, high = record["intervals"]["lv_ef_percent"]
    assert low == pytest.approx(60) and high == pytest.approx(60)
    low, high = record["intervals"]["lv_edv_ml"]
    assert (low, high) == pytest.approx((100 - 4.3027 * 10, 100 + 4.3027 * 10), abs=0.01)
    assert describe_cine(record).startswith("LV EF 60 % (60 to 60), EDV 100 ml (57 to 143)")
    assert "slices flagged: 2 at ED, 2 at ES" in describe_cine(record)
    assert record["flagged_slices"] == {"ed": [0, 3], "es": [0, 3]} and record["flagged_levels"] == {}
    with open(tmp_path / "indices.csv") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["lv_edv_ml_low"]) < 100 < float(row["lv_edv_ml_high"]) and row["ed_slices_flagged"] == "2"


def test_intervals_end_at_what_is_possible():
    """Two samples that contradict each other: half the interval is 12.7 standard deviations, of 56.6 ml or %."""
    ed, es = ({name: values for name in ("LV", "RV", "LVM")} for values in ([100.0, 100.0], [10.0, 90.0]))
    indices = named_indices(dict.fromkeys(ed, 100.0), dict.fromkeys(es, 50.0), None)
    intervals = index_intervals(indices, ed, es)
    low, high = (50 + sign * 12.7062 * 40 * 2**0.5 for sign in (-1, 1))
    assert intervals["lv_esv_ml"] == pytest.approx([0, high], abs=0.01)
    assert intervals["lv_sv_ml"] == pytest.approx([low, high], abs=0.01)  # blood may flow back
    assert intervals["lv_ef_percent"] == pytest.approx([low, 100], abs=0.01)
    assert index_intervals(indices, ed, {}) == index_intervals(indices, {}, es) == {}  # one of the two was not sampled


def test_flagged_slices_are_named_by_their_third(tmp_path):
    cases = [case("heart_ed", 100, flagged=(0, 1, 3)), case("heart_es", 40)]
    cases[0]["segmentation"]["slice_level"] = ["basal", "basal", "mid", "apical"]
    (record,) = written(cases, tmp_path)
    assert record["flagged_levels"] == {"ed": {"basal": 2, "apical": 1}}
    assert "slices flagged: 3 at ED (2 basal, 1 apical), 0 at ES" in describe_cine(record)


def test_no_lv_at_all(tmp_path):
    (record,) = written(cine(tmp_path, [0, 0, 0, 0]), tmp_path)
    assert record["ed_phase"] is None and record["ed_es"] == "not known"
    assert record["indices"] == {} and "no indices" in describe_cine(record)
    (record,) = written(cine(tmp_path, [0, 0, 0, 0]), tmp_path, given=(2, None))
    assert record["ed_es"] == "ED given, ES not known" and record["indices"] == {}
    (record,) = written([case("heart_ed", 0), case("heart_es", 0)], tmp_path)
    assert record["indices"]["lv_ef_percent"] is None and record["indices"]["lv_edv_ml"] == 0


def test_a_phase_that_is_lost_after_the_plan(tmp_path):
    (whole,) = group_cines(cine(tmp_path), tmp_path)
    assert plan_phases(whole, "images") == (0, 3)
    without = [qc for qc in cine(tmp_path) if qc["case"] != "heart/phase05"]
    (other,) = group_cines(without, tmp_path)
    assert plan_phases(other, "images") == (0, 3) and len(other.volume_ml) == 7
    (lost,) = group_cines([qc for qc in cine(tmp_path) if qc["case"] != "heart/phase03"], tmp_path)
    with pytest.raises(ValueError, match="heart: phase 3, its end-diastole or end-systole, could not be processed"):
        plan_phases(lost, "images")
    (again,) = group_cines(cine(tmp_path, LV[::-1]), tmp_path)
    assert plan_phases(again, "other images") == (7, 4)  # a plan for others is none


def test_a_phase_that_does_not_exist_stops_no_other_heart(bundles, tmp_path):  # noqa: F811
    for name, frames in (("short", 3), ("long", 5)):
        phantom = ShortAxisPhantom(seed=1, shape=(40, 40), n_slices=2, spacing=(4.0, 4.0, 20.0))
        write_phantom(tmp_path / "in", name, phantom, cine_frames=frames, with_labels=False)
    scans = [scan for scan in find_scans(tmp_path / "in") if "_4d/" in scan.case]
    for preview in (None, predictors(bundles, "emap", 0)):
        with pytest.raises(CaseFailures) as error:
            full = predictors(bundles, "emap" if preview is None else "bmap", 0 if preview is None else 2)
            run(scans, tmp_path / "out", *full, preview=preview, given=(4, 0))
        assert [case for case, _ in error.value.failures] == ["short_4d"]
        assert "no phase 4 among its 3" in error.value.failures[0][1]
        assert len(error.value.cases) == 8 and (tmp_path / "out" / "report.html").is_file()
        found = [json.loads((tmp_path / "out" / f"{n}_4d" / "cine.json").read_text()) for n in ("short", "long")]
        assert [record["ed_phase"] for record in found] == [None, 4]
        assert describe_cine(found[0]) == "end-diastole and end-systole are not known, so no indices"
        with pytest.raises(ValueError, match=r"No cine has a phase 9, but 0 to 4\."):
            run(scans, tmp_path / "other", *full, preview=preview, given=(9, None))
        assert not list((tmp_path / "other").rglob("qc.json"))


def predictors(bundles, map, samples):  # noqa: F811
    segmenter = BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", map=map, samples=samples, amp=False)
    failure = bundles / "cardiac_segmentation_failure"
    return segmenter, BundlePredictor(failure, "cpu", map=map, segmentation_model="dn", amp=False)


def test_samples_at_ed_and_es_only(bundles, tmp_path):  # noqa: F811
    """The e-map on all phases, the b-map on two; a second run changes nothing."""
    phantom = ShortAxisPhantom(seed=1, shape=(40, 40), n_slices=2, spacing=(4.0, 4.0, 20.0))
    path = write_phantom(tmp_path / "in", "heart", phantom, cine_frames=4, with_labels=False)["4d"]
    full, preview = predictors(bundles, "bmap", 3), predictors(bundles, "emap", 0)
    cases = run(find_scans(path), tmp_path / "out", *full, preview=preview, given=(0, 2))
    record = json.loads((tmp_path / "out" / "heart_4d" / "cine.json").read_text())
    sampled = [qc["case"][-2:] for qc in cases if qc["segmentation"]["map"] == "bmap"]
    assert sampled == [f"{p:02d}" for p in (0, 2)]
    plan = json.loads((tmp_path / "out" / "heart_4d" / "plan.json").read_text())
    assert [point["LV_ml"] for point in record["curve"]] == [round(v["LV"], 2) for v in plan["volume_ml"].values()]
    assert {qc["scores"]["urgency"] == qc["scores"]["region_failure"] for qc in cases} == {True}
    samples = cases[0]["segmentation"]["sample_volume_ml"]
    assert [len(samples[name]) for name in ("RV", "LVM", "LV")] == [3, 3, 3]
    assert "lv_edv_ml" in record["intervals"] or record["indices"]["lv_edv_ml"] == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}
    again = run(find_scans(path), tmp_path / "out", *full, preview=preview, given=(0, 2))
    assert again == cases and {path: path.stat().st_mtime_ns for path in files} == files
    assert "LV EF" in (tmp_path / "out" / "report.html").read_text()
    page = (tmp_path / "out" / "heart_4d" / "phase01" / "report.html").read_text()
    assert 'id="volumes"' in page and "../phase00/report.html" in page


def test_samples_at_ed_and_es_only_with_the_e_map(bundles, tmp_path):  # noqa: F811
    phantom = ShortAxisPhantom(seed=1, shape=(40, 40), n_slices=2, spacing=(4.0, 4.0, 20.0))
    path = write_phantom(tmp_path / "in", "heart", phantom, cine_frames=4, with_labels=False)["4d"]
    models, preview = load_predictors("dn", "emap", 3, "ed_es", "cpu", bundles)
    assert preview[1] is models[1]  # so a promise is for all phases
    cases = run(find_scans(path), tmp_path / "out", *models, preview=preview, given=(0, 2))
    assert [qc["segmentation"]["samples"] for qc in cases] == [3, 0, 3, 0]
    assert {qc["detection"]["map"] for qc in cases} == {"emap"}
    assert load_predictors("dn", "emap", 0, "ed_es", "cpu", bundles)[1] is None  # nothing is sampled anyway


def test_a_corrected_info_makes_a_new_plan(bundles, tmp_path):  # noqa: F811
    phantom = ShortAxisPhantom(seed=1, shape=(40, 40), n_slices=2, spacing=(4.0, 4.0, 20.0))
    path = write_phantom(tmp_path / "in", "heart", phantom, cine_frames=4, with_labels=False)["4d"]
    full, preview = predictors(bundles, "bmap", 2), predictors(bundles, "emap", 0)
    for es in (2, 3):
        (path.parent / "Info.cfg").write_text(f"ED: 1\nES: {es}\n")
        cases = run(find_scans(path), tmp_path / "out", *full, preview=preview)
        record = json.loads((tmp_path / "out" / "heart_4d" / "cine.json").read_text())
        assert (record["ed_phase"], record["es_phase"], record["ed_es"]) == (0, es - 1, "given")
        assert cases[es - 1]["segmentation"]["map"] == "bmap"


def test_what_became_of_missing_phases_is_noted(bundles, tmp_path):  # noqa: F811
    """A phase that cannot be read, here end-diastole, and why there are no indices then."""
    for frame in range(4):
        phantom = ShortAxisPhantom(seed=1, shape=(40, 40), n_slices=2, spacing=(4.0, 4.0, 20.0))
        written = write_phantom(tmp_path / "in", f"p{frame}", phantom, with_labels=False)
        path = tmp_path / "in" / f"phase{frame:02d}.nii.gz"
        next(iter(written.values())).rename(path)
    path.write_bytes(b"no image")
    scans = [Scan(f"heart/phase{frame:02d}", tmp_path / "in" / f"phase{frame:02d}.nii.gz") for frame in range(4)]
    with pytest.raises(CaseFailures) as error:
        run(scans, tmp_path / "out", *predictors(bundles, "emap", 0), given=(3, None))
    record = json.loads((tmp_path / "out" / "heart" / "cine.json").read_text())
    assert record["ed_phase"] is None and len(record["cases"]) == 3
    lost, reason = dict(error.value.failures)["heart/phase03"], dict(error.value.failures)["heart"]
    assert record["notes"] == [f"heart/phase03: {lost}", reason] and "phase03.nii.gz: not a NIfTI image" in lost
    assert "not a NIfTI image" in (tmp_path / "out" / "report.html").read_text()
