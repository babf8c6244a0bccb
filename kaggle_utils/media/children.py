"""Run a program on a stranger's file with limits of memory, time and output."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from .. import disk

SOUND_MEMORY = 700 * 2**20  # bytes of address space, to list packets or decode sound
PICTURE_MEMORY = 1280 * 2**20  # bytes, to decode pictures
COPY_MEMORY = 1100 * 2**20  # bytes, to copy them while the reader holds others; 3840 × 2160: 1041 MiB
MOST_OUTPUT = 256 * 2**20  # bytes kept of each stream; sound at 16 kHz: two hours
MOST_LISTED = 8 * 2**20  # bytes kept of standard error: a damaged track has an error in every packet
BUSY = 4  # processors that a program may keep busy for the whole of its time
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}  # each reserves 64 MiB of address space


def run(command: list[str], memory: int, limit_s: float, stdout: bool,
        stderr: bool) -> tuple[int, bytes, bytes]:
    """Run a program to its end; returns its exit status and the two streams, empty where not wanted.

    What it writes beyond ``MOST_OUTPUT`` and ``MOST_LISTED`` is read and dropped.

    Raises:
        subprocess.TimeoutExpired: it was killed after ``limit_s`` seconds.
        OSError: it cannot be started; names it. RuntimeError: no thread can be started.
    """
    program = command[0]
    if os.name == "posix":  # a shell sets limits without running Python in a forked process
        limits = f"ulimit -c 0; ulimit -t {int(limit_s * BUSY) + 1}; ulimit -v {memory // 1024}"
        command = ["/bin/sh", "-c", f'{{ {limits}; }} 2>/dev/null; exec "$@"', "sh", *command]
    streams = [subprocess.PIPE if wanted else subprocess.DEVNULL for wanted in (stdout, stderr)]
    kept: tuple[list[bytes], list[bytes]] = ([], [])
    most = MOST_OUTPUT, MOST_LISTED
    with disk.named(Path(program)):
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1],
                                 env={**os.environ, **FEW_ARENAS})
    readers = [threading.Thread(target=_read, args=parts, daemon=True)
               for parts in zip((child.stdout, child.stderr), kept, most, strict=True) if parts[0]]
    until = time.monotonic() + limit_s
    with child:
        try:
            for reader in readers:
                reader.start()
            for reader in readers:  # a join wakes at once; wait looks again and again, after up to 50 ms
                reader.join(max(0.0, until - time.monotonic()))
            status = child.wait(max(0.0, until - time.monotonic()))
        except BaseException:
            child.kill()
            raise
        finally:
            for reader in readers:
                if reader.ident:  # it was started: the system may have no thread left
                    reader.join()
    return status, b"".join(kept[0]), b"".join(kept[1])


def _read(stream: IO[bytes], kept: list[bytes], most: int) -> None:
    left = most
    while part := stream.read(2**16):
        kept.append(part[:left]) if left else None
        left -= min(len(part), left)


def limit_growth(memory: int) -> None:
    """Let this process's address space grow by ``memory`` bytes at most, on POSIX."""
    if os.name != "posix":
        return
    import resource

    used = 0
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def end_with(parent: int) -> None:
    """End this process soon after ``parent`` has ended, even if it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def release_memory() -> None:
    """Give the memory of the last clip back to the system, which glibc does not do by itself."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
