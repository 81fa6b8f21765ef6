"""The review page in Chromium, driven by real mouse, touch and key events."""

import contextlib
import json
import socket
import threading
import time

import nibabel as nib
import numpy as np
import psutil
import pytest
import uvicorn
from seats import REGIONS, SHAPE, automatic, flagged

from cardiac_qc_plugin.review.seat import Seat
from cardiac_qc_plugin.review.server import create_app

TOKEN = "a-token"


@pytest.fixture
def address(predictions, tmp_path):
    """A server in this process; its state can be compared with what the page shows."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = create_app(Seat(predictions, tmp_path / "out"), TOKEN, port, "Dr A")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{port}/?token={TOKEN}"
        server.should_exit = True
        thread.join()


class Screen:
    """A window of the browser; what it complains about fails the test."""

    def __init__(self, chromium, address, **options):
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.goto(address)
        self.page.wait_for_selector("#rows tr")

    def open(self):
        self.page.click("#next-case")
        self.page.wait_for_selector("#seat:not([hidden])")

    def take_over(self):
        """Open the first case although another window has it."""
        self.page.click("#rows tr:first-child button")
        self.page.wait_for_selector("#message[open]")
        assert "open in another window" in self.page.text_content("#message-text")
        self.page.click("#message >> text=Take over")
        self.page.wait_for_selector("#seat:not([hidden])")

    def point(self, i, j):
        return self.page.evaluate("([i, j]) => review.point(i, j)", [i, j])

    def drag(self, *voxels):
        """The mouse, with its left button down, over the middles of these voxels, until that is saved."""
        self.stroke(*voxels)
        self.saved()

    def stroke(self, *voxels):
        """The same without waiting."""
        self.page.mouse.move(*self.point(*voxels[0]))
        self.page.mouse.down()
        for voxel in voxels[1:]:
            self.page.mouse.move(*self.point(*voxel), steps=4)
        self.page.mouse.up()

    def saved(self):
        self.page.wait_for_selector("#saved.saved")

    def labels(self):
        """What the page shows."""
        get = """([h, w, d]) => [...Array(h * w * d).keys()].map(
            k => review.label(k % h, Math.floor(k / h) % w, Math.floor(k / h / w)))"""
        return np.array(self.page.evaluate(get, list(SHAPE))).reshape(SHAPE, order="F")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
            self.saved()

    def where(self):
        return self.page.text_content("#which"), self.page.text_content("#slice-label")


def written(tmp_path, name="segmentation.nii.gz"):
    return np.asanyarray(nib.load(tmp_path / "out" / "p1_ed" / name).dataobj)


def test_a_case_from_opening_to_finishing(chromium, address, tmp_path):
    screen = Screen(chromium, address)
    screen.open()
    page, expected = screen.page, automatic()
    assert screen.where() == ("Region 1 of 3", "slice 2 of 4")
    z, row, col, _ = REGIONS[1]

    # paint with LV, one pixel wide, from outside (left of the region) to inside and out again
    screen.press("3", "[", "[")
    screen.drag((row - 6, col + 2), (row + 3, col + 2), (row + 3, col + 12))
    expected[row : row + 4, col + 2, z] = 3
    expected[row + 3, col + 2 : col + 8, z] = 3
    np.testing.assert_array_equal(screen.labels(), expected)

    # outside only: nothing, and the page says why
    screen.drag((row - 8, col - 4), (row - 8, col + 4))
    assert "Only flagged regions" in page.text_content("#toast")
    np.testing.assert_array_equal(screen.labels(), expected)

    # erase in region 2, undo, redo, undo
    before = expected.copy()
    screen.press("0", "]", "]")
    screen.drag((28, 20), (29, 22))
    erased = screen.labels()
    assert (erased[24:32, 16:24, z] == 0).sum() > (before[24:32, 16:24, z] == 0).sum()
    screen.press("z")
    np.testing.assert_array_equal(screen.labels(), before)
    screen.press("y")
    np.testing.assert_array_equal(screen.labels(), erased)
    screen.press("z")

    # the next region in order of probability, which the page takes up again when it is loaded again
    screen.press("c")
    assert screen.where()[0] == "Region 2 of 3"
    screen.press("n")
    assert screen.where() == ("Region 3 of 3", "slice 4 of 4")
    page.reload()
    page.wait_for_selector("#seat:not([hidden])")
    assert screen.where() == ("Region 3 of 3", "slice 4 of 4")
    np.testing.assert_array_equal(screen.labels(), expected)
    assert page.is_enabled("#undo")

    # an accepted region cannot be called corrected; then the last one, and the case is done
    screen.press("c")
    assert "accept it as correct" in page.text_content("#toast")
    screen.press("a", "a")
    page.click("#finish.primary")
    page.wait_for_selector("#message[open]")
    assert "Regions corrected: 1, accepted as correct: 2" in page.text_content("#message-text")
    labels = written(tmp_path)
    np.testing.assert_array_equal(labels, expected)
    changed = labels != automatic()
    assert changed.any() and not (changed & (flagged() != 1)).any()
    audit = json.loads((tmp_path / "out" / "p1_ed" / "audit.json").read_text())
    assert audit["reviewers"] == ["Dr A"] and audit["voxels_changed"] == changed.sum() and 0 < audit["seconds"] < 600
    page.click("text=All cases")
    page.wait_for_selector("#worklist:not([hidden])")
    page.wait_for_selector("#totals:has-text('finished: 1 of 2')")  # which the server counts after the list appeared
    assert not screen.complaints


def test_a_case_finished_with_regions_undecided(chromium, address, tmp_path):
    screen = Screen(chromium, address)
    screen.open()
    page = screen.page
    screen.press("a", "Enter")
    page.wait_for_selector("#message[open]")
    assert "Regions that are not decided: 2" in page.text_content("#message-text")
    page.click("text=Go on")
    assert not (tmp_path / "out" / "p1_ed" / "audit.json").exists()
    page.click("#finish")
    page.click("text=Finish all the same")
    page.wait_for_selector("#message h2")
    np.testing.assert_array_equal(written(tmp_path), automatic())
    audit = json.loads((tmp_path / "out" / "p1_ed" / "audit.json").read_text())
    assert [one["decision"] for one in audit["regions"]].count("not decided") == 2
    assert not screen.complaints


def test_a_killed_browser(chromium, launch_chromium, address):
    before = set(psutil.Process().children(recursive=True))
    screen = Screen(launch_chromium(), address)
    screen.open()
    _, row, col, _ = REGIONS[1]
    screen.press("3")
    screen.drag((row + 2, col + 2), (row + 4, col + 5))
    painted = screen.labels()
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    again = Screen(chromium, address)
    again.take_over()
    np.testing.assert_array_equal(again.labels(), painted)
    assert (painted != automatic()).any()


def test_two_browsers(chromium, address):
    first = Screen(chromium, address)
    first.open()
    _, row, col, _ = REGIONS[1]
    first.press("3")
    first.drag((row + 2, col + 2), (row + 4, col + 5))
    painted = first.labels()
    assert (painted != automatic()).any()

    second = Screen(chromium, address)
    second.take_over()
    np.testing.assert_array_equal(second.labels(), painted)

    first.page.keyboard.press("2")
    for _ in range(2):  # the second time nothing is even drawn
        first.stroke((row + 6, col + 6), (row + 6, col + 7))
        first.page.wait_for_selector("#message[open]")
        assert "taken over by another window" in first.page.text_content("#message-text")
        assert "NOT SAVED" in first.page.text_content("#saved")
        first.page.keyboard.press("Escape")
        first.page.wait_for_selector("#message:not([open])", state="attached")
        np.testing.assert_array_equal(first.labels(), painted)  # what is not saved is not shown
    second.press("z")
    np.testing.assert_array_equal(second.labels(), automatic())
    assert [text.partition("status of ")[2] for text in second.complaints] == ["409 (Conflict)"]


def test_a_duplicated_tab_is_another_window(chromium, address):
    """It has the first one's session storage."""
    screen = Screen(chromium, address)
    screen.open()
    with screen.page.expect_popup() as opened:
        screen.page.evaluate("window.open(location.href)")
    opened.value.wait_for_selector("#message[open]")
    assert "open in another window" in opened.value.text_content("#message-text")
    screen.press("a")
    assert screen.where()[0] == "Region 2 of 3"


