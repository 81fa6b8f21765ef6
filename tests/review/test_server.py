"""Attempts to leave the rules of the review seat; each is refused, and nothing is written."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from seats import PIPELINE, SHAPE, automatic, flagged, save, write_predictions
from starlette.testclient import TestClient

from cardiac_qc_plugin.review.seat import Seat
from cardiac_qc_plugin.review.server import MAX_BODY, create_app
from cardiac_qc_plugin.review.server import serve as start
from cardiac_qc_plugin.workflows.correct import correct
from cardiac_qc_plugin.workflows.evaluate import evaluate

TOKEN, PORT = "a-token", 8123
HOME = f"http://127.0.0.1:{PORT}"
INSIDE = [[16, 16], [17, 16], [18, 17]]  # of region 1


class Page:
    """A page in a browser of its own."""

    def __init__(self, app):
        self.client = TestClient(app, base_url=HOME, raise_server_exceptions=True)
        self.client.headers["Origin"] = HOME
        assert self.client.get("/", params={"token": TOKEN}).status_code == 200
        self.count = 0

    def post(self, path, **body):
        return self.client.post(f"/api/{path}", json=body)

    def open(self, case="p1_ed", **options):
        answer = self.post("open", case=case, reviewer="Dr A", **options)
        if answer.status_code == 200:
            self.case, self.session = case, answer.json()["session"]
        return answer

    def act(self, action, **event):
        self.count += 1
        event = {"id": f"{id(self)}-{self.count}", "action": action, **event}
        return self.post("act", case=self.case, session=self.session, action=event)

    def paint(self, voxels=INSIDE, **event):
        return self.act("paint", **{"shape": list(SHAPE), "slice": 1, "label": 3, "voxels": voxels, **event})


@pytest.fixture
def app(predictions, tmp_path):
    return create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT)


@pytest.fixture
def page(app):
    return Page(app)


def journal(tmp_path, case="p1_ed"):
    path = tmp_path / "out" / case / "review.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# ---- who may ask


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(app):
    client = TestClient(app, base_url=HOME, follow_redirects=False)
    answer = client.get("/", params={"token": TOKEN})
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and f"review_{PORT}=" in cookie
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    "path", ["/", "/api/cases", "/api/settings", "/api/volume?case=p1_ed&name=image", "/static/app.js"]
)
@pytest.mark.parametrize("token", [None, "", "another", TOKEN + "x", TOKEN[:-1], "ä"])
def test_without_the_token_nothing_is_told(app, path, token):
    client = TestClient(app, base_url=HOME, follow_redirects=False)
    if token is not None:
        client.headers = [(b"Cookie", f"review_{PORT}={token}".encode())]
    assert client.get(path).status_code == 403
    assert client.get(path, params={"token": token or ""}).status_code == 403


def test_the_token_in_the_address_opens_the_page_only(app):
    client = TestClient(app, base_url=HOME)
    assert client.get("/api/cases", params={"token": TOKEN}).status_code == 403


def test_the_token_of_a_browsers_command_line_opens_once(predictions, tmp_path):
    app = create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT, once="shown")
    first, second = (TestClient(app, base_url=HOME, follow_redirects=False) for _ in range(2))
    assert first.get("/", params={"token": "shown"}).status_code == 303
    assert first.get("/api/cases").status_code == 200
    assert second.get("/", params={"token": "shown"}).status_code == 403
    second.headers = [(b"Cookie", f"review_{PORT}=shown".encode())]
    assert second.get("/api/cases").status_code == 403
    assert first.get("/", params={"token": TOKEN}).status_code == 303


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"127.0.0.1.evil.example:{PORT}", ""]
)
def test_other_hosts_are_refused(page, host):
    """DNS rebinding: another name that leads to this computer."""
    answer = page.client.get("/api/cases", headers={"Host": host})
    assert answer.status_code == 403 and "no address" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", f"https://127.0.0.1:{PORT}", "http://127.0.0.1:1", "null", ""]
)
def test_other_origins_are_refused(page, tmp_path, origin):
    body = {"case": "p1_ed", "reviewer": "Dr A"}
    for answer in (
        page.client.post("/api/open", json=body, headers={"Origin": origin}),
        page.client.get("/api/cases", headers={"Origin": origin}),
    ):
        assert answer.status_code == 403 and "other origins" in answer.json()["error"]
    assert not journal(tmp_path)


def test_a_post_without_origin_or_from_another_site_is_refused(page, tmp_path):
    body = {"case": "p1_ed", "reviewer": "Dr A"}
    del page.client.headers["Origin"]
    assert page.client.post("/api/open", json=body).status_code == 403
    for site in ("cross-site", "same-site"):
        assert page.client.get("/api/cases", headers={"Sec-Fetch-Site": site}).status_code == 403
    assert not journal(tmp_path)


def test_a_form_of_another_page_is_no_json(page):
    answer = page.client.post("/api/open", data={"case": "p1_ed"})
    assert answer.status_code == 415
    answer = page.client.post("/api/open", content=b'{"case": "p1_ed"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


# ---- what may be asked for


@pytest.mark.parametrize(
    "name",
    [
        "../run/p1_ed",
        "..",
        ".",
        "",
        "/etc",
        "p1_ed/../p1_es",
        "p1_ed/",
        "..%2frun",
        "%2e%2e/p1_ed",
        "..\\run",
        "p1_ed\x00",
        None,
        5,
        ["p1_ed"],
        {"a": 1},
    ],
)
def test_cases_have_no_other_names_than_those_of_the_list(page, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    assert page.post("open", case=name, reviewer="Dr A").status_code == 404
    assert page.post("act", case=name, session="x", action={"id": "1", "action": "undo"}).status_code == 404
    if isinstance(name, str):
        assert page.client.get("/api/volume", params={"case": name, "name": "image"}).status_code == 404
        assert page.client.get("/api/state", params={"case": name}).status_code == 404
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/%252e%252e/server.py",
        "/static/..%5cserver.py",
        "/static//etc/passwd",
        "/static/",
        "/../../etc/passwd",
        "/%2e%2e/setup.cfg",
    ],
)
def test_files_outside_the_page_are_not_served(page, path):
    answer = page.client.get(path)
    assert answer.status_code in (404, 405) and "Guard" not in answer.text and "root:" not in answer.text


def test_volumes_have_no_other_names(page):
    for name in ("../qc", "qc.json", "", "segmentation"):
        assert page.client.get("/api/volume", params={"case": "p1_ed", "name": name}).status_code == 404


def test_volumes_come_first_axis_fastest(page):
    def volume(name, dtype):
        content = page.client.get("/api/volume", params={"case": "p1_ed", "name": name}).content
        return np.frombuffer(content, dtype).reshape(SHAPE, order="F")

    np.testing.assert_array_equal(volume("automatic", np.uint8), automatic())
    np.testing.assert_array_equal(volume("regions", "<u2"), flagged())
    assert volume("image", "<u2").max() == 65535 and volume("uncertainty", np.uint8).max() == round(
        0.98 * 0.4 / 0.5 * 255 - 0.5
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 200000, b'{"case": "p1_ed", "session": "x", "action": 1}']
)
def test_what_is_no_json_object_is_refused(page, content):
    answer = page.client.post("/api/act", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_bodies_are_limited_with_and_without_a_length(page, tmp_path):
    page.open()
    before = journal(tmp_path)
    assert page.paint([[16, 16]] * 200000).status_code == 413

    def chunks():
        for _ in range(MAX_BODY // 65536 + 2):
            yield b" " * 65536

    answer = page.client.post("/api/act", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert journal(tmp_path) == before


# ---- what may be done


@pytest.mark.parametrize(
    "change, message",
    [
        ({"voxels": [[16, 16], [0, 3]]}, "Voxels outside the flagged regions: (0, 3, 1)"),
        ({"shape": [64, 48, 5]}, "shape [64, 48, 5]"),
        ({"label": 7}, "Unknown label 7"),
    ],
)
def test_strokes_that_break_a_rule_are_refused_and_not_kept(page, tmp_path, change, message):
    page.open()
    assert page.paint().status_code == 200
    before, state = journal(tmp_path), page.client.get("/api/state", params={"case": "p1_ed"}).json()
    answer = page.paint(**change)
    assert answer.status_code == 422 and message in answer.json()["error"]
    assert journal(tmp_path) == before
    assert page.client.get("/api/state", params={"case": "p1_ed"}).json() == state


def test_an_action_that_is_sent_again_is_done_once(page, tmp_path):
    page.open()
    action = {"id": "same", "action": "visit", "region": 2}
    for _ in range(2):
        assert page.post("act", case="p1_ed", session=page.session, action=action).json()["position"] == 2
    assert sum(event["action"] == "visit" for event in journal(tmp_path)) == 1
    assert (
        page.post("act", case="p1_ed", session=page.session, action={"action": "visit", "region": 3}).status_code == 422
    )


def test_nobody_reviews_without_a_name(page):
    for name in ("", "  ", None, 5):
        assert page.post("open", case="p1_ed", reviewer=name).status_code == 422


def test_a_reviewers_name_is_utf_8(page, predictions, tmp_path, command):
    body = json.dumps({"case": "p1_ed", "reviewer": "M\udcfcller"})
    answer = page.client.post("/api/open", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "'M\\udcfcller' is not UTF-8" in answer.json()["error"]
    assert not journal(tmp_path)
    places = ("--predictions", predictions, "--output", tmp_path / "other")
    outcome = command("review", *places, "--reviewer", os.fsdecode(b"M\xfcller"), "--no_browser")
    assert outcome.returncode == 1 and "is not UTF-8" in outcome.stderr and outcome.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_a_name_that_is_not_utf_8_in_one_journal_leaves_the_other_cases(page, predictions, tmp_path):
    """Earlier versions kept such a name, and then no case was listed any more."""
    page.open()
    path = tmp_path / "out" / "p1_ed" / "review.jsonl"
    path.write_text(path.read_text().replace("Dr A", "M\\udcfcller"))
    again = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    rows = {row["case"]: row for row in again.client.get("/api/cases").json()}
    assert rows["p1_ed"]["status"] == "broken" and "line 2" in rows["p1_ed"]["message"]
    assert rows["p1_es"]["status"] != "broken" and again.open("p1_es").status_code == 200


def test_two_browsers_on_one_case(app, tmp_path):
    first, second = Page(app), Page(app)
    assert first.open().status_code == 200
    answer = second.open()
    assert answer.status_code == 409 and "open in another window (Dr A" in answer.json()["error"]
    assert second.open("p1_es").status_code == 200  # other cases are free
    assert second.open(take_over=True).status_code == 200
    before = journal(tmp_path)
    answer = first.paint()
    assert answer.status_code == 409 and "taken over" in answer.json()["error"]
    assert first.open().status_code == 409
    assert journal(tmp_path) == before
    assert second.paint().status_code == 200
    first.post("close", case="p1_ed", session=first.session)  # too late to end the other's session
    assert second.paint(label=1).status_code == 200


def test_a_window_that_is_loaded_again_goes_on(page):
    page.open()
    page.paint()
    page.act("visit", region=3)
    old = page.session
    answer = page.open(previous=old)
    state = answer.json()["state"]
    assert answer.status_code == 200 and state["position"] == 3 and state["regions"][0]["changed"]
    page.post("close", case="p1_ed", session=old)  # of the window before, and late
    assert page.act("undo").status_code == 200


def test_a_closed_case_is_free(app):
    first, second = Page(app), Page(app)
    first.open()
    first.post("close", case="p1_ed", session=first.session)
    assert second.open().status_code == 200
    assert first.paint().status_code == 409


# ---- what comes of it


def finish(page, case="p1_ed"):
    page.open(case)
    page.paint()
    page.paint(label=1)
    page.act("undo")
    page.act("decide", regions=[1], decision="corrected")
    assert page.act("finish").status_code == 422
    page.act("decide", regions=[2, 3], decision="accepted")
    answer = page.act("finish")
    assert answer.status_code == 200 and answer.json()["finished"]


def test_a_finished_case(page, predictions, tmp_path):
    finish(page)
    out = tmp_path / "out" / "p1_ed"
    expected = automatic()
    for row, col in INSIDE:
        expected[row, col, 1] = 3
    source = nib.load(predictions / "p1_ed" / "segmentation.nii.gz")
    for name in ("segmentation.nii.gz", "edited.nii.gz"):
        written = nib.load(out / name)
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), expected)
        np.testing.assert_array_equal(written.affine, source.affine)
    lost = automatic()[16:19, 16:18, 1]
    audit = json.loads((out / "audit.json").read_text())
    first = audit["regions"][0]
    assert (first["id"], first["decision"], first["voxels_changed"], first["LV_gained"]) == (1, "corrected", 3, 3)
    assert first["RV_lost"] == sum(automatic()[row, col, 1] == 1 for row, col in INSIDE) and lost.size
    assert [region["decision"] for region in audit["regions"]] == ["corrected", "accepted", "accepted"]
    assert audit["reviewers"] == ["Dr A"] and audit["finished_utc"] > audit["started_utc"]
    assert [row["action"] for row in audit["actions"]] == [
        "open",
        "paint",
        "paint",
        "undo",
        "decide",
        "decide",
        "finish",
    ]
    ml = 3 * 1.5 * 1.5 * 8 / 1000
    assert audit["volume_ml"]["after"]["LV"] - audit["volume_ml"]["before"]["LV"] == pytest.approx(ml)
    indices = audit["indices"]  # both phases are the same heart here
    assert indices["cases"] == {"ED": "p1_ed", "ES": "p1_es"} and indices["reviewed"] == {"ED": True, "ES": False}
    assert indices["before"]["lv_ef_percent"] == 0 < indices["after"]["lv_ef_percent"]
    lines = (out / "audit.csv").read_text().splitlines()
    assert lines[0].startswith("time_utc,reviewer,action,slice,regions,decision,voxels_changed,RV_gained")
    assert len(lines) == 8 and ",Dr A,paint,1,1,,3,0," in lines[2]
    row = page.client.get("/api/cases").json()[0]
    assert (row["case"], row["status"], row["decided"]) == ("p1_ed", "finished", 3)
    assert page.paint().status_code == 422  # until it is opened again


def test_the_same_rule_and_files_as_correct_edited(page, predictions, tmp_path):
    for case in ("p1_ed", "p1_es"):
        finish(page, case)
    outcome = correct(predictions, tmp_path / "again", edited=tmp_path / "out")
    assert not outcome.failures
    for case in ("p1_ed", "p1_es"):
        mine, theirs = (tmp_path / side / case for side in ("out", "again"))
        assert (mine / "segmentation.nii.gz").read_bytes() == (theirs / "segmentation.nii.gz").read_bytes()
        records = [json.loads((side / "correction.json").read_text()) for side in (mine, theirs)]
        for record in records:
            record.pop("sources")
        assert {k: v for k, v in records[0].items() if k not in ("reviewer", "seconds")} == records[1]
    for case in ("p1_ed", "p1_es"):
        save(tmp_path / "reference" / f"{case}_gt.nii.gz", automatic())
    assert not evaluate(predictions, tmp_path / "reference", tmp_path / "scores", compare=tmp_path / "out").failures
    assert (
        "p1_ed" in (tmp_path / "scores" / "comparison.csv").read_text()
        or (tmp_path / "scores" / "comparison.csv").stat().st_size
    )


def test_painting_the_reference_is_the_simulated_correction(page, predictions, tmp_path):
    """Two ways to the same labels: by strokes in the seat, and by `correct --reference`."""
    reference = np.roll(automatic(), (3, -2), axis=(0, 1))
    reference[30:36, 26:30, 3] = 3
    for case in ("p1_ed", "p1_es"):
        save(tmp_path / "reference" / f"{case}_gt.nii.gz", reference)
    assert not correct(predictions, tmp_path / "simulated", reference=tmp_path / "reference").failures
    page.open()
    for z in range(SHAPE[2]):
        for label in range(4):
            voxels = np.argwhere((flagged()[..., z] > 0) & (reference[..., z] == label)).tolist()
            if voxels:
                assert page.paint(voxels, slice=z, label=label).status_code == 200
    assert page.act("finish", incomplete=True).status_code == 200
    mine, theirs = (load(tmp_path / side / "p1_ed" / "segmentation.nii.gz") for side in ("out", "simulated"))
    np.testing.assert_array_equal(mine, theirs)
    assert (mine != automatic()).any()


def test_a_journal_that_breaks_a_rule_is_refused(page, predictions, tmp_path):
    finish(page)
    path = tmp_path / "out" / "p1_ed" / "review.jsonl"
    lines = path.read_text().splitlines()
    paint = json.loads(lines[2])
    for change in ({"voxels": [[0, 0]]}, {"action": "none"}, {"time": "noon"}, {"label": None}):
        path.write_text("\n".join([*lines[:2], json.dumps({**paint, **change}), *lines[3:], ""]))
        other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
        answer = other.open()
        assert answer.status_code == 422 and "review.jsonl, line 3: no action of a review" in answer.json()["error"]


def test_the_last_word_has_the_rule_of_correct(predictions, tmp_path):
    """Even if a label outside had changed in the server, it would not be written."""
    seat = Seat(predictions, tmp_path / "out")
    page = Page(create_app(seat, TOKEN, PORT))
    page.open()
    seat.reviews["p1_ed"].state.labels[0, 0, 0] = 1
    answer = page.act("finish", incomplete=True)
    assert answer.status_code == 422 and "1 voxel(s) edited outside the flagged regions" in answer.json()["error"]
    assert not (tmp_path / "out" / "p1_ed" / "segmentation.nii.gz").exists()


def test_other_predictions_than_those_begun_on(page, predictions, tmp_path):
    finish(page)
    labels = automatic()
    labels[0, 0, 0] = 1
    save(predictions / "p1_ed" / "segmentation.nii.gz", labels)
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    answer = other.open()
    assert answer.status_code == 422 and "begun on other predictions" in answer.json()["error"]
    rows = {row["case"]: row["status"] for row in other.client.get("/api/cases").json()}
    assert rows == {"p1_ed": "broken", "p1_es": "open"}


@pytest.mark.parametrize("begun", [True, False])
def test_predictions_made_again_under_the_server(page, predictions, tmp_path, begun):
    """Nothing of the old segmentation is written as a result of the new one; a review not begun yet is of the new."""
    path, new = predictions / "p1_ed" / "segmentation.nii.gz", automatic()
    old = path.read_bytes()
    page.client.get("/api/state", params={"case": "p1_ed"})  # the server has read the case
    if begun:
        page.open()
        page.paint()
    new[40:44, 20:30, 0] = 0
    save(path, new)
    if begun:
        for answer in (page.act("finish", incomplete=True), page.open(take_over=True)):
            assert answer.status_code == 422 and "begun on other predictions" in answer.json()["error"]
        assert page.client.get("/api/cases").json()[0]["status"] == "broken"
        assert [file.name for file in (tmp_path / "out" / "p1_ed").iterdir()] == ["review.jsonl"]
        path.write_bytes(old)  # as from a backup: the review goes on
    else:
        page.open()
    assert page.act("finish", incomplete=True).status_code == 200
    written = load(tmp_path / "out" / "p1_ed" / "segmentation.nii.gz")
    assert (written[flagged() == 0] == load(path)[flagged() == 0]).all()


def test_a_journal_moved_away_under_the_server(page, predictions, tmp_path):
    """The review begins anew, as the messages promise; the journal can be put back as well."""
    page.open()
    page.paint()
    path, old = tmp_path / "out" / "p1_ed" / "review.jsonl", tmp_path / "old.jsonl"
    path.rename(old)
    assert page.client.get("/api/cases").json()[0]["status"] == "open"
    answer = page.paint()
    assert answer.status_code == 409 and "is not open any more" in answer.json()["error"]
    assert not page.open().json()["state"]["can_undo"]
    assert page.paint().status_code == 200
    assert [event["action"] for event in journal(tmp_path)] == ["begin", "open", "paint"]
    path.unlink()
    assert page.open().status_code == 200
    path.unlink()
    page.client.get("/api/state", params={"case": "p1_ed"})  # the server has read that there is none
    old.rename(path)
    assert page.open().json()["state"]["can_undo"]
    assert [event["action"] for event in journal(tmp_path)] == ["begin", "open", "paint", "open"]


@pytest.mark.parametrize("restart", [True, False])
def test_moving_the_journal_of_a_finished_case_begins_it_anew(page, predictions, tmp_path, restart):
    """Its results go when the new review begins, so that nothing takes them for that one's."""
    finish(page)
    out = tmp_path / "out" / "p1_ed"
    (out / "review.jsonl").rename(tmp_path / "old.jsonl")
    page = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT)) if restart else page
    assert page.client.get("/api/cases").json()[0]["status"] == "open"
    assert not page.open().json()["state"]["finished"]
    assert {path.name for path in out.iterdir()} == {"review.jsonl"}


