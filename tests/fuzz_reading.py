"""Mutated clips through the reading of pictures and of sound, and mutated files of the cache:
``python tests/fuzz_reading.py [COUNT] [--seed N]``.

Each of COUNT inputs is a small valid file with bytes changed, moved, repeated or cut out, or with an extreme
number in one of its tables; the same for the same seed. Frames, samples or an extract must come of it, or a
reason: no exception of another kind, no decoder that dies or hangs, no memory that grows or passes 3 GiB.
``make fuzz`` runs 10,000 inputs, ``tests/test_fuzz.py`` as many as fit into some seconds.
"""

import argparse
import itertools
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaggle_utils import extraction, extracts
from kaggle_utils.face import framing
from kaggle_utils.media import isolation, sound, video

PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=0.8")
SOUND = ("-f", "lavfi", "-i", "anoisesrc=d=0.8:r=16000:a=0.3")
SEEDS = {  # files that are mutated: name, and what ffmpeg makes them of
    "h264.mp4": (*PICTURE, *SOUND, "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
    "fragments.mp4": (*PICTURE, *SOUND, "-pix_fmt", "yuv420p", "-movflags", "frag_keyframe+empty_moov"),
    "mpeg4.mp4": (*PICTURE, "-c:v", "mpeg4"),
    "h265.mp4": (*PICTURE, "-pix_fmt", "yuv420p", "-c:v", "libx265", "-x265-params", "log-level=none"),
    "fields.mp4": (*PICTURE, "-pix_fmt", "yuv420p", "-flags", "+ildct+ilme", "-x264opts", "tff=1"),
    "vp9.webm": (
        *PICTURE,
        *SOUND,
        "-pix_fmt",
        "yuv420p",
        "-c:v",
        "libvpx-vp9",
        "-c:a",
        "libopus",
        "-deadline",
        "realtime",
    ),
    "table.mp4": (*SOUND, "-c:a", "pcm_s16le", "-f", "mov"),
    "adpcm.mov": (*SOUND, "-c:a", "adpcm_ima_qt"),
    "h264.mkv": (*PICTURE, *SOUND, "-pix_fmt", "yuv420p", "-c:a", "aac"),
    "ffv1.mkv": (*PICTURE, *SOUND, "-c:v", "ffv1", "-c:a", "flac"),
    "mjpeg.avi": (*PICTURE, *SOUND, "-c:v", "mjpeg", "-c:a", "pcm_s16le"),
    "mpeg2.ts": (*PICTURE, *SOUND, "-r", "25", "-pix_fmt", "yuv420p", "-c:v", "mpeg2video"),
    "sound.wav": SOUND,
    "sound.aac": SOUND,
    "sound.m4a": SOUND,
}
# The ffmpeg of imageio-ffmpeg 0.6, Kaggle's: it dies at every transport stream, and begins the sound of
# Matroska elsewhere.
if OLD_FFMPEG := get_ffmpeg_version().startswith("7.0"):
    del SEEDS["mpeg2.ts"]
CACHED = "cached.npz"
# where numbers stand: boxes of MP4, elements of Matroska, headers of a ZIP archive
TABLES = (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"elst", b"mdhd", b"mvhd", b"tkhd", b"stsd", b"trun",
          b"tfhd", b"\x44\x89", b"\x2a\xd7\xb1", b"\xb5", b"\x9f", b"\xb0", b"\x63\xa2", b"\x1f\x43\xb6\x75",
          b"\x1c\x53\xbb\x6b", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"shape")  # fmt: skip
EXTREMES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 40_000_000, 0x00010000)
MOST_MEMORY = 3 * 2**30
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
# outcomes that tell of a decoder's crash or hang, or of a fault of ours
RAISED = "raised"
CONTAINED = ("its decoder crashed", "was not decoded in", "ffmpeg did not finish", "ffmpeg crashed", RAISED)


