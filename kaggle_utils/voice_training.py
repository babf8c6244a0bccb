"""Train the voice networks: corpora split by speaker, spoofed twins, channel effects on the device, evaluation.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas, scipy and soundfile. Start with
:func:`read_voices`, :func:`add_twins` and :func:`train_voice`.
"""

import io
import json
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from . import networks, vocoders
from .dataset import FAKE, REAL
from .metrics import auc, equal_error_rate, log_loss
from .training import PlanEpochs, WarmupCosine, averaged_weights, dtype_policy, fast_policy, sigmoid
from .voice import REFERENCE_RATE, REFERENCE_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, canonical, to_mono, windows

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

    def canonical(self, rate: int = SAMPLE_RATE) -> "Voices":
        """All voices at ``rate``, alike in band, edges and level (``voice.canonical``)."""
        return prepared(self, rate)

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
    if codec is not None:
        samples = recode(samples, rate, codec)
    return to_int16(canonical(to_mono(samples, rate, target_rate), target_rate))


def _pooled(function: Callable, work: list, processes: int) -> list:
    if processes == 1:
        return [function(item) for item in work]
    context = multiprocessing.get_context("spawn")  # a forked JAX may hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(function, work, chunksize=max(1, min(16, len(work) // processes))))


def recode(samples: np.ndarray, rate: int, codec: str) -> np.ndarray:
    """int16 samples through a codec of ``CODECS`` and back."""
    from moviepy.config import FFMPEG_BINARY

    raw = ["-f", "s16le", "-ar", str(rate), "-ac", "1"]
    run = partial(subprocess.run, capture_output=True, check=True)
    coded = run([FFMPEG_BINARY, "-v", "error", *raw, "-i", "-", *CODECS[codec], "-"], input=samples.tobytes()).stdout
    decoded = run([FFMPEG_BINARY, "-v", "error", "-i", "-", *raw, "-"], input=coded).stdout
    return np.frombuffer(decoded, np.int16)


def noisy(samples: np.ndarray, snr: float, seed: int = 0) -> np.ndarray:
    """int16 samples with white noise ``snr`` dB under them."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    noise = np.random.default_rng(seed).standard_normal(len(samples)) * rms * 10 ** (-snr / 20)
    return to_int16((samples + noise) / 32768)


# --- feeding --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VoiceSettings:
    """What a training run of a voice network depends on.

    Attributes:
        name: of the run and its files.
        network, network_options: a function of ``networks`` and its arguments; gets a dense 1 as its head.
        epochs, steps: an epoch is ``steps`` batches. batch_size: even, half of it spoofed.
        weights: share of each family of generators among the spoofed voices; 1 where not named, 0 leaves it out.
        augment: arguments of :class:`ChannelAugment`; None: no channel effects.
        recoded: share of the voices that are heard through a codec, where there are copies.
        shortened: share of the voices that are cut to half a window or more, and repeated.
        average: decay of the exponential moving average of the weights, which is what is kept; None: the last weights.
        policy: dtype policy; None: the fastest of this machine.
    """

    name: str = "voice_inception"
    network: str = "voice_inception"
    network_options: dict = field(default_factory=dict)
    epochs: int = 20
    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.02
    average: float | None = 0.995
    weights: dict = field(default_factory=dict)
    augment: dict | None = field(default_factory=dict)
    recoded: float = 0.4
    shortened: float = 0.3
    seed: int = 0
    policy: str | None = None

    @property
    def reference(self) -> bool:
        """Whether the network is the study's, which hears 8 kHz."""
        return self.network == "voice_cnn"

    @property
    def rate(self) -> int:
        return REFERENCE_RATE if self.reference else SAMPLE_RATE

    @property
    def length(self) -> int:
        return REFERENCE_SAMPLES if self.reference else WINDOW_SAMPLES


