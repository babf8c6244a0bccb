"""Frames of a clip: upright, RGB, evenly spread, decoded in one pass with OpenCV's FFmpeg reader.

Clips are untrusted. Only regular files in the containers of ``CONTAINERS`` are opened, and FFmpeg may not
follow a playlist or a concat script to other files or to the network, whatever the file's name.
"""

import math
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"  # names of FFmpeg's demuxers
CAPTURE_OPTIONS = f"protocol_whitelist;file|format_whitelist;{CONTAINERS}"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
LIMIT_S, LIMIT_S_PER_MB = 60.0, 2.0  # to decode a clip; 1080p takes about 0.5 s per MB on one core
UPRIGHT = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}

# Silence FFmpeg and OpenCV: errors are raised below with a file name and a reason.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)


class UnreadableClip(Exception):
    """A file without a readable frame (or sound): ``path``, and ``reason`` in words."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # both, to be picklable between processes
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ClipInfo:
    """A clip's header.

    ``width`` and ``height`` are in pixels as shown, after rotation; ``rotation`` is the clockwise turn in
    degrees (0, 90, 180, 270) that makes the picture upright; ``frame_count`` is 0 and ``fps`` 0.0 if unknown.
    """

    width: int
    height: int
    fps: float
    frame_count: int
    duration_s: float
    rotation: int
    codec: str


@dataclass
class Frames:
    """Frames of one clip: upright uint8 RGB images (H, W, 3), times in s, float64 (n,), and warnings."""

    images: list[np.ndarray]
    times_s: np.ndarray
    info: ClipInfo
    warnings: list[str] = field(default_factory=list)


def probe(path: str | Path) -> ClipInfo:
    """Read the header of a clip without decoding.

    Raises:
        UnreadableClip: missing, empty, truncated before its index, or not a video.
    """
    with _open(path) as capture:
        return _info(capture)


def iter_frames(path: str | Path) -> Iterator[tuple[int, float, np.ndarray]]:
    """Iterate over all frames: index, time in seconds, upright image uint8 RGB (H, W, 3).

    The file is closed when the iteration ends or is abandoned.

    Raises:
        UnreadableClip: as :func:`probe`, at the first step.
    """
    with _open(path) as capture:
        info = _info(capture)
        for index, time_s in _grab(capture, info.fps):
            if (image := _retrieve(capture, info.rotation)) is not None:
                yield index, time_s, image


def read_frames(path: str | Path, count: int = 10) -> Frames:
    """Evenly spread frames: the middles of ``count`` equal parts of the clip.

    Middles represent their parts, and avoid the fades and the damage that are common at both ends. All frames
    are grabbed (a seek would decode from the last key frame, and DFDC clips have one or two), but only the
    wanted ones are converted. The header's number of frames may be wrong. If so, a second pass spreads them
    over the frames that decode, and a warning gives their number. A shorter clip gives each frame once.

    Returns:
        ``Frames`` with 1 to ``count`` images; ``info`` holds the number of frames that decode.

    Raises:
        UnreadableClip: as :func:`probe`, or no frame decodes.
        ValueError: ``count`` is less than 1.
    """
    path = Path(path)
    images, times, decoded, header = _read(path, count)
    if decoded and decoded != header.frame_count:
        images, times, decoded, _ = _read(path, count, decoded)
    if not images or _is_interlaced(path):
        decoded = decoded or header.frame_count
        images, times = _read_copy(path, evenly_spread(decoded, count))
    if not images:
        raise UnreadableClip(path, f"no frame decodes of the {header.frame_count} in its header "
                                   f"(codec {header.codec!r})")
    info = replace(header, frame_count=decoded, duration_s=_duration(decoded, header.fps))
    warnings = []
    if 0 < header.frame_count != decoded:
        warnings.append(f"{path.name}: {decoded} frames decode of the {header.frame_count} in its header")
    return Frames(images, np.array(times), info, warnings)


def evenly_spread(frame_count: int, count: int) -> list[int]:
    """Middles of ``count`` equal parts of ``frame_count`` frames; every index if there are fewer frames."""
    if count < 1:
        raise ValueError(f"expected a count of at least 1 frame, found {count}")
    count = min(count, max(frame_count, 0))
    return [(2 * part + 1) * frame_count // (2 * count) for part in range(count)]


def _read(path: Path, count: int,
          frame_count: int | None = None) -> tuple[list[np.ndarray], list[float], int, ClipInfo]:
    """One pass: images, their times, the number of frames that decode, and the header.

    Images are spread over ``frame_count`` frames, by default the header's number. A damaged frame gives way
    to the next.
    """
    images, times, decoded = [], [], 0
    with _open(path) as capture:
        header = _info(capture)
        wanted = evenly_spread(header.frame_count if frame_count is None else frame_count, count)
        for index, time_s in _grab(capture, header.fps):
            decoded = index + 1
            due = len(images) < len(wanted) and index >= wanted[len(images)]
            if due and (image := _retrieve(capture, header.rotation)) is not None:
                images.append(image)
                times.append(time_s)
    return images, times, decoded, header


def _is_interlaced(path: Path) -> bool:
    """Whether ffmpeg finds interlaced fields: OpenCV 4.13 and 5.0 then return uninitialised memory."""
    return re.search(rb"^ +Stream #.*: Video: (dvvideo|.*(top|bottom) (coded )?first)",
                     run_ffmpeg(path, kept="stderr"), re.MULTILINE) is not None


def _read_copy(path: Path, wanted: list[int]) -> tuple[list[np.ndarray], list[float]]:
    """The frames at ``wanted`` and their times, through a lossless ffmpeg copy: deinterlaced, or of AV1."""
    chosen = "+".join(f"eq(n,{index})" for index in wanted) or "0"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "frames.mkv"
        run_ffmpeg(path, "-an", "-sn", "-dn", "-vf",
                   f"yadif=deint=interlaced,select='{chosen}',setfield=prog", "-fps_mode", "passthrough",
                   "-pix_fmt", "yuv444p", "-c:v", "libx264", "-preset", "ultrafast", "-qp", "0", copy)
        if not copy.is_file() or not copy.stat().st_size:
            return [], []
        images, times, _, _ = _read(copy, len(wanted), len(wanted))
    return images, times


def run_ffmpeg(path: Path, *options: object, demuxers: str = CONTAINERS, kept: str = "stdout") -> bytes:
    """Read a file with moviepy's ffmpeg, known containers only, and return its ``stdout`` or ``stderr``.

    The other stream is discarded: on a damaged track its errors would fill a pipe and block ffmpeg.

    Raises:
        UnreadableClip: it takes too long or crashes.
    """
    from moviepy.config import FFMPEG_BINARY  # the same name in moviepy 1.0.3 and 2.2

    command = [FFMPEG_BINARY, "-hide_banner", "-nostdin", "-protocol_whitelist", "file", "-format_whitelist",
               demuxers, "-i", str(path.resolve()), *map(str, options)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, kept: subprocess.PIPE}
    limit_s = time_limit(path)
    try:
        done = subprocess.run(command, **pipes, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise UnreadableClip(path, f"ffmpeg did not finish in {limit_s:.0f} s") from error
    if done.returncode < 0:
        raise UnreadableClip(path, f"ffmpeg crashed (signal {-done.returncode})")
    return getattr(done, kept)


@contextmanager
def _open(path: str | Path) -> Iterator[cv2.VideoCapture]:
    """A capture of a regular file in a known container, closed on exit."""
    path = Path(path)
    check_file(path)
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = CAPTURE_OPTIONS  # OpenCV reads it at each opening
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise UnreadableClip(path, _why_not(path))
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)  # rotated in _retrieve, the same in all releases
        yield capture
    finally:
        capture.release()


def check_file(path: Path) -> None:
    """Reject files unsafe for a decoder: OpenCV crashes on a non-UTF-8 name and blocks for ever on a pipe.

    Raises:
        UnreadableClip: missing, empty, not a regular file, not permitted, or with such a name.
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


