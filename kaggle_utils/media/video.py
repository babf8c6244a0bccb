"""Frames of a clip: upright, RGB, evenly spread, decoded in one pass with OpenCV's FFmpeg reader."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from .. import disk
from . import children, files
from .files import CONTAINERS, MP4_BOXES, Survey, UnreadableClip, boxes, check_file, survey, time_limit

CAPTURE_OPTIONS = f"protocol_whitelist;file|format_whitelist;{CONTAINERS}"
UPRIGHT = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
SLACK = 0.1  # a frame farther than this from its target time, in parts of the clip, starts a second pass
DECODERS = 4  # threads, at most: each holds frames of its own
MOST_PIXELS = 4_500_000  # of a frame that is kept; a larger one is shrunk, so that thirty fit into memory
MOST_ASPECT = 4.0  # a more extreme pixel aspect ratio is taken for a header error

# Silence FFmpeg and OpenCV: errors are raised below with a file name and a reason.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)


@dataclass(frozen=True)
class ClipInfo:
    """A clip's header.

    ``width`` and ``height`` are in pixels as shown. To display the stored picture, multiply its width by
    ``aspect``, mirror it left to right if ``mirrored``, and rotate it clockwise by ``rotation`` degrees
    (0, 90, 180, 270). ``frame_count`` is 0 and ``fps`` 0.0 if unknown.
    """

    width: int
    height: int
    fps: float
    frame_count: int
    duration_s: float
    rotation: int
    codec: str
    mirrored: bool = False
    aspect: float = 1.0


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
        UnreadableClip: the file is missing, empty, truncated before its index, or not a video.
    """
    with _open(path) as capture:
        return _info(capture, Path(path))


def iter_frames(path: str | Path) -> Iterator[tuple[int, float, np.ndarray]]:
    """Iterate over all frames: index, time in seconds, upright image uint8 RGB (H, W, 3).

    The file is closed when the iteration ends or is abandoned.

    Raises:
        UnreadableClip: as :func:`probe`, at the first step.
    """
    with _open(path) as capture:
        info = _info(capture, Path(path))
        for index, time_s in _grab(capture, info.fps):
            if (image := _retrieve(capture, info)) is not None:
                yield index, time_s, image


def read_frames(path: str | Path, count: int = 10, found: Survey | None = None) -> Frames:
    """The frames shown at the middles of ``count`` equal parts of the clip's time.

    Middles represent their parts and avoid the fades and the damage that are common at both ends. All frames
    are grabbed (a seek would decode from the last key frame, and DFDC clips have one or two), but only the
    wanted ones are converted. If some frames of the file do not decode, a second pass spreads the choice over
    the others, and a warning gives their number. A clip with fewer frames than ``count`` yields each frame
    once. A frame that is shown for more than one part is repeated.

    Args:
        found: the clip's :func:`survey`, if it was made before.

    Returns:
        ``Frames`` with 1 to ``count`` images; ``info`` holds the number of frames that decode.

    Raises:
        UnreadableClip: as :func:`probe`, or no frame decodes.
        ValueError: ``count`` is less than 1.
    """
    path = Path(path)
    found = survey(path) if found is None else found
    images, picked, stamps_s, header = _read(path, spread(found.stamps_s, count))
    wanted = spread(stamps_s, count)
    if wanted and _is_off(stamps_s, picked, wanted):
        images, picked, stamps_s, _ = _read(path, wanted)
    times_s = stamps_s[picked]
    if not images or found.through_copy or _stand_still(images, times_s):
        wanted = wanted or spread(found.stamps_s, count)
        copied, copied_s = _read_copy(path, wanted, found)
        if copied:
            rows = np.minimum(np.unique(wanted, return_inverse=True)[1], len(copied) - 1)
            images, times_s = [copied[row] for row in rows], copied_s[rows]
    if not images:
        raise UnreadableClip(path, f"no frame decodes of the {header.frame_count} in its header "
                                   f"(codec {header.codec!r})")
    decoded = len(stamps_s) or len(found.stamps_s)
    info = replace(header, frame_count=decoded, duration_s=_length(stamps_s, header.fps) or found.duration_s)
    return Frames(images, times_s, info, [*_missing(path, header, info, found), *_shrunk(path, info, images)])


