"""Work on a stranger's file in a process of its own, so that a decoder that hangs or dies does not take the run with it.

The process starts at the first call, lives as long as this one needs it, and is replaced when it died or took too long. It
is loky's, which comes with joblib: unlike those of ``multiprocessing`` it starts fresh, with none of this process's threads
and locks, on every system, in a notebook, and from a script without ``if __name__ == "__main__"``.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from . import video

MEMORY = 8 * 2**30  # bytes of address space; beyond it, allocations in the process fail


class Worker:
    """One process that runs functions for this one, a call after the other; calls from several threads wait in turn."""

    def __init__(self):
        self._turn, self._pool = threading.Lock(), None

    def call(self, limit_s: float, function: Callable, *arguments):
        """What ``function(*arguments)`` returns or raises; both must be picklable.

        Raises:
            TimeoutError: no answer in ``limit_s`` seconds. BrokenProcessPool: the process died. In both cases a new
            process takes the next call.
        """
        with self._turn:
            self._pool = self._pool or _start()
            try:
                return self._pool.submit(function, *arguments).result(limit_s)
            except (TimeoutError, BrokenProcessPool, KeyboardInterrupt):
                self.stop()
                raise

    def stop(self) -> None:
        """End the process and all that it started; the next call starts another."""
        if self._pool:
            self._pool.shutdown(kill_workers=True)
            self._pool = None


def read_frames(path: str | Path, count: int = 10) -> video.Frames:
    """As :func:`kaggle_utils.video.read_frames`, in the process for reading.

    Raises:
        UnreadableClip: also where the decoder hangs, dies, or needs more than ``MEMORY``.
    """
    path = Path(path)
    if multiprocessing.current_process().daemon:  # such as a worker of dask: it may start none, and its nanny replaces it
        return video.read_frames(path, count)
    limit_s = video.time_limit(path)
    try:
        return _reader(os.getpid()).call(limit_s, video.read_frames, path, count)
    except TimeoutError as error:
        raise video.UnreadableClip(path, f"its pictures are not decoded in {limit_s:.0f} s") from error
    except BrokenProcessPool as error:
        raise video.UnreadableClip(path, "its decoder crashed") from error
    except (MemoryError, cv2.error) as error:
        raise video.UnreadableClip(path, "its pictures need too much memory") from error


@cache
def _reader(process_id: int) -> Worker:
    """The worker of this process: one that was forked away has another."""
    return Worker()


def _start() -> ProcessPoolExecutor:
    quiet = {"PYTHONFAULTHANDLER": ""}  # loky would dump the stack of a process that dies; the caller is told anyway
    return ProcessPoolExecutor(1, initializer=_set_up, initargs=(os.getpid(),), env=quiet)


def _set_up(parent: int) -> None:
    """In the new process: Ctrl-C is the parent's to answer, memory is bounded, and the end comes with the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