def time_limit(path: Path) -> float:
    """Seconds after which a decoder still working on this file is considered hung."""
    return LIMIT_S + (LIMIT_S_PER_MB * path.stat().st_size / 1e6 if os.path.isfile(path) else 0)


def _why_not(path: Path) -> str:
    """The reason why a file does not open, from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith((b"#EXTM3U", b"ffconcat")):
        return "not a video: a playlist, which might open other files"
    if start[4:8] not in MP4_BOXES:
        return f"not a video: starts with {start!r}, expected one of the containers {CONTAINERS}"
    if b"moov" not in _whole_boxes(path):
        return f"cut before its index: an MP4 file of {path.stat().st_size} bytes without a complete moov box"
    return "not a video: an MP4 file without a picture track that decodes"


def _whole_boxes(path: Path) -> set[bytes]:
    """The types of an MP4 file's complete top-level boxes (ISO/IEC 14496-12, section 4.2)."""
    found, start, end = set(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4], "big")
            size = {0: end - start, 1: int.from_bytes(head[8:], "big")}.get(size, size)  # to the end; 64-bit
            start += size
            if size < 8 or start > end:
                break
            found.add(head[4:8])
            file.seek(start)
    return found


def _info(capture: cv2.VideoCapture) -> ClipInfo:
    rotation = int(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 360
    width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    if rotation in (90, 270):
        width, height = height, width
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if math.isfinite(fps) and fps > 0 else 0.0
    count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    code = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    codec = code.to_bytes(4, "little").decode("latin-1").strip("\0 ")
    return ClipInfo(width, height, fps, count, _duration(count, fps), rotation if rotation in UPRIGHT else 0,
                    codec)


def _duration(frame_count: int, fps: float) -> float:
    return frame_count / fps if fps else 0.0


def _grab(capture: cv2.VideoCapture, fps: float) -> Iterator[tuple[int, float]]:
    """Decode frame after frame; yields index and time in seconds.

    The time is the frame's time stamp if it increases, else the previous time plus one frame's length.
    """
    index, time_s, step_s = 0, 0.0, _duration(1, fps)
    while capture.grab():
        stamp_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if index == 0:
            time_s = stamp_s if math.isfinite(stamp_s) and stamp_s > 0 else 0.0
        else:
            time_s = stamp_s if math.isfinite(stamp_s) and stamp_s > time_s else time_s + step_s
        yield index, time_s
        index += 1


def _retrieve(capture: cv2.VideoCapture, rotation: int) -> np.ndarray | None:
    """The grabbed frame, uint8 RGB (H, W, 3), upright; None if it is damaged."""
    decoded, image = capture.retrieve()
    if not decoded or image is None:
        return None
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return cv2.rotate(image, UPRIGHT[rotation]) if rotation else image