def spread(stamps_s: np.ndarray, count: int) -> list[int]:
    """Indices of the frames shown at the middles of ``count`` equal parts of the time, or all if fewer exist.

    Args:
        stamps_s: float (n,), sorted start times of the frames.
    """
    frames = len(stamps_s)
    if frames <= count or _is_regular(stamps_s):
        return evenly_spread(frames, count)
    middles = (np.arange(count) + 0.5) / count * _length(stamps_s)
    return np.maximum(np.searchsorted(stamps_s, stamps_s[0] + middles, "right") - 1, 0).tolist()


def evenly_spread(frame_count: int, count: int) -> list[int]:
    """Middles of ``count`` equal parts of ``frame_count`` frames; every index if there are fewer frames."""
    if count < 1:
        raise ValueError(f"expected a count of at least 1 frame, found {count}")
    count = min(count, max(frame_count, 0))
    return [(2 * part + 1) * frame_count // (2 * count) for part in range(count)]


def _is_regular(stamps_s: np.ndarray) -> bool:
    """Whether the frame rate is constant, to within half a frame."""
    even = np.linspace(stamps_s[0], stamps_s[-1], len(stamps_s))
    return bool(np.abs(stamps_s - even).max() <= 0.5 * (even[1] - even[0])) if len(even) > 1 else True


def _length(stamps_s: np.ndarray, fps: float = 0.0) -> float:
    """Seconds from the first frame to the end of the last one, which lasts as long as the one before."""
    if len(stamps_s) < 2:
        return _duration(len(stamps_s), fps)
    if fps and abs(np.median(np.diff(stamps_s)) * fps - 1) < 0.1 and _is_regular(stamps_s):
        return _duration(len(stamps_s), fps)
    return float(2 * stamps_s[-1] - stamps_s[-2] - stamps_s[0])


def _is_off(stamps_s: np.ndarray, picked: list[int], wanted: list[int]) -> bool:
    """Whether frames are missing or far from their target times."""
    apart_s = SLACK * _length(stamps_s) / len(wanted)
    return len(picked) != len(wanted) or bool(np.abs(stamps_s[picked] - stamps_s[wanted]).max() > apart_s)


def _stand_still(images: list[np.ndarray], times_s: np.ndarray) -> bool:
    """Whether a picture repeats byte for byte: a still, or a decoder that no longer returns new frames."""
    return any(later > earlier and np.array_equal(one, other) for one, other, earlier, later
               in zip(images, images[1:], times_s, times_s[1:], strict=False))


def _missing(path: Path, header: ClipInfo, info: ClipInfo, found: Survey) -> list[str]:
    """The warning that frames are missing: MP4 and AVI store their number, others at most the duration."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[4:8] in MP4_BOXES or start[:4] == b"RIFF":
        short = 0 < header.frame_count != info.frame_count
    else:
        sound_s = max(found.sound_s, default=0.0) - min(found.stamps_s, default=0.0)
        short = max(info.duration_s, sound_s) < 0.9 * found.duration_s
    counted = f"{info.frame_count} frames decode of the {header.frame_count} in its header"
    return [f"{path.name}: {counted}"] if short else []


def _shrunk(path: Path, info: ClipInfo, images: list[np.ndarray]) -> list[str]:
    if info.width * info.height <= MOST_PIXELS:
        return []
    height, width = images[0].shape[:2]
    return [f"{path.name}: frames of {info.width} × {info.height} pixels were shrunk to {width} × {height}, "
            "and boxes are in these pixels"]


def _read(path: Path, wanted: list[int]) -> tuple[list[np.ndarray], list[int], np.ndarray, ClipInfo]:
    """One pass: the images at ``wanted``, their indices, the times of all frames that decode, and the header.

    A damaged frame is replaced by the next.
    """
    images: list[np.ndarray] = []
    picked, stamps_s = [], []
    with _open(path) as capture:
        header = _info(capture, path)
        for index, time_s in _grab(capture, header.fps):
            stamps_s.append(time_s)
            due = sum(index >= place for place in wanted[len(images):])
            if due and (image := _retrieve(capture, header)) is not None:
                images += due * [image]
                picked += due * [index]
    return images, picked, np.array(stamps_s), header


def _read_copy(path: Path, wanted: list[int], found: Survey) -> tuple[list[np.ndarray], np.ndarray]:
    """Read the frames at ``wanted``, each once, and their times, through a lossless ffmpeg copy.

    The copy is deinterlaced, upright, and in a codec that OpenCV reads.
    """
    chosen = "+".join(f"eq(n,{index})" for index in sorted({*wanted})) or "0"
    children.release_memory()  # ffmpeg needs it
    with disk.temporary() as folder:
        copy = folder / "frames.mkv"
        files.run_ffmpeg(path, "-an", "-sn", "-dn", "-vf",
                         f"yadif=deint=interlaced,select='{chosen}',setfield=prog", "-fps_mode",
                         "passthrough", "-pix_fmt", "yuv444p", "-c:v", "libx264", "-preset", "ultrafast",
                         "-qp", "0", "-threads", "1", copy, limit_s=time_limit(path, found),
                         memory=children.COPY_MEMORY)
        if not copy.is_file() or not copy.stat().st_size:
            return [], np.zeros(0)
        images, picked, stamps_s, _ = _read(copy, list(range(len(set(wanted)))))
    return images, stamps_s[picked]


@contextmanager
def _open(path: str | Path) -> Iterator[cv2.VideoCapture]:
    """A capture of a regular file in a known container, closed on exit."""
    path = Path(path)
    check_file(path)
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = CAPTURE_OPTIONS  # OpenCV reads it at each opening
    threads = [cv2.CAP_PROP_N_THREADS, min(os.cpu_count() or 1, DECODERS)]
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG, threads)
    try:
        if not capture.isOpened():
            raise UnreadableClip(path, _why_not(path))
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)  # rotated in _retrieve, the same in all releases
        yield capture
    finally:
        capture.release()


def _why_not(path: Path) -> str:
    """The reason why a file does not open, from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith((b"#EXTM3U", b"ffconcat")):
        return "not a video: a playlist, which might open other files"
    if start[4:8] not in MP4_BOXES:
        return f"not a video: expected one of the containers {CONTAINERS}"
    with open(path, "rb") as file:
        whole = {name for name, *_ in boxes(file, 0, path.stat().st_size)}
    if b"moov" not in whole:
        return f"cut before its index: an MP4 file of {path.stat().st_size} bytes without a complete moov box"
    return "not a video: an MP4 file without a picture track that decodes"


def _info(capture: cv2.VideoCapture, path: Path) -> ClipInfo:
    matrix, mirrored = files.display_matrix(path), False
    rotation = _whole(capture, cv2.CAP_PROP_ORIENTATION_META) % 360
    if matrix is not None:
        mirrored = bool(np.linalg.det(matrix) < 0)
        across = -matrix[0] if mirrored else matrix[0]
        rotation = round(math.degrees(math.atan2(across[1], across[0]))) % 360
    width = _whole(capture, cv2.CAP_PROP_FRAME_WIDTH)
    height = _whole(capture, cv2.CAP_PROP_FRAME_HEIGHT)
    over, under = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    aspect = over / under if over > 0 and under > 0 else 1.0
    aspect = aspect if 1 / MOST_ASPECT <= aspect <= MOST_ASPECT else 1.0
    width = max(1, round(width * aspect))
    if rotation in (90, 270):
        width, height = height, width
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if math.isfinite(fps) and fps > 0 else 0.0
    count = max(0, _whole(capture, cv2.CAP_PROP_FRAME_COUNT))
    code = _whole(capture, cv2.CAP_PROP_FOURCC) & 0xFFFFFFFF
    codec = code.to_bytes(4, "little").decode("latin-1").strip("\0 ")
    return ClipInfo(width, height, fps, count, _duration(count, fps), rotation if rotation in UPRIGHT else 0,
                    codec, mirrored, aspect)


def _whole(capture: cv2.VideoCapture, field: int) -> int:
    """A header's value as an integer; 0 where it is no number, whatever a header says."""
    value = capture.get(field)
    return int(value) if math.isfinite(value) else 0


def _duration(frame_count: int, fps: float) -> float:
    return frame_count / fps if fps > 1e-6 else 0.0  # a header may say anything


def _grab(capture: cv2.VideoCapture, fps: float) -> Iterator[tuple[int, float]]:
    """Grab one frame after another; yields index and time in seconds.

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


def _retrieve(capture: cv2.VideoCapture, info: ClipInfo) -> np.ndarray | None:
    """The grabbed frame, uint8 RGB (H, W, 3), upright and in its display shape; None if it is damaged.

    It is shrunk to ``MOST_PIXELS``.
    """
    decoded, image = capture.retrieve()
    if not decoded or image is None:
        return None
    height, width = image.shape[:2]
    scale = min(1.0, math.sqrt(MOST_PIXELS / (height * width * info.aspect)))
    if info.aspect != 1 or scale < 1:
        size = max(1, round(width * info.aspect * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if size[0] > width else cv2.INTER_AREA)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    image = cv2.flip(image, 1) if info.mirrored else image
    return cv2.rotate(image, UPRIGHT[info.rotation]) if info.rotation else image
