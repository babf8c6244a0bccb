"""Attacks on the whole chain: nothing that a stranger sends costs another clip, another file or the machine."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import ffmpeg

from conftest import ROOT
from kaggle_utils import __main__ as command_line
from kaggle_utils import disk, extraction, extracts, plots, report
from kaggle_utils.face import detection
from kaggle_utils.kaggle.paths import research_data
from kaggle_utils.media import children, files, isolation, sound, video

MOST_MEMORY = 3 * 2**30  # bytes over all processes
PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=1")
TONE = ("-f", "lavfi", "-i", "anoisesrc=d=1:r=16000:a=0.3")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    ffmpeg(*PICTURE, *TONE, "-pix_fmt", "yuv420p", path)
    return path


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


# --- memory and time ----------------------------------------------------------------------------------------
STUDY = """
import sys
from pathlib import Path
from kaggle_utils.kaggle import paths
paths.prepare()
from kaggle_utils import Detector, report
detector = Detector.load()
for path in sys.argv[2:]:
    report.write_report(path, Path(sys.argv[1]) / (Path(path).stem + ".html"), detector)
    print(path, flush=True)
"""


def peak_of(process: subprocess.Popen) -> int:
    """The most memory in bytes that a process and its descendants hold at one time, until it ends.

    A child that has not yet started its program shares the memory of its parent: it is not counted.
    """
    most, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        held = 0
        for one in [watched, *watched.children(recursive=True)]:
            with suppress(psutil.Error):
                if one == watched or one.cmdline() != psutil.Process(one.ppid()).cmdline():
                    held += one.memory_info().rss
        most = max(most, held)
        time.sleep(0.05)
    return most


@needs_posix
def test_no_report_takes_more_than_three_gib_over_all_processes(tmp_path):
    """Two bombs made here and, where the research data is at hand, a wall of faces and a second pair.

    The large ones have a process of their own, as on the command line: one that has searched many faces keeps memory.
    """
    sample_bomb(tmp_path / "sound.mp4")
    picture_bomb(tmp_path / "picture.mp4")
    runs = [[tmp_path / "sound.mp4", tmp_path / "picture.mp4"]]
    if odd := research_data("odd_clips"):
        runs[0].append(odd / "stsz_sound.mp4")
        runs += [[odd / "wall_of_faces.mp4"], [odd / "bomb10_8192x8192.mp4"]]
    for clips in runs:
        process = subprocess.Popen(
            [sys.executable, "-c", STUDY, tmp_path, *clips], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert peak_of(process) < MOST_MEMORY, clips
        assert process.returncode == 0
        assert process.stdout.read().split() == [str(path) for path in clips]
        for path in clips:
            assert (tmp_path / f"{path.stem}.html").stat().st_size > 10_000
    assert "were shrunk to 2121 × 2121" in (tmp_path / "picture.html").read_text(encoding="utf-8")


@needs_posix
def test_a_child_has_limits_of_memory_time_and_output(monkeypatch):
    program = "import sys; print('x' * 1000); x = bytes(600 * 2**20); print(len(x), file=sys.stderr)"
    status, stdout, stderr = children.run([sys.executable, "-c", program], 300 * 2**20, 60, True, True)
    assert status == 1 and stdout == b"x" * 1000 + b"\n" and b"MemoryError" in stderr
    monkeypatch.setattr(children, "MOST_OUTPUT", 10)
    monkeypatch.setattr(children, "MOST_LISTED", 0)
    status, stdout, stderr = children.run([sys.executable, "-c", program], 2**31, 60, True, True)
    assert (status, stdout, stderr) == (0, b"x" * 10, b"")
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", "while True: print('x' * 1000)"], 2**31, 1, True, True)
    assert time.monotonic() - began < 10


def test_a_wall_of_faces_is_bounded_and_the_best_stay():
    rows = np.random.default_rng(0).random((5000, 6))
    rows[:, 0] = np.arange(5000) % 2
    kept = detection._first(rows, 100)
    assert np.bincount(kept[:, 0].astype(int)).tolist() == [100, 100]
    for picture in (0, 1):
        wanted = np.sort(rows[rows[:, 0] == picture, 5])[-100:]
        assert np.array_equal(np.sort(kept[kept[:, 0] == picture, 5]), wanted)
    assert detection._first(rows[:80], 100) is not None and len(detection._first(rows[:80], 100)) == 80


def test_frames_that_repeat_are_handed_over_once(clip):
    frames = isolation.read_frames(clip, 40)
    here = video.read_frames(clip, 40)
    assert np.array_equal(frames.images, here.images) and len({id(x) for x in frames.images}) == 10


@pytest.mark.parametrize("hours", [3])
def test_hours_of_silence_are_read_to_the_limit(tmp_path, hours):
    path = tmp_path / "silence.m4a"
    ffmpeg("-f", "lavfi", "-i", f"anullsrc=r=8000:cl=mono:d={hours * 3600}", "-c:a", "aac", "-b:a", "8k", path)
    assert len(sound.read_voice(path)) == sound.LONGEST * sound.SAMPLE_RATE


def test_thirty_two_channels_become_one(tmp_path):
    path = tmp_path / "many.wav"
    ffmpeg("-f", "lavfi", "-i", "aevalsrc=" + "|".join(["0.3*sin(800*t)"] * 32) + ":d=1", path)
    assert sound.read_voice(path).shape == (16000,)


# --- headers that lie ---------------------------------------------------------------------------------------
def with_box(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    place = content.index(box) + 4 + offset
    return content[:place] + value + content[place + len(value) :]


LIES = {  # box, offset in it, value
    "a thousand years": (b"mvhd", 16, b"\xff\xff\xff\xfe"),
    "no time base": (b"mdhd", 12, b"\0\0\0\0"),
    "a negative time base": (b"mdhd", 12, b"\xff\xff\xff\xff"),
    "no matrix": (b"tkhd", 40, b"\0" * 36),
    "a wild matrix": (b"tkhd", 40, b"\x7f\xff\xff\xff" * 9),
    "no pixels": (b"avc1", 24, b"\0\0\0\0"),
    "many pixels": (b"avc1", 24, b"\xff\xff\xff\xff"),
    "endless frames": (b"stts", 8, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    "many frames": (b"stsz", 4, b"\0\0\0\1\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", LIES)
def test_no_header_value_raises(clip, tmp_path, name):
    path = tmp_path / "lie.mp4"
    path.write_bytes(with_box(clip.read_bytes(), *LIES[name]))
    for read in (isolation.read_frames, sound.read_voice, sound.sound_format, files.survey):
        try:
            read(path)
        except video.UnreadableClip as error:
            assert "crashed" not in error.reason


def test_a_short_box_at_the_start_has_no_matrix(tmp_path):
    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", len(content) + 8, name) + content

    media = box(b"mdia", box(b"hdlr", b"\0" * 8 + b"vide"))
    (tmp_path / "a.mp4").write_bytes(box(b"moov", box(b"trak", box(b"tkhd", b"") + media)))
    assert np.array_equal(files.display_matrix(tmp_path / "a.mp4"), np.eye(2))


# --- other files --------------------------------------------------------------------------------------------
def test_a_refused_link_shows_nothing_of_its_target(tmp_path):
    (tmp_path / "secret").write_text("password=123")
    (tmp_path / "link.mp4").symlink_to("secret")
    for read in (isolation.read_frames, sound.read_voice):
        with pytest.raises(video.UnreadableClip) as caught:
            read(tmp_path / "link.mp4")
        assert "passw" not in str(caught.value)


def test_mp4_data_references_lead_to_no_other_file(clip, tmp_path):
    """A track whose samples lie, by its header, in another file: the frames of that file never appear."""
    content = clip.read_bytes()
    other = tmp_path / "other.mp4"
    shutil.copy(clip, other)
    place = content.index(b"url \0\0\0\1")  # flag 1: the samples are in this file
    content = content[:place] + b"url \0\0\0\0" + content[place + 8 :]
    alias = content.replace(b"url \0\0\0\0", b"alis\0\0\0\0", 1)
    for number, variant in enumerate((content, alias)):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(variant)
        with opened_files() as seen, suppress(video.UnreadableClip):
            isolation.read_frames(path, 2)
        assert str(other) not in seen


def test_mkv_segment_links_lead_to_no_other_file(clip, tmp_path):
    """Next and previous segment by name, and ordered chapters: only the file itself is read."""
    ffmpeg("-i", clip, "-c", "copy", tmp_path / "other.mkv")
    content = (tmp_path / "other.mkv").read_bytes()
    info = content.index(bytes.fromhex("1549a966"))
    end = info + 5 + (content[info + 4] & 0x7F) if content[info + 4] != 1 else None
    name = b"other.mkv"
    link = bytes.fromhex("3e83bb") + bytes([0x80 | len(name)]) + name
    if end is None:
        size = int.from_bytes(content[info + 5 : info + 12], "big")
        head = content[info : info + 5] + (size + len(link)).to_bytes(7, "big")
        linked = content[:info] + head + link + content[info + 12 :]
    else:
        head = content[info : info + 4] + bytes([content[info + 4] + len(link)])
        linked = content[:info] + head + link + content[info + 5 :]
    path = tmp_path / "linked.mkv"
    path.write_bytes(linked)
    (tmp_path / "other.mkv").write_bytes(b"not a clip any more")
    assert len(isolation.read_frames(path, 2).images) == 2


class opened_files:
    """The files that this process's children have open while the block runs, looked at again and again."""

    def __enter__(self) -> set[str]:
        self.seen: set[str] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self.seen

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.is_set():
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self.seen.update(file.path for file in child.open_files())
            time.sleep(0.002)


