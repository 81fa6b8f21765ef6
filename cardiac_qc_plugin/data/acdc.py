"""Datalists of the ACDC challenge's 100 training patients, and of other data in its layout, in MONAI's format."""

import re
from pathlib import Path

import numpy as np

__all__ = ["acdc_datalist", "read_info"]

# patient076 is patient074's scan, labelled a second time: never on two sides of a split
SAME_SCAN = (("patient074", "patient076"),)


def read_info(path: Path) -> dict[str, str]:
    """Entries of a patient's ``Info.cfg``: ED and ES frame, Group, Height (cm), Weight (kg).

    Raises:
        ValueError: if the file is missing, or does not give the frames of both phases.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    missing = [key for key in ("ED", "ES") if key not in info]
    if missing:
        raise ValueError(f"{path}: no entry for {', '.join(missing)}.")
    for key in ("ED", "ES"):
        if not info[key].isdigit():
            raise ValueError(f"{path}: {key} is no frame number: '{info[key]}'.")
    return info


def stratified_folds(groups: dict[str, str], folds: int, seed: int) -> dict[str, int]:
    """Fold of each patient: each group is shuffled, and each patient goes where his group has the fewest so far."""
    rng = np.random.default_rng(seed)
    twin = {first: second for first, second in SAME_SCAN if first in groups and second in groups}
    result: dict[str, int] = {}
    totals = [0] * folds
    for group in sorted(set(groups.values())):
        members = [p for p in sorted(groups) if groups[p] == group and p not in twin.values()]
        order = rng.permutation(members).tolist()
        for first in twin.keys() & set(order):  # in the first half, so that the others can even it out
            order.insert(min(order.index(first), len(order) // 2), order.pop(order.index(first)))
        sizes = [0] * folds
        for patient in order:
            fold = min((sizes[f], totals[f], f) for f in range(folds))[2]
            for name in (patient, twin[patient]) if patient in twin else (patient,):
                result[name] = fold
                sizes[fold] += 1
                totals[fold] += 1
    return result


def released_code_folds(groups: dict[str, str]) -> dict[str, int]:
    """Folds of the authors' released code: blocks of five patients go to folds 3, 2, 1, 0 in turn."""
    return {patient: 3 - (int(patient[-3:]) - 1) // 5 % 4 for patient in groups}


def acdc_datalist(root: str | Path, folds: int = 4, seed: int = 0, split: str = "stratified") -> dict:
    """Datalist with folds, stratified by disease group; end-diastole and end-systole of a patient share a fold.

    Args:
        root: folder with ``patientNNN/patientNNN_frameFF.nii.gz``, ``..._gt.nii.gz`` and ``Info.cfg``; other data's
            patients may have other names.
        folds: number of folds, at least 2.
        seed: seed of the shuffle; recorded in the datalist.
        split: ``"stratified"``, or ``"released_code"``: the authors' deterministic four folds, in which the scan that
            occurs twice (patients 074 and 076) is in two folds.

    Returns:
        ``{"name", "seed", "split", ..., "training": [{"image", "label", "fold", "meta": {"patient", "phase",
        "group"}}, ...]}`` with paths relative to ``root``.

    Raises:
        ValueError: if the folder holds no patient, or fewer than folds, a listed frame is missing, or a setting is
            unknown.
    """
    root = Path(root)
    if folds < 2 or split not in ("stratified", "released_code") or (split == "released_code" and folds != 4):
        raise ValueError(
            f"Choose 2 or more folds with split 'stratified', or 4 with 'released_code'; got {folds} and '{split}'."
        )
    folders = sorted(
        {path for path in root.glob("patient*") if path.is_dir()} | {p.parent for p in root.glob("*/Info.cfg")}
    )
    infos = {folder.name: read_info(folder / "Info.cfg") for folder in folders}
    if not infos:
        raise ValueError(f"{root}: no patientNNN/Info.cfg. Give the folder that holds ACDC's patient folders.")
    is_acdc = all(re.fullmatch(r"patient\d{3}", patient) for patient in infos)
    if split == "released_code" and not is_acdc:
        raise ValueError(f"{root}: split 'released_code' is for ACDC's patients only, patient001 and so on.")
    if missing := next((patient for patient, info in infos.items() if "Group" not in info), None):
        raise ValueError(f"{root / missing / 'Info.cfg'}: no entry for Group, by which folds are stratified.")
    groups = {patient: info["Group"] for patient, info in infos.items()}
    fold = stratified_folds(groups, folds, seed) if split == "stratified" else released_code_folds(groups)
    items = []
    for patient, info in infos.items():
        for phase in ("ED", "ES"):
            stem = f"{patient}/{patient}_frame{int(info[phase]):02d}"
            item = {"image": f"{stem}.nii.gz", "label": f"{stem}_gt.nii.gz", "fold": fold[patient]}
            for path in (item["image"], item["label"]):
                if not (root / path).is_file():
                    raise ValueError(f"{root / path} is missing, but {patient}/Info.cfg lists it as {phase}.")
            # nested, because MONAI's datafold_read takes every string of an item for a path
            items.append({**item, "meta": {"patient": patient, "phase": phase, "group": info["Group"]}})
    if len(infos) < folds:
        raise ValueError(f"{root}: {len(infos)} patients cannot be put into {folds} folds. Choose fewer (--folds).")
    source = {
        "name": "ACDC training set",
        "reference": "Bernard et al., IEEE TMI 37(11), 2018, doi 10.1109/TMI.2018.2837502",
    }
    return (source if is_acdc else {"name": root.resolve().name}) | {
        "labels": {"0": "background", "1": "RV", "2": "LVM", "3": "LV"},
        "split": split,
        "seed": seed,
        "training": items,
    }
