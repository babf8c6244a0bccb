"""Training voices: recordings from many pages, folds that keep pages apart, and copies through codecs."""

import io
import multiprocessing
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.media.sound import SAMPLE_RATE, read_voice
from kaggle_utils.voice.signal import canonical, is_silent, to_mono

FOLDS = 5
COLUMNS = ["label", "system", "page", "speaker", "pair_key", "file"]
CODECS = {  # arguments of ffmpeg; in training, applied to both classes
    "aac_64": ["-c:a", "aac", "-b:a", "64k", "-f", "adts"],
    "aac_24": ["-c:a", "aac", "-b:a", "24k", "-f", "adts"],
    "opus_24": ["-c:a", "libopus", "-b:a", "24k", "-f", "ogg"],
    "opus_12": ["-c:a", "libopus", "-b:a", "12k", "-f", "ogg"],
    "mp3_128": ["-ar", "44100", "-c:a", "libmp3lame", "-b:a", "128k", "-f", "mp3"],
    "mp3_48": ["-c:a", "libmp3lame", "-b:a", "48k", "-f", "mp3"],
    "mp3_24": ["-c:a", "libmp3lame", "-b:a", "24k", "-f", "mp3"],
    "g722": ["-c:a", "g722", "-f", "wav"],
    "telephone": ["-af", "highpass=f=300,lowpass=f=3400", "-ar", "8000", "-c:a", "pcm_mulaw", "-f", "wav"],
    "11_khz": ["-ar", "11025", "-f", "wav"],
    "24_khz": ["-ar", "24000", "-f", "wav"],
    "slower": ["-af", "asetrate=14720,aresample=16000", "-f", "wav"],
    "faster": ["-af", "asetrate=17440,aresample=16000", "-f", "wav"],
    "denoised": ["-af", "afftdn=nr=20:nf=-40:tn=1", "-f", "wav"],
}


# --- corpora ------------------------------------------------------------------------------------------------
@dataclass
class Voices:
    """A table of voices and their samples, row by row.

    ``table``: ``label`` (0 REAL, 1 FAKE), ``system`` (spoofing system; "" for bona fide speech), ``page``
    (source repository or corpus), ``speaker``, ``pair_key`` (shared by spoofed and bona fide versions of an
    utterance, or ""), ``file``. ``samples``: int16 at ``rate`` Hz. ``copies``: the same voices through
    codecs.
    """

    table: pd.DataFrame
    samples: list[np.ndarray]
    rate: int = SAMPLE_RATE
    copies: list[list[np.ndarray]] | None = None

    def take(self, rows: np.ndarray) -> "Voices":
        """Only these rows."""
        copies = None if self.copies is None else [self.copies[row] for row in rows]
        table = self.table.iloc[rows].reset_index(drop=True)
        return Voices(table, [self.samples[row] for row in rows], self.rate, copies)

    def canonical(self, rate: int = SAMPLE_RATE) -> "Voices":
        """All voices at ``rate``, with the same band and level and trimmed ends (``signal.canonical``)."""
        return prepared(self, rate)

    def at(self, rate: int) -> "Voices":
        """Convert canonical voices and their copies to another rate."""
        if rate == self.rate:
            return self
        convert = partial(_prepared_at, self.rate, rate)
        copies = [[convert(copy) for copy in some] for some in self.copies or []] or None
        return Voices(self.table, [convert(samples) for samples in self.samples], rate, copies)

    def save(self, path: str | Path) -> None:
        """Write one npz file: the table, and all samples in one array."""
        copies = self.copies or [[] for _ in self.samples]
        parts = [*self.samples, *(copy for some in copies for copy in some)]
        table = self.table.to_json(orient="split")
        np.savez(
            path,
            table=table,
            rate=self.rate,
            samples=np.concatenate(parts),
            lengths=[len(part) for part in parts],
            copies=[len(some) for some in copies],
        )

    @classmethod
    def load(cls, path: str | Path) -> "Voices":
        with np.load(path, allow_pickle=False) as file:
            text = dict.fromkeys(("system", "page", "speaker", "pair_key", "file"), str)
            table = pd.read_json(io.StringIO(str(file["table"])), orient="split", dtype=text)
            parts = np.split(file["samples"], np.cumsum(file["lengths"])[:-1])
            counts, rate = file["copies"], int(file["rate"])
        ends = len(counts) + np.cumsum(counts)
        copies = [parts[end - count : end] for end, count in zip(ends, counts, strict=True)]
        return cls(table, parts[: len(counts)], rate, copies)


