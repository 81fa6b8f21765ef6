"""The report: pictures against positions, colors and sizes worked out by hand, the page by html.parser."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import nibabel as nib
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from cardiac_qc_plugin.data.phantom import ShortAxisPhantom
from cardiac_qc_plugin.reports.pictures import CONTOURS, FLAG_COLOR, GAP, PANEL_WIDTH, write_pictures
from cardiac_qc_plugin.reports.report import write_report
from cardiac_qc_plugin.workflows.files import write_json

SPACING = (2.0, 2.5, 10.0)
SHAPE = (104, 96, 4)
ACDC_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # toward the patient's left and back, as scanners store slices
BOX = (8, 96, 0, 80)  # with the margin of 8: rows 0 to 104, columns 0 to 88


def region(number, index, row, col, probability=0.9):
    return {
        "id": number, "slice": index, "row0": row, "row1": row + 8, "col0": col, "col1": col + 8,
        "probability": probability,
    }  # fmt: skip


def save(path, array, affine=ACDC_AFFINE):
    image = nib.Nifti1Image(array, affine)
    image.header.set_zooms(SPACING)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def make_case(root, name="scan1", regions=(), urgency=0.1, image=None, labels=None, bmap=None, **changes):
    """A finished case; its folder. ``changes`` overwrite entries of the detection."""
    folder = root / name
    scan = root / "scans" / f"{name.replace('/', '_')}.nii.gz"
    zeros = np.zeros(SHAPE, np.float32)
    save(scan, zeros + np.arange(SHAPE[2], dtype=np.float32) if image is None else image)
    save(folder / "segmentation.nii.gz", zeros.astype(np.uint8) if labels is None else labels)
    save(folder / "bayesian.nii.gz", zeros if bmap is None else bmap)
    save(folder / "entropy.nii.gz", zeros + 1)
    bundle = {"bundle_version": "0.1.0", "weights_sha256": "0123456789abcdef", "map": "bmap"}
    qc = {
        "case": name,
        "input": {
            "path": str(scan), "frame": None, "sha256": "00",
            "shape": list(SHAPE), "spacing_mm": list(SPACING),
        },
        "segmentation": {
            "bundle": "some_segmentation", **bundle, "samples": 10, "seed": 3,
            "pairwise_dice": {"RV": None, "LVM": 0.875, "LV": 0.9375},
            "volume_ml": {"RV": 101.26, "LVM": 98.0, "LV": 130.2},
        },
        "detection": {
            "bundle": "some_detection", **bundle, "threshold": 0.25, "region_size": 8,
            "boxes": [list(BOX)] * SHAPE[2], "n_regions": 440,
            "flagged_slices": sorted({r["slice"] for r in regions}), "regions": list(regions),
            **changes,
        },
        "scores": {"sample_disagreement": 0.07, "region_failure": 1.5, "urgency": urgency},
        "stages": {},
        "versions": {"cardiac_qc_plugin": "0.1.0", "torch": "2.8"},
    }  # fmt: skip
    write_json(folder / "qc.json", qc)
    return folder


def read_qc(folder):
    return json.loads((folder / "qc.json").read_text())


def edit_qc(folder, **detection):
    qc = read_qc(folder)
    qc["detection"] |= detection
    write_json(folder / "qc.json", qc)


def panels(path):
    """The two halves of a picture, RGB in [0, 1], their titles blackened."""
    picture = imread(path)[..., :3].copy()
    assert picture.shape[1] == 2 * PANEL_WIDTH + GAP
    halves = picture[:, :PANEL_WIDTH], picture[:, PANEL_WIDTH + GAP :]
    for half in halves:
        half[:34, :130] = 0
    return halves


def extent(panel, color, tolerance=0.15):
    """Left, right, top and bottom of a color's pixels as shares of the panel; None where there is none."""
    rows, cols = np.nonzero(np.abs(panel - to_rgb(color)).max(axis=-1) < tolerance)
    if not rows.size:
        return None
    height, width = panel.shape[:2]
    return np.array([cols.min() / width, (cols.max() + 1) / width, rows.min() / height, (rows.max() + 1) / height])


