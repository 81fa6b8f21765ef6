"""The report: layers against positions, colors and counts worked out by hand, pages by html.parser."""

from pathlib import Path
from urllib.parse import unquote, urlparse

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from report_cases import (
    ACDC_AFFINE,
    SHAPE,
    SPACING,
    VIEW,
    Page,
    edit_qc,
    heart,
    make_case,
    random_probabilities,
    read_qc,
    region,
    save,
)

from cardiac_qc_plugin.data.phantom import ShortAxisPhantom
from cardiac_qc_plugin.reports import write_case, write_report
from cardiac_qc_plugin.reports.pages import CONTOURS, FLAG_COLOR
from cardiac_qc_plugin.reports.pictures import map_colors, mirrored_axes
from cardiac_qc_plugin.reports.report import cohort_page
from cardiac_qc_plugin.workflows.files import write_json

NASTY = "a b#1 100% <i>&\"x'?</script><script>alert(1)<!--heart-->/phase01"


def drawn(folder):
    write_case(folder)
    return Page(folder / "report.html")


def report(root, folders, failures=(), **more):
    return Page(write_report(root, [read_qc(folder) for folder in folders], failures, **more))


def extent(mask):
    """Left, right, top and bottom of the true pixels (height, width) as shares of the picture."""
    rows, cols = np.nonzero(mask)
    height, width = mask.shape
    return np.array([cols.min() / width, (cols.max() + 1) / width, rows.min() / height, (rows.max() + 1) / height])


# layers


def test_flagged_cells_are_framed_where_they_lie(tmp_path):
    page = drawn(make_case(tmp_path, regions=[region(1, 2, 24, 16), region(2, 2, 32, 16)]))
    svg = page.all("svg", preserveaspectratio="none")
    assert {a["viewbox"] for a in svg} == {f"0 0 {4 * VIEW[0]} {4 * VIEW[1]}"} and len(svg) == SHAPE[2]
    # rows 24 to 40 to the right, columns 16 to 24 down, a quarter pixel inside
    frames = [[float(a[key]) / 4 for key in ("x", "width", "y", "height")] for a in page.all("rect", **{"class": "on"})]
    assert frames == [[24.25, 7.5, 16.25, 7.5], [32.25, 7.5, 16.25, 7.5]]
    assert "2 flagged regions on 1 of 4 slices" in page.text


def test_view_is_to_scale_and_inside_the_image(tmp_path):
    boxes = [[-8, 88, 8, 120], [40, 56, 40, 56], [40, 88, 8, 88], [40, 56, 40, 56]]
    page = drawn(make_case(tmp_path, regions=[region(1, 1, 40, 40)], boxes=boxes))
    rows, cols = 96, 96  # with a margin of 8, cut off at the image's border
    for picture in page.pictures("image"):
        assert picture.shape[1] / picture.shape[0] == pytest.approx(rows * SPACING[0] / (cols * SPACING[1]), abs=0.005)
    assert all(picture.shape[:2] == (cols, rows) for picture in page.pictures("map"))
    (sheet,) = page.all("section", id="sheet")
    assert float(sheet["style"].partition(":")[2]) == pytest.approx(rows * SPACING[0] / (cols * SPACING[1]), abs=1e-3)


def test_line_width_follows_probability(tmp_path):
    cells = [region(k, 0, 40, 8 * k, p) for k, p in enumerate((0.99, 0.6, 0.26, 0.2), start=1)]
    page = drawn(make_case(tmp_path, regions=cells))
    widths = [float(a["stroke-width"]) for a in page.all("rect")]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4 - 1  # thin below the operating point
    assert [a.get("class") for a in page.all("rect")] == ["on", "on", "on", None]


