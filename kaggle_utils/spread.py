"""Spread work over the processors of this machine or over a cluster; a worker that dies costs one item.

joblib does the spreading: ``loky`` for processes on this machine, ``dask`` or ``ray`` for a cluster.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import islice
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor

from .kaggle import paths
from .media import children

BACKENDS = ("loky", "dask", "ray")
DEATHS = {"BrokenProcessPool", "KilledWorker", "RayActorError", "WorkerCrashedError"}  # and their subclasses
WAVE = 4  # ray returns the results of a call together: items for each worker in a call
_loading = threading.Lock()


class WorkerDied(RuntimeError):
    """A worker process ended twice while it had one item: it crashed, was killed, or ran out of memory."""


class Team:
    """Worker processes that stay until the ``with`` block ends.

    Args:
        jobs: processes on this machine; -1: one for each processor; 1: work is done in this process.
        backend: ``loky`` for this machine, ``dask`` or ``ray`` for a cluster, whose workers count, not
            ``jobs``. Its machines must see all files under the same paths and have this package installed.
        scheduler: address of the cluster's scheduler, such as ``tcp://10.0.0.5:8786``; None: a local one.

    Attributes:
        size: number of workers, known inside the block.

    Raises:
        ValueError: an unknown backend, or no jobs. OSError: the scheduler does not answer.
    """

    def __init__(self, jobs: int = 1, backend: str = "loky", scheduler: str | None = None):
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
        if jobs == 0:
            raise ValueError("jobs: expected a number of processes, or -1 for one a processor, found 0")
        self.jobs, self.backend, self.scheduler = jobs if backend == "loky" else -1, backend, scheduler
        self.size = 1
        self._open = ExitStack()

    def __enter__(self) -> "Team":
        with ExitStack() as opening:
            options: dict[str, Any] = {}
            if self.backend == "dask":
                from distributed import Client

                opening.enter_context(Client(self.scheduler))
            elif self.backend == "ray":
                import ray
                from ray.util.joblib import register_ray

                register_ray()
                opening.enter_context(ray.init(self.scheduler))
            else:
                threads = max(1, (os.cpu_count() or 1) // joblib.effective_n_jobs(self.jobs))
                options = {"initializer": _set_up, "initargs": (os.getpid(), threads)}
            opening.enter_context(joblib.parallel_config(self.backend, **options))
            self.size = joblib.effective_n_jobs(self.jobs)
            if not self.is_here and self.backend == "loky":
                opening.callback(lambda: get_reusable_executor().shutdown(kill_workers=True))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    @property
    def is_here(self) -> bool:
        """Whether the work is done in this process."""
        return self.backend == "loky" and self.size == 1

    def run(self, function: Callable[[Any], Any], items: Iterable) -> Iterator[tuple[Any, Any]]:
        """Call ``function`` on every item; yields each item and its outcome in the order in which they end.

        The outcome is the result, or the exception that the function raised, or :class:`WorkerDied`. The
        items that were begun when a worker died are run again, each alone.

        Args:
            function: a function of one argument; with several workers, it and the results must be picklable.
            items: asked for the next one when a worker is free, possibly from another thread.
        """
        if self.is_here:
            for item in items:
                yield item, _outcome(function, item)
            return
        items, alone = iter(items), False
        suspects: list[Any] = []
        while True:
            begun: dict[int, Any] = {}
            source = islice(suspects, 1) if alone else items
            try:
                for number, outcome in self._parallel(_calls(function, source, begun)):
                    yield begun.pop(number), outcome
            except Exception as error:
                if not {kind.__name__ for kind in type(error).__mro__} & DEATHS:
                    raise
                if alone:
                    yield suspects[0], WorkerDied("its worker process died, twice")
                else:
                    suspects = list(begun.values())
                    alone = True
                    continue
            if not alone:
                return
            suspects = suspects[1:]
            alone = bool(suspects)

    def _parallel(self, calls: Iterator) -> Iterator[tuple[int, Any]]:
        if self.backend == "ray":
            while wave := list(islice(calls, WAVE * self.size)):
                yield from joblib.Parallel(self.jobs, batch_size=1)(wave)
            return
        early = "n_jobs" if self.backend == "loky" else "2*n_jobs"  # a cluster answers after a while
        yield from joblib.Parallel(self.jobs, batch_size=1, pre_dispatch=early,
                                   return_as="generator_unordered")(calls)


def once(make: Callable[..., Any], *arguments) -> Any:
    """``make(*arguments)``, called once in each process: a worker's networks load at its first item."""
    with _loading:
        return _made(make, *arguments)


@cache
def _made(make: Callable[..., Any], *arguments) -> Any:
    return make(*arguments)


def _calls(function: Callable, items: Iterable, begun: dict[int, Any]) -> Iterator:
    """joblib's calls; ``begun`` holds the items that were handed out and have no outcome yet."""
    for number, item in enumerate(items):
        begun[number] = item
        yield joblib.delayed(_numbered)(number, function, item)


def _numbered(number: int, function: Callable, item: Any) -> tuple[int, Any]:
    return number, _outcome(function, item)


def _outcome(function: Callable, item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error


def _set_up(parent: int, threads: int) -> None:
    """Set up a process of this machine: no more threads than its share; it leaves Ctrl-C to the parent."""
    os.environ |= {"TF_NUM_INTRAOP_THREADS": str(threads), "TF_NUM_INTEROP_THREADS": str(threads)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children.end_with(parent)
    paths.prepare()  # before the first item imports TensorFlow: it is silent then
