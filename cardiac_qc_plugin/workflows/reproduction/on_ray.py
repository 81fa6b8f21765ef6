"""The stages of a reproduction as tasks of a Ray cluster, each when those before it are done."""

import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from ..cohort.pool import Cluster, connected
from ..files import OutputError
from .stages import Budget, BudgetSpent, Progress, Stage

__all__ = ["carry_out_on_ray"]

ON_GPU = ("train", "segment", "detect")
RETRIES = 3  # of a stage whose worker or node dies


def run_stage(stage: Stage, end: float, cluster: Cluster) -> bool:
    """Carry out a stage in a process of the cluster; False if the budget stopped it.

    Args:
        stage: all that it reads and writes lies in folders that the nodes share.
        end: when the budget is spent, in seconds of `time.time`: nodes agree on it, other than on a monotonic clock.
        cluster: what the task may use.
    """
    import torch

    if not cluster.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows them all to whoever claims none
    torch.set_num_threads(cluster.cpus)
    left = end - time.time()
    if left <= 0:
        return False
    try:
        stage.run(Budget(None if left == float("inf") else left / 60))
    except BudgetSpent:
        return False
    return True


def carry_out_on_ray(stages: Iterable[Stage], budget: Budget, cluster: Cluster) -> Progress:
    """As :func:`~cardiac_qc_plugin.workflows.reproduction.stages.carry_out`, with the stages side by side that do not
    need each other.

    Args:
        stages: in any order.
        budget: wall-clock time.
        cluster: where to compute; ``cpus`` and ``gpus`` are those of a stage, and stages that run no network claim no
            GPU.

    Raises:
        OSError: the output cannot be written.
        ValueError: there is no such cluster.
    """
    progress, waiting = Progress(), list(dict.fromkeys(stages))
    end = time.time() + budget.left
    with connected(cluster) as ray:
        running: dict[Any, Stage] = {}
        while True:
            for stage in list(waiting):
                if stage.done:
                    progress.skipped.append(stage.name)
                elif stage.ready and budget.allows():
                    gpus = cluster.gpus if stage.info.get("kind") in ON_GPU else 0
                    # a process of its own for each: one that has used a GPU keeps it, whichever it is given next
                    options = {"num_cpus": cluster.cpus, "num_gpus": gpus, "max_retries": RETRIES, "max_calls": 1}
                    running[ray.remote(**options)(run_stage).remote(stage, end, cluster)] = stage
                else:
                    continue
                waiting.remove(stage)
            if not running:
                break
            (event,), _ = ray.wait(list(running), num_returns=1)
            stage = running.pop(event)
            try:
                (progress.carried_out if ray.get(event) else progress.remaining).append(stage.name)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, OutputError):
                    raise cause from None
                progress.failures[stage.name] = str(cause)
            print(
                f"{stage.name}: {state(stage, progress)}, {len(running)} under way, {len(waiting)} wait",
                file=sys.stderr,
            )
    progress.remaining += [stage.name for stage in waiting]
    return progress


def state(stage: Stage, progress: Progress) -> str:
    """What became of a stage, in a word."""
    if stage.name in progress.failures:
        return "failed"
    return "done" if stage.name in progress.carried_out else "stopped"