def test_display_is_transposed_and_mirrored_axes_are_turned_round(tmp_path):
    image = np.zeros(SHAPE, np.float32)
    image[80:96, 8:24] = 100  # high rows, low columns: at the right, at the top
    labels = (image > 0).astype(np.uint8)
    page = drawn(make_case(tmp_path, image=image, labels=labels, regions=[region(1, 1, 24, 40)]))
    plain = page.pictures("image")[1]
    np.testing.assert_allclose(extent(plain[..., 0] > 0.5), [80 / 104, 96 / 104, 8 / 88, 24 / 88], atol=0.01)

    # the same scan from a converter that stores columns from back to front
    box = [8, 96, SHAPE[1] - 80, SHAPE[1]]
    mirrored = region(1, 1, 24, SHAPE[1] - 48)
    folder = make_case(tmp_path, "mirrored", labels=labels[:, ::-1], regions=[mirrored], boxes=[box] * 4)
    affine = ACDC_AFFINE @ np.diag([1.0, -1.0, 1.0, 1.0])
    save(Path(read_qc(folder)["input"]["path"]), image[:, ::-1].copy(), affine)
    turned = drawn(folder)
    np.testing.assert_array_equal(turned.pictures("image")[1], plain)
    assert turned.all("rect") == page.all("rect")
    for edge in (np.min, np.max):
        np.testing.assert_array_equal(edge(turned.contours("RV"), axis=0), edge(page.contours("RV"), axis=0))


@pytest.mark.parametrize(
    ("axes", "turned"),
    [
        ("LPS", [False, False]),
        ("LAS", [False, True]),
        ("RPS", [True, False]),
        ("RAS", [True, True]),
        ("IRA", [False, False]),  # Sunnybrook's: turning one axis alone would show the slice from the base
        ("IRP", [False, False]),
        ("ILP", [False, True]),  # and as dcm2niix makes it of the former
    ],
)
def test_slices_are_seen_from_the_apex(axes, turned):
    ends = {"L": (-1, 0, 0), "R": (1, 0, 0), "P": (0, -1, 0), "A": (0, 1, 0), "I": (0, 0, -1), "S": (0, 0, 1)}
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([ends[end] for end in axes])
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)
    assert mirrored_axes(image) == turned
    assert mirrored_axes(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None)) == [False, False]  # the header does not say


@pytest.mark.parametrize(
    ("degrees", "turned"), [(0, False), (60, False), (90, False), (-90, False), (150, True), (180, True)]
)
def test_stacks_a_quarter_turn_from_the_usual_view_stay_as_stored(degrees, turned):
    """A patient of Sunnybrook's, whose rows run to the left, and the same stored turned round in the plane."""
    right, down = np.array([-0.77, -0.62, 0.16]), np.array([0.15, -0.41, -0.90])
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:3, 0] = np.cos(angle) * right + np.sin(angle) * down
    affine[:3, 1] = np.cos(angle) * down - np.sin(angle) * right
    affine[:3, 2] = [0.62, -0.67, 0.41]
    assert mirrored_axes(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)) == [turned, turned]
    affine[:3, 1] *= -1  # as dcm2niix turns it: the same picture
    assert mirrored_axes(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)) == [turned, not turned]


def test_contours_lie_at_the_border_of_each_class(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[16:40, 24:64], labels[40:88, 16:72], labels[52:76, 32:56] = 1, 2, 3
    page = drawn(make_case(tmp_path, labels=labels, regions=[region(1, 1, 0, 0)]))
    rectangles = {"RV": (16, 40, 24, 64), "LVM": (40, 88, 16, 72), "LV": (52, 76, 32, 56)}
    for name, (row0, row1, col0, col1) in rectangles.items():
        corners = page.contours(name)
        np.testing.assert_array_equal(corners.min(axis=0), [row0 + 0.25, col0 + 0.25])
        np.testing.assert_array_equal(corners.max(axis=0), [row1 - 0.25, col1 - 0.25])
    # a hole has a contour too; chamfered corners, and nothing between them
    assert [len(page.contours(name)) for name in ("RV", "LV", "LVM")] == [8 * 4, 8 * 4, 16 * 4]


def test_contours_differ_in_line_style_and_for_the_color_blind():
    assert len({dashes for _, dashes in CONTOURS.values()}) == 3
    # Machado et al. 2009, severity 1: protanopia, deuteranopia (on linear RGB)
    blind = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
    colors = np.array([to_rgb(color) for color, _ in CONTOURS.values()] + [to_rgb(FLAG_COLOR)])
    for matrix in blind:
        seen = (np.clip(colors**2.2 @ np.array(matrix).T, 0, 1)) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(4, 1)]
        assert distances.min() > 0.2