def test_caps_lock_is_no_shift(chromium, address):
    """With it the letter of a key is a capital, and with Shift a small one."""
    screen = Screen(chromium, address)
    screen.open()
    press = (
        "([key, shiftKey]) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, shiftKey, bubbles: true}))"
    )
    screen.page.evaluate(press, ["A", False])
    screen.saved()
    assert screen.where()[0] == "Region 2 of 3"
    screen.page.evaluate(press, ["Z", False])
    screen.saved()
    assert screen.where()[0] == "Region 1 of 3"
    screen.page.evaluate(press, ["a", True])
    screen.saved()
    assert screen.where() == ("Region 3 of 3", "slice 4 of 4")


def test_saves_wait_for_a_server_that_does_not_answer(chromium, address):
    screen = Screen(chromium, address)
    screen.open()
    _, row, col, _ = REGIONS[1]
    screen.press("3")
    screen.page.route("**/api/act", lambda route: route.abort())
    screen.stroke((row + 2, col + 2))
    screen.page.wait_for_selector("#saved.unsaved")
    assert "NOT SAVED" in screen.page.text_content("#saved")
    screen.page.unroute("**/api/act")
    screen.saved()
    painted = screen.labels()
    assert (painted != automatic()).any()
    screen.page.reload()
    screen.page.wait_for_selector("#seat:not([hidden])")
    np.testing.assert_array_equal(screen.labels(), painted)


