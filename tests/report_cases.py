"""Finished cases for the report's tests, and a reader of its pages."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
from PIL import Image

from cardiac_qc_plugin.workflows.files import write_json

SPACING = (2.0, 2.5, 10.0)
SHAPE = (104, 96, 4)
ACDC_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # toward the patient's left and back, as scanners store slices
BOX = (8, 96, 0, 80)  # with the margin of 8: rows 0 to 104, columns 0 to 88
VIEW = (104, 88)


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


def random_probabilities(seed):
    """A painted volume, and its regions from 0.25 on, read off the cells' corners."""
    rng = np.random.default_rng(seed)
    cells = rng.beta(0.5, 2.5, (11, 10, SHAPE[2])).astype(np.float32)
    painted = np.zeros(SHAPE, np.float32)
    painted[8:96, :80] = cells.repeat(8, axis=0).repeat(8, axis=1)
    found = sorted((-p, z, r, c) for (r, c, z), p in np.ndenumerate(cells) if p >= 0.25)
    return painted, [region(k, z, 8 + 8 * r, 8 * c, float(-p)) for k, (p, z, r, c) in enumerate(found, start=1)]


def make_case(root, name="scan1", regions=(), urgency=0.1, image=None, labels=None, bmap=None, painted=None, **changes):
    """A finished case; its folder. ``changes`` overwrite entries of the detection."""
    folder = root / name
    scan = root / "scans" / f"{name.replace('/', '_')}.nii.gz"
    zeros = np.zeros(SHAPE, np.float32)
    if painted is None:
        painted = zeros.copy()
        for r in regions:
            painted[r["row0"] : r["row1"], r["col0"] : r["col1"], r["slice"]] = r["probability"]
    save(scan, zeros + np.arange(SHAPE[2], dtype=np.float32) if image is None else image)
    save(folder / "segmentation.nii.gz", zeros.astype(np.uint8) if labels is None else labels)
    save(folder / "bayesian.nii.gz", zeros if bmap is None else bmap)
    save(folder / "entropy.nii.gz", zeros + 1)
    save(folder / "failure_probability.nii.gz", painted)
    bundle = {"bundle_version": "0.1.0", "weights_sha256": "0123456789abcdef", "map": "bmap"}
    qc = {
        "case": name,
        "input": {
            "path": str(scan), "frame": None, "sha256": "00",
            "shape": list(SHAPE), "spacing_mm": list(SPACING),
        },
        "segmentation": {
            "bundle": "cardiac_drn_segmentation", **bundle, "samples": 10, "seed": 3,
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


def heart(cases, ed=0, es=1):
    """Content of a ``cine.json`` of phases that are cases of these names."""
    return {
        "case": "heart", "cases": cases, "ed_phase": ed, "es_phase": es, "ed_es": "given",
        "notes": ["A slice is missing."], "jumps": [], "body_surface_area_m2": 2.0,
        "curve": [{"phase": k, "LV_ml": 100 - 10 * k, "RV_ml": 120 - 9 * k, "LVM_ml": 90} for k in range(len(cases))],
        "indices": {
            "lv_edv_ml": 100, "lv_esv_ml": 45, "lv_ef_percent": 55, "lv_edv_ml_per_m2": 50, "rv_ef_percent": None,
        },
        "intervals": {"lv_ef_percent": [50.25, 59.75]},
        "flagged_slices": {"ed": [1, 2], "es": [2]}, "flagged_levels": {},
    }  # fmt: skip


class Page(HTMLParser):
    """Elements and visible text of a page; fails on tags that are not closed in order."""

    VOID = {"meta", "img", "path", "link", "br", "rect", "input"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.open, self.text, self.scripts = [], [], "", {}
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())
        self.tags = [tag for tag, _ in self.elements]
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            attributes = self.elements[-1][1]
            if "id" in attributes:
                self.scripts[attributes["id"]] = json.loads(data)
        elif self.open[-1:] != ["style"]:
            self.text += data + " "

    def all(self, tag, **wanted):
        """Attributes of the elements of a tag."""
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]

    def pictures(self, kind):
        """Pixels of the slices' layers: ``image`` or ``map``."""
        sources = [a["src"] for a in self.all("img", **{"class": kind})]
        streams = [io.BytesIO(base64.b64decode(source.partition("base64,")[2])) for source in sources]
        return [np.asarray(Image.open(stream).convert("RGBA")) / 255 for stream in streams]

    def contours(self, name):
        """Corners (n, 2) of the contours of a class, in pixels of the view, in all slices together."""
        found = []
        for attributes in self.all("path", **{"class": name}):
            for start, moves in re.findall(r"M([-\d ]+)l([-\d ]+)z", attributes["d"]):
                steps = np.array(f"{start} {moves}".split(), int).reshape(-1, 2)
                found.append(steps.cumsum(axis=0) / 4)
        return np.concatenate(found) if found else None

    def rows(self):
        """Lines of the worklist, by case."""
        data = self.scripts["data"]
        return {row[0]: dict(zip(data["columns"], row, strict=True)) for row in data["rows"]}