def test_map_colors_grow_brighter_and_show_the_image_where_certain():
    colors = np.array(map_colors()) / 255
    luminance = colors[:, :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -0.002).all() and luminance[-1] > luminance[0] + 0.5
    assert colors[0, 3] == 0 and (np.diff(colors[:, 3]) >= 0).all()


@pytest.mark.parametrize(("map_name", "value", "step"), [("bmap", 0.0, 0), ("bmap", 0.25, 16), ("emap", 1, 31)])
def test_map_is_that_of_the_detection(tmp_path, map_name, value, step):
    bmap = np.zeros(SHAPE, np.float32)  # make_case fills the e-map with 1
    bmap[40:, 40:] = value
    page = drawn(make_case(tmp_path, regions=[region(1, 0, 0, 0)], bmap=bmap, map=map_name))
    picture = page.pictures("map")[0]
    np.testing.assert_allclose(255 * picture[60, 60], map_colors()[step], atol=0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_counts_at_every_threshold(tmp_path, seed):
    painted, flagged = random_probabilities(seed)
    page = drawn(make_case(tmp_path, painted=painted, regions=flagged))
    record = page.scripts["record"]
    corners = painted[8:96:8, 0:80:8]
    assert record["grid"][record["operating"]] == 0.25 and len(record["grid"]) > 25
    assert record["regions"][record["operating"]] == len(flagged) > 20
    for threshold, regions, slices in zip(record["grid"], record["regions"], record["slices"], strict=True):
        reached = corners.astype(float) >= threshold
        assert (regions, slices) == (reached.sum(), reached.any(axis=(0, 1)).sum())
    levels = np.array([int(a["data-level"]) for a in page.all("rect")])
    assert [(levels > step).sum() for step in range(len(record["grid"]))] == record["regions"]


def test_pages_are_drawn_anew_only_after_a_change(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 0, 40, 40)])
    path = folder / "report.html"
    write_case(folder)
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    write_case(folder)
    report(tmp_path, [folder])
    placed, later = path.read_bytes(), path.stat().st_mtime_ns
    assert later > written and placed != first  # with its place in the worklist
    write_case(folder)
    report(tmp_path, [folder])
    assert path.stat().st_mtime_ns == later
    edit_qc(folder, regions=[region(1, 0, 40, 48)], threshold=0.3)
    write_case(folder)
    assert path.stat().st_mtime_ns > later
    path.unlink()
    report(tmp_path, [folder])
    assert path.is_file()


def test_sizes(tmp_path):
    phantom = ShortAxisPhantom(shape=SHAPE[:2], n_slices=12, spacing=SPACING)
    image, labels = phantom.frame()
    painted, flagged = random_probabilities(0)
    folder = make_case(tmp_path, image=image, labels=labels, regions=flagged, boxes=[[8, 96, 0, 80]] * 12,
                       painted=np.concatenate([painted] * 3, axis=2),
                       bmap=np.random.default_rng(0).beta(0.3, 6, image.shape).astype(np.float32))  # fmt: skip
    page = drawn(folder)
    assert 40_000 < (folder / "report.html").stat().st_size < 400_000
    assert len(page.pictures("image")) == 12
    cohort = tmp_path / "report.html"
    qc, record = read_qc(folder), page.scripts["record"]
    cohort.write_text(cohort_page(tmp_path, [qc] * 200, [record] * 200, (), (), (), None))
    assert cohort.stat().st_size < 300_000  # two scans each of 100 patients