# pictures


def test_flagged_cells_are_framed_where_they_lie_in_both_panels(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 2, 24, 16), region(2, 2, 32, 16)])
    (path,) = write_pictures(folder)
    assert path == folder / "review" / "slice03.png"  # slice 2 from 0
    for panel in panels(path):
        # rows 24 to 40 of 104 to the right, columns 16 to 24 of 88 down
        expected = [24 / 104, 40 / 104, 16 / 88, 24 / 88]
        np.testing.assert_allclose(extent(panel, FLAG_COLOR), expected, atol=0.008)


def test_view_is_to_scale_and_inside_the_image(tmp_path):
    boxes = [[8, 96, 0, 80], [-8, 112, -20, 116], [8, 88, 8, 88], [40, 56, 40, 56]]
    folder = make_case(tmp_path, regions=[region(1 + k, k, 40, 40) for k in range(4)], boxes=boxes)
    shown = [(104, 88), (104, 96), (96, 96), (32, 32)]  # margin of a region, cut off at the image's border
    for path, (rows, cols) in zip(write_pictures(folder), shown, strict=True):
        left, _ = panels(path)
        assert left.shape[0] / left.shape[1] == pytest.approx(cols * SPACING[1] / (rows * SPACING[0]), abs=0.003)


def test_line_width_follows_probability(tmp_path):
    def framed_pixels(probability, threshold=0.25):
        folder = make_case(tmp_path, regions=[region(1, 0, 40, 40, probability)], threshold=threshold)
        left, _ = panels(write_pictures(folder)[0])
        return (np.abs(left - to_rgb(FLAG_COLOR)).max(axis=-1) < 0.15).sum()

    assert framed_pixels(0.26) < framed_pixels(0.6) < framed_pixels(0.99)
    assert framed_pixels(1.0, threshold=1.0) > 0


def test_display_is_transposed_and_mirrored_axes_are_turned_round(tmp_path):
    image = np.zeros(SHAPE, np.float32)
    image[80:96, 8:24] = 100  # high rows, low columns: at the right, at the top
    flagged = [region(1, 1, 24, 40)]
    folder = make_case(tmp_path, image=image, regions=flagged)
    (path,) = write_pictures(folder)
    plain = imread(path)
    np.testing.assert_allclose(extent(panels(path)[0], "white"), [80 / 104, 96 / 104, 8 / 88, 24 / 88], atol=0.03)

    # the same scan from a converter that stores columns from back to front
    affine = ACDC_AFFINE @ np.diag([1.0, -1.0, 1.0, 1.0])
    mirrored = region(1, 1, 24, SHAPE[1] - 48)
    box = [8, 96, SHAPE[1] - 80, SHAPE[1]]
    folder = make_case(tmp_path, "mirrored", regions=[mirrored], boxes=[box] * 4)
    save(Path(read_qc(folder)["input"]["path"]), image[:, ::-1].copy(), affine)
    (path,) = write_pictures(folder)
    turned = imread(path)
    assert turned.shape == plain.shape
    assert np.abs(turned - plain)[40:, PANEL_WIDTH // 4 :].mean() < 0.005  # but for half a pixel's rounding


def test_contours_lie_at_the_border_of_each_class(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[16:40, 24:64], labels[40:88, 16:72], labels[52:76, 32:56] = 1, 2, 3
    folder = make_case(tmp_path, labels=labels, regions=[region(1, 1, 0, 0)])
    left, right = panels(write_pictures(folder)[0])
    rectangles = {"RV": (16, 40, 24, 64), "LVM": (40, 88, 16, 72), "LV": (52, 76, 32, 56)}
    for name, (row0, row1, col0, col1) in rectangles.items():
        expected = [row0 / 104, row1 / 104, col0 / 88, col1 / 88]
        np.testing.assert_allclose(extent(left, CONTOURS[name][0]), expected, atol=0.012)
    assert extent(right, CONTOURS["RV"][0]) is None


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


@pytest.mark.parametrize(("map_name", "value", "position"), [("bmap", 0.0, 0.0), ("bmap", 0.25, 0.5), ("emap", 1, 1.0)])
def test_right_panel_shows_the_detections_map(tmp_path, map_name, value, position):
    bmap = np.full(SHAPE, value, np.float32)  # make_case fills the e-map with 1
    folder = make_case(tmp_path, regions=[region(1, 0, 0, 0)], bmap=bmap, map=map_name)
    _, right = panels(write_pictures(folder)[0])
    np.testing.assert_allclose(right[300, 300], colormaps["viridis"](position)[:3], atol=0.02)


def test_pictures_are_drawn_anew_only_after_a_change(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 0, 40, 40)])
    (path,) = write_pictures(folder)
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    assert write_pictures(folder) == [path] and path.stat().st_mtime_ns == written
    edit_qc(folder)
    write_pictures(folder)
    assert path.read_bytes() == first and path.stat().st_mtime_ns > written
    edit_qc(folder, regions=[region(1, 0, 40, 48)])
    write_pictures(folder)
    assert path.read_bytes() != first
    path.unlink()
    assert write_pictures(folder) == [path] and path.is_file()