class VoiceBatches(keras.utils.PyDataset):
    """Balanced batches: each spoofed voice beside the recording it was made from, or one of the same corpus.

    A batch depends on the seed, the epoch and its number alone. Set ``epoch`` before the epoch begins.
    """

    def __init__(self, voices: Voices, rows: np.ndarray, settings: VoiceSettings, workers: int = 4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        self.voices, self.settings, self.epoch = voices, settings, 0
        table = voices.table.iloc[rows]
        self.reals = rows[table["label"] == REAL]
        families = table["generator"].map(vocoders.family)
        weight = families.map(settings.weights).fillna(1.0) / families.map(families.value_counts())
        self.fakes = rows[(table["label"] == FAKE) & (weight > 0)]
        if not len(self.reals) or not len(self.fakes):
            raise ValueError(f"expected bona fide and spoofed voices, found {len(self.reals)} and {len(self.fakes)}")
        chosen = weight.to_numpy()[np.isin(rows, self.fakes)]
        self.weight = chosen / chosen.sum()
        corpus = voices.table["corpus"]
        self.of_corpus = {name: self.reals[corpus.iloc[self.reals] == name] for name in corpus.unique()}

    @property
    def num_batches(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """int16 (batch_size, length) and labels float32 (batch_size, 1)."""
        random = np.random.default_rng([self.settings.seed, self.epoch, index])
        fakes = random.choice(self.fakes, self.settings.batch_size // 2, p=self.weight)
        rows = np.concatenate([fakes, [self._recording(row, random) for row in fakes]])
        samples = np.stack([self._window(self._version(row, random), random) for row in rows])
        return samples, self.voices.table["label"].to_numpy(np.float32)[rows][:, None]

    def _recording(self, fake: int, random: np.random.Generator) -> int:
        source, corpus = self.voices.table["source"].iat[fake], self.voices.table["corpus"].iat[fake]
        if source >= 0:
            return source
        of_corpus = self.of_corpus[corpus]
        return random.choice(of_corpus if len(of_corpus) else self.reals)

    def _version(self, row: int, random: np.random.Generator) -> np.ndarray:
        copies = self.voices.copies[row] if self.voices.copies else []
        if len(copies) and random.random() < self.settings.recoded:
            return copies[random.integers(len(copies))]
        return self.voices.samples[row]

    def _window(self, samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        length = self.settings.length
        kept = length if random.random() > self.settings.shortened else random.integers(length // 2, length)
        start = random.integers(max(len(samples) - kept, 0) + 1)
        return np.resize(samples[start : start + kept], length)


@keras.saving.register_keras_serializable("kaggle_utils")
class ChannelAugment(keras.layers.Layer):
    """What recording and transmission do to a voice, drawn anew for each one and alike for both classes.

    int16 (n, T) -> float32 (n, T), RMS −26 dBFS. In training: an equaliser of up to ``equaliser`` dB, the telephone
    band or a low-pass at 3.4 to 7.5 kHz, coloured noise ``snr`` dB under the voice, clipping, a flipped sign.

    Args:
        rate: of the samples, in Hz.
        equaliser: dB. snr: lowest and highest, dB.
        band, noise, clip: shares of the voices that get it.
    """

    def __init__(self, rate: int = SAMPLE_RATE, equaliser: float = 6.0, snr: tuple[float, float] = (8.0, 40.0),
                 band: float = 0.3, noise: float = 0.5, clip: float = 0.1, enabled: bool = True, seed: int | None = None,
                 **kwargs):
        super().__init__(autocast=False, **kwargs)  # half precision would ruin the samples
        self.settings = {"rate": rate, "equaliser": equaliser, "snr": tuple(snr), "band": band, "noise": noise,
                         "clip": clip, "enabled": enabled}
        self.seed, self.random = seed, keras.random.SeedGenerator(seed)

    def get_config(self):
        return {**super().get_config(), **self.settings, "seed": self.seed}

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, samples, training=False):
        x = ops.cast(samples, "float32") / 32768.0
        if not training or not self.settings["enabled"]:
            return x
        count, length = ops.shape(x)[0], samples.shape[1]
        frequency = np.fft.rfftfreq(length, 1 / self.settings["rate"]).astype(np.float32)[None]
        x = self._filtered(x, self._response(count, frequency), length)
        limit = self._uniform(count, 1.5, 4.0) * _rms(x)
        x = ops.where(self._some(count, "clip"), ops.clip(x, -limit, limit), x)
        colour = (frequency + 50.0) ** -self._uniform(count, 0.0, 1.0)
        noise = self._filtered(keras.random.normal((count, length), seed=self.random), colour, length)
        level = 10.0 ** (-self._uniform(count, *self.settings["snr"]) / 20)
        level = ops.where(self._some(count, "noise"), level, 0.0)
        x = x + noise * (level * _rms(x) / _rms(noise))
        sign = ops.where(self._uniform(count, 0.0, 1.0) < 0.5, -1.0, 1.0)
        return x * (sign * 0.05 / _rms(x))

    def _response(self, count, frequency):
        """Gain (count, bins): a smooth random equaliser and, for some, a band limit."""
        place = np.log2(np.maximum(frequency, 50.0) / 50.0)  # octaves
        db = 0.0
        for octaves in (1.5, 3.0, 6.0):
            phase = self._uniform(count, 0.0, 2 * np.pi)
            db = db + self._uniform(count, -1.0, 1.0) * ops.sin(2 * np.pi * place / octaves + phase)
        top = self._uniform(count, 3400.0, 0.47 * self.settings["rate"])
        bottom = ops.where(self._uniform(count, 0.0, 1.0) < 0.5, 300.0, 20.0)
        limited = ops.sigmoid((top - frequency) / 60.0) * ops.sigmoid((frequency - bottom) / 20.0)
        limited = ops.where(self._some(count, "band"), limited, 1.0)
        return limited * 10.0 ** (db * self.settings["equaliser"] / 60.0)

    def _filtered(self, x, response, length):
        real, imaginary = ops.rfft(x)
        return ops.irfft((real * response, imaginary * response), fft_length=length)

    def _uniform(self, count, low, high):
        return keras.random.uniform((count, 1), low, high, seed=self.random)

    def _some(self, count, what):
        return self._uniform(count, 0.0, 1.0) < self.settings[what]


def _rms(x):
    return ops.sqrt(ops.mean(ops.square(x), axis=1, keepdims=True) + 1e-10)


# --- runs -----------------------------------------------------------------------------------------------------------
@dataclass
class VoiceRun:
    """A finished run: the float32 network with the averaged weights, its history, a score of every voice."""

    settings: VoiceSettings
    network: keras.Model
    history: pd.DataFrame
    scores: pd.DataFrame


def build_voice_network(settings: VoiceSettings, policy: str = "float32") -> keras.Model:
    """The network of ``settings`` with its head: samples -> a dict with ``logit`` (1)."""
    with dtype_policy(policy):
        return networks.with_head(getattr(networks, settings.network)(**settings.network_options))


def make_trainer(network: keras.Model, settings: VoiceSettings) -> tuple:
    """Compile channel effects and ``network`` as one model; returns it and the variable of planned steps."""
    samples = keras.Input((settings.length,), dtype="int16", name="window")
    x = ChannelAugment(settings.rate, enabled=settings.augment is not None, seed=settings.seed,
                       **(settings.augment or {}))(samples)
    x = keras.layers.Reshape(network.input_shape[1:], dtype="float32")(x)
    logit = keras.layers.Activation("linear", dtype="float32")(network(x)["logit"])
    optimizer = keras.optimizers.AdamW(settings.learning_rate, weight_decay=settings.weight_decay, clipnorm=5.0,
                                       use_ema=settings.average is not None, ema_momentum=settings.average or 0.99)
    planned = optimizer.add_variable((), initializer="zeros", dtype="float32", name="planned_steps")
    planned.assign(settings.steps * settings.epochs)
    optimizer.learning_rate = WarmupCosine(settings.learning_rate, settings.steps, planned)
    trainer = keras.Model(samples, logit, name=f"{network.name}_trainer")
    trainer.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing))
    return trainer, planned


def predict_logits(network: keras.Model, voices: Voices, rows: np.ndarray, length: int, batch: int = 64) -> np.ndarray:
    """Logit of each voice, the mean over its windows: float32 (len(rows),)."""
    cut = [windows(voices.samples[row] / np.float32(32768), length) for row in rows]
    inputs = np.concatenate(cut).reshape(-1, *network.input_shape[1:])
    logits = network.predict(inputs, batch_size=batch, verbose=0)["logit"][:, 0]
    return np.array([part.mean() for part in np.split(logits, np.cumsum([len(part) for part in cut])[:-1])], np.float32)


def score_voices(network: keras.Model, voices: Voices, rows: np.ndarray, length: int) -> pd.DataFrame:
    """These rows of the table with the column ``logit``."""
    return voices.table.iloc[rows].assign(logit=predict_logits(network, voices, rows, length), row=rows)


def train_voice(settings: VoiceSettings, voices: Voices, folder: str | Path, minutes: float | None = None,
                workers: int = 4) -> VoiceRun:
    """Train a voice network and score the speakers, and the generators left out, that it never heard.

    Args:
        settings: of the run.
        voices: canonical, at ``settings.rate``.
        folder: gets ``NAME.weights.npz`` (float16), ``NAME.history.csv``, ``NAME.scores.csv``, ``NAME.json``.
        minutes: limit on the wall clock; fewer epochs are planned when they would not fit.
        workers: threads that gather batches.
    """
    if voices.rate != settings.rate:
        raise ValueError(f"voices: found {voices.rate} Hz, expected {settings.rate} Hz for {settings.network}")
    began, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    policy = settings.policy or fast_policy()
    keras.utils.set_random_seed(settings.seed)
    network, scorer = build_voice_network(settings, policy), build_voice_network(settings)
    batches = VoiceBatches(voices, voices.rows("train"), settings, workers)
    trainer, planned = make_trainer(network, settings)
    watched = voices.rows("validation")
    labels = voices.table["label"].to_numpy()[watched]

    def validate(epoch: int) -> dict:
        if len(np.unique(labels)) < 2 or epoch % 2 == 0:
            return {}
        scorer.set_weights(averaged_weights(trainer, network) if settings.average else network.get_weights())
        logits = predict_logits(scorer, voices, watched, settings.length)
        return {"val_loss": log_loss(labels, sigmoid(logits)), "val_eer": equal_error_rate(labels, sigmoid(logits))}

    deadline = began + 60 * minutes if minutes is not None else None
    plan = PlanEpochs(batches, planned, settings.epochs, deadline, validate)
    trainer.fit(batches, epochs=settings.epochs, callbacks=[plan], verbose=0)
    scorer.set_weights(network.get_weights())  # fit has put the average in place
    scores = score_voices(scorer, voices, unheard(voices, settings), settings.length)
    run = VoiceRun(settings, scorer, pd.DataFrame(plan.history), scores)
    save_run(run, folder, {"policy": policy, "minutes": (time.monotonic() - began) / 60})
    return run


def unheard(voices: Voices, settings: VoiceSettings) -> np.ndarray:
    """Rows that a run is judged on: speakers outside the training split, and what left-out generators said."""
    left_out = voices.table["generator"].map(vocoders.family).map(settings.weights).eq(0)
    without_twins = left_out & (voices.table["source"] < 0)
    return np.flatnonzero((voices.table["split"] != "train") | without_twins)


def by_generator(scores: pd.DataFrame) -> pd.DataFrame:
    """EER and AUC of each generator against all bona fide voices of ``scores``, and of all together."""
    real = scores[scores["label"] == REAL]
    groups = {"all": scores[scores["label"] == FAKE], **dict(list(scores[scores["label"] == FAKE].groupby("generator")))}
    lines = {}
    for name, fakes in groups.items():
        both = pd.concat([real, fakes])
        labels, probabilities = both["label"].to_numpy(), sigmoid(both["logit"].to_numpy())
        lines[name] = {"voices": len(fakes), "eer": equal_error_rate(labels, probabilities),
                       "auc": auc(labels, probabilities)}
    return pd.DataFrame(lines).T


def save_run(run: VoiceRun, folder: Path, extra: dict) -> None:
    """Write weights (float16), history, scores, settings and figures of a run."""
    name = run.settings.name
    np.savez(folder / f"{name}.weights.npz",
             **{f"w{i}": weight.astype(np.float16) for i, weight in enumerate(run.network.get_weights())})
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    run.scores.to_csv(folder / f"{name}.scores.csv", index=False, float_format="%.5f")
    figures = {split: by_generator(scores).round(4).to_dict("index") for split, scores in run.scores.groupby("split")
               if scores["label"].nunique() == 2}
    summary = {"settings": asdict(run.settings), "epochs": len(run.history), "keras": keras.__version__,
               "backend": keras.backend.backend(), **extra, **figures}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def load_run(path: str | Path, settings: VoiceSettings) -> keras.Model:
    """The float32 network of a saved ``NAME.weights.npz``."""
    network = build_voice_network(settings)
    with np.load(path, allow_pickle=False) as file:
        network.set_weights([file[f"w{i}"].astype(np.float32) for i in range(len(file.files))])
    return network


# --- the study's network --------------------------------------------------------------------------------------------
REFERENCE = VoiceSettings(name="voice_cnn", network="voice_cnn", epochs=60, steps=100, batch_size=32,
                          learning_rate=3e-4, shortened=0.0)