def test_one_phase_of_a_cine(tmp_path):
    folder = make_case(tmp_path, "cine/phase01", regions=[region(1, 0, 40, 40)])
    qc = read_qc(folder)
    cine = np.zeros((*SHAPE, 3), np.float32)
    cine[16:32, 64:80, :, 1] = 100
    image = nib.Nifti1Image(cine, ACDC_AFFINE)
    image.header.set_zooms((*SPACING, 1.0))
    nib.save(image, qc["input"]["path"])
    qc["input"]["frame"] = 1
    write_json(folder / "qc.json", qc)
    picture = drawn(folder).pictures("image")[0]
    np.testing.assert_allclose(extent(picture[..., 0] > 0.5), [16 / 104, 32 / 104, 64 / 88, 80 / 88], atol=0.01)


def test_a_page_of_an_image_from_dicom_names_its_series(tmp_path):
    """The NIfTI file of the import is none that a user knows; of a user's own file of that name the name stays."""
    for name, numbers, said in (
        ("cine/phase03", [7], "mm, DICOM series 7"),
        ("alone", [7, 8], "mm, DICOM series 7, 8"),
        ("unnumbered", [-1], "mm, DICOM"),
        ("own", None, "mm, image.nii.gz"),
    ):
        folder = make_case(tmp_path, name)
        qc = read_qc(folder)
        image = Path(qc["input"]["path"]).rename(folder / "image.nii.gz")
        write_json(folder / "qc.json", qc | {"input": qc["input"] | {"path": str(image)}})
        if numbers:
            write_json(tmp_path / name.split("/")[0] / "dicom.json", {"series_numbers": numbers})
        assert f"{said} ‹ Region" in drawn(folder).text


def test_errors_name_the_file(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 0, 40, 40)])
    save(folder / "bayesian.nii.gz", np.zeros((8, 8, 4), np.float32))
    with pytest.raises(ValueError, match=r"bayesian.*\(8, 8, 4\).*\(104, 96, 4\)"):
        write_case(folder)
    (folder / "segmentation.nii.gz").unlink()
    with pytest.raises(ValueError, match="segmentation.nii.gz: no such file"):
        write_case(folder)
    assert not (folder / "report.html").exists()


# pages


def test_pages_are_whole_and_load_nothing(tmp_path):
    flagged = [region(1, 1, 40, 40, 0.987)]
    folders = [make_case(tmp_path, name, regions=flagged) for name in (NASTY, "plain", "third")]
    report(tmp_path, folders, cines=[heart([NASTY, "plain", "third"])])
    for folder in (tmp_path, *folders):
        page = Page(folder / "report.html")
        assert len(page.ids) == len(set(page.ids))
        assert all(a["src"].startswith("data:") for a in page.all("img"))
        assert not page.all("link") and not any("src" in a for a in page.all("script"))
        links = [a["href"] for a in page.all("a")]
        for parts in map(urlparse, links):
            assert not parts.scheme and not parts.netloc and not parts.query
            if parts.fragment:
                assert parts.fragment in page.ids
            else:
                assert (folder / unquote(parts.path)).is_file()
        policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
        assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "https" not in policy


def test_names_and_messages_are_escaped(tmp_path):
    reason = "bad & <b>file</b></script><script>alert(2)</script>"
    folder = make_case(tmp_path, NASTY)
    page = report(tmp_path, [folder], [("<script>alert(1)</script>", reason)], skipped=["series <i>3</i>"])
    assert page.scripts["data"]["failures"] == [["<script>alert(1)</script>", reason]]
    assert list(page.rows()) == [NASTY] and reason in page.text and "series <i>3</i>" in page.text
    own = Page(folder / "report.html")
    assert NASTY in own.text and page.tags.count("script") == 3 and own.tags.count("script") == 3
    for source in (page.source, own.source):
        assert "<i>" not in source and "<script>alert" not in source