def test_stale_pictures_go_and_nothing_else(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 0, 40, 40), region(2, 3, 40, 40)])
    write_pictures(folder)
    (folder / "review" / "note.txt").write_text("mine")
    edit_qc(folder, regions=[region(1, 3, 40, 40)])
    write_pictures(folder)
    assert sorted(p.name for p in (folder / "review").iterdir()) == ["note.txt", "slice04.png"]
    edit_qc(folder, regions=[])
    assert write_pictures(folder) == []
    assert [p.name for p in (folder / "review").iterdir()] == ["note.txt"]


def test_phantom_picture_is_a_small_file(tmp_path):
    phantom = ShortAxisPhantom(shape=SHAPE[:2], n_slices=SHAPE[2], spacing=SPACING)
    image, labels = phantom.frame()
    folder = make_case(tmp_path, image=image, labels=labels, regions=[region(1, 1, 40, 40)])
    (path,) = write_pictures(folder)
    assert 20_000 < path.stat().st_size < 120_000
    assert all(extent(panels(path)[0], color) is not None for color, _ in CONTOURS.values())


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
    left, _ = panels(write_pictures(folder)[0])
    np.testing.assert_allclose(extent(left, "white"), [16 / 104, 32 / 104, 64 / 88, 80 / 88], atol=0.03)


def test_errors_name_the_file(tmp_path):
    folder = make_case(tmp_path, regions=[region(1, 0, 40, 40)])
    save(folder / "bayesian.nii.gz", np.zeros((8, 8, 4), np.float32))
    with pytest.raises(ValueError, match=r"bayesian.*\(8, 8, 4\).*\(104, 96, 4\)"):
        write_pictures(folder)
    (folder / "segmentation.nii.gz").unlink()
    with pytest.raises(ValueError, match="segmentation.nii.gz: no such file"):
        write_pictures(folder)


# the page


