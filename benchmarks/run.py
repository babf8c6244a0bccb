"""The study's procedure, ours and peers on the same clips in one run: ``make benchmark``, which makes the
peers' environments.

All contestants are processes that stay; one at a time is given a clip, in turn, round after round, so that a
busy moment of the machine meets all alike. The first pass over all clips is not timed; it counts the faces.
DEEPFAKE_DATA names the real clips, else the miniature's serve.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaggle_utils.datasets import dfdc
from kaggle_utils.face import detection, framing
from kaggle_utils.kaggle import paths

HERE = Path(__file__).resolve().parent
REFERENCE, FULL, EXTRACTION, CHAIN = (
    "reference procedure",
    "MTCNN at full size",
    "ours, extraction",
    "ours, whole chain",
)
GRAB, DECODERS = "OpenCV grabs every frame", ("OpenCV to the last frame", "OpenCV seeks", "ffmpeg", "PyAV")
CONTESTANTS = {  # environment (None: the project's), script and arguments
    GRAB: (None, "decoding.py grab"),
    DECODERS[0]: (None, "decoding.py read"),
    DECODERS[1]: (None, "decoding.py seek"),
    DECODERS[2]: (None, "decoding.py ffmpeg"),
    DECODERS[3]: ("pyav", "decoding.py pyav"),
    EXTRACTION: (None, "project.py extraction"),
    CHAIN: (None, "project.py chain"),
    FULL: (None, "project.py full"),
    "facenet-pytorch": ("facenet", "facenet.py"),
    "facenet-pytorch, 640 px": ("facenet", "facenet.py 640"),
    "BlazeFace": ("blazeface", "blazeface.py"),
    REFERENCE: (None, "project.py reference"),
}
UNTIMED_FIRST = (FULL, EXTRACTION, CHAIN, "facenet-pytorch", "facenet-pytorch, 640 px", "BlazeFace")
OVERLAP = 0.5


@dataclass
class Contestant:
    """A process that answers paths; ``seconds`` and ``boxes`` by clip."""

    name: str
    process: subprocess.Popen
    errors: IO[str]
    seconds: list[dict] = field(default_factory=list)
    boxes: dict[str, list] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, environments: Path) -> "Contestant":
        environment, script = CONTESTANTS[name]
        python = environments / environment / "bin" / "python" if environment else sys.executable
        if not Path(python).exists():
            raise FileNotFoundError(
                f"{python}: expected the environment of {name!r}; make benchmark makes it"
            )
        command, errors = [str(python), *str(HERE / script).split()], tempfile.TemporaryFile("w+")  # noqa: SIM115
        return cls(
            name,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            ),
            errors,
        )

    def look(self, clip: Path) -> dict:
        """Let it work on a clip; returns its seconds, ``processor`` of them on all cores, its children
        included.
        """
        used = processor_s(self.process.pid)
        self.process.stdin.write(f"{clip}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(
                f"{self.name} ended at {clip} with code {self.process.wait()}:\n{self.errors.read()[-2000:]}"
            )
        answer = json.loads(line)
        self.boxes[clip.name] = answer["boxes"]
        return {"clip": clip.name, **answer["seconds"], "processor": processor_s(self.process.pid) - used}


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process and of its living children, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 + sum(map(peak_mib, _children(pid)))


def processor_s(pid: int) -> float:
    """Seconds that a process, its ended and its living children have had of all cores."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(map(processor_s, _children(pid)))


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def find_clips() -> tuple[list[Path], list[Path]]:
    """The clips whose faces are counted, and those among them that are timed: the DFDC ones, 10 s of 1080p.
    """
    folders = [paths.research_data(name) for name in ("dfdc_clips", "ffpp_clips")]
    if None in folders:
        clips = sorted((dfdc.data_folder() / "train_sample_videos").glob("*.mp4"))
        return clips, clips[:2]
    real = [sorted(folder.glob("*.mp4")) for folder in folders]
    return real[0] + real[1], real[0]


