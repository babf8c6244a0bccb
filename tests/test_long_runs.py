"""Runs that are killed, interrupted, short of time or of disk: no row is lost or scored twice, and one line
says why.

``make test-kills`` kills a hundred runs; ``make test`` some.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from helpers import CAN_BE_NOBODY, as_nobody
from stubs import one_by_one

from kaggle_utils.check import problems_of
from kaggle_utils.submission import FRAME_LADDER, score_clips

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("DEEPFAKE_KILLS", "20"))
CLIPS = 150


def unscored(name, reason):
    return {"probability": 0.5, "warnings": [reason]}


def probability_of(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def table_of(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"filename": [f"{number:04}.mp4" for number in range(count)], "path": None, "label": None}
    )


def score_slowly(folder: Path) -> None:
    """A run that notes each clip in ``calls`` before it scores it."""

    def predict(name, path, frames):
        with open(folder / "calls", "a") as calls:
            calls.write(f"{name}\n")
        time.sleep(0.002)
        return {"probability": probability_of(name), "warnings": []}

    score_clips(table_of(CLIPS), one_by_one(predict), folder / "out.csv", unscored, "stub", progress=False)


def finished_of(output: Path) -> list[str]:
    """Clips whose whole line is in the journal of a submission."""
    journal = output.with_name(output.name + ".journal")
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return [json.loads(line)["filename"] for line in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="starts its runs from a fork server, to be quick")
def test_killed_at_any_moment_nothing_is_lost_or_repeated(tmp_path):
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["kaggle_utils.submission"])
    names = table_of(CLIPS)["filename"]
    expected = "".join(["filename,label\n", *(f"{name},{probability_of(name):.5f}\n" for name in names)])
    kills, folder = 0, None
    while kills < KILLS:
        if folder is None:
            folder = tmp_path / f"run after {kills} kills"
            folder.mkdir()
        before, called = set(finished_of(folder / "out.csv")), lines_of(folder / "calls")
        run = context.Process(target=score_slowly, args=(folder,))
        run.start()
        run.join(moments.uniform(0, 0.3))
        run.kill()
        run.join()
        kills += run.exitcode == -signal.SIGKILL
        assert before <= set(finished_of(folder / "out.csv"))
        assert not before & set(lines_of(folder / "calls")[len(called) :])
        assert not (folder / "out.csv").exists() or problems_of(folder / "out.csv", names) == []
        if run.exitcode == 0 or kills == KILLS:
            score_slowly(folder)
            assert (folder / "out.csv").read_text() == expected and set(
                finished_of(folder / "out.csv")
            ) == set(names)
            folder = None


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_clip_whose_scoring_fails_keeps_the_prior_says_why_and_is_tried_again(tmp_path, capsys):
    def fails(name, path, frames):
        if name == "0001.mp4":
            raise RuntimeError("no memory on the device")
        return {"probability": 0.9, "warnings": []}

    table = score_clips(table_of(3), one_by_one(fails), tmp_path / "out.csv", unscored, "stub", progress=False)
    assert table["label"].tolist() == [0.9, 0.5, 0.9]
    assert table["warnings"][1] == ["RuntimeError: no memory on the device"]
    assert "0001.mp4 keeps the prior: RuntimeError: no memory on the device" in capsys.readouterr().out
    called = []

    def works(name, path, frames):
        called.append(name)
        return {"probability": 0.1, "warnings": []}

    table = score_clips(table_of(3), one_by_one(works), tmp_path / "out.csv", unscored, "stub", progress=False)
    assert called == ["0001.mp4"] and table["label"].tolist() == [0.9, 0.1, 0.9]


def test_a_failure_on_every_clip_is_not_the_clips_fault(tmp_path):
    def fails(name, path, frames):
        raise RuntimeError("no driver")

    with pytest.raises(RuntimeError, match="no driver"):
        score_clips(table_of(5), one_by_one(fails), tmp_path / "out.csv", unscored, "stub", progress=False)
    assert problems_of(tmp_path / "out.csv", table_of(5)["filename"]) == []


def test_a_budget_of_seconds_is_kept_by_fewer_frames_and_then_the_prior(tmp_path):
    read, seconds = [], 3.0

    def predict(name, path, frames):
        read.append(frames)
        time.sleep(0.01 * frames)
        return {"probability": 0.9, "warnings": []}

    started = time.monotonic()
    table = score_clips(
        table_of(300), one_by_one(predict), tmp_path / "out.csv", unscored, "stub", seconds / 3600, progress=False
    )
    assert time.monotonic() - started < seconds + 0.5
    assert list(dict.fromkeys(read)) == list(FRAME_LADDER)
    assert (table["label"] == [0.9] * len(read) + [0.5] * (300 - len(read))).all()
    assert problems_of(tmp_path / "out.csv", table["filename"]) == []


# --- the command line, with a detector that needs no TensorFlow ---------------------------------------------
COMMAND = """
import resource, signal, sys, time, types
from kaggle_utils import __main__, submission
from kaggle_utils.datasets import dfdc

signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell lets what it starts in the background ignore Ctrl-C

limit, seconds = int(sys.argv[1]), float(sys.argv[2])

class Detector:
    @classmethod
    def load(cls, folder, prior):
        return cls()

    def predict_folder(self, folder, output, hours, **_):
        def run(asks):
            for ask in asks:
                time.sleep(seconds)
                yield ask, unscored(ask.filename, "x" * 500)
        def unscored(name, reason):
            return {"probability": 0.25, "face": None, "voice": None, "warnings": [reason]}
        return submission.score_clips(dfdc.clips_to_score(folder), run, output, unscored, "stub", hours, False)

sys.modules["kaggle_utils.detector"] = types.SimpleNamespace(Detector=Detector)
__main__.draw = lambda table, output: {}
if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(__main__.main(["predict", *sys.argv[3:]]))
"""


@pytest.fixture
def predict(tmp_path):
    """Start ``predict`` on ten clips in a process of its own; files may grow to ``limit`` bytes, a clip takes
    ``seconds``.
    """
    (tmp_path / "clips").mkdir()
    for number in range(10):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes(b"clip")

    def start(output: Path, limit: int = 0, seconds: float = 0.0) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            COMMAND,
            str(limit),
            str(seconds),
            str(tmp_path / "clips"),
            "-o",
            str(output),
        ]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


@needs_posix
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(predict, tmp_path):
    full = predict(tmp_path / "full.csv", limit=4000)
    errors = full.communicate()[1].splitlines()
    assert full.returncode == 1 and errors == [f"error: {tmp_path / 'full.csv.journal'}: File too large"]
    assert problems_of(tmp_path / "full.csv") == [] and 0 < len(finished_of(tmp_path / "full.csv")) < 10
    again, whole = predict(tmp_path / "full.csv"), predict(tmp_path / "whole.csv")
    assert again.communicate()[1] == whole.communicate()[1] == "" and again.returncode == 0
    assert (tmp_path / "full.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(finished_of(tmp_path / "full.csv")) == 10


@needs_posix
def test_a_disk_that_is_full_from_the_start_is_one_line(predict, tmp_path):
    run = predict(tmp_path / "out.csv", limit=10)
    assert run.communicate()[1] == f"error: {tmp_path / 'out.csv.journal'}: File too large\n"
    assert run.returncode == 1 and not list(tmp_path.glob("*.deepfake-*"))


def test_a_folder_that_cannot_be_written_is_one_line(predict, tmp_path):
    (tmp_path / "file").write_text("no folder")
    run = predict(tmp_path / "file" / "out.csv")
    assert run.communicate()[1] == f"error: {tmp_path / 'file'}: File exists\n"
    assert run.returncode == 1


@pytest.mark.skipif(not CAN_BE_NOBODY, reason="root may write anywhere; setpriv, to be someone else, is missing")
def test_a_read_only_folder_is_one_line(predict, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    output = tmp_path / "closed" / "out.csv"
    run = as_nobody(tmp_path, COMMAND, 0, 0.0, tmp_path / "clips", "-o", output)
    assert run.communicate()[1] == f"error: {output}: Permission denied\n" and run.returncode == 1


@needs_posix
def test_in_turkish_every_clip_is_found_and_numbers_have_points(tmp_path):
    """In Turkish, i is not the small letter of I, and a comma stands before decimals."""
    names = ["I.MP4", "i.mp4", "\u0131.avi", "\u0130.AVI", "TITLE.MKV"]
    (tmp_path / "clips").mkdir()
    for name in names:
        (tmp_path / "clips" / name).write_bytes(b"clip")
    if shutil.which("localedef"):
        subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", tmp_path / "tr_TR.UTF-8"], capture_output=True)
    turkish = "import locale, sys\ntry: locale.setlocale(locale.LC_ALL, '')\nexcept locale.Error: sys.exit(77)\n"
    command = [sys.executable, "-c", turkish + COMMAND, "0", "0", tmp_path / "clips", "-o", tmp_path / "out.csv"]
    variables = os.environ | {"LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr", "LOCPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, encoding="utf-8")
    if run.returncode == 77:
        pytest.skip("needs the locale tr_TR.UTF-8, or localedef and its sources to make it")
    assert run.stderr == "" and run.returncode == 0
    rows = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert sorted(rows[1:]) == sorted(f"{name},0.25000" for name in names)


@needs_posix
def test_ctrl_c_is_one_line_and_the_run_goes_on_after_it(predict, tmp_path):
    run = predict(tmp_path / "out.csv", seconds=0.3)
    while not finished_of(tmp_path / "out.csv"):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    errors = run.communicate()[1]
    assert run.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("stopped; run predict or extract again")
    kept = finished_of(tmp_path / "out.csv")
    assert 0 < len(kept) < 10 and problems_of(tmp_path / "out.csv") == []
    assert predict(tmp_path / "out.csv").wait() == 0
    assert (
        finished_of(tmp_path / "out.csv")[: len(kept)] == kept
        and len(set(finished_of(tmp_path / "out.csv"))) == 10
    )