def test_a_correction_made_under_the_server_is_not_lost(page, predictions, tmp_path):
    out = tmp_path / "out" / "p1_ed"
    for case in ("p1_ed", "p1_es"):
        save(tmp_path / "edited" / f"{case}.nii.gz", automatic())
    assert not correct(predictions, tmp_path / "out", edited=tmp_path / "edited").failures
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    answer = page.open()
    assert answer.status_code == 422 and "has a segmentation that no review made" in answer.json()["error"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_a_scan_that_has_changed_is_not_shown(page, tmp_path):
    scan = tmp_path / "scans" / "p1_ed.nii.gz"
    save(scan, np.zeros(SHAPE, np.float32))
    answer = page.open()
    assert answer.status_code == 422 and f"{scan}: not the scan that was segmented" in answer.json()["error"]
    scan.unlink()
    assert "no such file" in page.open().json()["error"]
    assert not journal(tmp_path)
    assert page.open("p1_es").status_code == 200


def test_a_server_killed_right_after_finishing_makes_up_the_audit(page, predictions, tmp_path):
    finish(page)
    audit = tmp_path / "out" / "p1_ed" / "audit.json"
    content = json.loads(audit.read_text())
    audit.unlink()
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    other.client.get("/api/cases")
    assert json.loads(audit.read_text()) == content


def test_a_reopened_case_has_no_result_until_it_is_finished_again(page, predictions, tmp_path):
    finish(page)
    out = tmp_path / "out" / "p1_ed"
    files = {path.name for path in out.iterdir()}
    assert page.act("reopen").status_code == 200
    assert {path.name for path in out.iterdir()} == {"review.jsonl"}
    (out / "segmentation.nii.gz").touch()  # as if the server had been killed in between
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    assert other.client.get("/api/cases").json()[0]["status"] == "in progress"
    assert not (out / "segmentation.nii.gz").exists()
    assert page.act("finish").status_code == 200
    assert {path.name for path in out.iterdir()} == files


def test_the_audit_of_a_phase_follows_the_other_phase(page, tmp_path):
    finish(page)
    assert reviewed_phases(tmp_path, "p1_ed") == {"ED": True, "ES": False}
    finish(page, "p1_es")
    assert reviewed_phases(tmp_path, "p1_ed") == {"ED": True, "ES": True}
    page.act("reopen")
    assert reviewed_phases(tmp_path, "p1_ed") == {"ED": True, "ES": False}


def reviewed_phases(tmp_path, case):
    return json.loads((tmp_path / "out" / case / "audit.json").read_text())["indices"]["reviewed"]


@pytest.mark.parametrize("first", ["p1_ed", "p1_es"])
@pytest.mark.parametrize("action", ["finish", "reopen"])
def test_a_server_killed_before_the_other_phases_audit_makes_it_up(predictions, tmp_path, first, action):
    seat = Seat(predictions, tmp_path / "out")
    page = Page(create_app(seat, TOKEN, PORT))
    finish(page)
    if action == "reopen":
        finish(page, "p1_es")
    page.open("p1_es")
    seat.review("p1_es").act(page.session, {"id": "1", "action": action, "incomplete": True})  # killed after this
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    assert other.open(first).status_code == 200
    expected = {"ED": True, "ES": action == "finish"}
    assert reviewed_phases(tmp_path, "p1_ed") == expected
    audit = tmp_path / "out" / "p1_es" / "audit.json"
    assert reviewed_phases(tmp_path, "p1_es") == expected if action == "finish" else not audit.exists()


def test_a_case_begun_anew_leaves_the_audit_of_the_other_phase(page, tmp_path):
    finish(page)
    finish(page, "p1_es")
    (tmp_path / "out" / "p1_es" / "review.jsonl").unlink()
    page.open("p1_es")
    assert reviewed_phases(tmp_path, "p1_ed") == {"ED": True, "ES": False}


@pytest.mark.parametrize("name", ["segmentation.nii.gz", "correction.json"])
def test_a_removed_result_of_a_finished_case_is_written_again(page, predictions, tmp_path, name):
    finish(page)
    path = tmp_path / "out" / "p1_ed" / name
    before = path.read_bytes()
    path.unlink()
    assert next(iter(Seat(predictions, tmp_path / "out").worklist()))["status"] == "finished"
    assert path.read_bytes() == before


def test_phases_of_a_long_cine(tmp_path):
    """Of more than 100 phases the cases have three digits."""
    cases = ("heart/phase007", "heart/phase100")
    root = write_predictions(tmp_path, cases)
    record = {"cases": list(cases), "curve": [{"phase": 7}, {"phase": 100}], "ed_phase": 7, "es_phase": 100}
    (root / "heart" / "cine.json").write_text(json.dumps(record))
    seat = Seat(root, tmp_path / "out")
    assert seat._phases(seat.review(cases[0])) == {"ED": cases[0], "ES": cases[1]}
    above = Seat(root.parent, tmp_path.parent / f"{tmp_path.name}_out")  # the folder above has it as well
    names = [f"{root.name}/{case}" for case in cases]
    assert above._phases(above.review(names[0])) == {"ED": names[0], "ES": names[1]}


@pytest.mark.parametrize("lost", ["segmentation.nii.gz", "qc.json"])
def test_a_case_can_be_finished_beside_a_damaged_one(page, predictions, tmp_path, lost):
    (predictions / "p1_es" / lost).write_text("torn")
    finish(page)
    audit = json.loads((tmp_path / "out" / "p1_ed" / "audit.json").read_text())
    assert audit["finished_utc"] and "missing" in audit["indices"]
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    assert {row["case"]: row["status"] for row in other.client.get("/api/cases").json()}["p1_ed"] == "finished"


QC = {
    "detection": [None, [], {}, {"map": "bmap"}, {"map": "none", "regions": []}, {"map": [], "regions": []}],
    "input": [None, "p1_es.nii.gz", {"path": None, "frame": None, "sha256": ""}, {"path": "p1_es.nii.gz"}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in QC.items() for value in values])
def test_an_incomplete_qc_json_breaks_its_case_alone(predictions, tmp_path, key, value):
    path = predictions / "p1_es" / "qc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    page = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    rows = {row["case"]: row for row in page.client.get("/api/cases").json()}
    assert {name: row["status"] for name, row in rows.items()} == {"p1_ed": "open", "p1_es": "broken"}
    assert rows["p1_es"]["message"].startswith(f"{path}: no scan or no failure detection in it.")
    answer = page.open("p1_es")
    assert answer.status_code == 422 and answer.json()["error"] == rows["p1_es"]["message"]


@pytest.mark.parametrize("scores", [None, [1], {"region_failure": None}, {"region_failure": "high"}])
def test_cases_without_usable_scores_come_last(predictions, tmp_path, scores):
    path = predictions / "p1_ed" / "qc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": scores}))
    assert [row["case"] for row in Seat(predictions, tmp_path / "out").worklist()] == ["p1_es", "p1_ed"]


