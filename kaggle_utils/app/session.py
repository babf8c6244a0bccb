"""The temporary folder of a session: uploads and reports, deleted with the process, however it ends."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import disk

# The guard is a process of its own. Its standard input ends with the process that started it, also after a
# SIGKILL; a decoder that still writes into the folder has ended some seconds later.
GUARD = """
import os, shutil, sys, time
sys.stdin.read()
for attempt in range(20):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.5)
"""


@contextmanager
def session_folder() -> Iterator[Path]:
    """A new private folder. Decoders of this process also put their temporary files into it."""
    disk.sweep()
    with disk.temporary() as folder:
        command = [sys.executable, "-I", "-S", "-c", GUARD, str(folder)]
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, start_new_session=True)
        before = os.environ.get("TMPDIR")
        scratch = folder / "scratch"
        scratch.mkdir()
        os.environ["TMPDIR"], tempfile.tempdir = str(scratch), None
        try:
            yield folder
        finally:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before
            with suppress(OSError):
                guard.stdin.close()


def safe_name(name: str) -> str:
    """A stranger's file name without folders, control characters and halves of surrogate pairs."""
    name = re.split(r"[\\/]", name)[-1].encode("utf-8", "replace").decode("utf-8")
    name = "".join(letter for letter in name if letter.isprintable()).strip()
    return name if name.strip(". ") else "clip"
