"""Files that a full disk, a kill or a second run cannot damage."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from conftest import ROOT
from kaggle_utils import disk

needs_posix = pytest.mark.skipif(os.name != "posix", reason="locks and limits of POSIX")
HOLDS = """
import sys, time
from pathlib import Path
from kaggle_utils import disk
folder = Path(sys.argv[1])
with disk.locked(folder / "out.csv"), disk.writing(folder / "out.csv") as file, disk.temporary() as temporary:
    file.write(b"half")
    file.flush()
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that writes out.csv and holds its lock and a temporary folder: the process, the folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "deepfake" in path.name)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(RuntimeError), disk.writing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old" and leftovers(tmp_path) == []
    disk.replace(path, "neu: ü \udcff")
    assert path.read_bytes() == "neu: ü \\udcff".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@needs_posix
def test_links_are_followed_and_pipes_written(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    disk.replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    command = "from kaggle_utils import disk; disk.replace('/dev/stdout', 'page')"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "page"
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        disk.replace(tmp_path, "x")


@needs_posix
def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    command = (
        "import resource, sys; from kaggle_utils import disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); disk.replace(sys.argv[1], b'x' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", command, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert path.read_text() == "old" and leftovers(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/out\.csv"):
        disk.replace(tmp_path / "none" / "out.csv", "x")


@pytest.mark.parametrize("name", ["a" * 255, "a" * 251 + ".mp4", "ü" * 127, "あ" * 85, "a." + "b" * 253])
def test_every_name_fits(tmp_path, name):
    path = disk.fitting(tmp_path / f"{name}.npz")
    assert path != disk.fitting(tmp_path / f"{name[:-1]}c.npz")  # names stay different
    assert path.suffix == ".npz"
    disk.replace(path, "whole")
    disk.replace(tmp_path / name, "as the clip")
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 2


def test_short_names_stay_and_a_name_that_looks_cut_meets_no_other(tmp_path):
    assert disk.fitting(tmp_path / "a.mp4", ".npz") == tmp_path / "a.mp4.npz"
    long = disk.fitting(tmp_path / ("a" * 255), ".npz")
    assert disk.fitting(tmp_path / long.stem, ".npz") != long


@needs_posix
def test_a_second_run_learns_who_holds_the_output(holder, tmp_path):
    process, _ = holder
    expected = f"is being written by process {process.pid} of .* on .* since .*out.csv"
    with pytest.raises(BlockingIOError, match=expected), disk.locked(tmp_path / "out.csv"):
        pass
    own = tmp_path / "other.csv"  # a second run of this process, too
    with disk.locked(own), pytest.raises(BlockingIOError), disk.locked(own):
        pass


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_run_takes_over_and_sweeps(holder, tmp_path, number):
    process, temporary = holder
    strangers = [tmp_path / "tmp" / "deepfake-clip-main", tmp_path / "notes.partial"]
    strangers[0].mkdir()
    strangers[1].touch()
    disk.sweep(tmp_path)
    disk.sweep()
    assert len(leftovers(tmp_path)) == 2 and temporary.is_dir()  # in use
    process.send_signal(number)
    process.wait()
    with disk.locked(tmp_path / "out.csv"):
        disk.sweep(tmp_path)
        disk.sweep()
    assert leftovers(tmp_path) == [] and not temporary.exists()
    assert all(path.exists() for path in strangers)


@needs_posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can act as another user")
def test_what_another_user_left_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with disk.temporary() as folder:
        kept = tmp_path / folder.name.replace(".temporary", "")[:-1]
        kept = kept.with_name(kept.name + "_.temporary")
        kept.mkdir()
        os.chown(kept, 65534, 65534)
    (tmp_path / "deepfake-clip.12345678.temporary").symlink_to(kept)
    disk.sweep()
    assert kept.is_dir()


def test_temporary_folders_end_with_their_block(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), disk.temporary() as folder:
        (folder / "copy.mkv").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


@needs_posix
def test_where_nothing_can_be_locked_only_old_leftovers_go(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "fcntl", None)
    for name, age_s in {"new": 60.0, "old": 2 * disk.STALE_S}.items():
        path = tmp_path / f"{name}.csv.{'0' * 16}.deepfake-partial"
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    with disk.locked(tmp_path / "out.csv"):
        disk.sweep(tmp_path)
    assert leftovers(tmp_path) == [f"new.csv.{'0' * 16}.deepfake-partial"]
