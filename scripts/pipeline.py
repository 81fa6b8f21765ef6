"""Command line of the pipeline: segment short-axis cine MRI, and find where the segmentation failed.

    python scripts/pipeline.py demo     --output DIR
    python scripts/pipeline.py run      --input PATH --output DIR
    python scripts/pipeline.py segment  --input PATH --output DIR
    python scripts/pipeline.py datalist --dataset acdc --root DIR --output folds.json
    python scripts/pipeline.py import_mnms --input DIR --output DIR
    python scripts/pipeline.py correct  --predictions DIR --reference DIR --output DIR
    python scripts/pipeline.py evaluate --predictions DIR --reference DIR --output DIR
    python scripts/pipeline.py export   --bundle NAME --output DIR
    python scripts/pipeline.py auto3dseg --datalist FILE --root DIR --output DIR
    python scripts/pipeline.py fold_to_bundle --source PATH --output DIR
    python scripts/pipeline.py reproduce --data DIR --output DIR [--dry_run]
    python scripts/pipeline.py dicom_seg --predictions DIR --dicom DIR
    python scripts/pipeline.py effort   --predictions DIR --reference DIR --output DIR
    python scripts/pipeline.py calibrate --predictions DIR --reference DIR --output FILE
    python scripts/pipeline.py compare_expert --predictions DIR --expert DIR --reference DIR --output DIR
    python scripts/pipeline.py table    --predictions DIR
    python scripts/pipeline.py review   --predictions DIR [--output DIR]

`python scripts/pipeline.py COMMAND --help` explains the options of a command.
"""

import difflib
import gc
import inspect
import json
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any


def _summary(cases: list[dict], output: str) -> None:
    """What was found, and where."""
    from pathlib import Path

    from cardiac_qc_plugin.reports.cine import describe_cine

    flagged = [qc for qc in cases if qc["detection"]["regions"]]
    regions = sum(len(qc["detection"]["regions"]) for qc in cases)
    slices = sum(len(qc["detection"]["flagged_slices"]) for qc in cases)
    total = sum(qc["input"]["shape"][2] for qc in cases)
    print(
        f"\n{len(cases)} scan(s): {regions} region(s) flagged in {slices} of {total} slices, in {len(flagged)} scan(s)."
    )
    for qc in sorted(cases, key=lambda qc: -qc["scores"]["urgency"])[:10]:
        volumes = ", ".join(f"{name} {ml:.0f} ml" for name, ml in qc["segmentation"]["volume_ml"].items())
        listed = ", ".join(str(z + 1) for z in qc["detection"]["flagged_slices"]) or "none"
        print(f"  {qc['case']}: {volumes}; slices to review: {listed}")
    for name in dict.fromkeys(qc["case"].rpartition("/phase")[0] for qc in cases if "/phase" in qc["case"]):
        print(f"  {name}: {describe_cine(json.loads((Path(output) / name / 'cine.json').read_text()))}")
    print(f"Worklist: {output}/worklist.csv\nReport:   {output}/report.html")


def _numbers(series: int | tuple | None) -> tuple[int, ...]:
    """SeriesNumbers, as Fire reads ``5,6``; another value would be a series that no file has."""
    numbers = () if series is None else _listed(series)
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"--series is a whole number, or several with commas between, got '{series}'.")
    return numbers


def _gather(input: str, output: str, root: str | None, fold: int | None, series: int | tuple | None, name_by: str):
    """The scans of an input; names what is skipped."""
    from cardiac_qc_plugin.workflows.import_dicom import gather_scans

    inputs = gather_scans(input, output, root, fold, _numbers(series), name_by)
    if inputs.skipped:
        print("Skipped:\n" + "\n".join(f"  {item}" for item in inputs.skipped))
    return inputs


