"""Clips an hour of a folder by every way: ``python benchmarks/chain.py``.

From the clips, from a cache, with other weights, in two processes, on a cluster of two workers. Each way is a
process of its own, and all take turns, round after round. The first clips, at which networks load, do not
count. The clips are copies of real ones (DEEPFAKE_DATA), else of those of the miniature.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.run import find_clips, peak_mib
from kaggle_utils import results
from kaggle_utils.kaggle import paths

DIRECT, CACHED, WEIGHTS, TWO, CLUSTER = (
    "from the clips",
    "from a cache",
    "other weights, same cache",
    "two processes",
    "cluster of two workers",
)
WAYS = (DIRECT, CACHED, WEIGHTS, TWO, CLUSTER)
DFDC = 124_000  # clips
UNCOUNTED = 4  # clips at the start of a run


def other_weights(folder: Path) -> Path:
    """The shipped weights with another calibration, so that journals and fingerprints differ."""
    shutil.copytree(paths.models_folder(), folder, ignore=shutil.ignore_patterns("SHA256SUMS", "reference"))
    settings = json.loads((folder / "detector.json").read_text())
    settings["calibration"]["clip"][1] += 0.1
    (folder / "detector.json").write_text(json.dumps(settings))
    return folder


def score(way: str, clips: Path, cache: Path) -> dict:
    """Score the folder in this process: clips an hour after the first ones, peak memory with all workers."""
    from kaggle_utils import Detector

    with tempfile.TemporaryDirectory() as results:
        output, seen = Path(results) / "submission.csv", []
        detector = Detector.load(other_weights(Path(results) / "models") if way == WEIGHTS else None)
        options: dict = {CACHED: {"cache": cache}, WEIGHTS: {"cache": cache}, TWO: {"jobs": 2}}.get(way, {})
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                journal = output.with_name("submission.csv.journal")
                lines = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
                seen.extend((time.monotonic(), peak_mib_of_all()) for _ in range(lines - len(seen)))

        threading.Thread(target=watch, daemon=True).start()
        if way == CLUSTER:
            from distributed import LocalCluster

            with LocalCluster(
                n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
            ) as cluster:
                detector.predict_folder(
                    clips, output, progress=False, backend="dask", scheduler=cluster.scheduler_address
                )
        else:
            detector.predict_folder(clips, output, progress=False, **options)
        time.sleep(0.1)
        done.set()
        labels = output.read_text()
    counted = seen[UNCOUNTED - 1 :]
    hours = (counted[-1][0] - counted[0][0]) / 3600
    return {"clips/h": (len(counted) - 1) / hours, "MiB at half": seen[len(seen) // 2][1],
            "MiB at the end": max(memory for _, memory in seen[-3:]), "labels": labels}


def peak_mib_of_all() -> float:
    """Peak memory of this process and its children; 0 while one of them ends."""
    try:
        return peak_mib(os.getpid())
    except (OSError, IndexError, ValueError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--score", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--clips", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=24, help="clips in the folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.score:
        print(json.dumps(score(options.score, options.clips, options.cache)))
        return
    with tempfile.TemporaryDirectory() as work:
        clips, cache = Path(work) / "clips", Path(work) / "cache"
        clips.mkdir()
        sources = find_clips()[1]
        for number in range(options.count):
            shutil.copy(sources[number % len(sources)], clips / f"{number:03}.mp4")
        subprocess.run([sys.executable, "-m", "kaggle_utils", "extract", str(clips), "--cache", str(cache)],
                       check=True, cwd=paths.project_root())
        rows = []
        for turn in range(options.rounds):
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                command = [sys.executable, __file__, "--score", way, "--clips", clips, "--cache", cache]
                found = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"way": way, **json.loads(found.stdout.splitlines()[-1])})
                print(f"round {turn + 1}, {way}: {rows[-1]['clips/h']:.0f} clips an hour", flush=True)
    table = pd.DataFrame(rows)
    same = table[table["way"] != WEIGHTS]["labels"].nunique() == 1
    table = table.drop(columns="labels").groupby("way", sort=False).median().loc[list(WAYS)]
    table.insert(1, "times direct", table["clips/h"] / table.loc[DIRECT, "clips/h"])
    print(table.round(2).to_string())
    print("the same labels by every way" if same else "LABELS DIFFER")
    about = {"data": f"{len(sources)} clips, copied to {options.count}", "split": f"{os.cpu_count()} cores",
             "command": "python benchmarks/chain.py"}
    results.save_results(
        results.result(f"chain/{name}/{way}", value, **about)
        for way, row in table.iterrows()
        for name, value in (("times direct", row["times direct"]), ("hours for DFDC", DFDC / row["clips/h"]))
    )


if __name__ == "__main__":
    main()