def test_a_journal_without_events_breaks_its_case_alone(page, tmp_path):
    path = tmp_path / "out" / "p1_ed" / "review.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("[]\n")
    rows = {row["case"]: row for row in page.client.get("/api/cases").json()}
    assert rows["p1_es"]["status"] == "open" and rows["p1_ed"]["status"] == "broken"
    assert rows["p1_ed"]["message"].startswith(f"{path}: a line is damaged (not a JSON object)")


@pytest.mark.parametrize("change", [{"cases": None}, {"cases": []}, {"curve": [1, 2]}, {"ed_phase": []}])
def test_a_phase_can_be_finished_beside_an_incomplete_cine_json(tmp_path, change):
    cases = ["heart/phase00", "heart/phase01"]
    cine = write_predictions(tmp_path, cases) / "heart" / "cine.json"
    record = {"cases": cases, "curve": [{"phase": 0}, {"phase": 1}], "ed_phase": 0, "es_phase": 1}
    cine.write_text(json.dumps(record | change))
    page = Page(create_app(Seat(tmp_path / "run", tmp_path / "out"), TOKEN, PORT))
    page.open(cases[0])
    answer = page.act("finish", incomplete=True)
    assert answer.status_code == 200
    assert answer.json()["indices"]["missing"].startswith(f"{cine}: the heart's phases are not in it.")
    assert (tmp_path / "out" / cases[0] / "audit.json").is_file()


