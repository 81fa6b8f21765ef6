"""The files that a run leaves in a case's folder, by name; and datalist items of them, and of the scans of a folder."""

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from monai.utils import ensure_tuple

__all__ = [
    "CORRECTION_FILE",
    "MAP_FILES",
    "MAP_NAMES",
    "PROBABILITY_FILE",
    "REGIONS_FILE",
    "SEGMENTATION_FILE",
    "case_name",
    "files_below",
    "results_among",
    "scan_items",
    "with_predictions",
]

SEGMENTATION_FILE = "segmentation.nii.gz"
PROBABILITY_FILE = "failure_probability.nii.gz"
REGIONS_FILE = "failure_regions.nii.gz"
CORRECTION_FILE = "correction.json"
MAP_FILES = {"bmap": "bayesian.nii.gz", "emap": "entropy.nii.gz"}
MAP_NAMES = {"emap": "e-map", "bmap": "b-map"}  # in the order of the paper's tables


def case_name(path: str | Path) -> str:
    """Name of an image file without ``.nii`` or ``.nii.gz``: the name of its case's folder."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)


RESULT = re.compile(  # of the pipeline; of a bundle with the case's name before it
    rf"(.+_)?({'|'.join(map(case_name, (SEGMENTATION_FILE, PROBABILITY_FILE, REGIONS_FILE, *MAP_FILES.values())))})"
)


def results_among(names: Iterable[str]) -> set[str]:
    """File names in a folder that are results of a case: its maps, and a segmentation that has a map beside it."""
    found = {name: match.groups() for name in names if (match := RESULT.fullmatch(case_name(name)))}
    cases = {case for case, kind in found.values() if kind != case_name(SEGMENTATION_FILE)}
    return {name for name, (case, _) in found.items() if case in cases}


def files_below(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders, sorted. Links are followed, but each folder is searched once.

    A folder that may not be read is left out, with a warning that names it.
    """
    files, seen, starts = [], set(), [folder]
    for start in starts:  # which grows by links: a folder that lies here itself is not named by a link to it
        for path, folders, names in os.walk(start, onerror=_warn):
            if os.path.realpath(path) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(path))
            folders.sort()
            starts += [Path(path, name) for name in folders if os.path.islink(os.path.join(path, name))]
            files += [Path(path, name) for name in names]
    return sorted(files)


