"""A small data set in DFDC's layout, made in seconds without a download for a first run.

One portrait (Eileen Collins, NASA, public domain; it is part of scikit-image) becomes several talking people:
mirrored, reshaped, dyed, lit and moved in front of a painted room. The voice is a source-filter synthesis of
vowels and hisses. A FAKE has a self-blended face (as in Shiohara and Yamasaki, CVPR 2022: a shifted,
recoloured copy blended through a soft mask), a voice resynthesised from its mel spectrogram (Griffin and Lim,
1984), or both. The clips exercise the code and its edge cases; they teach nothing about real deepfakes.

The same seed gives the same bytes on the same machine.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .babble import SOUND_RATE, resynthesize, speak
from .drawing import Clip, Person, clip_frames, face_ellipse, portrait, poses, random_person

VERSION = 3
MARK = "miniature.json"
SIZES = ((640, 360), (768, 432), (854, 480))


def make_miniature(folder: str | Path, seed: int = 0, progress: bool = True) -> Path:
    """Make the data set, unless ``folder`` already holds the one of this seed; returns ``folder``.

    Writes ``train_sample_videos/`` (4 originals, 4 fakes of them, ``metadata.json``), ``test_videos/`` (8
    clips: three plain ones, and one each without sound, without a face, with two faces, stored on its side, 1
    s long), ``sample_submission.csv``, ``test_labels.csv`` (``filename,label``), and ``miniature.json``,
    which records what is fake in each clip and where the faces are.

    Raises:
        FileExistsError: ``folder`` holds something else; nothing is changed.
        RuntimeError: ffmpeg failed; includes ffmpeg's message.
    """
    folder = Path(folder)
    if (folder / MARK).is_file():
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if (mark.get("version"), mark.get("seed")) == (VERSION, seed):
            return folder
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or empty folder, or a miniature; found other files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        made = Path(unfinished) / folder.name
        _make(made, seed, progress)
        _put_in_place(made, folder)
    return folder


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename the finished data set; another process may have finished the same one first."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / MARK).is_file():
            raise


def _make(folder: Path, seed: int, progress: bool) -> None:
    clips = plan(seed)
    for name in ("train_sample_videos", "test_videos"):
        (folder / name).mkdir(parents=True)
    portrait()  # cache it before the threads need it
    with ThreadPoolExecutor(2) as pool:
        made = list(tqdm(pool.map(lambda clip: write_clip(clip, folder), clips), "miniature", len(clips),
                         unit="clip", disable=not progress))
    train = [clip for clip in clips if clip.folder == "train_sample_videos"]
    test = sorted((clip for clip in clips if clip.folder == "test_videos"), key=lambda clip: clip.name)
    _write_json(folder / "train_sample_videos" / "metadata.json", {
        clip.name: {"label": "FAKE" if clip.fake else "REAL", "split": "train", "original": clip.original}
        for clip in train})
    _write_table(folder / "test_labels.csv", {clip.name: int(clip.fake) for clip in test})
    _write_table(folder / "sample_submission.csv", {clip.name: 0.5 for clip in test})
    facts = {clip.name: entry for clip, entry in zip(clips, made, strict=True)}
    _write_json(folder / MARK, {"version": VERSION, "seed": seed, "clips": facts})


def plan(seed: int) -> list[Clip]:
    """The clips of a seed: names, sizes and lengths are random, the cases are always the same."""
    rng = np.random.default_rng(seed)
    names = iter(_names(rng, 16))
    people = [random_person(rng, index) for index in range(6)]

    def clip(folder: str, *who: int, **case) -> Clip:
        drawn = {"size": SIZES[rng.integers(len(SIZES))], "fps": int(rng.choice((15, 20, 24, 25))),
                 "seconds": float(rng.choice((2.0, 2.4, 3.0))), "scene": int(rng.integers(2**31))}
        return Clip(folder, next(names), people=tuple(people[index] for index in who), **(drawn | case))

    originals = [clip("train_sample_videos", index) for index in range(4)]
    parts = ({"fake_face": 0}, {"fake_face": 0}, {"fake_voice": True}, {"fake_face": 0, "fake_voice": True})
    fakes = [replace(original, name=next(names), original=original.name, **part)
             for original, part in zip(originals, parts, strict=True)]
    tests = [
        clip("test_videos", 4),
        clip("test_videos", 5, fake_face=0, fake_voice=True, seconds=4.0),
        clip("test_videos", 0, fake_voice=True),
        clip("test_videos", 1, fake_face=0, sound=False),
        clip("test_videos"),
        clip("test_videos", 2, size=(360, 640), turned=True),
        clip("test_videos", 4, 3, fake_face=1),
        clip("test_videos", 5, seconds=1.6),
    ]
    return originals + fakes + tests


def _names(rng: np.random.Generator, count: int) -> list[str]:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(rng.choice(letters, 10)) + ".mp4" for _ in range(count)]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=None if path.name == MARK else 1) + "\n", encoding="utf-8")


def _write_table(path: Path, labels: dict[str, float]) -> None:
    rows = "".join(f"{name},{label}\n" for name, label in labels.items())
    path.write_text("filename,label\n" + rows, encoding="utf-8")


# --- files --------------------------------------------------------------------------------------------------
def write_clip(clip: Clip, folder: Path) -> dict:
    """Render and encode a clip; returns its entry for ``miniature.json``."""
    count = round(clip.seconds * clip.fps)
    rng = np.random.default_rng((clip.scene, 0))
    speaker = clip.people[0] if clip.people else Person()
    samples, opening = speak(speaker, clip.seconds, rng)
    if clip.fake_voice:
        samples = resynthesize(samples, clip.scene)
    tracks = poses(clip, rng, np.arange(count) / clip.fps)
    opening = opening[np.arange(count) * SOUND_RATE // clip.fps]
    frames = clip_frames(clip, opening, tracks)
    _encode(folder / clip.folder / clip.name, clip, frames, samples if clip.sound else None)
    faces = [[face_ellipse(pose, person) for pose in track]
             for track, person in zip(tracks, clip.people, strict=True)]
    return {
        "label": "FAKE" if clip.fake else "REAL", "original": clip.original,
        "fake_face": clip.fake_face, "fake_voice": clip.fake_voice and clip.sound, "sound": clip.sound,
        "turned": clip.turned, "width": clip.size[0], "height": clip.size[1], "fps": clip.fps, "faces": faces,
    }


def _encode(path: Path, clip: Clip, frames: Iterator[np.ndarray], samples: np.ndarray | None) -> None:
    """Write H.264 and AAC to an MP4 file without dates or versions, for reproducible bytes."""
    width, height = clip.size[::-1] if clip.turned else clip.size
    pixels = b"".join((np.rot90(frame, -1) if clip.turned else frame).tobytes() for frame in frames)
    exact = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-map_metadata", "-1"]
    picture = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(clip.fps), "-i",
               "pipe:0"]
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "21", "-pix_fmt", "yuv420p", "-threads", "1"]
    aac = ["-c:a", "aac", "-b:a", "96k", "-ar", "44100"]
    with tempfile.TemporaryDirectory() as scratch:
        sound = []
        if samples is not None:
            (32767 * samples).round().astype("<i2").tofile(f"{scratch}/sound")
            sound = ["-f", "s16le", "-ar", str(SOUND_RATE), "-ac", "1", "-i", f"{scratch}/sound"]
        encoded = Path(scratch) / "sideways.mp4" if clip.turned else path
        _ffmpeg(path, [*picture, *sound, *h264, *aac, *exact, str(encoded)], pixels)
        if clip.turned:
            _ffmpeg(path, ["-display_rotation", "90", "-i", str(encoded), "-c", "copy", *exact, str(path)])


def _ffmpeg(path: Path, arguments: list[str], stdin: bytes = b"") -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    done = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *arguments], input=stdin,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{path}: ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