def people(boxes: list[list]) -> list[list[np.ndarray]]:
    """The boxes that belong to a tracked person: full-size MTCNN takes flowers and gloves for faces here and
    there.
    """
    found = [
        [detection.Detection(np.array(row[:4]), row[4], np.zeros((5, 2))) for row in frame] for frame in boxes
    ]
    tracks = framing.link_tracks(found)
    return [
        [track.detections[index].box for track in tracks if index in track.detections]
        for index in range(len(boxes))
    ]


def count_faces(boxes: dict[str, list], wanted: dict[str, list]) -> int:
    """How many wanted boxes overlap one of ``boxes`` of the same frame by half of their union or more."""
    return sum(
        any(overlap(box, other) >= OVERLAP for other in frame)
        for clip, frames in wanted.items()
        for frame, those in zip(boxes[clip], frames, strict=True)
        for box in those
    )


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes x, y, width, height."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(np.add(a[:2], a[2:4]), np.add(b[:2], b[2:4]))
    common = np.prod(np.maximum(high - low, 0))
    return float(common / (a[2] * a[3] + b[2] * b[3] - common))


def summarise(contestants: list[Contestant], counted: list[str]) -> pd.DataFrame:
    """One row for each contestant: median seconds of its parts, mean over clips; ratios; memory; faces."""
    rows = {one.name: pd.DataFrame(one.seconds).groupby("clip").median().mean() for one in contestants}
    table = pd.DataFrame(rows).T.rename_axis("contestant")
    for column, against in (("of reference", REFERENCE), ("of grab", GRAB)):
        if against in table.index:
            table[column] = table["total"] / table.loc[against, "total"]
    table["clips/h"] = 3600 / table["total"]
    table["MiB"] = {one.name: peak_mib(one.process.pid) for one in contestants}
    table["faces found"] = np.nan
    for truth in (one.boxes for one in contestants if one.name == FULL):
        every = {clip: [[row[:4] for row in frame] for frame in truth[clip]] for clip in counted}
        wanted = {clip: people(truth[clip]) for clip in counted}
        for one in contestants:
            if all(one.boxes.get(clip) for clip in counted):
                for column, those in (("faces found", wanted), ("of all boxes", every)):
                    table.loc[one.name, column] = count_faces(one.boxes, those) / count_faces(those, those)
    return table


def draw(table: pd.DataFrame, path: Path) -> None:
    """Bars of seconds a clip, split into parts, with the share of faces found."""
    shown = table.sort_values("total")
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.4))
    left = np.zeros(len(shown))
    parts = {
        "decode": "tab:blue",
        "detect": "tab:orange",
        "faces": "tab:orange",
        "voice": "tab:green",
        "networks": "tab:red",
    }
    for part, colour in parts.items():
        if part in shown:
            width = shown[part].fillna(0).to_numpy()
            axes.barh(shown.index, width, left=left, color=colour, label=None if part == "faces" else part)
            left = left + width
    axes.barh(shown.index, shown["total"] - left, left=left, color="tab:grey", label="not split")
    for place, (_, row) in enumerate(shown.iterrows()):
        found = "" if np.isnan(row["faces found"]) else f", {row['faces found']:.0%} of the faces"
        axes.text(row["total"], place, f" {row['total']:.2f} s{found}", va="center", fontsize=8)
    axes.set(
        title=f"Seconds a clip, {os.cpu_count()} cores",
        xlabel="seconds",
        xlim=(0, 1.35 * shown["total"].max()),
    )
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--environments", type=Path, default=paths.working_folder() / "benchmark", help="the peers'"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME"
    )
    parser.add_argument("--chart", type=Path, default=HERE.parent / "docs" / "speed.png")
    options = parser.parse_args()
    clips, timed = find_clips()
    contestants = [
        Contestant.start(name, options.environments) for name in CONTESTANTS if name in options.only
    ]
    for one in contestants:
        for clip in tqdm(clips if one.name in UNTIMED_FIRST else timed[:1], desc=one.name, unit="clip"):
            one.look(clip)
    for turn in tqdm(range(options.rounds), desc="rounds"):
        for clip in timed:
            for one in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
                one.seconds.append(one.look(clip))
    table = summarise(contestants, [clip.name for clip in clips])
    print(table.round(2).to_string())
    options.environments.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.environments / "table.csv")
    draw(table, options.chart)


if __name__ == "__main__":
    main()