def _warn(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # of which callers say more
        logging.getLogger(__name__).warning(
            "%s: this folder cannot be read (%s), and what is in it is left out. Change its permissions.",
            error.filename,
            error.strerror,
        )


def scan_items(folder: str | Path, output: str | Path) -> list[dict[str, str]]:
    """A datalist of the 3-D NIfTI files (``.nii``, ``.nii.gz``) in a folder and below, without ACDC's labels and cines.

    Results of earlier runs, see `results_among`, are no scans; a line of the log says in how many folders they are.

    Args:
        folder: where the scans are.
        output: where results go; files in it are none, if it is a folder below.

    Raises:
        ValueError: if there is no scan; if two have one name, by which the results of one would replace the other's; or
            if results would go to the scans' own folder, where the next run would take them for scans.

    Example::

        >>> scan_items("nowhere", "results")
        Traceback (most recent call last):
        ValueError: nowhere: no scan (.nii, .nii.gz) in this folder or below. Check --dataset_dir.
    """
    root, own = Path(folder), Path(output).resolve()
    if own == root.resolve():
        raise ValueError(
            f"{folder}: results in the scans' own folder would be taken for scans by the next run. Give another "
            "--output_dir; it may be a folder in this one."
        )
    paths = [
        path
        for path in files_below(root)
        if re.search(r"(?<!_gt)(?<!_4d)\.nii(\.gz)?$", path.name, re.IGNORECASE)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not (root.resolve() in own.parents and own in path.resolve().parents)
    ]
    names: dict[Path, list[str]] = {}
    for path in paths:
        names.setdefault(path.parent, []).append(path.name)
    results = {parent / name for parent, own in names.items() for name in results_among(own)}
    if results:
        where = sorted({path.parent for path in results})
        logging.getLogger(__name__).info(
            "%s: results of earlier runs in %d folder(s) are left out, %s first.", folder, len(where), where[0]
        )
    paths = [path for path in paths if path not in results]
    if not paths:
        raise ValueError(f"{folder}: no scan (.nii, .nii.gz) in this folder or below. Check --dataset_dir.")
    taken: dict[str, Path] = {}
    for path in paths:
        if (first := taken.setdefault(case_name(path), path)) != path:
            raise ValueError(
                f"{first} and {path} have one name, and so would their results. Rename one of them, or use "
                "`python scripts/pipeline.py run`, which names results by the folder as well."
            )
    return [{"image": str(path)} for path in paths]


def with_predictions(
    items: Sequence[dict], predictions_dir: str | Path | Sequence[str | Path], map: str, model: str
) -> list[dict]:
    """Add ``segmentation`` and ``uncertainty`` files to datalist items.

    Args:
        items: datalist items with ``image``.
        predictions_dir: output folder of the pipeline's or a segmentation bundle's run over these images, or several
            that have them between them (the folds of a cross-validation).
        map: ``"bmap"`` or ``"emap"``, the uncertainty map.
        model: the network that segmented the images, ``"drn"`` for ``cardiac_drn_segmentation``.

    Raises:
        ValueError: for an unknown map, if a file is missing, if two images would take one, or if the segmentation was
            made by the bundle of another network, to go with the other map, or with too few samples for a b-map; the
            message names the file.
    """
    if map not in MAP_FILES:
        raise ValueError(f"Unknown uncertainty map '{map}': choose one of {sorted(MAP_FILES)}.")
    result, taken = [], {}
    for item in items:
        image = Path(item["image"])
        names = (case_name(image), f"{image.parent.name}_{case_name(image)}")  # as `find_scans` has them
        folders = [Path(folder) / name for name in names for folder in ensure_tuple(predictions_dir)]
        folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        if (first := taken.setdefault(folder, image)) != image:
            raise ValueError(f"{folder}: of {first} or {image}? Give predictions that `segment` made of these images.")
        names = {"segmentation": SEGMENTATION_FILE, "uncertainty": MAP_FILES[map]}
        files = {key: _result(folder, case_name(image), name) for key, name in names.items()}
        for path in files.values():
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing. Segment the images first: "
                    f"python scripts/pipeline.py segment --input ... --output {folder.parent}"
                )
        check_made_for(folder / "qc.json", map, model)
        result.append({**item, **{key: str(path) for key, path in files.items()}})
    return result


def _result(folder: Path, case: str, name: str) -> Path:
    """A file in a case's folder; a bundle writes the case's name before it."""
    path, of_bundle = folder / name, folder / f"{case}_{name}"
    return of_bundle if of_bundle.is_file() and not path.is_file() else path


def check_made_for(record: Path, map: str, model: str) -> None:
    """Refuse predictions whose record says that they are of another network, or do not go with the map."""
    if not record.is_file():
        return
    try:
        made = json.loads(record.read_text())["segmentation"]
        by, made_map, samples = str(made.get("bundle")), made["map"], int(made["samples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{record}: does not say what the segmentation was made by ({error!r}). Remove it, and segment again."
        ) from error
    bundle = re.fullmatch(r"cardiac_(.+)_segmentation", by)
    if bundle and bundle[1] != model:
        raise ValueError(
            f"{record}: segmented by the {bundle[1]}, and a detector belongs to one network. Give its maps to "
            f"--segmentation_model {bundle[1]}, or maps of the {model}."
        )
    if made_map != map or (map == "bmap" and samples < 2):
        raise ValueError(
            f"{record}: segmented for the {made_map} with {samples} samples, which does not go with the "
            f"{map}. Segment with --map {map}" + (" and two samples or more." if map == "bmap" else ".")
        )
