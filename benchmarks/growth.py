"""Does the cost grow with the clips alone? Clips of 5 to 40 s and folders of 10 to 200 clips: ``python
benchmarks/growth.py``.

Each point is a process of its own, which scores its clips with ``Detector.predict_folder`` after one clip to
warm up. The clips are made from a real one (DEEPFAKE_DATA), else from one of the miniature, without encoding
it anew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from imageio_ffmpeg import get_ffmpeg_exe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.run import find_clips, peak_mib
from kaggle_utils.kaggle import paths

FOLDER_LENGTH_S, REPEATS = 2, 4  # seconds of each clip of a folder; clips of each length


def cut(source: Path, target: Path, seconds: int) -> None:
    """Write the first seconds of a clip, which repeats itself as often as needed."""
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-nostdin",
        "-stream_loop",
        "-1",
        "-i",
        str(source),
        "-t",
        str(seconds),
        "-c",
        "copy",
        str(target),
    ]
    subprocess.run(command, check=True)


def score(folder: Path) -> dict:
    """Seconds and peak memory of scoring a folder, measured in this process."""
    from kaggle_utils import Detector

    detector = Detector.load()
    detector.predict(next(folder.glob("*.mp4")))
    with tempfile.TemporaryDirectory() as results:
        began = time.monotonic()
        detector.predict_folder(folder, Path(results) / "submission.csv", progress=False)
        seconds = time.monotonic() - began
    return {"seconds": seconds, "MiB": peak_mib(os.getpid())}


def measure(source: Path, seconds: int, count: int) -> dict:
    """The same of ``count`` clips of some length, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "0.mp4"
        cut(source, first, seconds)
        for number in range(1, count):
            os.link(first, Path(folder) / f"{number}.mp4")
        command = [sys.executable, __file__, "--score", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"clip in s": seconds, "clips": count, **json.loads(done.stdout.splitlines()[-1])}


def draw(lengths: pd.DataFrame, folders: pd.DataFrame, path: Path) -> None:
    """Time and memory over the length of a clip and over the number of clips, both from zero."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    panels = [
        (
            axes[0],
            lengths["clip in s"],
            lengths["seconds"] / lengths["clips"],
            lengths["MiB"],
            "One clip",
            "length of the clip in s",
        ),
        (
            axes[1],
            folders["clips"],
            folders["seconds"],
            folders["MiB"],
            f"A folder of clips of {FOLDER_LENGTH_S} s",
            "clips",
        ),
    ]
    for left, across, seconds, memory, title, label in panels:
        right = left.twinx()
        right.plot(across, memory, "s--", color="tab:grey")
        right.set(ylim=(0, 2600), ylabel="peak memory in MiB (squares)")
        left.plot(across, seconds, "o-")
        left.set(title=title, xlabel=label, ylabel="seconds to score (dots)", xlim=(0, None), ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[5, 10, 20, 40], metavar="S", help="of single clips"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[10, 50, 200], metavar="N", help="clips in a folder"
    )
    parser.add_argument("--chart", type=Path, default=paths.project_root() / "docs" / "growth.png")
    options = parser.parse_args()
    if options.score:
        print(json.dumps(score(options.score)))
        return
    source = find_clips()[0][0]
    lengths = pd.DataFrame([measure(source, seconds, REPEATS) for seconds in options.lengths])
    folders = pd.DataFrame([measure(source, FOLDER_LENGTH_S, count) for count in options.counts])
    print(pd.concat([lengths, folders]).round(1).to_string(index=False))
    draw(lengths, folders, options.chart)


if __name__ == "__main__":
    main()