def read_voices(folder: str | Path) -> Voices:
    """Read the corpora that exist under ``folder``.

    ``systems/``: ``index.csv`` as ``corpus.build`` writes it, with the recordings beside it or in
    ``voices.tar``. ``neural/``: ``index.csv`` with ``generator`` and ``corpus``.
    ``bona_fide/SPEAKER-….flac``: LibriSpeech.

    Raises:
        FileNotFoundError: none of them exists.
        ValueError: a recording has another rate or several channels.
    """
    folder = Path(folder)
    tables = []
    if (folder / "systems" / "index.csv").is_file():
        tables.append(_read_index(folder / "systems").assign(folder="systems"))
    if (folder / "neural" / "index.csv").is_file():
        listed = _read_index(folder / "neural")
        tables.append(
            listed.assign(
                system=listed["generator"].where(listed["label"] == FAKE, ""),
                page="neural",
                pair_key="",
                speaker=listed["corpus"] + "-" + listed["speaker"],
                folder="neural",
            )
        )
    if names := sorted(path.name for path in (folder / "bona_fide").glob("*.flac")):
        tables.append(
            pd.DataFrame(
                {
                    "file": names,
                    "label": REAL,
                    "system": "",
                    "page": "LibriSpeech",
                    "pair_key": "",
                    "speaker": [name.partition("-")[0] for name in names],
                    "folder": "bona_fide",
                }
            )
        )
    if not tables:
        raise FileNotFoundError(f"{folder}: expected systems/index.csv, neural/index.csv or bona_fide/*.flac")
    table = pd.concat(tables, ignore_index=True)
    table["system"] = table["system"].str.removesuffix("_R")  # voicebox_R: its authors' own samples
    archives = {name: _archive(folder / name / "voices.tar") for name in table["folder"].unique()}
    places = zip(table["folder"], table["file"], strict=True)
    samples = [_read(folder / where / name, archives[where]) for where, name in places]
    return Voices(table[COLUMNS], samples)


def _read_index(folder: Path) -> pd.DataFrame:
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
    return index.assign(label=np.where(index["label"] == "bona_fide", REAL, FAKE))


def _archive(path: Path) -> dict[str, bytes]:
    """The files of an archive by name; empty if there is no archive."""
    if not path.is_file():
        return {}
    with tarfile.open(path) as archive:
        files = [member for member in archive if member.isfile()]
        return {Path(member.name).name: archive.extractfile(member).read() for member in files}


def _read(path: Path, archive: dict[str, bytes]) -> np.ndarray:
    import soundfile

    source = io.BytesIO(archive[path.name]) if path.name in archive else path
    read, rate = soundfile.read(source, dtype="int16")
    if rate != SAMPLE_RATE or read.ndim != 1:
        raise ValueError(f"{path}: found {rate} Hz, shape {read.shape}, expected {SAMPLE_RATE} Hz, mono")
    return read


def voices_of_clips(clips: pd.DataFrame) -> Voices:
    """Read the voices of clips, for a first run without a corpus.

    Args:
        clips: rows of ``dfdc.read_dfdc``. Silent clips are left out. An original and its fakes form a page.
    """
    rows, samples = [], []
    for clip in clips.itertuples():
        heard = read_voice(clip.path, seconds=10)
        if heard is not None and not is_silent(heard):
            original = getattr(clip, "original", None) or clip.filename
            fake = clip.label == "FAKE"
            rows.append(
                {
                    "label": FAKE if fake else REAL,
                    "system": "clips" if fake else "",
                    "page": original,
                    "speaker": Path(original).stem,
                    "pair_key": original,
                    "file": clip.filename,
                }
            )
            samples.append(to_int16(heard))
    if not rows:
        raise ValueError("expected a clip with a voice, found none")
    return Voices(pd.DataFrame(rows), samples)


