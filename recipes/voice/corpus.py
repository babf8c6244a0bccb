"""Build the corpus of voices from clones of public repositories, as listed in ``recordings.csv``.

This manifest holds only facts: the location and the kind of each recording. Each recording keeps its own
licence.
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.media.sound import SAMPLE_RATE, UnreadableClip, read_voice

MANIFEST = Path(__file__).with_name("recordings.csv")
COLUMNS = ["repository", "commit", "path", "label", "system", "speaker", "language", "licence", "pair_key"]
SECONDS = 4.0  # kept from the middle of each recording


def read_manifest(path: str | Path = MANIFEST) -> pd.DataFrame:
    """Read the list of recordings: ``COLUMNS``, all text.

    ``label`` is ``bona_fide`` or ``spoof``; ``system`` names the system that made a spoof.

    Raises:
        ValueError: a column is missing, or a label is unknown.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := set(COLUMNS) - set(table):
        raise ValueError(f"{path}: expected the columns {', '.join(sorted(missing))}")
    if odd := set(table["label"]) - {"bona_fide", "spoof"}:
        raise ValueError(f"{path}: found the labels {', '.join(sorted(odd))}, expected bona_fide and spoof")
    return table


def build(clones: str | Path, output: str | Path, manifest: str | Path = MANIFEST) -> pd.DataFrame:
    """Write the available recordings as mono FLAC at 16 kHz, with ``index.csv`` for ``data.read_voices``.

    Args:
        clones: holds a git clone of each repository, bare or not, under ``OWNER/NAME``.
        output: gets ``NNNN.flac`` (up to 4 s from the middle, silence at the ends cut) and ``index.csv``.

    Returns:
        The rows that are missing, with the column ``reason``.
    """
    import soundfile

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    table, written, missing = read_manifest(manifest), [], []
    for number, row in enumerate(tqdm(table.to_dict("records"), unit="recording")):
        try:
            samples = _middle(_recording(Path(clones) / row["repository"], row["commit"], row["path"]))
        except (FileNotFoundError, UnreadableClip) as error:
            missing.append(row | {"reason": str(error)})
            continue
        name = f"{number:04d}.flac"
        soundfile.write(output / name, samples, SAMPLE_RATE)
        written.append({"file": name, "page": row["repository"]} | row)
    pd.DataFrame(written, columns=["file", "page", *COLUMNS]).to_csv(output / "index.csv", index=False)
    return pd.DataFrame(missing, columns=[*COLUMNS, "reason"])


def _recording(clone: Path, commit: str, path: str) -> np.ndarray:
    """Read the sound of a file in a commit, float32 (T,) at 16 kHz.

    Raises:
        FileNotFoundError: clone, commit or file is missing, or Git LFS stores the file.
        UnreadableClip: the file has no sound.
    """
    shown = subprocess.run(["git", "-C", str(clone), "show", f"{commit}:{path}"], capture_output=True)
    if shown.returncode:
        raise FileNotFoundError(f"{clone}: {shown.stderr.decode(errors='replace').strip()}")
    if shown.stdout.startswith(b"version https://git-lfs"):
        raise FileNotFoundError(f"{clone}: {path} is stored in Git LFS")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"recording{Path(path).suffix}"
        file.write_bytes(shown.stdout)
        samples = read_voice(file)
    if samples is None or not samples.any():
        raise UnreadableClip(file.name, f"no sound in {path}")
    return samples


def _middle(samples: np.ndarray) -> np.ndarray:
    """Trim zeros at the ends and keep at most ``SECONDS`` from the middle."""
    heard = np.flatnonzero(samples)
    samples, longest = samples[heard[0] : heard[-1] + 1], int(SECONDS * SAMPLE_RATE)
    return samples[max(len(samples) - longest, 0) // 2 :][:longest]