def test_neighbors_in_the_worklist(tmp_path):
    urgencies = {"low": 0.01, "nested/phase00": 0.9, "mid": 0.2}
    folders = [make_case(tmp_path, name, urgency=u) for name, u in urgencies.items()]
    page = report(tmp_path, folders, [("broken", "no such file.")])
    assert list(page.rows()) == ["nested/phase00", "mid", "low"]
    ways = {
        name: {rel: a[0]["href"] for rel in ("prev", "next") if (a := own.all("a", rel=rel))}
        for name in urgencies
        if (own := Page(tmp_path / name / "report.html"))
    }
    assert ways == {
        "nested/phase00": {"next": "../../mid/report.html"},
        "mid": {"prev": "../nested/phase00/report.html", "next": "../low/report.html"},
        "low": {"prev": "../mid/report.html"},
    }
    assert "4 of 4 in the worklist, urgency 0.010" in Page(tmp_path / "low" / "report.html").text
    assert Page(tmp_path / "nested/phase00" / "report.html").all("a")[0]["href"] == "../../report.html"


def test_numbers_of_a_case(tmp_path):
    flagged = [region(1, 1, 40, 40, 0.987), region(2, 1, 48, 40, 0.5), region(3, 3, 40, 40, 0.25)]
    folder = make_case(tmp_path, regions=flagged, urgency=0.125)
    qc = read_qc(folder)
    qc["segmentation"] |= {
        "plausibility": {"violations": {"hole_LV": [1, 2]}, "implausible_slices": [1, 2]},
        "slice_level": ["basal", "mid", "mid", "apical"],
        "sample_volume_ml": {"LV": [129.2, 131.2]},
    }
    write_json(folder / "qc.json", qc)
    page = report(tmp_path, [folder, make_case(tmp_path, "quiet")], [("scan7", "damaged.")])
    row = page.rows()["scan1"]
    at = page.scripts["data"]["groups"][row["group"]]["operating"]
    assert (row["regions"][at], row["slices"][at], row["total"], row["implausible"]) == (3, 2, 4, 2)
    assert row["volumes"] == [101.3, 98.0, 130.2] and row["dice"] == [None, 0.875, 0.938]
    facts = "cases 2 cases to review 1 flagged slices 2 flagged regions 3 implausible 1 not processed 1"
    assert facts in page.text and "For research only." in page.text
    own = Page(folder / "report.html").text
    assert "3 flagged regions on 2 of 4 slices implausible" in own
    assert "Implausible: hole in the LV (slice 2, 3)." in own and own.count("hole in the LV") == 3
    assert "volume (ml) 101.3 98.0 130.2" in own and "(Dice) – 0.875 0.938" in own
    assert "95 % interval – – 112.2 to 148.2" in own  # 130.2 ± 12.706 * 1.414
    assert "2 mid hole in the LV" in own and "4 apical" in own and "No LV" not in own


def test_without_samples(tmp_path):
    folder = make_case(tmp_path)
    qc = read_qc(folder)
    qc["segmentation"] |= {"samples": 1, "pairwise_dice": {}}
    qc["scores"] = {"region_failure": 12.34, "urgency": 12.34}
    write_json(folder / "qc.json", qc)
    row = report(tmp_path, [folder]).rows()["scan1"]
    assert row["urgency"] == 12.34 and row["dice"] == [None] * 3 and row["implausible"] is None
    own = Page(folder / "report.html").text
    assert "add up to 12.3." in own and "Plausibility was not checked" in own


def test_hearts(tmp_path):
    folders = [make_case(tmp_path, f"heart/phase{k:02d}") for k in range(3)] + [make_case(tmp_path, "alone")]
    page = report(tmp_path, folders, cines=[heart([f"heart/phase{k:02d}" for k in range(3)], es=2)])
    assert {name: row["phase"] for name, row in page.rows().items()} == {
        "heart/phase00": "ED", "heart/phase01": "phase 1", "heart/phase02": "ES", "alone": None,
    }  # fmt: skip
    (row,) = page.scripts["data"]["hearts"]
    assert (row["ed"], row["es"], row["flagged"]) == ("heart/phase00", "heart/phase02", 3)
    assert row["values"][3] == 55 and row["intervals"][3] == [50.25, 59.75] and row["values"][7] is None
    own = Page(folders[1] / "report.html")
    assert "LV EF (%) 55.0 50.2 to 59.8" in own.text and "LV EDV (ml) 100.0 – 50.0" in own.text
    assert "A slice is missing." in own.text and "ED phase 1 ES" in own.text
    chart = own.scripts["volumes"]
    assert chart["volumes"]["LV"] == [100, 90, 80] and chart["here"] == 1
    assert chart["marks"] == [{"x": 0, "label": "ED"}, {"x": 2, "label": "ES"}]
    assert "volumes" not in Page(folders[3] / "report.html").scripts


