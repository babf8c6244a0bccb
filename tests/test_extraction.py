"""Caches of crops and voice: whole or not there, resumed, and the same bytes whoever makes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kaggle_utils import extraction, extracts
from kaggle_utils.__main__ import main
from kaggle_utils.face import detection

CLIPS = 6


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    """Some clips of the miniature, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for path in sorted((miniature / "train_sample_videos").glob("*.mp4"))[: CLIPS - 1]:
        shutil.copy(path, folder)
    (folder / "zzz.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def serial(folder, tmp_path_factory):
    """The folder's cache, made clip after clip in one process."""
    cache = tmp_path_factory.mktemp("serial")
    assert extracts.extract_folder(folder, cache, progress=False)["made"].tolist() == [True] * CLIPS
    return cache


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("*.npz")}


def test_a_cached_clip_is_what_was_extracted(folder, serial):
    path = sorted(folder.glob("*.mp4"))[0]
    fresh, cached = (
        extraction.extract(path, detection.FaceFinder()),
        extracts.load_extract(serial / f"{path.name}.npz"),
    )
    assert len(fresh.people) == len(cached.people) >= 1
    for one, other in zip(fresh.people, cached.people, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert (one.sources, one.track) == (other.sources, other.track)
        np.testing.assert_array_equal(one.frame_indices, other.frame_indices)
    np.testing.assert_array_equal(fresh.times_s, cached.times_s)
    np.testing.assert_array_equal(fresh.samples, cached.samples)
    assert (fresh.sample_rate, fresh.warnings) == (cached.sample_rate, cached.warnings)


def test_what_cannot_be_read_is_cached_with_its_warnings(serial):
    cached = extracts.load_extract(serial / "zzz.mp4.npz")
    assert cached.people == [] and cached.samples is None and not len(cached.times_s)
    assert len(cached.warnings) == 2 and all("zzz.mp4" in warning for warning in cached.warnings)


def test_a_second_run_makes_only_what_is_missing_or_changed(folder, serial, tmp_path):
    copy, cache = shutil.copytree(folder, tmp_path / "clips"), shutil.copytree(serial, tmp_path / "cache")
    first, second, *_ = sorted(cache.glob("*.npz"))
    first.unlink()
    shutil.copy(copy / first.stem, copy / second.stem)
    table = extracts.extract_folder(copy, cache, progress=False).set_index("filename")
    assert table["made"].sum() == 2 and table.loc[[first.stem, second.stem], "made"].all()
    assert table["failed"].isna().all()
    assert first.read_bytes() == (serial / first.name).read_bytes()
    assert not extracts.extract_folder(copy, cache, progress=False)["made"].any()
    for path in copy.glob("*.mp4"):
        path.touch()  # a copy of a data set has other time stamps
    assert not extracts.extract_folder(copy, cache, progress=False)["made"].any()


def test_a_cache_made_with_something_else_is_refused_in_one_line(folder, serial, tmp_path, capsys):
    cache = shutil.copytree(serial, tmp_path / "cache")
    assert main(["extract", str(folder), "--cache", str(cache), "--frames", "3"]) == 1
    expected = f"error: {cache}: extracts made with frames 10; expected frames 3: use another folder\n"
    assert capsys.readouterr().err == expected
    record = json.loads((cache / extracts.RECORD).read_text())
    (cache / extracts.RECORD).write_text(json.dumps(record | {"opencv": "1.0"}))
    with pytest.raises(ValueError, match="extracts made with opencv 1.0; expected opencv"):
        extracts.Cache(cache)
    (cache / extracts.RECORD).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        extracts.Cache(cache)


def test_a_mix_of_channels_is_kept_exactly(tmp_path):
    samples = (np.arange(-5, 5, dtype=np.float32) + 0.5) / 32768
    extract = extraction.Extract([], np.zeros(0), samples, 16000, [], asked=6)
    extracts.save_extract(tmp_path / "x.npz", extract)
    cached = extracts.load_extract(tmp_path / "x.npz")
    np.testing.assert_array_equal(cached.samples, samples)
    assert cached.samples.dtype == np.float32 and cached.asked == 6


def test_a_run_that_is_killed_leaves_whole_files_only(folder, serial, tmp_path):
    command = [sys.executable, "-m", "kaggle_utils", "extract", str(folder), "--cache", str(tmp_path)]
    run = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("*.npz")):
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    table = extracts.extract_folder(folder, tmp_path, progress=False)
    assert table["made"].sum() == CLIPS - len(kept)
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert contents(tmp_path) == contents(serial)


@pytest.mark.skipif("DEEPFAKE_LONG" not in os.environ, reason="make test-cluster runs it")
def test_processes_give_the_same_bytes(folder, serial, tmp_path, capsys):
    assert main(["extract", str(folder), "--cache", str(tmp_path), "--jobs", "2"]) == 0
    assert contents(tmp_path) == contents(serial)
    assert f"{CLIPS} clips, {CLIPS} newly extracted" in capsys.readouterr().out


def test_a_cluster_gives_the_same_bytes_and_survives_a_killed_worker(folder, serial, tmp_path):
    """A real dask scheduler on loopback and two worker processes, one of which is killed after the first
    clip.
    """
    distributed = pytest.importorskip(
        "distributed", reason="needs dask's distributed: pip install distributed"
    )
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        with distributed.Client(cluster) as client:
            victim = sorted(client.run(os.getpid).values())[0]

        def kill():
            while not list(tmp_path.glob("*.npz")):
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        address = cluster.scheduler_address
        assert address.startswith("tcp://127.0.0.1")
        extracts.extract_folder(folder, tmp_path, backend="dask", scheduler=address, progress=False)
        killer.join(timeout=10)
        with distributed.Client(cluster) as client:
            assert victim not in client.run(os.getpid).values()
    assert contents(tmp_path) == contents(serial)


@pytest.mark.skipif("DEEPFAKE_LONG" not in os.environ, reason="make test-cluster runs it")
def test_ray_gives_the_same_bytes(folder, serial, tmp_path):
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    assert extracts.extract_folder(folder, tmp_path, backend="ray", progress=False)["made"].all()
    assert contents(tmp_path) == contents(serial)


def test_an_unknown_backend_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="expected one of loky, dask, ray, found 'spark'"):
        extracts.extract_folder(folder, tmp_path, backend="spark")
