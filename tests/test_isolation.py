"""A decoder that hangs, dies or eats memory costs its clip and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from kaggle_utils.media import files, isolation, video
from kaggle_utils.media.video import UnreadableClip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(miniature) -> Path:
    return sorted((miniature / "test_videos").glob("*.mp4"))[0]


@pytest.fixture
def worker():
    worker = isolation.Worker()
    yield worker
    worker.stop()


@pytest.fixture
def reader():
    """The process id of the process that reads clips for this one."""
    return isolation._reader(os.getpid()).call(60, os.getpid)


def is_gone(process_id: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while psutil.pid_exists(process_id) and time.monotonic() < end:
        time.sleep(0.05)
    return not psutil.pid_exists(process_id)


def test_frames_are_those_of_the_clip(clip):
    here, there = video.read_frames(clip, 4), isolation.read_frames(str(clip), 4)
    assert (
        there.info == here.info
        and there.warnings == here.warnings
        and np.array_equal(there.times_s, here.times_s)
    )
    assert np.array_equal(there.images, here.images)


def test_reasons_come_back(tmp_path):
    with pytest.raises(UnreadableClip, match="none.mp4: no such file") as caught:
        isolation.read_frames(tmp_path / "none.mp4")
    assert (caught.value.path, caught.value.reason) == (tmp_path / "none.mp4", "no such file")


def test_one_process_serves_many_calls_and_is_not_this_one(worker):
    numbers = {worker.call(60, os.getpid) for _ in range(3)}
    assert len(numbers) == 1 and os.getpid() not in numbers
    worker.stop()
    assert is_gone(numbers.pop())


@pytest.mark.skipif(os.name != "posix", reason="stops a process by a signal")
def test_a_decoder_that_hangs_is_stopped(clip, reader, monkeypatch):
    monkeypatch.setattr(files, "LIMIT_S", 1.0)
    monkeypatch.setattr(files, "LIMIT_S_PER_MB", 0.0)
    os.kill(reader, signal.SIGSTOP)
    with pytest.raises(UnreadableClip, match="not decoded in 1 s"):
        isolation.read_frames(clip, 2)
    assert is_gone(reader)
    monkeypatch.undo()
    assert len(isolation.read_frames(clip, 2).images) == 2


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
def test_a_decoder_that_dies_is_replaced(clip, reader):
    os.kill(reader, signal.SIGSTOP)  # so that it is killed while it has a clip
    threading.Timer(0.5, os.kill, (reader, signal.SIGKILL)).start()
    with pytest.raises(UnreadableClip, match="its decoder crashed"):
        isolation.read_frames(clip, 2)
    assert len(isolation.read_frames(clip, 2).images) == 2


@pytest.mark.skipif(os.name != "posix", reason="halts a process by a signal")
def test_a_decoder_that_is_stopped_from_another_thread(clip, reader):
    os.kill(reader, signal.SIGSTOP)  # so that it is stopped while it has a clip
    threading.Timer(0.5, isolation.stop_reading).start()
    with pytest.raises(UnreadableClip, match="its decoder (was stopped|crashed)"):
        isolation.read_frames(clip, 2)
    assert len(isolation.read_frames(clip, 2).images) == 2


def test_what_a_process_started_ends_with_it(worker):
    started = worker.call(60, start_sleeper)
    with pytest.raises(TimeoutError):
        worker.call(0.2, time.sleep, 60)
    assert is_gone(started)


def start_sleeper() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


@pytest.mark.skipif(os.name != "posix", reason="memory is bounded on POSIX alone")
def test_memory_is_bounded(worker):
    process_id = worker.call(60, os.getpid)
    with pytest.raises(MemoryError):
        worker.call(60, bytes, isolation.MEMORY)
    assert worker.call(60, os.getpid) == process_id


def test_calls_of_several_threads_wait_in_turn(clip):
    read = []
    threads = [threading.Thread(target=lambda: read.append(isolation.read_frames(clip, 2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(frames.images) for frames in read] == [2, 2, 2]


SCRIPT = """
import os, sys, time
from kaggle_utils.media import isolation
print("started", os.getpid(), flush=True)
print(isolation._reader(os.getpid()).call(60, os.getpid), len(isolation.read_frames(sys.argv[1], 2).images), flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_script_needs_no_main_guard(clip, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", clip, "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()].count("started") == 1


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
def test_no_process_is_left_when_this_one_is_killed(clip, tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, clip, "60"], stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    reader = int(parent.stdout.readline().split()[0])
    parent.kill()
    parent.wait()
    assert is_gone(reader)
