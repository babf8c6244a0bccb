"""Files that a full disk, a kill or a second run cannot damage: written aside, locked, and swept afterwards.

The lock of an open file (``flock``) tells a file in use from one that a killed run left: the kernel releases
it with the process. Without ``flock``, as on Windows, nothing is locked, and only leftovers of more than a
day are swept.
"""

import getpass
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PARTIAL = re.compile(r".*\.[0-9a-f]{16}\.deepfake-partial", re.DOTALL)  # the names of partial files
TEMPORARY = re.compile(r"deepfake-clip\.\w{8}\.temporary")  # the names of temporary folders
CUT = re.compile(r"~[0-9a-f]{12}(\.|$)")  # a name that fitting() has cut
LONGEST_NAME = 255  # bytes, where the file system does not say
STALE_S = 24 * 3600.0  # a leftover this old is stale even if nothing tells whether it is in use


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to a disk error; a full disk does not report it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


# --- writing ------------------------------------------------------------------------------------------------
@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends without an error.

    Another reader sees the old or the new content, never a mixture; an error leaves the old file. A link is
    followed. A device or a pipe, such as ``/dev/stdout``, is written directly.

    Raises:
        OSError: names ``path``, as do the block's own disk errors.
    """
    path = Path(path)
    with named(path):
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        partial = fitting(target, f".{secrets.token_hex(8)}.deepfake-partial")
        try:
            with os.fdopen(_held(partial), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def replace(path: str | Path, content: bytes | str) -> None:
    """Write a whole file as :func:`writing` does; text in UTF-8, undecodable bytes of file names escaped."""
    with writing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def fitting(path: Path, ending: str = "") -> Path:
    """``path`` with ``ending`` added to its name, which is cut if the file system could not hold it.

    A digest in a cut name keeps different names different.
    """
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        longest = LONGEST_NAME
    name = os.fsencode(path.name)
    if len(name) + len(ending) <= longest and not CUT.search(path.name):
        return path.with_name(path.name + ending)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= 16 else ""
    mark = f"~{hashlib.sha256(name).hexdigest()[:12]}{suffix}{ending}"
    start = os.fsdecode(name[: max(0, longest - len(os.fsencode(mark)))])
    return path.with_name(start.encode("utf-8", "ignore").decode("utf-8") + mark)


def printable(text: str) -> str:
    """``text`` with its control, direction and undecodable characters escaped, for terminals and pictures."""
    return "".join(mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
                   for mark in text)


# --- locks --------------------------------------------------------------------------------------------------
@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs from an output: the file NAME.deepfake-lock beside it says who holds it.

    The lock of a run that was killed is taken over.

    Raises:
        BlockingIOError: another run holds it; names that run.
    """
    lock = fitting(path, ".deepfake-lock")
    with named(path):
        try:
            file = _held(lock)
        except BlockingIOError as error:
            holder = lock.read_text(encoding="utf-8", errors="replace").strip() or "another run"
            raise BlockingIOError(error.errno, f"is being written by {holder}") from error
    try:
        holder = f"process {os.getpid()} of {_user()} on {platform.node()} since {time.strftime('%F %T')}"
        with named(path):
            os.truncate(file, 0)
            os.write(file, holder.encode())
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock)
        os.close(file)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "an unnamed user"


def _held(path: Path) -> int:
    """A descriptor of ``path``, created if missing, with its lock.

    Raises:
        BlockingIOError: another process has the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(file)
            with suppress(FileNotFoundError):  # removed or replaced by its former holder meanwhile
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file; False where the file system or the operating system has no locks.

    Raises:
        BlockingIOError: another process has the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


# --- temporary files ----------------------------------------------------------------------------------------
@contextmanager
def temporary() -> Iterator[Path]:
    """A temporary folder, removed when the block ends; :func:`sweep` removes it after a kill."""
    folder = Path(tempfile.mkdtemp(".temporary", "deepfake-clip."))
    file = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if file is not None:
            _lock(file)
        folder.mkdir(0o700, exist_ok=True)  # another run may have swept it before it was locked
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if file is not None:
            os.close(file)


def sweep(folder: str | Path | None = None) -> None:
    """Remove the leftovers of this user's killed runs.

    Args:
        folder: of partial files; None: of temporary folders, the system's.
    """
    names, remove = (PARTIAL, os.unlink) if folder else (TEMPORARY, shutil.rmtree)
    with suppress(OSError), os.scandir(folder or tempfile.gettempdir()) as entries:
        for entry in entries:
            if names.fullmatch(entry.name):
                with suppress(OSError):
                    if _is_stale(entry):
                        remove(entry.path)


def _is_stale(entry: os.DirEntry) -> bool:
    """Whether a leftover belongs to this user and to no living process."""
    found = entry.stat(follow_symlinks=False)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return False
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return False
    file = os.open(entry.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        return _lock(file) or time.time() - found.st_mtime > STALE_S
    except BlockingIOError:
        return False
    finally:
        os.close(file)
