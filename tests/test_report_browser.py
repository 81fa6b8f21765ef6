"""The report in Chromium: what a reader does with the mouse, the keys and the printer, against counts of our own."""

import numpy as np
import pytest
from report_cases import SHAPE, heart, make_case, random_probabilities, read_qc

from cardiac_qc_plugin.reports import write_report
from cardiac_qc_plugin.reports.report import cohort_page
from cardiac_qc_plugin.workflows.files import write_json

NASTY = "<script>alert(1)<i>"
CURVE = {
    "model": "drn", "map": "bmap", "patients": 15, "source": "fold 1 <b>",
    "threshold": [0.2, 0.6, 0.9], "caught": [0.9, 0.6, 0.2], "regions_per_patient": [40.0, 10.0, 2.0],
}  # fmt: skip


@pytest.fixture
def page(chromium):
    """A page that fails the test for any message on the console, error, or request beyond the files themselves."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, troubles = context.new_page(), []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or troubles.append(request.url))
    yield page
    context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five cases, one with a name that is HTML; two phases of a heart; one failure. Folder and painted volumes."""
    root = tmp_path_factory.mktemp("cohort")
    volumes, cases = {}, []
    for index, name in enumerate(("heart/phase00", "heart/phase01", "heart/phase02", NASTY, "quiet")):
        painted, flagged = random_probabilities(index)
        if name == "quiet":
            painted, flagged = 0.2 * painted, []
        volumes[name] = painted
        folder = make_case(root, name, painted=painted, regions=flagged, urgency=0.5 - 0.1 * index)
        qc = read_qc(folder)
        if name == NASTY:
            qc["segmentation"]["plausibility"] = {"violations": {"hole_LV": [1]}, "implausible_slices": [1]}
        write_json(folder / "qc.json", qc)
        cases.append(qc)
    write_json(root / "operating_curve.json", CURVE)
    phases = [f"heart/phase{k:02d}" for k in range(3)]
    write_report(root, cases, [("broken", "broken.nii.gz: <b>no such file.</b>")], [heart(phases, es=2)])
    return root, volumes


def names(page):
    return [text.split("\n")[0] for text in page.locator("#cases tbody th").all_inner_texts()]


def set_slider(page, selector, step):
    page.locator(selector).evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(step))


def reached(volume, threshold):
    """Regions that reach a threshold, (rows, columns, slices), from the cells' corners."""
    return volume[8:96:8, 0:80:8].astype(float) >= threshold


def open_case(page, root, name="heart/phase00"):
    page.goto((root / name / "report.html").as_uri())


