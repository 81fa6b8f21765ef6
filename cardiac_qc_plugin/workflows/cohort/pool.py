"""Workers of a Ray cluster: each holds what is dear to load, and does one task at a time."""

import contextlib
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Cluster", "Died", "WorkerPool", "connected"]

Work = Callable[[Any], Any]
STARTS = 5  # workers that may die one after another before any is ready
PATIENCE = 10.0  # seconds in which Ray finds out why a worker is gone


@dataclass(frozen=True)
class Cluster:
    """Where to compute.

    Args:
        address: of a running Ray cluster: ``"auto"`` for the one of this machine, or ``HOST:PORT``; None for a new one
            on this machine alone, or what ``RAY_ADDRESS`` says.
        workers: number of workers; None for as many as there is room for.
        cpus: of a worker, and its threads.
        gpus: of a worker; several share a GPU with 0.25, say.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1 or self.cpus < 1 or self.gpus < 0:
            raise ValueError("--workers and --worker_cpus have to be 1 or more, --worker_gpus 0 or more.")

    @property
    def options(self) -> dict[str, Any]:
        """A worker's or task's claim, in Ray's words."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """The module ``ray``, connected to the cluster.

    Raises:
        ValueError: if Ray is missing, or the cluster is not there.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'cardiac-qc-plugin[cluster]'") from error
    address = cluster.address or os.environ.get("RAY_ADDRESS", "local")  # which a job of the cluster finds set
    own = {"include_dashboard": False, "object_store_memory": 100 << 20} if address == "local" else {}
    ours = not ray.is_initialized()
    if ours:
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        except ConnectionError as error:
            raise ValueError(f"--address {address}: no Ray cluster there ({error}).") from error
        with contextlib.suppress(ValueError):  # Ray has put its own; not in the main thread
            signal.signal(signal.SIGTERM, terminate)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


class Died(NamedTuple):
    """What came of a task whose worker died.

    Attributes:
        node: where it ran.
        reason: what Ray says, in one line.
    """

    node: str
    reason: str


class Task(NamedTuple):
    """A task, and the nodes on which it failed."""

    key: Hashable
    argument: Any
    nodes: tuple[str, ...] = ()


@dataclass(eq=False)
class Worker:
    """An actor, where it runs, and what it does; no node while it loads, no task while it waits."""

    actor: Any
    node: str = ""
    task: Task | None = None


class WorkerActor:
    """Lives in a process of the cluster.

    Args:
        threads: of PyTorch: sums of floats depend on how they are shared out.
        gpus: what is claimed; without, the device is the CPU.
    """

    def __init__(self, threads: int, gpus: float) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows them all to whoever claims none
        self.threads = threads
        self.work: Work | None = None

    def load(self, make: Callable[[], Work]) -> str:
        """Load what the work needs; returns the node's name."""
        import ray

        self.work = make()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.threads)
        return ray.get_runtime_context().get_node_id()

    def do(self, argument: Any) -> Any:
        """One task."""
        return self.work(argument)


