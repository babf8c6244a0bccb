"""Inspect a file without decoding it: container, times of frames and sound packets, display matrix.

Clips are untrusted. Only regular files in the containers of ``CONTAINERS`` are opened, and FFmpeg may not
follow a playlist or a concat script to other files or to the network, whatever the file's name.
"""

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import children

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"  # names of FFmpeg's demuxers
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
LIMIT_S, LIMIT_S_PER_MB = 60.0, 2.0  # to decode a clip; 1080p takes about 0.5 s per MB on one core
LIMIT_S_PER_GIGAPIXEL, LONGEST_LIMIT_S = 20.0, 3600.0  # 40 minutes of 1080p are 150 gigapixels in few bytes
MOST_BOXES, MOST_LISTED = 10_000, 64_000_000  # boxes, bytes of packet list: a forged file may have more


class UnreadableClip(Exception):
    """A file without a readable frame (or sound): ``path``, and ``reason`` as text."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # both, to be picklable between processes
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Survey:
    """The properties of a clip that ffmpeg finds without decoding it.

    ``stamps_s`` float64 (frames,) and ``sound_s`` float64 (packets,): start times of frames and sound
    packets, sorted; ``duration_s``: from the header, 0 if unknown; ``pixels``: of a frame; ``through_copy``:
    OpenCV shows such a clip wrongly (interlaced, or rotated in a container other than MP4).
    """

    stamps_s: np.ndarray
    sound_s: np.ndarray
    duration_s: float
    pixels: int
    through_copy: bool

    @property
    def sound_start_s(self) -> float:
        """Delay of the sound after the first frame; 0 if it starts with the frame or earlier."""
        both = len(self.stamps_s) and len(self.sound_s)
        return max(0.0, float(self.sound_s.min() - self.stamps_s[0])) if both else 0.0


def survey(path: str | Path) -> Survey:
    """List the frames and sound packets of a clip without decoding them.

    Raises:
        UnreadableClip: as :func:`check_file`, or ffmpeg crashes or hangs.
    """
    path = Path(path)
    check_file(path)
    packets, listed = run_ffmpeg(path, "-map", "0:v:0?", "-map", "0:a:0?", "-c", "copy", "-fs", MOST_LISTED,
                                 "-f", "framecrc", "-", kept="both")
    kinds = dict(re.findall(rb"#media_type (\d): (\w+)", packets))
    bases = {stream: int(over) / int(under) for stream, over, under
             in re.findall(rb"#tb (\d): (\d+)/(\d+)", packets)}
    times: dict[bytes, list[float]] = {b"video": [], b"audio": []}
    stamp = rb"^(\d), +(-?\d+|NOPTS), +(-?\d+|NOPTS),"
    for line in re.finditer(stamp, packets, re.MULTILINE):  # one by one: there may be a million
        stream, decoded, shown = line.groups()
        if (known := decoded if shown == b"NOPTS" else shown) != b"NOPTS":
            times[kinds[stream]].append(int(known) * bases[stream])
    picture = re.search(rb"^ +Stream #.*: Video: (.*)", listed, re.MULTILINE)
    described = picture[1] if picture else b""
    size = re.search(rb", (\d+)x(\d+)", described)
    length = re.search(rb"Duration: (\d+):(\d+):([\d.]+)", listed)
    fields = re.match(rb"dvvideo|.*(top|bottom) (coded )?first", described) is not None
    turned = re.search(rb"display ?matrix", listed, re.IGNORECASE) is not None
    parts = map(float, length.groups()) if length else (0.0, 0.0, 0.0)
    return Survey(np.sort(times[b"video"]), np.sort(times[b"audio"]), float(np.dot([*parts], (3600, 60, 1))),
                  int(size[1]) * int(size[2]) if size else 0,
                  fields or (turned and display_matrix(path) is None))


def run_ffmpeg(path: Path, *options: object, demuxers: str = CONTAINERS, kept: str = "stdout",
               limit_s: float | None = None, memory: int = children.SOUND_MEMORY):
    """Read a file with moviepy's ffmpeg, known containers only, and return its ``stdout`` or ``stderr``.

    ``both`` returns a pair. Limits of memory, time and output are those of :func:`children.run`.

    Raises:
        UnreadableClip: it takes longer than ``limit_s``, by default :func:`time_limit`, or crashes.
    """
    from moviepy.config import FFMPEG_BINARY  # the same name in moviepy 1.0.3 and 2.2

    command = [FFMPEG_BINARY, "-hide_banner", "-nostdin", "-protocol_whitelist", "file", "-format_whitelist",
               demuxers, "-threads", "2", "-i", str(path.resolve()), *map(str, options)]
    limit_s = time_limit(path) if limit_s is None else limit_s
    try:
        status, stdout, stderr = children.run(command, memory, limit_s, kept != "stderr", kept != "stdout")
    except subprocess.TimeoutExpired as error:
        raise UnreadableClip(path, f"ffmpeg did not finish in {limit_s:.0f} s") from error
    if status < 0:
        raise UnreadableClip(path, f"ffmpeg crashed (signal {-status})")
    return {"stdout": stdout, "stderr": stderr, "both": (stdout, stderr)}[kept]


def check_file(path: Path) -> None:
    """Reject files unsafe for a decoder: OpenCV crashes on a non-UTF-8 name and blocks forever on a pipe.

    Raises:
        UnreadableClip: the file is missing, empty, not regular, not permitted, or has such a name.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableClip(path, "not a regular file")
        str(path.resolve()).encode()
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise UnreadableClip(path, "no such file") from error
    except UnicodeEncodeError as error:
        raise UnreadableClip(path, "its name is not valid UTF-8") from error
    except OSError as error:
        raise UnreadableClip(path, f"cannot be opened: {error.strerror}") from error
    if empty:
        raise UnreadableClip(path, "empty file")


