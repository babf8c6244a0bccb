"""What several tests share."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from imageio_ffmpeg import get_ffmpeg_exe

from kaggle_utils.datasets.drawing import blend_mask
from kaggle_utils.datasets.miniature import MARK
from kaggle_utils.kaggle.paths import research_data

MOST_MEMORY = 3 * 2**30  # bytes over all processes, whatever a stranger sends
TONE = ("-f", "lavfi", "-i", "anoisesrc=d=1:r=16000:a=0.3")


def clip_facts(folder: str | Path, filename: str) -> dict:
    """The entry of a clip in ``miniature.json``.

    Keys: ``label``, ``original``, ``fake_face`` (index of the altered face, or null), ``fake_voice``,
    ``sound``, ``turned``, ``width``, ``height``, ``fps``, and ``faces``: for each person, an ellipse per
    frame in the upright picture [centre x, centre y, half width, half height in pixels, degrees clockwise].
    """
    return json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))["clips"][filename]


def clip_mask(folder: Path, filename: str, frame_index: int) -> np.ndarray:
    """Where a frame of a miniature clip is altered: the blend mask, float32 (H, W) in 0..1; zeros when
    nowhere.
    """
    facts = clip_facts(folder, filename)
    if facts["fake_face"] is None:
        return np.zeros((facts["height"], facts["width"]), np.float32)
    return blend_mask(facts["height"], facts["width"], facts["faces"][facts["fake_face"]][frame_index])


def ffmpeg(*arguments: object, stdin: bytes = b"") -> None:
    """Run ffmpeg; raises where it fails."""
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True, input=stdin)


def sample_bomb(path: Path, promised: int = 40_000_000) -> None:
    """A sound file of few bytes whose sample-size table promises millions of samples."""
    ffmpeg(*TONE, path)
    content = bytearray(path.read_bytes())
    place = content.index(b"stsz")  # version and flags, the size of all samples, their number
    content[place + 8 : place + 16] = struct.pack(">II", 1, promised)
    place = content.index(b"stsc")
    content[place + 16 : place + 20] = struct.pack(">I", promised)  # all in one chunk
    place = content.index(b"stts")
    content[place + 12 : place + 16] = struct.pack(">I", promised)
    path.write_bytes(content)


def picture_bomb(path: Path) -> None:
    """Ten frames of 200 MB each, in few bytes."""
    h264 = ("-c:v", "libx264", "-preset", "ultrafast", "-threads", 2, "-pix_fmt", "yuv420p")
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=8192x8192:r=5:d=2", *h264, path)


def bombs_in(folder: Path) -> list[Path]:
    """Put two bombs into a folder and, where the research data is at hand, a wall of faces, the first, and another."""
    sample_bomb(folder / "sound.mp4")
    picture_bomb(folder / "picture.mp4")
    if odd := research_data("odd_clips"):
        for name in ("wall_of_faces.mp4", "bomb10_8192x8192.mp4"):
            shutil.copyfile(odd / name, folder / name)
    return sorted(folder.iterdir(), key=lambda path: path.name != "wall_of_faces.mp4")


def peak_of(process: subprocess.Popen, ended: Callable[[], bool] = lambda: False) -> int:
    """The most memory in bytes that a process and its descendants hold at one time, until it or something else ends.

    A child that has not yet started its program shares the memory of its parent: it is not counted.
    """
    most, watched = 0, psutil.Process(process.pid)
    while process.poll() is None and not ended():
        held = 0
        for one in [watched, *watched.children(recursive=True)]:
            with suppress(psutil.Error):
                if one == watched or one.cmdline() != psutil.Process(one.ppid()).cmdline():
                    held += one.memory_info().rss
        most = max(most, held)
        time.sleep(0.05)
    return most


def as_nobody(folder: Path, program: str, *arguments: object, **variables: str) -> subprocess.Popen:
    """Start a Python program as another user than root, who may read everything but write only to ``folder``.

    Where the tests do not run as root, it is started as their user.
    """
    become = []
    if os.geteuid() == 0:
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        become += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
    homes = {name: str(folder) for name in ("HOME", "TMPDIR", "MPLCONFIGDIR")}
    return subprocess.Popen(
        [*become, sys.executable, "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | homes | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CAN_BE_NOBODY = os.name == "posix" and (os.geteuid() != 0 or shutil.which("setpriv") is not None)