def test_worklist_search_filter_sort(page, cohort):
    page.goto((cohort[0] / "report.html").as_uri())
    everything = ["broken", "heart/phase00", "heart/phase01", "heart/phase02", NASTY, "quiet"]
    assert names(page) == everything
    search = page.get_by_label("Search").first
    for text, found in (
        ("SCRIPT", [NASTY]),
        ("no such", ["broken"]),
        ("hole in", [NASTY]),
        ("xyz", []),
        ("", everything),
    ):
        search.fill(text)
        assert names(page) == found
    show = page.get_by_label("Show")
    for kind, found in (
        ("to review", everything[1:5]), ("nothing flagged", ["quiet"]), ("implausible", [NASTY]),
        ("not processed", ["broken"]), ("all", everything),
    ):  # fmt: skip
        show.select_option(kind)
        assert names(page) == found
    for phase, found in (("ED", everything[1:2]), ("ES", everything[3:4]), ("", everything)):
        page.get_by_label("Phase").select_option(phase)
        assert names(page) == found
    page.get_by_role("button", name="Urgency").click()
    assert names(page) == everything[1:] + ["broken"]  # unknown comes last
    page.get_by_role("button", name="Urgency").press("Enter")
    assert names(page) == everything[:0:-1] + ["broken"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.get_by_role("link", name=NASTY, exact=True).click()
    assert page.locator("h1").inner_text() == NASTY
    page.get_by_role("link", name="All cases").click()
    assert page.locator("#hearts tbody th").inner_text().split() == ["heart", "ED", "ES"]


def test_cohort_slider_counts_what_the_files_have(page, cohort):
    root, volumes = cohort
    page.goto((root / "report.html").as_uri())
    grid = page.evaluate("JSON.parse(document.getElementById('data').textContent).groups[0].grid")
    status = page.locator("[data-group='0'] [role=status]")
    for step in range(0, len(grid), 4):
        set_slider(page, "[data-group='0'] input", step)
        flags = [reached(volume, grid[step]) for volume in volumes.values()]
        regions, slices = (sum(int(f.sum()) for f in part) for part in (flags, [f.any(axis=(0, 1)) for f in flags]))
        cases = sum(f.any() for f in flags)
        found = f"{regions} region{'s' * (regions != 1)} on {slices} of {5 * SHAPE[2]} slices"
        assert status.inner_text().startswith(f"{found} flagged, in {cases} of 5 cases.")
        cells = page.locator("#cases tbody td[data-label='Flagged regions']").all_inner_texts()
        assert list(map(int, cells)) == [int(f.sum()) for f in flags]
    page.get_by_role("button", name="Operating point").click()
    text = status.inner_text()
    assert (
        "On 15 validation patients (fold 1 <b>) this threshold caught 86 % of the failure voxels" in text
    )  # 0.9 to 0.6
    assert "36.3 regions per patient" in text  # an eighth of the way from 40 to 10
    set_slider(page, "[data-group='0'] input", len(grid) - 1)
    assert "Not measured" in status.inner_text()


def test_case_slider_counts_what_the_file_has(page, cohort):
    root, volumes = cohort
    open_case(page, root)
    grid = page.evaluate("JSON.parse(document.getElementById('record').textContent).grid")
    for step in (0, 3, 8, len(grid) - 1):
        set_slider(page, "#threshold", step)
        flags = reached(volumes["heart/phase00"], grid[step])
        counts = page.locator("figure").evaluate_all("all => all.map(f => f.querySelectorAll('rect.on').length)")
        assert counts == flags.sum(axis=(0, 1)).tolist()
        visible = page.locator("rect").evaluate_all("all => all.filter(r => r.getClientRects().length).length")
        assert visible == flags.sum()
        slices = flags.any(axis=(0, 1)).sum()
        assert page.locator("#flagged").inner_text().startswith(f"{flags.sum()} region")
        assert f" on {slices} of 4 slices flagged." in page.locator("#flagged").inner_text()
    page.keyboard.press("0")
    assert "0.25 (operating point)" in page.locator("#value").inner_text()


def test_case_keys(page, cohort):
    root, volumes = cohort
    open_case(page, root)
    flags = reached(volumes["heart/phase00"], 0.25)
    total, first = int(flags.sum()), int(np.flatnonzero(flags.any(axis=(0, 1)))[0])
    page.keyboard.press("n")
    best = volumes["heart/phase00"][..., first].max()
    told = page.locator("#region")
    assert told.inner_text() == f"Region 1 of {total}: slice {first + 1}, probability of failure {best:.3f}."
    assert page.locator("rect.current").count() == 1
    page.keyboard.press("p")
    assert told.inner_text().startswith(f"Region {total} of {total}: slice")
    page.keyboard.press("N")
    assert told.inner_text().startswith("Region 1 of")
    figure = page.locator("figure").first
    shown = {"m": figure.locator(".map"), "c": figure.locator(".contours")}
    style = {"m": ("visibility", "hidden", "visible"), "c": ("display", "inline", "none")}
    for key, (name, before, after) in style.items():
        button = page.get_by_role("button", name={"m": "Uncertainty", "c": "Contours"}[key])
        for wanted, pressed in ((before, key == "c"), (after, key == "m"), (before, key == "c")):
            assert shown[key].evaluate(f"e => getComputedStyle(e).{name}") == wanted
            assert button.get_attribute("aria-pressed") == str(pressed).lower()
            page.keyboard.press(key)
        page.keyboard.press(key)
    width = figure.bounding_box()["width"]
    figure.get_by_role("button").press("Enter")
    assert figure.bounding_box()["width"] > 2 * width
    page.keyboard.press("Escape")
    assert figure.bounding_box()["width"] == width
    page.keyboard.press("Control+p")  # not ours
    for key in ("n", "p", "m", "c", "0", "Esc"):
        assert page.locator("kbd", has_text=key).count() >= 1


def test_volume_curve_and_ways(page, cohort):
    open_case(page, cohort[0])
    assert page.locator("#curve canvas").count() == 1
    page.get_by_role("link", name="phase 1").click()
    assert page.locator("h1").inner_text() == "heart/phase01"
    page.locator("a[rel=next]").click()
    assert page.locator("h1").inner_text() == "heart/phase02"
    page.locator("a[rel=prev]").click()
    assert page.locator("[aria-current=page]").inner_text() == "phase 1"


@pytest.mark.parametrize("name", ["", "heart/phase00"])
def test_phone_and_print(page, cohort, name):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto((cohort[0] / name / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 760, "height": 900})
    page.emulate_media(media="print")
    assert page.locator("button:visible, input:visible, select:visible, nav:visible").evaluate_all(
        "all => all.filter(e => !e.closest('th')).length"
    ) == 0  # fmt: skip
    if name:
        boxes = [page.locator(f"figure .{kind}").first.bounding_box() for kind in ("image", "map")]
        assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"] - 1 and boxes[1]["width"] > 20  # beside each other
        assert page.locator(".contours").first.evaluate("e => getComputedStyle(e).display") == "inline"
    assert page.pdf().startswith(b"%PDF")


def test_ten_thousand_cases_are_paged(page, cohort, tmp_path):
    _, volumes = cohort
    qc = read_qc(cohort[0] / "quiet")
    grid = sorted({k / 30 for k in range(30)} | {0.25})
    cases, records = [], []
    for k in range(10_000):
        counts = [max(0, (k % 97) - 3 * step) for step in range(len(grid))]
        cases.append(qc | {"case": f"subject{k:05d}", "scores": {"urgency": 1 - k / 10_000, "region_failure": 1.0}})
        records.append(
            {"grid": grid, "operating": grid.index(0.25), "regions": counts, "slices": [n > 0 for n in counts]}
        )
    path = tmp_path / "report.html"
    path.write_text(cohort_page(tmp_path, cases, records, (), (), (), None))
    assert path.stat().st_size < 15e6
    page.goto(path.as_uri())
    assert names(page) == [f"subject{k:05d}" for k in range(50)]
    where = page.locator("#cases .where")
    assert where.inner_text() == "1 to 50 of 10000, page 1 of 200"
    page.get_by_role("button", name="Next page").click()
    assert names(page)[0] == "subject00050" and where.inner_text().startswith("51 to 100")
    page.get_by_label("Rows").select_option("500")
    assert len(names(page)) == 500 and where.inner_text().endswith("page 1 of 20")
    page.get_by_label("Search").fill("subject0999")
    assert names(page) == [f"subject{k:05d}" for k in range(9990, 10_000)]
    assert page.get_by_role("button", name="Next page").is_disabled()
    page.get_by_label("Search").fill("")
    page.get_by_role("button", name="Case").click()
    page.get_by_role("button", name="Case").click()
    assert names(page)[0] == "subject09999"
    page.get_by_label("Search").fill("subject09")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#cases tbody tr").count() == 1000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#cases tbody tr").count() == 500