class Page(HTMLParser):
    """Links, images, ids and visible text of a page; fails on tags that are not closed in order."""

    VOID = {"meta", "img", "path", "link", "br"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.links, self.images, self.ids, self.text = [], [], [], [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.images += [attributes] if tag == "img" else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data + " "


def report(root, folders, failures=()):
    return Page(write_report(root, [read_qc(folder) for folder in folders], failures))


NASTY = "a b#1 100% <i>&\"x'?/phase01"


def test_links_lead_to_pictures_whatever_the_names(tmp_path):
    flagged = [region(1, 1, 40, 40, 0.987), region(2, 1, 48, 40, 0.5), region(3, 3, 40, 40, 0.25)]
    page = report(tmp_path, [make_case(tmp_path, NASTY, regions=flagged), make_case(tmp_path, "plain")])
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        parts = urlparse(link)
        assert not parts.scheme and not parts.netloc and not parts.query
        assert parts.fragment in page.ids if parts.fragment else (tmp_path / unquote(parts.path)).is_file()
    assert [unquote(image["src"]) for image in page.images] == [
        f"{NASTY}/review/slice02.png",
        f"{NASTY}/review/slice04.png",
    ]
    assert all(image["loading"] == "lazy" for image in page.images)
    alt = " ".join(page.images[0]["alt"].split())
    assert alt == f"{NASTY}, slice 2: image with segmentation, and uncertainty map, 2 flagged regions"


def test_names_and_messages_are_escaped(tmp_path):
    page = report(tmp_path, [make_case(tmp_path, NASTY)], [("<script>alert(1)</script>", "bad & <b>file</b>")])
    assert "script" not in page.tags and "<i>" not in page.source and "<b>file" not in page.source
    assert NASTY in page.text
    assert "<script>alert(1)</script> bad & <b>file</b>" in page.text


def test_worklist_is_by_urgency(tmp_path):
    urgencies = {"scan-l": 0.01, "scan-h": 0.9, "scan-b": 0.2, "scan-a": 0.2}
    page = report(tmp_path, [make_case(tmp_path, name, urgency=u) for name, u in urgencies.items()])
    positions = [page.text.index(name) for name in ("scan-h", "scan-b", "scan-a", "scan-l")]  # stable, as the CSV is
    assert positions == sorted(positions)
    assert [link for link in page.links if link.startswith("#case")] == [f"#case-{k}" for k in range(1, 5)]
    assert "worklist.csv" not in page.source
    (tmp_path / "worklist.csv").write_text("rank,case\n")
    assert "worklist.csv" in report(tmp_path, [tmp_path / "scan-l"]).links


def test_without_samples(tmp_path):
    folder = make_case(tmp_path)
    qc = read_qc(folder)
    qc["segmentation"] |= {"samples": 1, "pairwise_dice": {}}
    qc["scores"] = {"region_failure": 12.34, "urgency": 12.34}
    write_json(folder / "qc.json", qc)
    page = report(tmp_path, [folder])
    assert "1 scan1 12.340 0 none 101.3 98.0 130.2 – – –" in page.text
    assert "12.3 failing regions expected" in page.text


def test_numbers_of_a_case(tmp_path):
    flagged = [region(1, 1, 40, 40, 0.987), region(2, 1, 48, 40, 0.5), region(3, 3, 40, 40, 0.25)]
    page = report(tmp_path, [make_case(tmp_path, regions=flagged, urgency=0.125), make_case(tmp_path, "quiet")])
    # rank, case, urgency, regions, slices from 1, volumes, agreement
    assert "1 scan1 0.125 3 2, 4 101.3 98.0 130.2 – 0.875 0.938" in page.text
    assert "2 quiet 0.100 0 none" in page.text
    assert "3 regions on 2 of 4 slices" in page.text
    assert "Slice 2 of 4: 2 flagged regions, highest probability of failure 0.99" in page.text
    assert "Slice 4 of 4: 1 flagged region, highest probability of failure 0.25" in page.text
    assert "no flagged region" in page.text and "No region of its 4 slices reached the threshold" in page.text
    assert "cases 2 cases to review 1 flagged slices 2 flagged regions 3 not processed 0" in page.text
    assert "count from 1" in page.text and "For research only" in page.text


def test_settings_are_shown_once_per_kind(tmp_path):
    folders = [make_case(tmp_path, name) for name in ("a", "b", "c")]
    page = report(tmp_path, folders)
    for text in (
        "some_segmentation 0.1.0 (weights 0123456789ab)",
        "b-map",
        "10 (seed 3)",
        "torch 2.8",
        "0.25",
    ):
        assert page.text.count(text) == 1
    assert "not all made alike" not in page.text
    edit_qc(folders[1], map="emap")
    page = report(tmp_path, folders)
    assert "not all made alike" in page.text
    assert page.text.index("2 cases") < page.text.index("b-map") < page.text.index("e-map")


def test_failures_alone(tmp_path):
    page = report(tmp_path, [], [("scan7", "scan7.nii.gz: the file is damaged.")])
    assert "cases 0" in page.text and "not processed 1" in page.text
    assert "scan7 scan7.nii.gz: the file is damaged." in page.text
    assert "No case was processed." in page.text