class WorkerPool:
    """Workers that are replaced when they die.

    As many tasks are under way as there are workers, so it is known over which one a worker died; tasks are taken from
    their iterator when a worker is free.

    Args:
        ray: the module, connected.
        make: returns the function that does a task; called once in each worker.
        cluster: how many workers, and what each may use.

    Raises:
        ValueError: if there is no room for a single worker.
    """

    def __init__(self, ray: Any, make: Callable[[], Work], cluster: Cluster) -> None:
        self.ray, self.cluster = ray, cluster
        self.make = ray.put(make)
        self.actor = ray.remote(WorkerActor)
        self.workers: set[Worker] = set()
        self.events: dict[Any, Worker] = {}  # by what is awaited of them
        self.failed_starts = 0
        have = ray.cluster_resources()
        room = have.get("CPU", 0) // cluster.cpus
        room = int(min(room, have.get("GPU", 0) // cluster.gpus) if cluster.gpus else room)
        if room < 1 and cluster.workers is None:
            raise ValueError(
                f"A worker wants {cluster.cpus} CPU(s) and {cluster.gpus:g} GPU(s), and the cluster has "
                f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}. See --worker_cpus and --worker_gpus."
            )
        for _ in range(cluster.workers or room):
            self.start()

    def start(self) -> None:
        """Ask for a worker; it is ready when the cluster has room for it, and it has loaded."""
        actor = self.actor.options(max_restarts=0, **self.cluster.options)
        worker = Worker(actor.remote(self.cluster.cpus, self.cluster.gpus))
        self.workers.add(worker)
        self.events[worker.actor.load.remote(self.make)] = worker

    def end(self, worker: Worker) -> None:
        """End a worker."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self.end(worker)

    def each(
        self, tasks: Iterable[tuple[Hashable, Any]], retry: Callable[[Hashable, Died], bool]
    ) -> Iterator[tuple[Hashable, Any]]:
        """Do tasks, as many at a time as there are workers.

        Args:
            tasks: (key, argument) of each.
            retry: whether to try a task again whose worker died; on another node, if there is one.

        Yields:
            Key and result, in the order in which they end. The result is an exception if the work raised it, and `Died`
            if the worker died and the task is not tried again.

        Raises:
            RuntimeError: if no worker lives long enough to load.
            Exception: what a worker raised while loading.
        """
        source, again = (Task(*task) for task in tasks), deque[Task]()
        while True:
            idle = [worker for worker in self.workers if worker.node and not worker.task]
            left = [worker for worker in idle if not self.give(worker, source, again)]
            if left and not any(worker.task for worker in self.workers):
                return
            (event,), _ = self.ray.wait(list(self.events), num_returns=1)
            worker = self.events.pop(event)
            task, worker.task = worker.task, None
            try:
                result = self.ray.get(event)
            except self.ray.exceptions.RayTaskError as error:
                result = error.cause if isinstance(error.cause, Exception) else error
                if task is None:
                    raise result from None
            except self.ray.exceptions.RayError as error:
                result = Died(worker.node, first_line(self.death(worker, error)))
                self.end(worker)
                self.failed_starts += task is None
                if self.failed_starts == STARTS:
                    raise RuntimeError(f"Workers die while they load: {result.reason}") from error
                self.start()
                if task is not None and retry(task.key, result):
                    again.append(task._replace(nodes=(*task.nodes, worker.node)))
                    continue
            if task is not None:
                yield task.key, result
            elif not isinstance(result, Died):
                worker.node, self.failed_starts = result, 0

    def death(self, worker: Worker, error: Exception) -> Exception:
        """What Ray says of a worker that is gone, which it may learn later than that its connection broke."""
        unavailable = self.ray.exceptions.ActorUnavailableError
        deadline = time.monotonic() + PATIENCE
        while isinstance(error, unavailable) and time.monotonic() < deadline:
            time.sleep(0.1)
            try:
                self.ray.get(worker.actor.__ray_ready__.remote(), timeout=PATIENCE)
                return error
            except self.ray.exceptions.GetTimeoutError:
                return error
            except self.ray.exceptions.RayError as later:
                error = later
        return error

    def give(self, worker: Worker, source: Iterator[Task], again: deque[Task]) -> bool:
        """Give a worker a task that failed elsewhere, or on all nodes; else a new one. False if there is none."""
        nodes = {other.node for other in self.workers if other.node}
        suited = (task for task in again if worker.node not in task.nodes or nodes <= set(task.nodes))
        worker.task = next(suited, None)
        if worker.task is not None:
            again.remove(worker.task)
        else:
            worker.task = next(source, None)
        if worker.task is not None:
            self.events[worker.actor.do.remote(worker.task.argument)] = worker
        return worker.task is not None


def first_line(error: Exception) -> str:
    """What Ray says of a death, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "died" in line.lower() and "before finishing" not in line), lines[0])
    detail = re.search(r"Worker exit detail: ([^.]*)", told)
    return detail[1] if detail else told.partition(". ")[0]
