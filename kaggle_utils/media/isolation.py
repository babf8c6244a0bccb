"""Decode untrusted files in a separate process: a decoder that hangs or crashes does not end the run.

The process starts at the first call, lives as long as this one needs it, and is replaced after a crash or a
timeout. It is loky's (part of joblib). Unlike those of ``multiprocessing``, it starts without this process's
threads and locks on every system, in notebooks, and from scripts without ``if __name__ == "__main__"``.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool, ShutdownExecutorError

from .. import disk
from . import children, video

MEMORY = children.PICTURE_MEMORY  # bytes by which the process may grow; allocations beyond it fail


class Worker:
    """One process that runs functions for this one, one call at a time; other threads wait their turn."""

    def __init__(self):
        self._turn, self._pool = threading.Lock(), None

    def call(self, limit_s: float, function: Callable, *arguments):
        """The result or exception of ``function(*arguments)``; both must be picklable.

        Raises:
            TimeoutError: no answer in ``limit_s`` seconds.
            BrokenProcessPool: the process died. RuntimeError, OSError: the system has no process or thread
                left. After each, a new process takes the next call.
        """
        with self._turn:
            pool = self._pool = self._pool or _start()
            try:
                return pool.submit(function, *arguments).result(limit_s)
            except (OSError, RuntimeError, KeyboardInterrupt):  # TimeoutError and those of the pool, too
                self.stop()
                raise

    def stop(self) -> None:
        """End the process and its children; the next call starts another."""
        pool, self._pool = self._pool, None
        if pool:
            try:
                pool.shutdown(kill_workers=True)
            except RuntimeError:  # no thread was left to watch its process
                for process in [*pool._processes.values()]:
                    process.terminate()


def read_frames(path: str | Path, count: int = 10) -> video.Frames:
    """As :func:`kaggle_utils.media.video.read_frames`, in the reader process.

    Raises:
        UnreadableClip: also if the decoder hangs, crashes, or needs more than ``MEMORY``.
    """
    path = Path(path)
    if multiprocessing.current_process().daemon:  # dask workers cannot start processes; a nanny restarts them
        return video.read_frames(path, count)
    found = video.survey(path)
    limit_s = video.time_limit(path, found)
    worker = _reader(os.getpid())
    try:
        with disk.temporary() as folder:
            frames, places = worker.call(limit_s, _read_into, folder, path, count, found)
            images = [np.load(folder / f"{number}.npy") for number in range(len({*places}))]
        return replace(frames, images=[images[place] for place in places])
    except TimeoutError as error:
        raise video.UnreadableClip(path, f"the picture was not decoded in {limit_s:.0f} s") from error
    except BrokenProcessPool as error:
        raise video.UnreadableClip(path, "its decoder crashed") from error
    except ShutdownExecutorError as error:
        raise video.UnreadableClip(path, "its decoder was stopped") from error
    except (MemoryError, cv2.error) as error:
        raise video.UnreadableClip(path, "decoding needs too much memory") from error


def _read_into(folder: Path, path: Path, count: int, found: video.Survey) -> tuple[video.Frames, list[int]]:
    """Read frames in the reader; files hold their images: a pipe would hold each four times.

    Returns the frames without images, and for each the number of its file: a frame may be repeated.
    """
    frames = video.read_frames(path, count, found)
    images = {id(image): image for image in frames.images}
    for number, image in enumerate(images.values()):
        np.save(folder / f"{number}.npy", image)
    return replace(frames, images=[]), [[*images].index(id(image)) for image in frames.images]


def stop_reading() -> None:
    """End the reader process, from any thread; the clip that it reads counts as unreadable."""
    _reader(os.getpid()).stop()


@cache
def _reader(process_id: int) -> Worker:
    """The worker of this process; a forked process gets its own."""
    return Worker()


def _start() -> ProcessPoolExecutor:
    disk.sweep()  # temporary copies of processes that were killed
    # no stack dump of a crashed process: the caller gets an error; no threads that it does not need
    quiet = {"PYTHONFAULTHANDLER": "", "OPENBLAS_NUM_THREADS": "1"}
    return ProcessPoolExecutor(1, initializer=_set_up, initargs=(os.getpid(),),
                               env=quiet | children.FEW_ARENAS)


def _set_up(parent: int) -> None:
    """Set up the new process: leave Ctrl-C to the parent, limit the memory, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children.limit_growth(MEMORY)
    children.end_with(parent)