CURVE = {
    "model": "drn", "map": "bmap", "patients": 15, "source": "fold 1",
    "threshold": [0.2, 0.6, 0.9], "caught": [0.9, 0.6, 0.2], "regions_per_patient": [40.0, 10.0, 2.0],
}  # fmt: skip


def test_operating_curve_goes_with_its_network_and_map(tmp_path):
    folders = [make_case(tmp_path, "b"), make_case(tmp_path, "e", map="emap")]
    report(tmp_path, folders)
    assert "effort" not in Page(folders[0] / "report.html").scripts
    write_json(tmp_path / "operating_curve.json", CURVE)
    groups = report(tmp_path, folders).scripts["data"]["groups"]
    assert {group["map"]: group["effort"] for group in groups} == {"b-map": CURVE, "e-map": None}
    assert Page(folders[0] / "report.html").scripts["effort"] == CURVE
    assert "effort" not in Page(folders[1] / "report.html").scripts
    write_json(tmp_path / "operating_curve.json", CURVE | {"model": "unet"})
    assert [g["effort"] for g in report(tmp_path, folders).scripts["data"]["groups"]] == [None, None]


@pytest.mark.parametrize("change", [{"caught": [1]}, {"threshold": [0.9, 0.6, 0.2]}, {"source": None, "threshold": []}])
def test_damaged_operating_curve(tmp_path, change):
    write_json(tmp_path / "operating_curve.json", CURVE | change)
    with pytest.raises(ValueError, match="operating_curve.json: expected"):
        report(tmp_path, [make_case(tmp_path)])


def test_settings_are_shown_once_per_kind(tmp_path):
    folders = [make_case(tmp_path, name) for name in ("a", "b", "c")]
    page = report(tmp_path, folders)
    for text in ("cardiac_drn_segmentation 0.1.0 (weights 0123456789ab)", "b-map", "10 (seed 3)", "torch 2.8", "0.25"):
        assert page.text.count(text) == 1
    assert "not all made alike" not in page.text
    edit_qc(folders[1], map="emap")
    page = report(tmp_path, folders)
    assert "not all made alike" in page.text
    settings = page.text[page.text.index("not all made alike") :]
    assert settings.index("2 cases") < settings.index("b-map") < settings.index("e-map")


def test_promise_is_among_the_settings(tmp_path):
    folder = make_case(tmp_path)
    qc = read_qc(folder)
    assert "Promise" not in report(tmp_path, [folder]).text
    write_json(folder / "qc.json", qc | {"promise": {"kind": "catch", "target": 0.8, "probability": None}})
    assert "80 % of a patient's failure voxels are caught" in report(tmp_path, [folder]).text.replace("’", "'")
    write_json(folder / "qc.json", qc | {"promise": {"kind": "regions_per_patient", "target": 5, "probability": 0.9}})
    assert "no more regions than 5, in 90 % of patients" in report(tmp_path, [folder]).text


def test_failures_alone(tmp_path):
    page = report(tmp_path, [], [("scan7", "scan7.nii.gz: the file is damaged.")])
    assert "cases 0" in page.text and "not processed 1" in page.text
    assert "scan7 scan7.nii.gz: the file is damaged." in page.text
    assert "No case was processed." in report(tmp_path, []).text


def test_assets_are_safe_inside_a_page():
    folder = Path(write_report.__code__.co_filename).parent
    for path in (*folder.glob("assets/*"), *folder.glob("vendor/*/*.js")):
        text = path.read_text().lower()
        assert "</script" not in text and "<!--" not in text and "</style" not in text
    assert "MIT" in (folder / "vendor" / "uplot" / "LICENSE").read_text()
