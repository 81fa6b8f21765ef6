"""The evaluation's parts against straightforward implementations of the same definitions.

    python benchmarks/evaluation.py [--volumes 200] [--compared 4] [--json FILE] [--quick]

Synthetic hearts (216 x 256 x 10), segmented as they are in a neighboring cardiac phase, with a smooth random
uncertainty map. Ours is timed on all volumes, the straightforward way on the first few, alternating with ours on the
same ones; ratios are medians over these pairs, and the results have to be equal.

- risk-coverage: one pass over the box for each distinct uncertainty (exact, as ours is); for each of 100 percentiles
  (not exact); and for each percentile with the Hausdorff distances that the paper's released code computes on the way
- Dice and Hausdorff distance: a distance transform of the whole volume for each mask
- failure labels: one labelling and one distance transform for each slice and structure, and a loop over clusters
- region curve: a loop over thresholds and regions
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cardiac_qc_plugin.data.phantom import ShortAxisPhantom
from cardiac_qc_plugin.metrics.calibration import voxel_risk_coverage
from cardiac_qc_plugin.metrics.detection import THRESHOLDS, VolumeDetection, region_curve
from cardiac_qc_plugin.metrics.segmentation import dice_and_hausdorff
from cardiac_qc_plugin.transforms.failure_labels import failure_mask

SPACING = (1.5625, 1.5625, 10.0)
Volume = tuple[np.ndarray, np.ndarray, np.ndarray]  # prediction, reference, uncertainty


def volumes(number: int) -> Iterator[Volume]:
    rng = np.random.default_rng(0)
    for seed in range(number):
        heart = ShortAxisPhantom(seed=seed)
        reference, prediction = heart.frame(0.30)[1], heart.frame(0.18)[1]
        uncertainty = ndimage.gaussian_filter(rng.random(reference.shape), (2, 2, 0)).astype(np.float32)
        yield prediction, reference, uncertainty


def exact_by_thresholds(prediction: np.ndarray, reference: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    box = ndimage.find_objects((reference > 0).astype(int))[0]
    wrong, values = (prediction != reference)[box], uncertainty[box]
    points = [(0, 0)]
    for threshold in np.unique(values):
        kept = values <= threshold
        points.append((kept.mean(), (wrong & kept).sum()))
    return np.interp(np.linspace(0, 1, 101), *np.transpose(points))


def by_percentiles(prediction: np.ndarray, reference: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    box = ndimage.find_objects((reference > 0).astype(int))[0]
    wrong, values = (prediction != reference)[box], uncertainty[box]
    return np.array([(wrong & (values <= np.percentile(values, p))).sum() for p in range(1, 101)])


def as_released(prediction: np.ndarray, reference: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    risks = []
    for p in range(1, 101):
        referred = uncertainty > np.percentile(uncertainty, p)
        corrected = np.where(referred, reference, prediction)
        for label in (1, 2, 3):
            slow_hausdorff(corrected == label, reference == label)
        risks.append(sum((corrected[..., z] != reference[..., z]).sum() for z in range(reference.shape[2])))
    return np.array(risks)


def surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def slow_hausdorff(a: np.ndarray, b: np.ndarray) -> float:
    a, b = surface(a), surface(b)
    one, other = (ndimage.distance_transform_edt(~mask, sampling=SPACING) for mask in (a, b))
    return max(other[a].max(), one[b].max())


def slow_scores(prediction: np.ndarray, reference: np.ndarray, _: np.ndarray) -> np.ndarray:
    pairs = [(prediction == label, reference == label) for label in (1, 2, 3)]
    return np.array([(2 * (a & b).sum() / (a.sum() + b.sum()), slow_hausdorff(a, b)) for a, b in pairs])


def fast_scores(prediction: np.ndarray, reference: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.array([(s.dice, s.hausdorff) for s in dice_and_hausdorff(prediction, reference, SPACING).values()])


def slow_labels(prediction: np.ndarray, reference: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The paper's criterion, slice by slice (III-D); a slice without the structure, or the last, has no size rule."""
    failures = np.zeros(reference.shape, dtype=bool)
    apical = np.flatnonzero(reference.any(axis=(0, 1)))[-1]
    cross = ndimage.generate_binary_structure(2, 1)
    for z in range(reference.shape[2]):
        for label in (1, 2, 3):
            mine, true = prediction[..., z] == label, reference[..., z] == label
            wrong = mine != true
            if true.any():
                edge = true & ~ndimage.binary_erosion(true, cross)
                distance = ndimage.distance_transform_edt(~edge)
                beyond = wrong & (distance > np.where(true, 2, 3))
            else:
                beyond = wrong
            clusters, number = ndimage.label(wrong, cross)
            for cluster in range(1, number + 1):
                own = clusters == cluster
                if own.sum() >= 10 or z == apical or not true.any():
                    failures[..., z] |= own & beyond
    return failures