def test_leaving_waits_for_what_is_not_saved(chromium, address):
    screen = Screen(chromium, address)
    screen.open()
    _, row, col, _ = REGIONS[1]
    screen.press("3")
    screen.page.route("**/api/act", lambda route: route.abort())
    screen.stroke((row + 2, col + 2))
    for choice, list_is_shown in (("Stay", False), ("Leave without them", True)):
        screen.page.wait_for_selector("#saved.unsaved")
        screen.page.keyboard.press("Escape")
        screen.page.wait_for_selector("#message[open]")
        assert "Actions that are not saved yet: 1" in screen.page.text_content("#message-text")
        screen.page.click(f"#message >> text={choice}")
        screen.page.wait_for_selector("#worklist:not([hidden])" if list_is_shown else "#seat:not([hidden])")


def test_leaving_at_once_saves_all(chromium, address):
    """The answer to the first action has not come when the case is left."""
    screen = Screen(chromium, address)
    screen.open()
    _, row, col, _ = REGIONS[1]
    screen.press("3")

    def slow(route):
        time.sleep(0.5)
        route.continue_()

    screen.page.route("**/api/act", slow)
    for step in (2, 4):
        screen.stroke((row + step, col + step))
    painted = screen.labels()
    screen.page.keyboard.press("Escape")
    screen.page.wait_for_selector("#worklist:not([hidden])")
    screen.page.unroute("**/api/act")
    screen.open()
    np.testing.assert_array_equal(screen.labels(), painted)
    assert (painted != automatic()).any() and not screen.complaints


def test_a_case_that_was_left_is_not_open(chromium, address):
    """The list waits for the server to close it, and the next case is this one again."""
    screen = Screen(chromium, address)
    screen.open()
    screen.page.route("**/api/close", lambda route: (time.sleep(0.5), route.continue_()))
    screen.page.keyboard.press("Escape")
    status = screen.page.locator("#rows tr:first-child td:nth-child(3)")
    status.filter(has_text="in progress").wait_for()
    assert status.text_content() == "in progress"
    screen.open()
    assert screen.page.text_content("#case-name") == "p1_ed" and not screen.complaints


def test_a_phone(chromium, address):
    """Nothing is wider than the screen, buttons can be hit, a finger paints, and two fingers only zoom."""
    screen = Screen(chromium, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390
    screen.open()
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = screen.page.eval_on_selector_all(
        "#seat footer button", "all => all.filter(b => b.offsetParent).map(b => [b.offsetWidth, b.offsetHeight])"
    )
    assert min(map(min, sizes)) >= 40
    assert screen.page.evaluate("document.querySelector('footer').getBoundingClientRect().bottom") <= 844
    _, row, col, _ = REGIONS[1]
    client = screen.context.new_cdp_session(screen.page)

    def touch(kind, *voxels):
        points = [dict(zip("xy", screen.point(*voxel), strict=True), id=n) for n, voxel in enumerate(voxels)]
        client.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    first, other = (row + 2, col + 2), (row + 6, col + 6)
    far = screen.point(row + 20, col), screen.point(row, col)
    touch("Start", first)
    touch("Start", first, other)
    touch("Move", first, (row + 12, col + 12))
    touch("End")
    near = screen.point(row + 20, col), screen.point(row, col)
    assert near[0][0] - near[1][0] > 1.3 * (far[0][0] - far[1][0])
    np.testing.assert_array_equal(screen.labels(), automatic())
    for _ in range(10):  # the browser sometimes makes no click of a tap after a pinch that is none of its own
        screen.page.tap("[data-label='3']")
        if screen.page.get_attribute("[data-label='3']", "aria-checked") == "true":
            break
        screen.page.wait_for_timeout(300)
    touch("Start", first)
    touch("Move", (row + 4, col + 2))
    touch("End")
    screen.page.wait_for_selector("#undo:enabled")  # touches arrive with the next frame
    screen.saved()
    changed = screen.labels() != automatic()
    assert changed.any() and not (changed & (flagged() == 0)).any()
    assert not screen.complaints