# --- folds --------------------------------------------------------------------------------------------------
def folds(table: pd.DataFrame, count: int = FOLDS) -> np.ndarray:
    """The fold of each row, int (N,): a page belongs to one fold, and the folds are similar in size.

    Pages with spoofed voices come first, in descending order of their number, each into the fold that has the
    fewest so far. Pages without them follow in the same way, by their number of bona fide voices.
    """
    sizes = table.groupby("page")["label"].agg(fakes="sum", reals=lambda labels: (labels == REAL).sum())
    held, chosen = np.zeros((count, 2)), {}
    ordered = sizes.sort_values(["fakes", "reals"], ascending=False, kind="stable")
    for page, fakes, reals in ordered.itertuples():
        fold = min(range(count), key=lambda fold: tuple(held[fold] if fakes else held[fold][::-1]))
        held[fold] += fakes, reals
        chosen[page] = fold
    return table["page"].map(chosen).to_numpy()


def training_rows(table: pd.DataFrame, fold: np.ndarray, judged: int) -> np.ndarray:
    """Training rows for the evaluation of fold ``judged``: other pages, without the systems of that fold."""
    known = set(table.loc[fold == judged, "system"]) - {""}
    return np.flatnonzero((fold != judged) & ~table["system"].isin(known).to_numpy())


# --- canonical form, codecs ---------------------------------------------------------------------------------
def to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)


def prepared(
    voices: Voices,
    rate: int = SAMPLE_RATE,
    codecs: Sequence[str] = (),
    copies: int = 0,
    processes: int = 1,
    seed: int = 0,
) -> Voices:
    """Canonical voices at ``rate``, with ``copies`` of each through random ones of ``codecs``."""
    random = np.random.default_rng(seed)
    chosen = [random.choice(codecs, copies, replace=False) if copies else () for _ in voices.samples]
    made = [[] for _ in voices.samples]
    for codec in codecs if copies else ():
        rows = [row for row, some in enumerate(chosen) if codec in some]
        heard = recoded([voices.samples[row] for row in rows], codec, voices.rate, processes)
        for row, copy in zip(rows, heard, strict=True):
            made[row].append(copy)
    alike = partial(_prepared_at, voices.rate, rate)
    flat = iter(pooled(alike, [*voices.samples, *(copy for some in made for copy in some)], processes))
    canonical_ones = [next(flat) for _ in made]
    return Voices(voices.table, canonical_ones, rate, [[next(flat) for _ in some] for some in made])


def _prepared_at(rate: int, target_rate: int, samples: np.ndarray) -> np.ndarray:
    return to_int16(canonical(to_mono(samples, rate, target_rate), target_rate))


def pooled(function: Callable, work: list, processes: int) -> list:
    """Apply ``function`` to each item, in order, with this many processes."""
    if processes == 1:
        return [function(item) for item in work]
    return list(_pool(processes).map(function, work, chunksize=max(1, min(16, len(work) // processes))))


@cache
def _pool(processes: int) -> ProcessPoolExecutor:
    """Kept from call to call: a process takes seconds to start. A forked JAX may hang, hence spawn."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def recoded(
    samples: Sequence[np.ndarray], codec: str, rate: int = SAMPLE_RATE, processes: int = 1
) -> list[np.ndarray]:
    """Pass int16 voices through a codec of ``CODECS``, a hundred at a time as one stream with gaps."""
    parts = [samples[start : start + 100] for start in range(0, len(samples), 100)]
    heard = pooled(partial(_recoded, codec, rate), parts, min(processes, len(parts) or 1))
    return [voice for part in heard for voice in part]


def _recoded(codec: str, rate: int, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    gap = rate // 2
    stream = np.concatenate([np.pad(voice, (0, gap)) for voice in samples])
    raw = ["-f", "s16le", "-ar", str(rate), "-ac", "1"]
    heard = np.frombuffer(_run_ffmpeg(_run_ffmpeg(stream.tobytes(), raw, CODECS[codec]), [], raw), np.int16)
    stretch = len(heard) / len(stream)  # differs from 1 if the codec changes the speed
    ends = np.cumsum([len(voice) + gap for voice in samples])
    spans = [(end - gap - len(voice), end - gap // 2) for voice, end in zip(samples, ends, strict=True)]
    return [heard[round(start * stretch) : round(end * stretch)] for start, end in spans]


def _run_ffmpeg(data: bytes, read: list[str], write: list[str]) -> bytes:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", *read, "-i", "-", *write, "-"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def noisy(samples: np.ndarray, snr: float, seed: int = 0) -> np.ndarray:
    """Add white noise to int16 samples at a signal-to-noise ratio of ``snr`` dB."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    noise = np.random.default_rng(seed).standard_normal(len(samples)) * rms * 10 ** (-snr / 20)
    return to_int16((samples + noise) / 32768)
