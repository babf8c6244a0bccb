"""Attacks on the whole chain: nothing that a stranger sends costs another clip, another file or the machine."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import CAN_BE_NOBODY, MOST_MEMORY, TONE, as_nobody, bombs_in, ffmpeg, peak_of
from test_report import clip_with

from conftest import ROOT
from kaggle_utils import __main__ as command_line
from kaggle_utils import disk, extraction, extracts, plots, report
from kaggle_utils.face import detection
from kaggle_utils.media import children, files, isolation, sound, video

MOST_SECONDS = 200.0  # of processors, for the reports of six clips
PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=1")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    ffmpeg(*PICTURE, *TONE, "-pix_fmt", "yuv420p", path)
    return path


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


def spent_s() -> float:
    """Seconds of processors that this process's ended children took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> list[Path]:
    return bombs_in(tmp_path_factory.mktemp("bombs"))


@needs_posix
def test_reports_of_one_process_take_no_more_than_three_gib_over_all_processes(bombs, miniature, tmp_path):
    """After a clip with a face and a voice, whose networks stay, and the wall, the bombs are opened.

    The wall costs four people and forty-eight faces a frame, no more: seconds of processors, so that a machine with
    other work passes.
    """
    clips = [clip_with(miniature, people=2), *bombs]
    began = spent_s()
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, tmp_path, *clips], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    peak = peak_of(process)
    assert spent_s() - began < MOST_SECONDS
    assert peak < MOST_MEMORY and process.returncode == 0
    assert process.stdout.read().split() == [str(path) for path in clips]
    for path in clips:
        assert (tmp_path / f"{path.stem}.html").stat().st_size > 10_000
    assert "were shrunk to 2121 × 2121" in (tmp_path / "picture.html").read_text(encoding="utf-8")