def fast_labels(prediction: np.ndarray, reference: np.ndarray, _: np.ndarray) -> np.ndarray:
    return failure_mask(prediction, reference, SPACING[:2]).astype(bool)


def detection(prediction: np.ndarray, reference: np.ndarray, uncertainty: np.ndarray) -> VolumeDetection:
    """Regions of 8 x 8 voxels over the whole field, with the map's mean as their probability."""

    def cells(values: np.ndarray) -> np.ndarray:
        rows, columns, slices = values.shape
        return values.reshape(rows // 8, 8, columns // 8, 8, slices).sum(axis=(1, 3))

    counts = cells((prediction != reference).astype(int))
    index = np.broadcast_to(np.arange(counts.shape[2]), counts.shape).ravel()
    return VolumeDetection(cells(uncertainty).ravel() / 64, counts.ravel(), index, np.zeros(counts.shape[2], int))


def slow_curve(*volume: np.ndarray) -> np.ndarray:
    found, points = detection(*volume), []
    for threshold in THRESHOLDS:
        caught = false = 0
        for probability, voxels in zip(found.probability, found.failure_voxels, strict=True):
            if probability >= threshold:
                caught += voxels
                false += voxels == 0
        points.append((caught / found.failure_voxels.sum(), false))
    return np.transpose(points)


def fast_curve(*volume: np.ndarray) -> np.ndarray:
    curve = region_curve([detection(*volume)])
    return np.stack([curve.sensitivity, curve.false_positives])


def fast_coverage(*volume: np.ndarray) -> np.ndarray:
    return voxel_risk_coverage(*volume).risk


Work = tuple[str, Callable[..., np.ndarray], Callable[..., np.ndarray], bool]
WORK: list[Work] = [
    ("risk-coverage, exact", fast_coverage, exact_by_thresholds, True),
    ("risk-coverage, percentiles", fast_coverage, by_percentiles, False),
    ("risk-coverage, as released", fast_coverage, as_released, False),
    ("Dice and Hausdorff", fast_scores, slow_scores, True),
    ("failure labels", fast_labels, slow_labels, True),
    ("region curve", fast_curve, slow_curve, True),
]


def seconds(function: Callable[..., np.ndarray], volume: Volume) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = function(*volume)
    return time.perf_counter() - start, result


def measure(work: Work, data: list[Volume], compared: int) -> dict[str, Any]:
    """Medians per volume; straightforward and ours alternate on the volumes that both are timed on."""
    name, ours, straightforward, comparable = work
    pairs = []
    for volume in data[:compared]:
        (slow, expected), (fast, result) = seconds(straightforward, volume), seconds(ours, volume)
        if comparable:
            np.testing.assert_allclose(result, expected, rtol=1e-6, err_msg=name)
        pairs.append((slow, fast))
    total = sum(seconds(ours, volume)[0] for volume in data)
    return {
        "straightforward_seconds": statistics.median(slow for slow, _ in pairs),
        "seconds": statistics.median(fast for _, fast in pairs),
        "speedup": statistics.median(slow / fast for slow, fast in pairs),
        "seconds_all_volumes": total,
    }


def main(a: argparse.Namespace) -> None:
    data = list(volumes(8 if a.quick else a.volumes))
    results = {}
    print(f"{'per volume':28}{'straightforward':>16}{'ours':>10}{'ratio':>8}{f'all {len(data)}':>10}")
    for work in WORK:
        r = results[work[0]] = measure(work, data, 1 if a.quick else a.compared)
        print(
            f"{work[0]:28}{r['straightforward_seconds']:14.3f} s{1000 * r['seconds']:7.1f} ms{r['speedup']:8.0f}"
            f"{r['seconds_all_volumes']:8.1f} s",
            flush=True,
        )
    if a.json:
        a.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--compared", type=int, default=4, help="volumes that the straightforward way is timed on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="8 volumes, one of them compared")
    main(parser.parse_args())
