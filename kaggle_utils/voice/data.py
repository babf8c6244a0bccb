"""Voices to learn from: corpora, their splits, copies through codecs."""

import importlib.util
import io
import multiprocessing
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd

from ..datasets.dfdc import FAKE, REAL
from ..media.sound import SAMPLE_RATE, read_voice
from . import vocoders
from .signal import canonical, is_silent, to_mono

BONA_FIDE = "bona_fide"  # the generator of what no generator made
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # shares of the speakers
ALWAYS_TRAIN = ("LJ", "unknown")  # the only speakers of some generators
CODECS = {  # arguments of ffmpeg; both classes get them in training
    "aac_64": ["-c:a", "aac", "-b:a", "64k", "-f", "adts"],
    "aac_24": ["-c:a", "aac", "-b:a", "24k", "-f", "adts"],
    "opus_24": ["-c:a", "libopus", "-b:a", "24k", "-f", "ogg"],
    "opus_12": ["-c:a", "libopus", "-b:a", "12k", "-f", "ogg"],
    "mp3_48": ["-c:a", "libmp3lame", "-b:a", "48k", "-f", "mp3"],
    "g722": ["-c:a", "g722", "-f", "wav"],
    "telephone": ["-af", "highpass=f=300,lowpass=f=3400", "-ar", "8000", "-c:a", "pcm_mulaw", "-f", "wav"],
}
PROMPTS_FOLDER = "/usr/share/asterisk/sounds"  # where Debian puts them
PROMPTS = {  # folder of each language: speaker and split
    "en_US_f_Allison": ("allison", "train"), "es_MX_f_Allison": ("allison", "train"), "fr_CA_f_June": ("june", "train"),
    "it_IT_m_Carlo": ("carlo", "test"), "ru_RU_f_IvrvoiceRU": ("ivrvoice", "validation"),
}
ONLY_TEST = ("VCTK",)  # corpora without bona fide speech here: in training, the corpus would tell the class


# --- corpora --------------------------------------------------------------------------------------------------------
@dataclass
class Voices:
    """A table of voices and their samples, row by row.

    ``table``: ``label`` (0 REAL, 1 FAKE), ``generator`` (``bona_fide`` or a vocoder or text-to-speech system),
    ``corpus``, ``speaker``, ``split``, ``source`` (row of the recording that a twin was made from, −1: none).
    ``samples``: int16 at ``rate`` Hz. ``copies``: the same voices through a codec, none to several for each.
    """

    table: pd.DataFrame
    samples: list[np.ndarray]
    rate: int = SAMPLE_RATE
    copies: list[list[np.ndarray]] | None = None

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.table["split"] == split)

    def take(self, rows: np.ndarray) -> "Voices":
        place = pd.Series(range(len(rows)), index=rows)
        table = self.table.iloc[rows].reset_index(drop=True)
        return Voices(table.assign(source=place.reindex(table["source"]).fillna(-1).astype(int).to_numpy()),
                      [self.samples[row] for row in rows], self.rate,
                      None if self.copies is None else [self.copies[row] for row in rows])

    def __add__(self, other: "Voices") -> "Voices":
        """Both, the rows of ``other`` last; copies through codecs are dropped."""
        table = other.table.assign(source=other.table["source"].where(other.table["source"] < 0, other.table["source"]
                                                                      + len(self.table)))
        return Voices(pd.concat([self.table, table], ignore_index=True), [*self.samples, *other.samples], self.rate)

    def canonical(self, rate: int = SAMPLE_RATE) -> "Voices":
        """All voices at ``rate``, alike in band, edges and level (``voice.canonical``)."""
        return prepared(self, rate)

    def at(self, rate: int) -> "Voices":
        """Canonical voices, and their copies, at another rate."""
        if rate == self.rate:
            return self
        convert = partial(_prepared_at, self.rate, rate)
        copies = None if self.copies is None else [[convert(copy) for copy in some] for some in self.copies]
        return Voices(self.table, [convert(samples) for samples in self.samples], rate, copies)

    def save(self, path: str | Path) -> None:
        """One npz: the table, and all samples one after the other."""
        copies = self.copies or [[] for _ in self.samples]
        parts = [*self.samples, *(copy for some in copies for copy in some)]
        np.savez(path, table=self.table.to_json(orient="split"), rate=self.rate, samples=np.concatenate(parts),
                 lengths=[len(part) for part in parts], copies=[len(some) for some in copies])

    @classmethod
    def load(cls, path: str | Path) -> "Voices":
        with np.load(path, allow_pickle=False) as file:
            table = pd.read_json(io.StringIO(str(file["table"])), orient="split", dtype={"speaker": str})
            parts = np.split(file["samples"], np.cumsum(file["lengths"])[:-1])
            counts, rate = file["copies"], int(file["rate"])
        ends = len(counts) + np.cumsum(counts)
        copies = [parts[end - count : end] for end, count in zip(ends, counts, strict=True)]
        return cls(table, parts[: len(counts)], rate, copies)