def _note_other_cases(output: str, names: set[str]) -> None:
    """Name cases in the output folder that this run does not make, but the commands that read the folder will take."""
    from pathlib import Path

    from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE

    others = [path.parent.relative_to(output).as_posix() for path in Path(output).glob(f"**/{SEGMENTATION_FILE}")]
    if others := sorted(set(others) - names):
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(
            f"{output} has {len(others)} case(s) of another input: {listed}. The commands that read this folder "
            "(evaluate, correct, table, review) will take them, too; remove them, or write to another folder."
        )


def _on_ray(engine: str, command: Callable[..., None], **options: Any) -> bool:
    """Whether an engine is Ray; of its own options those that are not the command's defaults the local one refuses."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine is local or ray, got '{engine}'.")
    defaults = inspect.signature(command).parameters
    given = [f"--{name}" for name, value in options.items() if value != defaults[name].default]
    if engine == "local" and given:
        raise ValueError(
            f"{', '.join(given)}: for --engine ray only, see docs/scaling.md. Leave these out, or give --engine ray."
        )
    return engine == "ray"


def _promised(models: tuple, calibration: str | None) -> dict | None:
    """Print what is promised; returns what each threshold catches, if that is known."""
    from cardiac_qc_plugin.reports.promise import promise_text
    from cardiac_qc_plugin.workflows.calibrate import Promise, promised_threshold

    if models[1].promise:
        print(promise_text(Promise(**models[1].promise)))
    known, _ = promised_threshold(*models, path=calibration)
    return known and known.operating_curve()


def _finish(outcome) -> None:
    """Print what a stage did; exit code 1 if it could not do some cases."""
    print(outcome.text)
    if outcome.failures:
        sys.exit(1)


def run(
    input: str,
    output: str,
    model: str = "drn",
    map: str = "bmap",
    samples: int = 10,
    turns: int = 1,
    sample_phases: str = "all",
    ed: int | None = None,
    es: int | None = None,
    device: str = "auto",
    threshold: float | None = None,
    catch: float | None = None,
    regions_per_patient: float | None = None,
    calibration: str | None = None,
    root: str | None = None,
    fold: int | None = None,
    series: int | tuple[int, ...] | None = None,
    name_by: str = "study",
    bundle_dir: str | None = None,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    worker_cpus: int = 1,
    worker_gpus: float = 0,
    retries: int = 3,
) -> None:
    """Segment scans and flag the regions where the segmentation probably failed.

    Args:
        input: a NIfTI file (3-D or 4-D), a folder of them or of DICOM files, an ACDC folder, a MONAI datalist, or a
            manifest (CSV or Parquet with a column image, and case if cases are not named by their files).
        output: folder for the results; what is already there with the same input and settings is skipped. With engine
            ray, an fsspec URL of a bucket as well.
        model: segmentation network: dn, drn or unet.
        map: uncertainty map for the detection: bmap (Monte Carlo dropout) or emap (entropy).
        samples: Monte Carlo samples T. With the e-map also 0, which is faster; then there are no intervals, and the
            worklist goes by the expected number of failing regions.
        turns: quarter turns in which slices are seen, 1 to 4: with 4 each sample, and each of four passes without
            dropout, sees another (test-time augmentation).
        sample_phases: phases of a cine that are sampled: all, or ed_es. With ed_es the others have the e-map, of one
            pass without dropout; end-diastole and end-systole are found with it. Takes about half the time.
        ed: phase of end-diastole in all cines, numbered from 0 as in the results; by default it is taken from ACDC's
            Info.cfg, or found from the LV's volume.
        es: the same for end-systole.
        device: auto, cpu, cuda, cuda:1, ...
        threshold: failure probability from which a region is flagged, instead of the bundle's operating point.
        catch: share of a patient's failure voxels to catch on average, 0.9 say: sets the threshold, with a promise.
        regions_per_patient: flagged regions that nine patients in ten must not exceed: sets the threshold as well.
        calibration: file that calibrate wrote, for the promise; by default the one that came with the detector.
        root: folder that the paths in a datalist or manifest are relative to; its own folder by default.
        fold: only this fold of a datalist or manifest.
        series: SeriesNumber of the DICOM series to take (5, or 5,6), instead of all short-axis cines.
        name_by: what cases from DICOM are named by: study (a digest that tells nothing of the patient), patient_id,
            patient_name or folder.
        bundle_dir: folder of the bundles, instead of the repository's.
        engine: local, or ray: over the workers of a Ray cluster, for cohorts (docs/scaling.md).
        address: of a running Ray cluster, auto or HOST:PORT; else RAY_ADDRESS, or one is started on this machine.
        workers: of the Ray cluster; by default as many as it has room for.
        worker_cpus: CPUs, and threads, of a worker.
        worker_gpus: GPUs of a worker; 0.25 lets four share one.
        retries: a file is tried so often when its worker dies, then it is quarantined and named.
    """
    from functools import partial

    from cardiac_qc_plugin.workflows.calibrate import write_operating_curve
    from cardiac_qc_plugin.workflows.run import CaseFailures, load_predictors
    from cardiac_qc_plugin.workflows.run import run as run_workflow

    if ed is not None and ed == es:
        raise ValueError(f"--ed and --es are both {ed}: that is no ejection. Give two phases, or leave one out.")
    promise = {"catch": catch, "regions_per_patient": regions_per_patient, "calibration": calibration}
    settings = {"root": bundle_dir, "threshold": threshold, "turns": turns, **promise}
    load = partial(load_predictors, model, map, samples, sample_phases, **settings)
    own = {"address": address, "workers": workers, "worker_cpus": worker_cpus, "worker_gpus": worker_gpus}
    if _on_ray(engine, run, **own, retries=retries):
        from cardiac_qc_plugin.workflows.cohort.engine import CohortWorker, run_cohort
        from cardiac_qc_plugin.workflows.cohort.pool import Cluster

        curve = _promised(load(device="cpu")[0], calibration)
        on_device, dicom = partial(load, device=device), {"series": _numbers(series), "name_by": name_by}
        make = partial(CohortWorker, str(output), on_device, (ed, es), dicom)
        cluster = Cluster(address, workers, worker_cpus, worker_gpus)
        return _finish(run_cohort(input, str(output), make, cluster, retries, root, fold, curve))
    inputs = _gather(input, output, root, fold, series, name_by)
    has_cine = any("/phase" in scan.case for scan in inputs.scans) or inputs.failures
    if (ed, es) != (None, None) and not has_cine:
        raise ValueError(f"{input}: --ed and --es are for cines, and none of these scans is one. Leave them out.")
    _note_other_cases(output, {scan.case for scan in inputs.scans} | {case for case, _ in inputs.failures})
    models, preview = load(device=device)
    write_operating_curve(output, _promised(models, calibration))
    skipped = [str(item) for item in inputs.skipped]
    try:
        cases = run_workflow(inputs.scans, str(output), *models, inputs.failures, preview, (ed, es), skipped)
    except CaseFailures as failures:
        _summary(failures.cases, output)
        raise
    _summary(cases, output)


def segment(
    input: str,
    output: str,
    model: str = "drn",
    map: str = "bmap",
    samples: int = 10,
    turns: int = 1,
    device: str = "auto",
    root: str | None = None,
    fold: int | None = None,
    series: int | tuple[int, ...] | None = None,
    name_by: str = "study",
    bundle_dir: str | None = None,
) -> None:
    """Segment scans with both uncertainty maps, without detection: what a detector is trained on.

    Args:
        input: as for run.
        output: folder for the results; run goes on from them.
        model: segmentation network: dn, drn or unet.
        map: what the segmentation has to go with: bmap (mean of the samples) or emap (deterministic pass).
        samples: Monte Carlo samples T; with 0 (emap only) the b-map is 0.
        turns: as for run.
        device: auto, cpu, cuda, cuda:1, ...
        root: folder that the paths in a datalist or manifest are relative to; its own folder by default.
        fold: only this fold of a datalist or manifest.
        series: SeriesNumber of the DICOM series to take (5, or 5,6), instead of all short-axis cines.
        name_by: what cases from DICOM are named by: study (a digest that tells nothing of the patient), patient_id,
            patient_name or folder.
        bundle_dir: folder of the bundles, instead of the repository's.
    """
    from cardiac_qc_plugin.bundle import load_segmenter
    from cardiac_qc_plugin.workflows.run import run as run_workflow

    inputs = _gather(input, output, root, fold, series, name_by)
    segmenter = load_segmenter(model, map, samples, device, bundle_dir, turns)
    cases = run_workflow(inputs.scans, str(output), segmenter, None, inputs.failures)
    print(f"{len(cases)} scan(s) segmented in {output}.")


def demo(output: str, seed: int = 1, device: str = "auto") -> None:
    """Write the scans of a synthetic heart at end-diastole and end-systole, and run on them.

    Args:
        output: folder for the phantom (``phantom/``), the results and the report.
        seed: seed of the phantom's anatomy.
        device: auto, cpu, cuda, ...
    """
    from pathlib import Path

    from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_phantom
    from cardiac_qc_plugin.workflows.evaluate import evaluate as evaluate_workflow

    scans = Path(output) / "phantom"
    write_phantom(scans, "phantom", ShortAxisPhantom(seed=seed))
    run(str(scans), output, device=device)
    evaluate_workflow(output, scans, Path(output) / "evaluation")
    print(f"Scores:   {output}/evaluation/summary.md (against the synthetic heart's true labels)")


def datalist(
    root: str, output: str, dataset: str = "acdc", folds: int = 4, seed: int = 0, split: str = "stratified"
) -> None:
    """Write a MONAI datalist with folds that keep a patient's scans together.

    Args:
        root: folder of the data set; paths in the datalist are relative to it.
        output: the datalist, a JSON file.
        dataset: acdc, or other data in its layout (see import_mnms).
        folds: number of folds.
        seed: seed of the stratified shuffle.
        split: stratified, or released_code (the authors' four folds).
    """
    from pathlib import Path

    from cardiac_qc_plugin.data.acdc import acdc_datalist
    from cardiac_qc_plugin.workflows.files import write_json

    if dataset != "acdc":
        raise ValueError(f"--dataset is acdc, got '{dataset}'.")
    items = acdc_datalist(root, folds, seed, split)
    write_json(Path(output), items)
    print(f"{output}: {len(items['training'])} scans in {folds} folds.")


def import_mnms(input: str, output: str) -> None:
    """Write end-diastole and end-systole of the challenges M&Ms and M&Ms-2, with labels, in ACDC's layout.

    Args:
        input: folder of the challenge's files.
        output: folder to write to, for run, evaluate, datalist and training.
    """
    from cardiac_qc_plugin.workflows.import_mnms import import_mnms as work

    _finish(work(input, output))


def correct(
    predictions: str,
    output: str,
    reference: str | None = None,
    edited: str | None = None,
    rule: str = "paper",
    criterion: str | None = None,
    on_outside: str = "error",
    apex: str = "last",
) -> None:
    """Correct flagged regions: simulated with references, or by an expert's edited masks.

    Args:
        predictions: output folder of run.
        output: folder for the corrected segmentations.
        reference: folder with reference labels, for a simulated correction.
        edited: folder with edited masks, for an expert's correction; only voxels in flagged regions may change.
        rule: paper, released_code or upper_bound (simulated correction).
        criterion: failure criterion, paper or released_code; the rule's own by default.
        on_outside: edits outside flagged regions are an error, or dropped and counted (drop).
        apex: end of the slice axis at which the apex lies, last or first.
    """
    from cardiac_qc_plugin.workflows.correct import correct as correct_workflow

    _finish(correct_workflow(predictions, output, reference, edited, rule, criterion, on_outside, apex))


def evaluate(
    predictions: str,
    reference: str,
    output: str,
    compare: str | None = None,
    criterion: str = "paper",
    apex: str = "last",
) -> None:
    """Score segmentations, clinical indices, uncertainty and failure detection against references.

    Args:
        predictions: output folder of run or correct.
        reference: folder with reference labels (``<case>_gt.nii.gz``); ACDC's layout gives the phases too.
        output: folder for tables, curves and figures.
        compare: a second folder of predictions, corrected ones say, to test the difference.
        criterion: what a failure is in tables by case and in figures, paper or released_code; the summary has both.
        apex: end of the slice axis at which the apex lies, last or first.
    """
    from cardiac_qc_plugin.workflows.evaluate import evaluate as evaluate_workflow

    _finish(evaluate_workflow(predictions, reference, output, compare, criterion, apex))


def effort(
    predictions: str,
    reference: str,
    output: str,
    compare_map: tuple | str = (),
    seeds: int = 10,
    criterion: str = "paper",
    apex: str = "last",
) -> None:
    """Measure what reviewing regions gains: Dice and Hausdorff distance against regions reviewed per patient.

    Args:
        predictions: output folder of run.
        reference: folder with reference labels.
        output: folder for the curves, the figure and the summary.
        compare_map: output folder of run with another map, or several with commas, drawn beside.
        seeds: random orders.
        criterion: which errors are failures, paper or released_code.
        apex: end of the slice axis at which the apex lies, last or first.
    """
    from cardiac_qc_plugin.workflows.effort import effort as effort_workflow

    _finish(
        effort_workflow(predictions, reference, output, tuple(map(str, _listed(compare_map))), seeds, criterion, apex)
    )


def calibrate(
    predictions: str,
    reference: str,
    output: str,
    source: str | None = None,
    criterion: str = "paper",
    apex: str = "last",
    check: bool = False,
    test: str | None = None,
) -> None:
    """Calibrate the promises of run --catch and --regions_per_patient on validation patients.

    Args:
        predictions: output folder of run on patients that neither network was trained on, with end-diastole and
            end-systole of each.
        reference: folder with reference labels.
        output: the calibration file, JSON. Beside the detector's weights run finds it by itself, as
            <weights>_calibration.json, or <weights>_turns4_calibration.json of a run with --turns 4.
        source: which patients these are, in words; reports repeat it.
        criterion: which errors are failures, paper or released_code.
        apex: end of the slice axis at which the apex lies, last or first.
        check: print how the promises are kept in random splits of these patients.
        test: print it for the patients of another output folder of run, with references in the same folder.
    """
    from cardiac_qc_plugin.workflows.calibrate import calibrate as workflow

    _finish(workflow(predictions, reference, output, source, criterion, apex, check, test))


def compare_expert(predictions: str, expert: str, reference: str, output: str, on_outside: str = "error") -> None:
    """Compare segmentations, their simulated and an expert's correction, beside the paper's Table IV.

    Args:
        predictions: output folder of run.
        expert: folder with the expert's masks, or output of correct --edited; cases without one are left out.
        reference: folder with reference labels.
        output: folder for the tables.
        on_outside: edits outside flagged regions are an error, or dropped and counted (drop).
    """
    from cardiac_qc_plugin.workflows.compare_expert import compare_expert as workflow

    _finish(workflow(predictions, expert, reference, output, on_outside))


def review(
    predictions: str, output: str | None = None, reviewer: str = "", port: int = 0, no_browser: bool = False
) -> None:
    """Review flagged regions in the browser: paint in them, accept them, finish case by case (docs/review.md).

    Args:
        predictions: output folder of run.
        output: folder for the corrected segmentations and audit trails; by default beside the predictions, with
            _reviewed after the name. Run the command again to go on.
        reviewer: who reviews, for the audit trail; the page asks for it.
        port: of this computer, on which the page is served; any free one by default.
        no_browser: only print the address.
    """
    try:
        from cardiac_qc_plugin.review.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise RuntimeError(f"{error.name} is not installed: pip install 'cardiac-qc-plugin[review]'.") from error

    serve(predictions, output, str(reviewer), port, not no_browser)


def dicom_seg(predictions: str, dicom: str) -> None:
    """Write segmentations and flagged regions as DICOM Segmentation objects, beside the NIfTI files.

    Args:
        predictions: output folder of run on DICOM.
        dicom: folder of the source images, to which the objects refer; they carry the patient's identity from there.
    """
    from cardiac_qc_plugin.workflows.dicom_seg import write_dicom_seg

    _finish(write_dicom_seg(predictions, dicom))


def table(predictions: str) -> None:
    """Write the results of a run as one Parquet table, cases.parquet: a row for each case, of a cine for each phase.

    Args:
        predictions: output folder of run, which writes the table itself where pyarrow is installed.
    """
    from cardiac_qc_plugin.workflows.table import table as table_workflow

    _finish(table_workflow(predictions))


def export(
    bundle: str,
    output: str,
    weights: str | None = None,
    weights_url: str | None = None,
    bundle_dir: str | None = None,
) -> None:
    """Write a bundle as a zip that runs without this package, as in MONAI's model zoo.

    Args:
        bundle: name of the bundle, cardiac_drn_segmentation say.
        output: folder for <name>_v<version>.zip.
        weights: weights to ship as models/model.pt, instead of the bundle's.
        weights_url: where weights above 25 MB will be published; they are then written beside the zip.
        bundle_dir: folder of the bundles, instead of the repository's.
    """
    from cardiac_qc_plugin.workflows.export import export as export_workflow

    print(export_workflow(bundle, output, bundle_dir, weights, weights_url))


def auto3dseg(
    datalist: str,
    root: str,
    output: str,
    algos: str | None = None,
    num_fold: int | None = None,
    input: str | None = None,
    bundle_dir: str | None = None,
    **settings,
) -> None:
    """Train the segmentation networks on the folds of a datalist by MONAI's AutoRunner, and segment with the ensemble.

    Args:
        datalist: MONAI datalist with folds, as datalist writes it.
        root: folder of the data; paths in the datalist are relative to it.
        output: AutoRunner's work folder; what is done is skipped when the command is run again.
        algos: bayesdn, bayesdrn, bayesunet, or several of them with commas; all by default.
        num_fold: train the first folds only, so many; all by default.
        input: scans to segment with the ensemble, as for run; results go to ensemble/ in output.
        bundle_dir: folder of the bundles, instead of the repository's.
        settings: any other option is an entry of the bundles' configs: --iterations 4000 --learning_rate 0.0005.
    """
    from pathlib import Path

    from cardiac_qc_plugin.workflows.auto3dseg import EnsembleSegmenter
    from cardiac_qc_plugin.workflows.auto3dseg import auto3dseg as auto3dseg_workflow
    from cardiac_qc_plugin.workflows.run import run as run_workflow

    folder = str(Path(output) / "ensemble")
    inputs = _gather(input, folder, None, None, None, "study") if input else None  # before hours of training
    scores = auto3dseg_workflow(datalist, root, output, algos, num_fold, bundle_dir, settings, bool(inputs))
    print("\nMean Dice coefficient on the fold left out:")
    for name, dice in scores.items():
        print(f"  {name}: {dice:.3f}")
    if inputs:
        segmenter = EnsembleSegmenter(output)
        cases = run_workflow(inputs.scans, folder, segmenter, None, inputs.failures)
        print(f"{len(cases)} scan(s) segmented by {', '.join(segmenter.members)} in {folder}.")


def fold_to_bundle(
    source: str,
    output: str,
    bundle: str | None = None,
    root: str | None = None,
    datalist: str | None = None,
    fold: int | None = None,
    version: str | None = None,
    bundle_dir: str | None = None,
    **settings,
) -> None:
    """Make a MONAI bundle of a fold that auto3dseg trained, or of any checkpoint of a bundle's training.

    Args:
        source: a fold's folder (bayesdn_0), or a file of weights.
        output: folder for the bundle.
        bundle: name of the bundle that a file of weights belongs to.
        root: folder of the data to validate a file of weights on; without it no performance is recorded.
        datalist: datalist of its training, instead of the bundle's.
        fold: fold that was left out of its training, instead of the bundle's.
        version: version of the new bundle; the last number one higher by default.
        bundle_dir: folder of the bundles, instead of the repository's.
        settings: any other option is an entry of the bundle's configs that was replaced in its training.
    """
    from cardiac_qc_plugin.workflows.fold_to_bundle import fold_to_bundle as workflow

    print(workflow(source, output, bundle, root, datalist, fold, version, bundle_dir, settings))


def _listed(value) -> tuple:
    """One value or several, with commas between; Fire takes only words apart, and no paths."""
    if isinstance(value, str):
        return tuple(value.split(","))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def reproduce(
    data: str,
    output: str,
    folds: tuple | int = (0, 1, 2, 3),
    models: tuple | str = ("drn", "unet", "dn"),
    losses: tuple | str = ("ce", "brier", "soft_dice"),
    maps: tuple | str = ("bmap", "emap"),
    regime: str = "short",
    iterations: int | None = None,
    detector_iterations: int | None = None,
    samples: int | None = None,
    detector_maps: str = "auto",
    ablations: tuple | str = (),
    members: int = 5,
    tracking: str | None = None,
    trained: str | None = None,
    budget_minutes: float | None = None,
    dry_run: bool = False,
    datalist: str | None = None,
    device: str = "auto",
    bundle_dir: str | None = None,
    engine: str = "local",
    address: str | None = None,
    worker_cpus: int = 1,
    worker_gpus: float = 0,
) -> None:
    """Redo the paper's experiments: train, segment, detect, correct, evaluate; tables and figures beside the paper's.

    What is there already, made from the same inputs, is skipped; a training that was stopped goes on. Lists are
    written with commas: --folds 0,1 --models drn,unet.

    Args:
        data: ACDC's training folder.
        output: folder for everything, results.md first.
        folds: folds to leave out, each in turn; -1 for networks and detectors of all patients.
        models: dn, drn, unet.
        losses: of the paper's two for each network, those to train with: ce, brier, soft_dice.
        maps: bmap, emap.
        regime: short (the bundles' train.json), paper, or another configuration in the bundles.
        iterations: of the segmentation networks, instead of the regime's.
        detector_iterations: of the detectors, instead of the regime's.
        samples: Monte Carlo samples T, instead of the bundles' own.
        detector_maps: what detectors learn from: in_sample (the paper), out_of_fold (needs all folds), or auto:
            out_of_fold if all folds are asked for.
        ablations: samples (Table V), region_size (Figure 7), labels (Figure 8 and cluster sizes), see_segmentation,
            detector_maps, ensemble, snapshots.
        members: networks of an ensemble.
        tracking: mlflow to track the trainings, or a file with settings for it.
        trained: folder with weights that were trained elsewhere, laid out as the output (docs/reproduce.md); what it
            has is taken instead of trained.
        budget_minutes: stop after so many minutes; the same command goes on.
        dry_run: print the plan, with a measured time, and do nothing.
        datalist: datalist with folds, instead of the bundles'.
        device: auto, cpu, cuda, ...
        bundle_dir: folder of the bundles, instead of the repository's.
        engine: local, or ray: stages that do not need each other at the same time, over a Ray cluster.
        address: of a running Ray cluster, auto or HOST:PORT; else RAY_ADDRESS, or one is started on this machine.
        worker_cpus: CPUs, and threads, of a stage.
        worker_gpus: GPUs of a stage that trains, segments or detects.
    """
    from pathlib import Path

    from cardiac_qc_plugin.workflows.cohort.pool import Cluster
    from cardiac_qc_plugin.workflows.reproduction import Settings
    from cardiac_qc_plugin.workflows.reproduction import reproduce as reproduce_workflow

    settings = Settings(
        data=Path(data).resolve(),
        output=Path(output).resolve(),
        folds=_listed(folds),
        models=_listed(models),
        losses=_listed(losses),
        maps=_listed(maps),
        regime=regime,
        iterations=iterations,
        detector_iterations=detector_iterations,
        samples=samples,
        detector_maps=detector_maps,
        ablations=_listed(ablations),
        members=members,
        tracking=tracking,
        trained=Path(trained).resolve() if trained else None,
        datalist=Path(datalist).resolve() if datalist else None,
        device=device,
        bundle_dir=Path(bundle_dir).resolve() if bundle_dir else None,
    )
    own = {"address": address, "worker_cpus": worker_cpus, "worker_gpus": worker_gpus}
    cluster = Cluster(address, None, worker_cpus, worker_gpus) if _on_ray(engine, reproduce, **own) else None
    _finish(reproduce_workflow(settings, budget_minutes, dry_run, cluster))


def _check_options(commands: dict, arguments: list[str]) -> None:
    """Refuse an option that the command does not have, or that lacks its value.

    Fire would look for the first only after it has run the command, and takes the second for True: a folder's name.
    """
    command = arguments[0] if arguments else ""
    if command not in commands:
        return
    names = inspect.signature(commands[command]).parameters
    flags = [name for name, parameter in names.items() if parameter.annotation is bool]
    open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in names.values())  # settings of the bundles
    for argument, following in zip(arguments[1:], [*arguments[2:], "--"], strict=True):
        if argument == "--":  # what follows is for Fire itself
            return
        option = re.match(r"--?([a-zA-Z][\w-]*)", argument)
        name = option[1].replace("-", "_") if option else "help"
        short_for = [other for other in names if len(name) == 1 and other.startswith(name)]
        name = short_for[0] if len(short_for) == 1 else name  # of several Fire says that they are
        known = short_for or name in (*names, "help", "h") or name in (f"no{flag}" for flag in flags)
        if not open_ended and not known:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean --{close[0]}?" if close else f"see {command} --help."
            raise ValueError(f"{command} has no option --{name}: {meant}")
        alone = "=" not in argument and re.match(r"--|-[a-zA-Z](=|$)", following)
        if alone and name in names and name not in flags:
            raise ValueError(f"--{name} has no value. See {command} --help.")


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _parser(option: inspect.Parameter):
    """What Fire reads an option's text with: a text is a text, also 2024 or 0.2, and a number is a number."""
    name, annotation = option.name, option.annotation
    kinds = {str: (str, ""), int: (int, "a whole number"), float: (float, "a number"), bool: (_truth, "true or false")}
    kind = next((kind for kind in kinds if annotation in (kind, kind | None)), None)
    if kind is None:
        return None
    convert, expected = kinds[kind]

    def parse(text: str):
        if text == "None" and annotation != kind:
            return None
        if not text and option.default != "":  # as a path it would be the current folder
            raise ValueError(f"--{name} is empty. A variable of the shell that is not set?")
        try:
            return convert(text)
        except (ValueError, KeyError):
            raise ValueError(f"--{name} is {expected}, got '{text}'.") from None

    return parse


def main() -> None:
    """Run a command; an error is one line, and a non-zero exit code."""
    import fire

    # MONAI looks for a GPU decoder of DICOM files whenever a reader is made, and tells that there is none
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    listed = [demo, run, segment, datalist, import_mnms, correct, evaluate, export, auto3dseg, fold_to_bundle]
    listed += [reproduce, dicom_seg, effort, calibrate, compare_expert, table, review]
    commands = {command.__name__: command for command in listed}
    fire.decorators.FIRE_METADATA = "_parsers"  # a name that no help lists
    for command in commands.values():
        parsers = {p.name: _parser(p) for p in inspect.signature(command).parameters.values()}
        fire.decorators.SetParseFns(**{name: parse for name, parse in parsers.items() if parse})(command)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C
    try:
        _check_options(commands, sys.argv[1:])
        fire.Fire(commands, name="pipeline.py")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on where it stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    # importing MONAI makes many objects and no garbage: to look for it less often saves a second of the import
    gc.set_threshold(50_000)
    main()
