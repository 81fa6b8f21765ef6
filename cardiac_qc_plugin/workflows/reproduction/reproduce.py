"""The paper's experiments from one command: training, detection, correction, tables, figures (sections V to VII)."""

from functools import partial
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.bundle import find_device
from cardiac_qc_plugin.reports.reproduction import write_reproduction

from ..cohort.pool import Cluster
from ..references import Outcome
from .grid import Grid, Settings
from .on_ray import carry_out_on_ray
from .plan import describe
from .stage_work import resume_folder
from .stages import Budget, Progress, carry_out
from .training import read_losses

__all__ = ["reproduce"]


def reproduce(
    settings: Settings, budget_minutes: float | None = None, dry_run: bool = False, cluster: Cluster | None = None
) -> Outcome:
    """Carry out what is not done, within a budget, and write tables and figures of all that is.

    Written to the output: ``tables/``, ``figures/`` and ``results.md``, and a folder for each network, see
    docs/reproduce.md.

    Args:
        settings: what to reproduce.
        budget_minutes: stop when so many minutes are over; the same command goes on.
        dry_run: only say what would be done, and how long it would take; a few steps are measured for that.
        cluster: a Ray cluster to work on, instead of in this process.

    Returns:
        What was done, and the stages that failed.

    Raises:
        ValueError: see `Settings`; or there is no such device.
        OSError: the output cannot be written.
    """
    if cluster is None and settings.device != "auto":
        find_device(settings.device)  # or every stage would fail of it; workers of a cluster may have others
    budget = Budget(budget_minutes)
    grid = Grid(settings)
    stages = grid.by_fold()
    if settings.trained and not any(stage.info["kind"] == "take" for stage in stages):
        raise ValueError(
            f"--trained {settings.trained}: no weights of these networks where they are looked for, such as "
            f"{stages[0].name}/model.pt. docs/reproduce.md lays it out."
        )
    if dry_run:
        stages += [experiment.stage for experiment in grid.over_folds(planned=True) if experiment.stage]
        return Outcome(describe(stages, settings.output), {})
    work = carry_out if cluster is None else partial(carry_out_on_ray, cluster=cluster)
    progress = work(stages, budget)
    experiments = grid.over_folds()
    measured = work([e.stage for e in experiments if e.stage], Budget())  # seconds each, and worth having
    write_reproduction(settings.output, experiments, training_budgets(grid))
    planned = {e.stage.name: e.stage for e in grid.over_folds(planned=True) if e.stage}
    progress.remaining += [n for n, stage in planned.items() if not stage.done and n not in measured.failures]
    return finish(progress, measured, settings.output)


def training_budgets(grid: Grid) -> list[dict[str, Any]]:
    """Iterations and hours of every training of a segmentation network or detector, also of those not finished.

    Of one that was taken, only its name is known.
    """
    rows = []
    for stage in grid.stages.values():
        if stage.info["kind"] == "take":
            unknown = dict.fromkeys(("iterations", "of", "finished", "hours", "last_loss"))
            rows.append({"training": stage.name, "regime": "trained elsewhere"} | unknown)
            continue
        is_training = stage.info["kind"] == "train" and (stage.done or resume_folder(stage).is_dir())
        if losses := read_losses(stage.folder / "loss.csv") if is_training else []:
            iteration, loss, seconds = losses[-1]
            rows.append(
                {"training": stage.name, "regime": stage.info["regime"], "iterations": int(iteration)}
                | {"of": stage.info["iterations"], "finished": stage.done, "hours": seconds / 3600, "last_loss": loss}
            )
    return rows


def finish(progress: Progress, measured: Progress, output: Path) -> Outcome:
    """The summary for the terminal."""
    failures = progress.failures | measured.failures
    carried_out, skipped = progress.carried_out + measured.carried_out, progress.skipped + measured.skipped
    lines = [f"{len(carried_out)} stage(s) carried out, {len(skipped)} there already."]
    if progress.remaining:
        lines.append(f"{len(progress.remaining)} stage(s) left; run the same command again to go on with:")
        lines += [f"  {name}" for name in progress.remaining]
    lines += [f"FAILED {name}: {message}" for name, message in failures.items()]
    lines.append(f"Tables and figures of what is done: {output / 'results.md'}")
    return Outcome("\n".join(lines), failures)
