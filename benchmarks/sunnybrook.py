"""Score a run on Sunnybrook's DICOM cines against the experts' LV contours.

    python scripts/pipeline.py run --input SUNNYBROOK --output OUT
    python benchmarks/sunnybrook.py --data SUNNYBROOK --predictions OUT

SUNNYBROOK holds ``SCD.../dicom`` and ``SCD.../contours/{i,o}-contours``. The contours are endocardial at end-diastole
and end-systole and epicardial at end-diastole, in the slices that the experts took for the LV; slices without a contour
are not scored.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from pydicom import config, dcmread
from skimage.draw import polygon2mask

from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE
from cardiac_qc_plugin.workflows.files import read_volume

CONTOUR = re.compile(r"IM-\d+-(\d+)-(.)contour-manual\.txt")


def contours(patient: Path) -> dict[tuple[str, int], np.ndarray]:
    """Masks (row, column) by kind, i(nner) or o(uter), and InstanceNumber of the image they were drawn on."""
    masks = {}
    for file in sorted(patient.glob("contours/*/*.txt")):
        number, kind = CONTOUR.fullmatch(file.name).groups()
        points = np.loadtxt(file)[:, ::-1]  # x y in pixels
        masks[kind, int(number)] = polygon2mask((256, 256), points)
    return masks


def instances(patient: Path) -> dict[str, int]:
    """InstanceNumber by SOPInstanceUID."""
    with config.disable_value_validation():
        headers = [dcmread(file, stop_before_pixels=True) for file in patient.glob("dicom/*.dcm")]
        return {str(header.SOPInstanceUID): int(header.InstanceNumber) for header in headers}


def score(patient: Path, predictions: Path) -> None:
    numbers = instances(patient)
    for record in predictions.glob("*/dicom.json"):
        images = json.loads(record.read_text())["images"]
        if images[0][0]["uid"] in numbers:
            break
    else:
        raise SystemExit(f"{predictions}: no case from {patient}.")
    masks, found, cine = contours(patient), {}, record.with_name("cine.json")
    for (kind, number), mask in masks.items():
        for t, phase in enumerate(images):
            for z, image in enumerate(phase):
                if numbers[image["uid"]] == number:
                    found[kind, t, z] = mask
    phases = sorted({t for kind, t, _ in found if kind == "i"})
    epicardial = {t for kind, t, _ in found if kind == "o"}
    ed = next(t for t in phases if t in epicardial)
    es = next(t for t in phases if t not in epicardial)
    print(f"{patient.name} ({record.parent.name})")
    volumes = {}
    for name, t in (("ED", ed), ("ES", es)):
        volume = read_volume(record.parent / f"phase{t:02d}" / SEGMENTATION_FILE)
        voxel = np.prod(volume.spacing) / 1000
        slices = [z for kind, p, z in found if (kind, p) == ("i", t)]
        truth = np.stack([found["i", t, z].T for z in slices], axis=-1)
        labels = volume.data[..., slices]
        volumes[name] = truth.sum() * voxel, (labels == 3).sum() * voxel, (volume.data == 3).sum() * voxel
        text = f"LV Dice {dice(labels == 3, truth):.3f}"
        if name == "ED":
            outer = np.stack([found["o", t, z].T if ("o", t, z) in found else found["i", t, z].T for z in slices], -1)
            both = [z for z, s in enumerate(slices) if ("o", t, s) in found]
            wall = (outer & ~truth)[..., both]
            text += f", LVM Dice {dice(labels[..., both] == 2, wall):.3f}"
        contour, same, every = volumes[name]
        print(f"  {name} phase {t}: {text}; LV {contour:.0f} ml by contours, {same:.0f} ml in their "
              f"{len(slices)} slices, {every:.0f} ml in all slices")  # fmt: skip
    for index, of in enumerate(("contours", "their slices", "all slices")):
        edv, esv = volumes["ED"][index], volumes["ES"][index]
        print(f"  EF, {of}: {100 * (edv - esv) / edv:.1f} %")
    if cine.is_file():
        measured = json.loads(cine.read_text())
        print(f"  found: ED phase {measured['ed_phase']}, ES phase {measured['es_phase']}, "
              f"EF {measured['indices']['lv_ef_percent']:.1f} %")  # fmt: skip
    seconds = [json.loads(p.read_text())["stages"] for p in record.parent.glob("phase*/qc.json")]
    print(f"  {np.mean([sum(s['seconds'] for s in stages.values()) for stages in seconds]):.1f} s a phase")


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    arguments = parser.parse_args()
    for folder in sorted(arguments.data.glob("SCD*")):
        score(folder, arguments.predictions)
