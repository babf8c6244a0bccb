"""What every contestant's process does: it waits for a clip's path on standard input and answers with one
line of JSON.

Needs the standard library alone, as each contestant runs in an environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FRAMES = 10


def middles(frame_count: int) -> list[int]:
    """The frames that all contestants look at: the middles of ten equal parts of the clip, as
    ``video.spread``.
    """
    return [(2 * part + 1) * frame_count // (2 * FRAMES) for part in range(FRAMES)]


class Stopwatch:
    """Seconds of each named part of the work, in ``seconds``."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def serve(work: Callable[[str, Stopwatch], list | None]) -> None:
    """Answer each path with the seconds that ``work(path, stopwatch)`` took and the boxes that it returned.

    ``work`` returns for each of the ten frames its faces as x, y, width, height in pixels (and perhaps more),
    or None where it looks for none.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    for line in sys.stdin:
        stopwatch = Stopwatch()
        began = time.perf_counter()
        boxes = work(line.rstrip("\n"), stopwatch)
        seconds = {**stopwatch.seconds, "total": time.perf_counter() - began}
        print(json.dumps({"seconds": seconds, "boxes": boxes}), file=answers, flush=True)