def make_seeds(folder: Path) -> dict[str, bytes]:
    """The valid files, by name."""
    for name, options in SEEDS.items():
        subprocess.run(
            [get_ffmpeg_exe(), "-v", "error", "-y", *options, folder / name],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    crops = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    person = framing.FaceCrops(crops, np.zeros((2, 4)), ["detected"] * 2, np.arange(2), 0)
    found = extraction.Extract([person], np.zeros(2), np.zeros(1600, np.float32), 16000, ["a"])
    extracts.save_extract(folder / CACHED, found, "key")
    return {name: (folder / name).read_bytes() for name in (*SEEDS, CACHED)}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: some to numbers in tables, a third of the others in the first kilobyte."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(min(len(data), 1024) if rng.random() < 0.3 else len(data))
        length = rng.choice((1, 2, 4, 8, 64, 512))
        change = rng.randrange(8)
        if change > 5:
            table = rng.choice([name for name in TABLES if name in data] or [bytes(data[:4])])
            places = [found.end() for found in re.finditer(re.escape(table), data)]
            place = min(rng.choice(places) + rng.randrange(24), len(data) - 4)
            data[place : place + 4] = rng.choice(EXTREMES).to_bytes(4, rng.choice(("big", "little")))
        if change == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[start : start + length] = rng.randbytes(min(length, len(data) - start))
        elif change == 2:
            data[start : start + length] = bytes([rng.choice(INTERESTING)]) * min(length, len(data) - start)
        elif change == 3:
            data[start:start] = data[start : start + length]
        elif change == 4 and len(data) > 2 * length:
            del data[start : start + length]
        elif change == 5 and rng.random() < 0.2:
            del data[max(start, 16) :]
    return bytes(data)


def read_cached(path: Path) -> str:
    """What came of a file of the cache: any error makes the extract again."""
    extracts._is_made(path, "key")
    try:
        extracts.load_extract(path)
    except Exception:
        return "refused"
    return "read"


def read_picture(path: Path) -> str:
    """What came of the picture, in a word; what a decoder may not return fails an assertion."""
    frames = isolation.read_frames(path, 4)
    assert 1 <= len(frames.images) == len(frames.times_s) <= 4 and np.isfinite(frames.times_s).all()
    assert all(
        image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
        for image in frames.images
    )
    return "read"


def read_sound(path: Path) -> str:
    """What came of the sound, in a word; what a decoder may not return fails an assertion."""
    samples = sound.read_voice(path)
    assert samples is None or (
        samples.dtype == np.float32 and samples.ndim == 1 and np.abs(samples).max() <= 1
    )
    return "none" if samples is None else "read"


def outcome(read: Callable[[Path], str], path: Path) -> str:
    """What came of an input, in a word; the traceback of an exception that no caller expects is printed."""
    try:
        return read(path)
    except video.UnreadableClip as error:
        return next((reason for reason in CONTAINED if reason in error.reason), "refused")
    except Exception:
        traceback.print_exc()
        return RAISED


def fuzz(
    count: int, seed: int, seconds: float = 0.0, kept: Path | None = None
) -> tuple[Counter, list[float]]:
    """Read ``count`` inputs, and more until ``seconds`` are over; Ctrl-C ends it sooner.

    Args:
        kept: a folder for the inputs at which a decoder crashed or hung.

    Returns:
        how often each outcome came, by (picture or sound, outcome), and the reader's memory in MB, input by
        input.
    """
    outcomes, memory = Counter(), []
    folders, threads = tempfile.TemporaryDirectory(), ThreadPoolExecutor(1)
    with folders as folder, threads as beside, suppress(KeyboardInterrupt):
        seeds = make_seeds(Path(folder))
        reader, end = isolation._reader(os.getpid()), time.monotonic() + seconds
        for number in tqdm(itertools.count(), total=count, unit="input"):
            if number >= count and time.monotonic() > end:
                break
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(list(seeds))
            path = Path(folder) / f"input{Path(name).suffix}"
            path.write_bytes(mutated(seeds[name], rng))
            if name == CACHED:
                outcomes.update([("cache", outcome(read_cached, path))])
                continue
            heard = beside.submit(outcome, read_sound, path)  # at the same time, as in extraction
            found = outcome(read_picture, path), heard.result()
            outcomes.update(zip(("picture", "sound"), found, strict=True))
            if kept and {*found} & set(CONTAINED):
                (kept / f"{seed}-{number}-{name}").write_bytes(path.read_bytes())
            memory.append(psutil.Process(reader.call(60, os.getpid)).memory_info().rss / 1e6)
    return outcomes, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="a folder for the inputs at which a decoder crashed or hung"
    )
    options = parser.parse_args()
    outcomes, memory = fuzz(options.count, options.seed, kept=options.keep)
    for (kind, came), number in sorted(outcomes.items()):
        print(f"{kind:8} {came:24} {number}")
    tenth = max(1, len(memory) // 10)
    print(
        f"memory of the reader: {np.median(memory[:tenth]):.0f} MB in the first tenth, {np.median(memory[-tenth:]):.0f} MB in "
        f"the last, {max(memory):.0f} MB at most"
    )
    largest = [resource.getrusage(whose).ru_maxrss / 1024
               for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"at most {largest[0]:.0f} MiB in this process, {largest[1]:.0f} MiB in a child")
    too_much = (largest[0] + 2 * largest[1]) * 2**20 > MOST_MEMORY  # the reader and ffmpeg
    return int(too_much or any(came in CONTAINED for _, came in outcomes))


if __name__ == "__main__":
    sys.exit(main())