@pytest.mark.parametrize("content", ['{"case": "p1_ed"', "{}", "[]"])
def test_a_damaged_audit_is_written_again(page, predictions, tmp_path, content):
    finish(page)
    audit = tmp_path / "out" / "p1_ed" / "audit.json"
    before = audit.read_text()
    audit.write_text(content)
    assert next(iter(Seat(predictions, tmp_path / "out").worklist()))["status"] == "finished"
    assert audit.read_text() == before


def test_what_cannot_be_made_up_is_told_until_it_can(page, predictions, tmp_path):
    finish(page)
    audit = tmp_path / "out" / "p1_ed" / "audit.json"
    audit.unlink()
    audit.mkdir()
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    for _ in range(2):
        row = other.client.get("/api/cases").json()[0]
        assert row["status"] == "broken" and f"cannot write {audit}" in row["message"]
    audit.rmdir()
    assert other.client.get("/api/cases").json()[0]["status"] == "finished" and audit.is_file()


def test_a_case_finished_before_all_was_decided(page, predictions, tmp_path):
    page.open()
    assert page.act("finish", incomplete=True).status_code == 200
    audit = json.loads((tmp_path / "out" / "p1_ed" / "audit.json").read_text())
    assert {region["decision"] for region in audit["regions"]} == {"not decided"}
    other = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    assert other.open().json()["state"]["finished"]