@needs_posix
def test_a_folder_of_bombs_is_scored_within_three_gib_and_no_clip_is_lost(bombs, clip, tmp_path):
    shutil.copy(clip, bombs[0].with_name("z.mp4"))
    command = [sys.executable, "-m", "kaggle_utils", "predict", bombs[0].parent, "-o", tmp_path / "out.csv"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert peak_of(process) < MOST_MEMORY and process.returncode == 0
    assert len((tmp_path / "out.csv.journal").read_text().splitlines()) == 1 + len(bombs) + 1


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


@contextmanager
def never_opened(path: Path) -> Iterator[None]:
    """Fails if any process opens ``path`` while the block runs (inotify)."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(path), 0x20) >= 0  # IN_OPEN
    try:
        yield
        with pytest.raises(BlockingIOError):  # no event is waiting
            os.read(watch, 4096)
    finally:
        os.close(watch)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify of Linux")


@on_linux
def test_a_file_that_a_child_opens_is_noticed(clip):
    with pytest.raises(pytest.fail.Exception), never_opened(clip):
        isolation.read_frames(clip, 2)


@on_linux
def test_mp4_data_references_lead_to_no_other_file(clip, tmp_path):
    """A track whose samples lie, by its header, in another file: that file is never opened."""
    content = clip.read_bytes()
    other = tmp_path / "other.mp4"
    shutil.copy(clip, other)
    place = content.index(b"url \0\0\0\1") - 4  # a reference's size, name, and flag 1: the samples are in this file
    size = struct.unpack(">I", content[place : place + 4])[0]
    for number, (name, target) in enumerate([(b"url ", b"other.mp4\0"), (b"url ", b"file:other.mp4\0"), (b"alis", b"")]):
        reference = struct.pack(">I", size + len(target)) + name + b"\0\0\0\0" + target
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(grown(content, place, size, reference))
        with never_opened(other), suppress(video.UnreadableClip):
            isolation.read_frames(path, 2)
        with never_opened(other), suppress(video.UnreadableClip):
            sound.read_voice(path)


def grown(content: bytes, place: int, size: int, box: bytes) -> bytes:
    """An MP4 file, its index at the end, with the box at ``place`` replaced and the boxes around it made longer."""
    data = bytearray(content[:place] + box + content[place + size :])
    for found in re.finditer(rb"moov|trak|mdia|minf|dinf|dref", content):
        start = found.start() - 4
        length = struct.unpack(">I", content[start : start + 4])[0]
        if start < place < start + length:
            data[start : start + 4] = struct.pack(">I", length + len(box) - size)
    return bytes(data)


@on_linux
def test_mkv_segment_links_lead_to_no_other_file(clip, tmp_path):
    """Next and previous segment by name and by UID: the other file is never opened, the pictures are the clip's."""
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x48:r=10:d=3", tmp_path / "other.mkv")
    ffmpeg("-i", clip, "-c", "copy", tmp_path / "plain.mkv")
    content, other = (tmp_path / "plain.mkv").read_bytes(), (tmp_path / "other.mkv").read_bytes()
    place = other.index(bytes.fromhex("73a490"))  # its SegmentUID, 16 bytes
    uid, name = other[place + 3 : place + 19], b"other.mkv"
    links = b"".join(bytes.fromhex(kind) + bytes([0x80 | len(value)]) + value
                     for kind, value in [("3eb923", uid), ("3e83bb", name), ("3cb923", uid), ("3c83ab", name)])  # fmt: skip
    info = content.index(bytes.fromhex("1549a966")) + 4  # its size follows, in one byte or in eight
    width = 8 if content[info] == 1 else 1
    size = int.from_bytes(content[info : info + width], "big") + len(links)
    linked = content[:info] + size.to_bytes(width, "big") + links + content[info + width :]
    (tmp_path / "linked.mkv").write_bytes(linked)
    plain = isolation.read_frames(tmp_path / "plain.mkv", 10)
    with never_opened(tmp_path / "other.mkv"):
        frames = isolation.read_frames(tmp_path / "linked.mkv", 10)
        heard = sound.read_voice(tmp_path / "linked.mkv")
    assert np.array_equal(frames.images, plain.images) and frames.info.frame_count == 10
    assert np.array_equal(heard, sound.read_voice(tmp_path / "plain.mkv"))


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


needs_nobody = pytest.mark.skipif(not CAN_BE_NOBODY, reason="root has no such limits; setpriv is missing")
FEW_PROCESSES = """
import os, resource, sys
from kaggle_utils import extraction
from kaggle_utils.media import isolation
def read(spare):
    for look, much in ((extraction.listen, 16000), (extraction.look, 4)):
        try:
            print(spare, look(sys.argv[1], much)[0] is not None)
        except (OSError, RuntimeError) as error:
            print(spare, error)
read("before")
isolation.stop_reading()
here, hard = len(os.listdir("/proc/self/task")), resource.getrlimit(resource.RLIMIT_NPROC)[1]
for spare in (0, 1, 2, 3, 4, 6, 8, 10, 12):
    resource.setrlimit(resource.RLIMIT_NPROC, (here + spare, hard))
    read(spare)
resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
isolation.stop_reading()  # it was started within the limit
read("after")
"""


@needs_nobody
@on_linux
def test_a_limit_of_processes_costs_the_clips_of_its_time(clip, tmp_path):
    """Whichever process or thread is one too many: a reason comes of it, no hang, and later clips are read."""
    shutil.copy(clip, tmp_path / "clip.mp4")
    run = as_nobody(tmp_path, FEW_PROCESSES, tmp_path / "clip.mp4")
    said, errors = run.communicate(timeout=100)
    lines = said.splitlines()
    assert run.returncode == 0 and len(lines) == 22, errors
    assert lines[:2] == ["before True"] * 2 and lines[-2:] == ["after True"] * 2
    others = [line for line in lines if not re.fullmatch(r"\w+ (True|False)", line)]
    reasons = r"\d+ (can't start new thread|\[Errno 11\] Resource temporarily unavailable.*)"
    assert others and all(re.fullmatch(reasons, line) for line in others), others


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("can't start new thread"), "the system's limit of processes and threads is reached (ulimit -u)"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_system_without_a_thread_or_memory_left_is_one_line(monkeypatch, capsys, error, said):
    def run(options):
        raise error

    monkeypatch.setattr(command_line, "run_check", run)
    assert command_line.main(["check", "x"]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"


@needs_nobody
def test_two_users_share_a_temporary_folder(clip, tmp_path):
    """What one of them left, or holds at the moment, neither stops the other nor goes."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    own.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    for name in ("deepfake-clip.abcd1234.temporary", "deepfake-clip.abcd1235.temporary"):
        (shared / name).mkdir(0o700)
    shutil.copy(clip, own / "clip.mp4")
    program = "import sys; from kaggle_utils.media import isolation; print(len(isolation.read_frames(sys.argv[1], 4).images))"
    with disk.locked(shared / "out.csv"):
        run = as_nobody(own, program, own / "clip.mp4", TMPDIR=str(shared))
        assert run.communicate(timeout=60) == ("4\n", "") and run.returncode == 0
        program = "import sys; from pathlib import Path; from kaggle_utils import disk\nwith disk.locked(Path(sys.argv[1])): pass"
        held = as_nobody(own, program, shared / "out.csv").communicate(timeout=60)[1].splitlines()[-1]
    left = {path.name for path in shared.iterdir()}
    if os.geteuid() == 0:
        assert left == {"deepfake-clip.abcd1234.temporary", "deepfake-clip.abcd1235.temporary"}
        assert held.startswith("PermissionError") and "out.csv" in held


# --- many clips ---------------------------------------------------------------------------------------------
MANY, FIRST = (200, 20) if os.environ.get("DEEPFAKE_LONG") else (18, 9)


def test_memory_and_temporary_files_do_not_grow_from_clip_to_clip(clip, miniature, tmp_path, detector, monkeypatch):
    """Every third one has faces and a voice; ``DEEPFAKE_LONG=1`` makes it 200 clips of the miniature."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    some = sorted(miniature.glob("*_videos/*.mp4"))
    for number in range(MANY):
        source = some[number % len(some)] if MANY == 200 or number % 3 == 0 else clip
        shutil.copy(source, tmp_path / "clips" / f"{number:03}.mp4")
    held, files, examine = [], [], detector.examine_extract

    def measured(*parts):
        found = examine(*parts)
        me = psutil.Process()
        held.append(sum(one.memory_info().rss for one in (me, *me.children(recursive=True)) if one.is_running()))
        files.append(len(list((tmp_path / "tmp").iterdir())))
        return found

    monkeypatch.setattr(detector, "examine_extract", measured)
    table = detector.predict_folder(tmp_path / "clips", tmp_path / "out.csv", progress=False)
    print([f"{value / 2**20:.0f} MiB" for value in (held[FIRST - 1], held[-1])], max(files), files[-1])
    assert len(table) == len(held) == MANY and max(files[FIRST:]) <= max(files[:FIRST])
    assert not list((tmp_path / "tmp").glob("deepfake-*"))
    assert np.median(held[-5:]) - np.median(held[FIRST - 5 : FIRST]) < 100 * 2**20


def test_case_is_changed_the_same_in_every_language():
    """Python's str.lower ignores the locale, so that .AVI is a clip in Turkish, too; nothing else is used."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kaggle_utils").rglob("*.py")]
    assert not any("setlocale" in source or "strcoll" in source for source in sources)
    assert "A.AVI".lower() == "a.avi" and json.loads('{"I": 1}') == {"I": 1}
