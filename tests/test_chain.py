"""The same submission by every way: from clips or a cache, in one process, in two, or on a cluster."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from kaggle_utils import Detector, extracts
from kaggle_utils.__main__ import main
from kaggle_utils.submission import TimeGuard, score_clips

CLIPS = 3


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    """Some clips of the miniature, a file that is none, and one cut short."""
    folder = tmp_path_factory.mktemp("clips")
    clips = sorted((miniature / "train_sample_videos").glob("*.mp4"))[: CLIPS - 1]
    for path in clips:
        shutil.copy(path, folder)
    (folder / "zzz.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def direct(detector, folder, tmp_path_factory):
    """The submission of one process without a cache, and the rows behind it."""
    output = tmp_path_factory.mktemp("direct") / "submission.csv"
    table = detector.predict_folder(folder, output, progress=False)
    return output.read_bytes(), table.drop(columns="seconds").to_dict("records")


@pytest.fixture(scope="module")
def cache(detector, folder, direct, tmp_path_factory):
    """A cache that a scored folder has filled; that run's submission is the same, too."""
    cache, output = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("filling") / "submission.csv"
    detector.predict_folder(folder, output, progress=False, cache=cache)
    assert output.read_bytes() == direct[0]
    assert len(list(cache.glob("*.npz"))) == CLIPS and (cache / extracts.RECORD).is_file()
    return cache


def no_decoding(*_, **__):
    raise AssertionError("a clip was decoded")


def test_a_cached_run_decodes_nothing_and_answers_the_same(detector, folder, cache, direct, tmp_path, monkeypatch):
    monkeypatch.setattr(extracts, "extract", no_decoding)
    table = detector.predict_folder(folder, tmp_path / "out.csv", progress=False, cache=cache)
    assert (tmp_path / "out.csv").read_bytes() == direct[0]
    assert repr(table.drop(columns="seconds").to_dict("records")) == repr(direct[1])


def test_other_weights_cost_only_the_networks(detector, folder, cache, direct, tmp_path, monkeypatch):
    other = Detector(detector.face, detector.voice, detector.fuse, detector.calibration, flip=True,
                     digests={"face.keras": "other"})
    fresh = other.predict_folder(folder, tmp_path / "fresh.csv", progress=False)
    monkeypatch.setattr(extracts, "extract", no_decoding)
    other.predict_folder(folder, tmp_path / "out.csv", progress=False, cache=cache)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "fresh.csv").read_bytes() != direct[0]
    assert fresh["face"].notna().any()


def test_a_cache_that_cannot_be_written_is_only_read(detector, folder, cache, direct, tmp_path, monkeypatch):
    part = shutil.copytree(cache, tmp_path / "part")
    next(part.glob("*.npz")).unlink()
    kept, access = sorted(part.iterdir()), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != part and access(path, mode))
    detector.predict_folder(folder, tmp_path / "out.csv", progress=False, cache=part)
    assert (tmp_path / "out.csv").read_bytes() == direct[0] and sorted(part.iterdir()) == kept


def test_two_processes_go_on_where_one_stopped_and_write_tables(folder, cache, direct, detector, tmp_path, capsys):
    detector.predict_folder(folder, tmp_path / "out.csv", progress=False, cache=cache)
    journal = tmp_path / "out.csv.journal"
    first, second, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second + rest[0][:20])
    command = ["predict", str(folder), "--jobs", "2", "-o", str(tmp_path / "out.csv")]
    assert main([*command, "--table", str(tmp_path / "scores.parquet")]) == 0
    assert (tmp_path / "out.csv").read_bytes() == direct[0]
    assert f"tables: {tmp_path / 'scores.parquet'}, " in capsys.readouterr().out
    clips = pd.read_parquet(tmp_path / "scores.parquet")
    crops = pd.read_parquet(tmp_path / "scores.crops.parquet")
    rows = pd.DataFrame(direct[1])
    assert clips["filename"].tolist() == rows["filename"].tolist()
    assert clips["probability"].tolist() == pytest.approx(rows["probability"].tolist(), abs=1e-6)
    assert (clips["weights"] == detector.fingerprint).all() and (clips["seconds"] > 0).all()
    assert clips["people"].tolist() == [len(tracks) for tracks in rows["tracks"]]
    assert clips["frames_read"].tolist() == [10] * CLIPS
    assert [list(row) for row in clips["warnings"]] == rows["warnings"].tolist()
    assert len(crops) == sum(map(len, rows["frames"])) and set(crops["filename"]) <= set(clips["filename"])
    assert crops.groupby("filename").size().to_dict() == {
        row["filename"]: len(row["frames"]) for row in direct[1] if row["frames"]
    }
    assert journal.read_bytes().startswith(first + second) and len(journal.read_bytes().splitlines()) == CLIPS + 1
    assert len(list((tmp_path / "out.csv.faces").iterdir())) == CLIPS - 1