def to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)


def read_voices(folder: str | Path, seed: int = 0) -> Voices:
    """The corpora under ``folder``: ``bona_fide/SPEAKER-….flac`` (LibriSpeech) and ``neural/index.csv`` with its files.

    Split by person: LibriSpeech and LibriTTS name the same people, so that they share a split.
    """
    import soundfile

    folder = Path(folder)
    recorded = [{"path": path, "label": REAL, "generator": BONA_FIDE, "corpus": "LibriSpeech",
                 "speaker": path.name.partition("-")[0]} for path in sorted((folder / "bona_fide").glob("*.flac"))]
    index = pd.read_csv(folder / "neural" / "index.csv", dtype={"speaker": str})
    listed = pd.DataFrame({
        "path": [folder / "neural" / name for name in index["file"]],
        "label": np.where(index["label"] == BONA_FIDE, REAL, FAKE),
        "generator": index["generator"].where(index["label"] != BONA_FIDE, BONA_FIDE),
        "corpus": index["corpus"], "speaker": index["speaker"],
    })
    table = pd.concat([pd.DataFrame(recorded), listed], ignore_index=True)
    samples = []
    for path in table["path"]:
        read, rate = soundfile.read(path, dtype="int16")
        if rate != SAMPLE_RATE or read.ndim != 1:
            raise ValueError(f"{path}: found {rate} Hz, shape {read.shape}, expected {SAMPLE_RATE} Hz, one channel")
        samples.append(read)
    table = table.assign(file=[path.name for path in table["path"]], source=-1).drop(columns="path")
    return Voices(split_by_speaker(table, seed), samples)