# --- names --------------------------------------------------------------------------------------------------
def test_names_become_text():
    assert disk.printable("a\x1b[31m.mp4") == "a\\x1b[31m.mp4"
    assert disk.printable("\u202egpj.mp4") == "\\u202egpj.mp4"
    assert disk.printable(os.fsdecode(b"\xff.mp4")) == "\\udcff.mp4"
    assert disk.printable("영상 ü $x$.mp4\n") == "영상 ü $x$.mp4\n"


@pytest.mark.parametrize("name", ["a $_{$.mp4", "$$.mp4", r"\frac{.mp4", "a\x1b]0;x\x07.mp4", "a" * 240])
def test_any_name_is_drawn_as_text(tmp_path, name):
    picture = np.zeros((8, 8, 3), np.uint8)
    figure = plots.contact_sheet([picture], [disk.printable(name)], columns=1)
    figure.savefig(tmp_path / "sheet.png")


NAMES = ["=cmd|'x'!A1.mp4", "a $_{$.mp4", "a" * 251 + ".mp4", "b" * 236 + ".mp4", "c\x1b[31mred.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")
def test_a_folder_of_odd_names_is_extracted_scored_and_drawn(clip, tmp_path, detector, capsys):
    folder, output = tmp_path / "clips", tmp_path / "out" / "submission.csv"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(clip, folder / name)
    made = extracts.extract_folder(folder, tmp_path / "cache", progress=False)
    assert made["made"].all() and all(path.is_file() for path in made["cache"])
    assert not extracts.extract_folder(folder, tmp_path / "cache", progress=False)["made"].any()
    table = detector.predict_folder(folder, output, progress=False, cache=tmp_path / "cache")
    pictures = command_line.draw(table, output)
    assert sorted(pictures) == ["faces", "scores"] and all(path.is_file() for path in pictures.values())
    assert len(list(output.with_name("submission.csv.faces").iterdir())) == len(NAMES)
    said = command_line.summary(table)
    assert "\x1b" not in said and "begin like formulas" in said
    assert output.read_bytes().count(b"\n=cmd|'x'!A1.mp4,") == 1  # Kaggle's file stays exact