def test_a_cluster_one_of_whose_workers_is_killed(detector, folder, direct, tmp_path):
    """A real dask scheduler on loopback and two workers; one is killed after the first clip."""
    distributed = pytest.importorskip("distributed", reason="needs dask's distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        with distributed.Client(cluster) as client:
            victim = sorted(client.run(os.getpid).values())[0]
        journal = tmp_path / "out.csv.journal"

        def kill():
            while not journal.is_file() or len(journal.read_bytes().splitlines()) < 2:
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        detector.predict_folder(folder, tmp_path / "out.csv", progress=False, backend="dask",
                                scheduler=cluster.scheduler_address)
        killer.join(timeout=10)
        with distributed.Client(cluster) as client:
            assert victim not in client.run(os.getpid).values()
    assert (tmp_path / "out.csv").read_bytes() == direct[0]


@pytest.mark.skipif("DEEPFAKE_LONG" not in os.environ, reason="make test-cluster runs it")
def test_ray_answers_the_same(detector, folder, direct, tmp_path):
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    detector.predict_folder(folder, tmp_path / "out.csv", progress=False, backend="ray")
    assert (tmp_path / "out.csv").read_bytes() == direct[0]


# --- the time guard and the cache ---------------------------------------------------------------------------
def test_cached_clips_come_first_and_leave_the_time_to_the_others(tmp_path):
    """Half of the clips are cached: without counting that, the guard would read fewer frames of the others."""
    clips = pd.DataFrame({"filename": [f"{n:02}.mp4" for n in range(40)], "path": None, "label": None})
    order = []

    def run(asks):
        for ask in asks:
            order.append(ask)
            time.sleep(0.001 if int(ask.filename[:2]) % 2 else 0.05)
            yield ask, {"probability": 0.5, "warnings": []}

    def cached(name, _):
        return int(name[:2]) % 2 == 1

    score_clips(clips, run, tmp_path / "out.csv", lambda *_: {"probability": 0.1, "warnings": []}, "x",
                20 / 3600, False, cached)
    assert [ask.filename for ask in order[:20]] == [f"{n:02}.mp4" for n in range(1, 40, 2)]
    assert all(ask.frames == 10 for ask in order) and len(order) == 40
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "00.mp4,0.50000"


def test_the_guard_counts_only_clips_without_an_extract():
    now = [0.0]
    guard = TimeGuard(100 / 3600 / 0.95, clips_left=8, clock=lambda: now[0])
    for _ in range(100):
        now[0] += 0.1
        guard.finished(0.1, cached=True)
    assert guard.left == 8 and not guard.seconds
    for _ in range(8):
        assert not guard.exhausted and guard.frames == 10
        now[0] += 10
        guard.finished(10.0)


def test_clips_in_flight_need_time_too():
    now = [0.0]
    guard = TimeGuard(100 / 3600 / 0.95, clips_left=50, clock=lambda: now[0])
    for _ in range(3):
        guard.finished(10.0)
    now[0] = 85.0
    assert not guard.exhausted
    guard.begun = 2
    assert guard.exhausted


# --- what is refused ----------------------------------------------------------------------------------------
def test_what_does_not_fit_together_is_one_line(detector, folder, tmp_path, capsys):
    clip = str(sorted(folder.glob("*.mp4"))[0])
    assert main(["predict", clip, "--jobs", "2"]) == 1
    assert "are for a folder of clips" in capsys.readouterr().err
    assert main(["predict", str(folder), "--table", str(tmp_path / "scores.xlsx")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'scores.xlsx'}: expected a name that ends in .parquet\n"
    made_here = Detector(detector.face, detector.voice, detector.fuse, detector.calibration)
    with pytest.raises(ValueError, match="only networks that Detector.load loaded"):
        made_here.predict_folder(folder, tmp_path / "out.csv", jobs=2, progress=False)