def read_prompts(folder: str | Path, each: int = 14) -> Voices:
    """Telephone prompts in five languages, bona fide: the Debian packages ``asterisk-core-sounds-{en,es,fr,it,ru}-g722``.

    Four more speakers with another microphone and codec (CC BY-SA 3.0). Of each language ``each`` prompts of 2.6 s or
    more, their middle 4.5 s. One speaker validates, one tests.

    Args:
        folder: where the packages lie, ``/usr/share/asterisk/sounds``.
    """
    draw, rows, samples = Random(0), [], []
    for name, (speaker, split) in PROMPTS.items():
        files = sorted(Path(folder).glob(f"{name}/*.g722"), key=lambda path: (-path.stat().st_size, path.name))
        files = [path for path in files if path.stat().st_size > 2.6 * SAMPLE_RATE / 2]
        for path in sorted(draw.sample(files, min(each, len(files)))):
            sound = _run_ffmpeg(path.read_bytes(), ["-f", "g722"], ["-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1"])
            sound, longest = np.frombuffer(sound, np.int16), int(4.5 * SAMPLE_RATE)
            samples.append(sound[max(len(sound) - longest, 0) // 2 :][:longest])
            rows.append({"label": REAL, "generator": BONA_FIDE, "corpus": "Asterisk", "speaker": speaker,
                         "file": path.name, "source": -1, "split": split})
    if not rows:
        raise FileNotFoundError(f"{folder}: expected the prompts of asterisk-core-sounds-*-g722")
    return Voices(pd.DataFrame(rows), samples)


def voices_of_clips(clips: pd.DataFrame) -> Voices:
    """The voices of REAL clips, for a first run without a corpus; every fourth clip validates.

    Args:
        clips: rows of ``dataset.read_dfdc``; those without a voice are left out.
    """
    rows, samples = [], []
    for clip in clips[clips["label"] == "REAL"].itertuples():
        heard = read_voice(clip.path, seconds=10)
        if heard is not None and not is_silent(heard):
            rows.append({"label": REAL, "generator": BONA_FIDE, "corpus": "clips", "speaker": Path(clip.path).stem,
                         "file": clip.filename, "source": -1, "split": "train" if len(rows) % 4 else "validation"})
            samples.append(to_int16(heard))
    if not rows:
        raise ValueError("expected a REAL clip with a voice, found none")
    return Voices(pd.DataFrame(rows), samples)


def split_by_speaker(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Adds the column ``split``; no person is on two sides, whatever the corpus."""
    person = table["corpus"].str.replace("Libri.*", "Libri", regex=True) + "-" + table["speaker"]
    names = np.random.default_rng(seed).permutation(np.unique(person))
    edges = np.cumsum([round(share * len(names)) for share in SPLITS.values()])
    side = pd.Series(np.array(list(SPLITS))[np.searchsorted(edges[:-1], range(len(names)), side="right")], index=names)
    split = person.map(side)
    split = split.mask(table["speaker"].isin(ALWAYS_TRAIN), "train").mask(table["corpus"].isin(ONLY_TEST), "test")
    return table.assign(split=split)


def add_twins(voices: Voices, generators: Sequence[str], processes: int = 1, seed: int = 0) -> Voices:
    """Voices and the twin of each bona fide one by each of ``generators`` (keys of ``vocoders.GENERATORS``)."""
    sources = np.flatnonzero(voices.table["label"] == REAL)
    work = [(voices.samples[row], voices.rate, name, seed + int(row)) for name in generators for row in sources]
    tables = [voices.table.iloc[sources].assign(label=FAKE, generator=name, source=sources) for name in generators]
    made = _pooled(_twin, work, processes)
    return Voices(pd.concat([voices.table, *tables], ignore_index=True), [*voices.samples, *made], voices.rate)


def add_neural_twins(voices: Voices, names: Sequence[str] | None = None, seconds: float = 200.0,
                     report: Callable = print) -> Voices:
    """Voices and their twins by small neural vocoders, each trained for ``seconds`` on the training speakers (JAX).

    For each of ``names`` (keys of ``neural_vocoders.VOCODERS``; None: all) the twin of every bona fide voice
    (``NAME``), the same with the mel spectrogram of its recording (``NAME_mel``), and for a third of the voices one by
    the unfinished vocoder (``NAME_early``).
    """
    from . import neural_vocoders

    names = list(neural_vocoders.VOCODERS) if names is None else list(names)
    reals = np.flatnonzero(voices.table["label"] == REAL)
    spoken = {row: _at_level(voices.samples[row] / np.float32(32768)) for row in reals}
    for number, name in enumerate(names):
        vocoder = neural_vocoders.VOCODERS[name]
        heard = [to_mono(spoken[row], voices.rate, vocoder.rate) for row in reals
                 if voices.table["split"].iat[row] == "train"]
        heard = [samples for samples in heard if len(samples) > vocoder.segment]
        early, full = neural_vocoders.train_vocoder(vocoder, heard, seconds, number, report, early=0.3)
        for variant, network, rows in ((name, full, reals), (f"{name}_early", early, reals[number % 3 :: 3])):
            made = neural_vocoders.vocode(vocoder, network, [spoken[row] for row in rows], voices.rate, seed=number)
            voices = _with_twins(voices, rows, variant, made)
            if variant == name:
                fixed = [vocoders.mel_corrected(twin, spoken[row], voices.rate)
                         for twin, row in zip(made, rows, strict=True)]
                voices = _with_twins(voices, rows, f"{name}_mel", fixed)
    return voices


def _with_twins(voices: Voices, rows: np.ndarray, generator: str, made: list[np.ndarray]) -> Voices:
    table = voices.table.iloc[rows].assign(label=FAKE, generator=generator, source=rows)
    samples = [*voices.samples, *(to_int16(_at_level(twin)) for twin in made)]
    return Voices(pd.concat([voices.table, table], ignore_index=True), samples, voices.rate)


def _at_level(samples: np.ndarray) -> np.ndarray:
    """Float samples (T,) with an RMS of 0.07 of full scale, clipped at full scale."""
    rms = max(float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))), 1e-6)
    return np.clip(samples * np.float32(0.07 / rms), -1, 1)


def prepared(voices: Voices, rate: int = SAMPLE_RATE, codecs: Sequence[str] = (), copies: int = 0, processes: int = 1,
             seed: int = 0) -> Voices:
    """All voices at ``rate``, alike in band, edges and level (``voice.canonical``), and ``copies`` recoded ones of each."""
    random = np.random.default_rng(seed)
    chosen = [[None, *random.choice(codecs, copies, replace=False)] if copies else [None] for _ in voices.samples]
    work = [(samples, voices.rate, rate, codec)
            for samples, some in zip(voices.samples, chosen, strict=True) for codec in some]
    made = _pooled(_prepared, work, processes)
    made = [made[i : i + copies + 1] for i in range(0, len(made), copies + 1)]
    return Voices(voices.table, [some[0] for some in made], rate, [some[1:] for some in made])


def _twin(item: tuple) -> np.ndarray:
    samples, rate, generator, seed = item
    return to_int16(vocoders.copy_synthesis(samples / np.float32(32768), rate, generator, seed))


def _prepared(item: tuple) -> np.ndarray:
    samples, rate, target_rate, codec = item
    return _prepared_at(rate, target_rate, samples if codec is None else recode(samples, rate, codec))


def _prepared_at(rate: int, target_rate: int, samples: np.ndarray) -> np.ndarray:
    return to_int16(canonical(to_mono(samples, rate, target_rate), target_rate))


def _pooled(function: Callable, work: list, processes: int) -> list:
    if processes == 1:
        return [function(item) for item in work]
    context = multiprocessing.get_context("spawn")  # a forked JAX may hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(function, work, chunksize=max(1, min(16, len(work) // processes))))


def recode(samples: np.ndarray, rate: int, codec: str) -> np.ndarray:
    """int16 samples through a codec of ``CODECS`` and back."""
    raw = ["-f", "s16le", "-ar", str(rate), "-ac", "1"]
    return np.frombuffer(_run_ffmpeg(_run_ffmpeg(samples.tobytes(), raw, CODECS[codec]), [], raw), np.int16)


def _run_ffmpeg(data: bytes, read: list[str], write: list[str]) -> bytes:
    from moviepy.config import FFMPEG_BINARY

    command = [FFMPEG_BINARY, "-v", "error", *read, "-i", "-", *write, "-"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def noisy(samples: np.ndarray, snr: float, seed: int = 0) -> np.ndarray:
    """int16 samples with white noise ``snr`` dB under them."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    noise = np.random.default_rng(seed).standard_normal(len(samples)) * rms * 10 ** (-snr / 20)
    return to_int16((samples + noise) / 32768)

# --- named runs -----------------------------------------------------------------------------------------------------
CLASSICAL = ("griffin_lim", "linear_prediction", "phase_vocoder", "world")


def make_corpus(data: str | Path, prompts: str | Path | None = None, seconds: float = 200.0, processes: int = 1) -> Voices:
    """All voices of a full run at 16 kHz: corpora, classical and neural twins, copies through codecs. Needs JAX.

    Args:
        data: holds ``bona_fide`` and ``neural``. prompts: see :func:`read_prompts`; None: without them.
        seconds: of training for each neural vocoder.
    """
    recorded = read_voices(data)
    if prompts is not None:
        recorded += read_prompts(prompts)
    families = [name for name in CLASSICAL if name != "world" or importlib.util.find_spec("pyworld")]
    classical = [name for name in vocoders.GENERATORS if vocoders.family(name) in families]
    voices = add_neural_twins(add_twins(recorded, classical, processes), seconds=seconds)
    voices = prepared(voices, codecs=list(CODECS), copies=1, processes=processes)
    return voices.take(np.flatnonzero([len(samples) > voices.rate for samples in voices.samples]))  # a vocoder may fail