def identity(path: Path) -> tuple[int, ...]:
    """Differs after any change to the file of this name; empty if there is none. No one can set a ctime."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def time_limit(path: Path, found: Survey | None = None) -> float:
    """Seconds after which a decoder of this file counts as hung, from its size and its frames."""
    bytes_s = LIMIT_S_PER_MB * path.stat().st_size / 1e6 if os.path.isfile(path) else 0.0
    pictures_s = LIMIT_S_PER_GIGAPIXEL * len(found.stamps_s) * found.pixels / 1e9 if found else 0.0
    return LIMIT_S + bytes_s + min(pictures_s, LONGEST_LIMIT_S)


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The complete boxes of an MP4 file between two offsets (ISO/IEC 14496-12, section 4.2).

    Yields type, start and end of the content; at most ``MOST_BOXES``.
    """
    for _ in range(MOST_BOXES):
        file.seek(start)
        if len(head := file.read(16)) < 8:
            return
        size, long = int.from_bytes(head[:4], "big"), int.from_bytes(head[8:], "big")
        length = {0: end - start, 1: long}.get(size, size)  # to the end; 64-bit
        if length < 8 or start + length > end:
            return
        yield head[4:8], start + (16 if size == 1 else 8), start + length
        start += length


def display_matrix(path: Path) -> np.ndarray | None:
    """How an MP4 file's picture is shown, float (2, 2): shown = stored @ matrix; None for other files."""
    with open(path, "rb") as file:
        if file.read(8)[4:8] not in MP4_BOXES:
            return None

        def inside(name: bytes, place: tuple[int, int]) -> list[tuple[int, int]]:
            return [(start, end) for found, start, end in boxes(file, *place) if found == name]

        def matrix(name: bytes, place: tuple[int, int], before_end: int) -> np.ndarray:
            for start, end in inside(name, place):
                if end - before_end < start:  # too short for a matrix
                    break
                file.seek(end - before_end)
                return np.frombuffer(file.read(36), ">i4").reshape(3, 3)[:2, :2] / 65536
            return np.eye(2)

        for movie in inside(b"moov", (0, path.stat().st_size)):
            for track in inside(b"trak", movie):
                for media in inside(b"mdia", track):
                    for start, _ in inside(b"hdlr", media):
                        file.seek(start + 8)
                        if file.read(4) == b"vide":  # sections 8.2.2 and 8.3.2: offsets of the matrices
                            return matrix(b"tkhd", track, 44) @ matrix(b"mvhd", movie, 64)
    return None