@needs_posix
def test_an_error_line_holds_no_escape_sequence(tmp_path, capsys):
    assert command_line.main(["check", str(tmp_path / "a\x1b[31m.csv")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/a\\x1b[31m.csv: No such file or directory\n"


# --- the page -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["reading", "voice", "after"])
def test_the_page_shows_no_hash_of_another_file(clip, tmp_path, detector, moment):
    path, other = tmp_path / "clip.mp4", tmp_path / "other.mp4"
    shutil.copy(clip, path)
    shutil.copy(clip, other)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def swap(stage: str) -> None:
        if stage == moment:
            os.replace(other, path)
            os.utime(path, ns=times)

    found = report.study(path, detector, swap)
    if moment == "after":
        assert len(report.facts(found)["SHA-256"]) == 64
        swap("after")
    else:
        assert f"clip.mp4: {report.CHANGED}" in found.verdict.warnings
    assert report.facts(found)["SHA-256"] == f"unknown: {report.CHANGED}"
    path.unlink()
    assert report.facts(found)["SHA-256"] == f"unknown: {report.CHANGED}"
    assert report.CHANGED in report.page(found)


@pytest.mark.parametrize("duration_s", [1e-3, 59.9, 60 * 3600.0, 3e10, 1e300])
def test_any_duration_has_ticks(duration_s):
    assert 1 <= len(report._ticks(duration_s)) <= report.MOST_TICKS


# --- the cache ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def extract() -> extraction.Extract:
    return extraction.Extract([], np.zeros(0), np.zeros(16000, np.float32), 16000, ["no picture"])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"samples.npy") + 40
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)


def bomb(path: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
        with file.open("images_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (2**30,)}
            )
            for _ in range(2**10):
                member.write(bytes(2**20))


def endless(path: Path) -> None:
    """A header that promises a hundred gigabytes which are not there."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            if name == "samples.npy":
                content = content.replace(b"(16000,), }" + b" " * 8, b"(100000000000,), } ")
            file.writestr(name, content)


def pickled(path: Path) -> None:
    np.savez(path, about=np.array([{"key": "key"}], dtype=object))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("attack", [truncated, damaged, bomb, endless, pickled, emptied])
def test_a_damaged_extract_is_made_again(clip, extract, tmp_path, monkeypatch, attack):
    place = extracts.Cache(tmp_path).place(clip.name, clip)
    extracts.save_extract(place.file, extract, place.key)
    assert extracts.Cache(tmp_path).place(clip.name, clip).made
    attack(place.file)
    monkeypatch.setattr(extracts, "extract", lambda *_: extract)
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        place = extracts.Cache(tmp_path).place(clip.name, clip)
        found = extracts.fetch(clip, None, extraction.FRAMES, 16000, place)
        assert found.warnings == ["no picture"]
    assert place.made and len(extracts.load_extract(place.file).samples) == 16000
    assert psutil.Process().memory_info().rss - before < 300 * 2**20


# --- signals and other users --------------------------------------------------------------------------------
WAITS = """
import sys, time
from kaggle_utils import __main__, disk
def wait(options):
    with disk.temporary() as folder:
        print(folder, flush=True)
        time.sleep(60)
__main__.run_check = wait
sys.exit(__main__.main(["check", "x"]))
"""


@needs_posix
def test_a_run_that_is_told_to_end_removes_its_temporary_files(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    folder = Path(run.stdout.readline().strip())
    assert folder.is_dir()
    run.send_signal(signal.SIGTERM)
    assert run.communicate()[1] == "" and run.returncode == 143
    assert not folder.exists()


@needs_posix
def test_the_copy_of_a_killed_reader_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "deepfake-clip.abcd1234.temporary").mkdir()
    worker = isolation.Worker()
    assert worker.call(60, os.getpid) and not list(tmp_path.glob("deepfake-clip.*"))
    worker.stop()


def test_case_is_changed_the_same_in_every_language():
    """Python's str.lower ignores the locale, so that .AVI is a clip in Turkish, too; nothing else is used."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kaggle_utils").rglob("*.py")]
    assert not any("setlocale" in source or "strcoll" in source for source in sources)
    assert "A.AVI".lower() == "a.avi" and json.loads('{"I": 1}') == {"I": 1}