@pytest.mark.parametrize("value", ["NaN", "1", '"yes"', "null"])
def test_a_refused_finish_writes_nothing(page, tmp_path, value):
    page.open()
    body = {"case": page.case, "session": page.session, "action": {"id": "1", "action": "finish", "incomplete": 0}}
    content = json.dumps(body).replace('"incomplete": 0', f'"incomplete": {value}')
    answer = page.client.post("/api/act", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "incomplete is true or false" in answer.json()["error"]
    assert [path.name for path in (tmp_path / "out" / "p1_ed").iterdir()] == ["review.jsonl"]
    assert page.act("finish", incomplete=True).status_code == 200


def test_cases_without_flagged_regions(tmp_path):
    predictions = write_predictions(tmp_path, with_regions=False)
    page = Page(create_app(Seat(predictions, tmp_path / "out"), TOKEN, PORT))
    assert page.open().json()["state"]["position"] is None
    assert page.act("finish").status_code == 200
    written = nib.load(tmp_path / "out" / "p1_ed" / "segmentation.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), automatic())


def test_no_review_without_flagged_regions_files(predictions, tmp_path):
    """As of a folder that `correct` or `segment` wrote: no case of it could be opened."""
    for file in predictions.glob("*/failure_regions.nii.gz"):
        file.unlink()
    with pytest.raises(ValueError, match=r"none of its \d case\(s\) has a failure_regions\.nii\.gz"):
        Seat(predictions, tmp_path / "out")


# ---- the command


class Browser:
    """Another program on this computer that was given the address."""

    def __init__(self, address):
        origin = address.split("/?")[0]
        self.client = httpx.Client(base_url=origin, headers={"Origin": origin}, follow_redirects=True, timeout=30)
        assert self.client.get(address).status_code == 200

    def get(self, path):
        return self.client.get(path).json()

    def open(self):
        answer = self.client.post("/api/open", json={"case": "p1_ed", "reviewer": "Dr A"}).json()
        self.session = answer["session"]  # that of a killed server is void
        return answer["state"]

    def act(self, **action):
        action = {"id": secrets.token_hex(8), **action}
        return self.client.post("/api/act", json={"case": "p1_ed", "session": self.session, "action": action})

    def paint(self, voxels, label):
        return self.act(action="paint", slice=1, label=label, voxels=voxels, shape=list(SHAPE))


def kill_later(process, seconds):
    threading.Timer(seconds, process.kill).start()


def test_the_command_serves_this_computer_only(predictions, tmp_path, serve):
    with serve(predictions, tmp_path / "out") as (process, address):
        assert address.startswith("http://127.0.0.1:") and len(address.split("token=")[1]) >= 40
        port = int(address.split(":")[2].split("/")[0])
        browser = Browser(address)
        assert [row["case"] for row in browser.get("/api/cases")] == ["p1_ed", "p1_es"]
        assert browser.get("/api/settings")["reviewer"] == "Dr A"
        bound = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert bound == ["127.0.0.1"]
        with socket.create_connection(("127.0.0.1", port)) as raw:  # a client library would tidy the path
            head = f"GET /static/../../../setup.cfg HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            raw.sendall(f"{head}Cookie: {next(iter(browser.client.cookies))}={address.split('=')[1]}\r\n\r\n".encode())
            assert raw.makefile("rb").readline().split()[1] == b"404"
        with pytest.raises(ValueError, match="another review server is at work there"):
            start(predictions, tmp_path / "out", browser=False)
        with pytest.raises(OSError, match=f"choose another --port than {port}"):
            start(predictions, tmp_path / "out2", port=port, browser=False)


def test_kill_9_during_saves(predictions, tmp_path, serve):
    """Every stroke that was answered is there after the server is killed, and the review goes on from it."""
    out, inside, labels, saved = tmp_path / "out", np.argwhere(flagged()[..., 1]).tolist(), automatic(), 0
    pending = None
    for round in range(2):
        with serve(predictions, out) as (process, address):
            browser = Browser(address)
            found = browser.open()["labels"]
            if pending and found != digits(labels):  # the unanswered stroke may have been saved as well
                (row, col), label = pending
                labels[row, col, 1] = label
            assert found == digits(labels)
            kill_later(process, 1 + round)
            for n in range(100000):
                pending = inside[(7 * n + round) % len(inside)], (n + round) % 4
                try:
                    assert browser.paint([pending[0]], pending[1]).status_code == 200
                except httpx.TransportError:
                    break
                (row, col), label = pending
                labels[row, col, 1] = label
                saved += 1
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert saved > 30
    assert {path.name for path in (out / "p1_ed").iterdir()} == {"review.jsonl"}


def digits(labels):
    """Labels of the flagged voxels, the first axis fastest."""
    return "".join(map(str, labels.T[flagged().T > 0].tolist()))


def test_kill_9_while_finishing(predictions, tmp_path, serve):
    """Wherever it is cut off, no file is half written, and finishing goes through afterwards."""
    out = tmp_path / "out"
    for round in range(2):
        with serve(predictions, out) as (process, address):
            browser = Browser(address)
            browser.open()
            kill_later(process, 0.3 + 0.4 * round)
            with contextlib.suppress(httpx.TransportError):
                for n in range(100000):
                    browser.act(action="reopen")
                    browser.paint(INSIDE, n % 4)
                    browser.act(action="finish", incomplete=True)
            process.join()
        for path in (out / "p1_ed").glob("[!.]*"):
            if path.name.endswith(".nii.gz"):
                assert not ((load(path) != automatic()) & (flagged() == 0)).any()
            elif path.suffix == ".json":
                json.loads(path.read_text())
    with serve(predictions, out) as (_, address):
        browser = Browser(address)
        browser.open()
        browser.act(action="reopen")
        assert browser.paint(INSIDE, 2).status_code == browser.act(action="finish", incomplete=True).status_code == 200
    assert all(load(out / "p1_ed" / "segmentation.nii.gz")[row, col, 1] == 2 for row, col in INSIDE)


def load(path):
    return np.asanyarray(nib.load(path).dataobj)


def test_what_is_wrong_with_the_command_is_one_line(predictions, tmp_path, command):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no segmentation.nii.gz in it"):
        Seat(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="the folder of one case"):
        Seat(predictions / "p1_ed", tmp_path / "out")
    corrected = tmp_path / "corrected" / "p1_ed" / "segmentation.nii.gz"
    corrected.parent.mkdir(parents=True)
    corrected.write_bytes(b"of correct")
    with pytest.raises(ValueError, match="p1_ed has a segmentation that no review made"):
        Seat(predictions, tmp_path / "corrected")
    assert corrected.read_bytes() == b"of correct"
    outcome = command("review", "--predictions", predictions, "--output", predictions / "out", "--no_browser")
    assert outcome.returncode == 1 and "write the review somewhere else" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_without_the_extra(predictions, tmp_path):
    """A missing package is named with the extra that brings it."""
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('no uvicorn', name='uvicorn')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PIPELINE), "review", "--predictions", str(predictions)]
    outcome = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert outcome.returncode == 1
    assert outcome.stderr == "error: uvicorn is not installed: pip install 'cardiac-qc-plugin[review]'.\n"
