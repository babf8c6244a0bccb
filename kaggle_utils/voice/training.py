"""Train the voice networks: folds of pages, balanced batches, channel effects on the device.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas, scipy and soundfile. Start with
``data.read_voices``, ``data.prepared`` and :func:`train_voice`.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from .. import blocks, storage
from ..datasets.dfdc import FAKE, REAL
from ..media.sound import REFERENCE_RATE, REFERENCE_SAMPLES, SAMPLE_RATE
from ..training import PlanEpochs, WarmupCosine, dtype_policy, fast_policy
from . import networks
from .data import CODECS, Voices, folds, prepared, read_voices, training_rows
from .signal import WINDOW_SAMPLES, windows


# --- feeding --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VoiceSettings:
    """What a training run of a voice network depends on.

    Attributes:
        name: of the run and its files.
        network, network_options: a function of ``networks`` and its arguments; gets a dense 1 as its head.
        epochs, steps: an epoch is ``steps`` batches. batch_size: even, half of it spoofed.
        same_utterance, same_page: shares of the spoofed voices that stand beside bona fide speech of their
            ``pair_key`` and, of the others, of their page, where there is any; the rest stand beside any page's.
        augment: arguments of :class:`ChannelAugment`; None: no channel effects.
        recoded: share of the voices that are heard through a codec, where there are copies.
        shortened: share of the voices that are cut to half a window or more, and repeated.
        average: decay of the exponential moving average of the weights, which is what is kept; None: the last weights.
        policy: dtype policy; None: the fastest of this machine.
    """

    name: str = "lfcc"
    network: str = "voice_inception"
    network_options: dict = field(default_factory=dict)
    epochs: int = 20
    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 2e-2
    label_smoothing: float = 0.05
    average: float | None = 0.998
    same_utterance: float = 0.5
    same_page: float = 0.7
    augment: dict | None = field(default_factory=dict)
    recoded: float = 0.6
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
        return REFERENCE_SAMPLES if self.reference else self.network_options.get("samples", WINDOW_SAMPLES)


def shares(table: pd.DataFrame) -> np.ndarray:
    """Chance of each spoofed voice of ``table`` to be drawn, float (N,), 0 for bona fide speech.

    The systems of a page share the square root of their number, the voices of a system on a page share its part: a page
    with fourteen systems weighs less than fourteen pages, and a system with many files no more than one with few.
    """
    fake = table["label"].eq(FAKE)
    systems = table.groupby("page")["system"].transform(lambda column: (column[column != ""]).nunique())
    files = table.groupby(["page", "system"])["label"].transform("size")
    weight = np.where(fake, 1 / (np.sqrt(systems.clip(lower=1)) * files), 0.0)
    return weight / weight.sum()


class VoiceBatches(keras.utils.PyDataset):
    """Balanced batches: first spoofed voices, then beside each bona fide speech, of its page and utterance if it can be.

    A batch depends on the seed, the epoch and its number alone. Set ``epoch`` before the epoch begins.

    Args:
        voices: canonical. rows: of it, to learn from.
    """

    def __init__(self, voices: Voices, rows: np.ndarray, settings: VoiceSettings, workers: int = 4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        self.voices, self.settings, self.epoch = voices.take(rows), settings, 0
        table = self.voices.table
        reals = np.flatnonzero(table["label"] == REAL)
        if not 0 < len(reals) < len(table):
            raise ValueError(f"expected bona fide and spoofed voices, found {len(reals)} and {len(table) - len(reals)}")
        self.share = shares(table)
        self.pages = [reals[table["page"].iloc[reals] == page] for page in table["page"].iloc[reals].unique()]
        self.of_page = {table["page"].iat[rows[0]]: rows for rows in self.pages}
        size = np.sqrt([len(rows) for rows in self.pages])
        self.page_share = size / size.sum()
        keys = table["pair_key"].iloc[reals]
        self.of_key = {key: reals[keys == key] for key in keys.unique() if key}

    @property
    def num_batches(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """int16 (batch_size, length) and labels float32 (batch_size, 1)."""
        random = np.random.default_rng([self.settings.seed, self.epoch, index])
        fakes = random.choice(len(self.share), self.settings.batch_size // 2, p=self.share)
        rows = np.concatenate([fakes, [self._beside(row, random) for row in fakes]])
        samples = np.stack([self._window(self._version(row, random), random) for row in rows])
        return samples, self.voices.table["label"].to_numpy(np.float32)[rows][:, None]

    def _beside(self, fake: int, random: np.random.Generator) -> int:
        same_utterance = self.of_key.get(self.voices.table["pair_key"].iat[fake])
        if same_utterance is not None and random.random() < self.settings.same_utterance:
            return random.choice(same_utterance)
        same_page = self.of_page.get(self.voices.table["page"].iat[fake])
        if same_page is not None and random.random() < self.settings.same_page:
            return random.choice(same_page)
        return random.choice(self.pages[random.choice(len(self.pages), p=self.page_share)])

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

    int16 (n, T) -> float32 (n, T), RMS −26 dBFS. In training: a room, an equaliser of up to ``equaliser`` dB, the
    telephone band or a low-pass at 3.4 to 7.5 kHz, coloured noise ``snr`` dB under the voice, clipping, a flipped sign.

    Args:
        rate: of the samples, in Hz.
        equaliser: dB. snr: lowest and highest, dB.
        band, noise, clip, room: shares of the voices that get it.
    """

    def __init__(self, rate: int = SAMPLE_RATE, equaliser: float = 6.0, snr: tuple[float, float] = (8.0, 40.0),
                 band: float = 0.3, noise: float = 0.5, clip: float = 0.1, room: float = 0.0, enabled: bool = True,
                 seed: int | None = None, **kwargs):
        super().__init__(autocast=False, **kwargs)  # half precision would ruin the samples
        self.settings = {"rate": rate, "equaliser": equaliser, "snr": tuple(snr), "band": band, "noise": noise,
                         "clip": clip, "room": room, "enabled": enabled}
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
        if self.settings["room"]:
            x = ops.where(self._some(count, "room"), self._in_a_room(x, count, length), x)
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

    def _in_a_room(self, x, count, length):
        """Direct sound and, −12 to +3 dB of it, noise that decays by 60 dB in 0.15 to 0.8 s (Moorer 1979)."""
        seconds = np.arange(length, dtype=np.float32)[None] / self.settings["rate"]
        tail = keras.random.normal((count, length), seed=self.random) * ops.exp(-6.9 * seconds / self._uniform(count, 0.15, 0.8))
        level = 10.0 ** (self._uniform(count, -12.0, 3.0) / 20)
        room = tail * level / ops.sqrt(ops.sum(ops.square(tail), axis=1, keepdims=True))
        (a, b), (c, d) = ops.rfft(x), ops.rfft(room + np.eye(1, length, dtype=np.float32))
        return ops.irfft((a * c - b * d, a * d + b * c), fft_length=length)

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
    """A finished run: the float32 network with the averaged weights, its history, a score of every voice not learnt from."""

    settings: VoiceSettings
    network: keras.Model
    history: pd.DataFrame
    scores: pd.DataFrame


def build_voice_network(settings: VoiceSettings, policy: str = "float32") -> keras.Model:
    """The network of ``settings`` with its head: samples -> a dict with ``logit`` (1)."""
    with dtype_policy(policy):
        return blocks.with_head(getattr(networks, settings.network)(**settings.network_options))


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
    whole = np.resize(inputs, (-(-len(inputs) // batch) * batch, *inputs.shape[1:]))  # one shape is compiled once
    logits = network.predict(whole, batch_size=batch, verbose=0)["logit"][: len(inputs), 0]
    return np.array([part.mean() for part in np.split(logits, np.cumsum([len(part) for part in cut])[:-1])], np.float32)


def score_voices(network: keras.Model, voices: Voices, rows: np.ndarray, length: int) -> pd.DataFrame:
    """These rows of the table with the columns ``logit`` and ``row``."""
    return voices.table.iloc[rows].assign(logit=predict_logits(network, voices, rows, length), row=rows)


def train_voice(settings: VoiceSettings, voices: Voices, rows: np.ndarray, folder: str | Path,
                minutes: float | None = None, workers: int = 4) -> VoiceRun:
    """Train a voice network on some rows and score all others.

    Args:
        settings: of the run.
        voices: canonical, at ``settings.rate``. rows: of them, to learn from.
        folder: gets ``NAME.keras`` (float16), ``NAME.history.csv``, ``NAME.scores.csv``, ``NAME.json``.
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
    batches = VoiceBatches(voices, rows, settings, workers)
    trainer, planned = make_trainer(network, settings)
    deadline = began + 60 * minutes if minutes is not None else None
    plan = PlanEpochs(batches, planned, settings.epochs, deadline)
    trainer.fit(batches, epochs=settings.epochs, callbacks=[plan], shuffle=False, verbose=0)
    scorer.set_weights(network.get_weights())  # fit has put the average in place
    storage.save_network(scorer, folder / f"{settings.name}.keras")
    others = np.setdiff1d(np.arange(len(voices.table)), rows)
    scores = score_voices(scorer, voices, others, settings.length) if len(others) else voices.table.iloc[:0]
    run = VoiceRun(settings, scorer, pd.DataFrame(plan.history), scores)
    save_run(run, folder, {"policy": policy, "minutes": (time.monotonic() - began) / 60, "learnt": len(rows)})
    return run


def save_run(run: VoiceRun, folder: Path, extra: dict) -> None:
    """Write history, scores and settings of a run."""
    name = run.settings.name
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    run.scores.to_csv(folder / f"{name}.scores.csv", index=False, float_format="%.5f")
    summary = {"settings": asdict(run.settings), "epochs": len(run.history), "keras": keras.__version__,
               "backend": keras.backend.backend(), **extra}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


# --- named runs -----------------------------------------------------------------------------------------------------
CHANNELS = {"band": 0.6, "noise": 0.6, "snr": (5.0, 40.0), "clip": 0.15, "room": 0.3, "equaliser": 8.0}
LFCC = VoiceSettings(name="lfcc", network_options={"kinds": ("lfcc",)}, augment=CHANNELS)
RUNS = {run.name: run for run in (
    LFCC,
    replace(LFCC, name="linear", network_options={"kinds": ("linear",)}),
    replace(LFCC, name="lfcc_attentive", network_options={"kinds": ("lfcc",), "attentive": True}),
    replace(LFCC, name="linear_attentive", network_options={"kinds": ("linear",), "attentive": True}),
    replace(LFCC, name="voice_cnn", network="voice_cnn", network_options={}, learning_rate=3e-4, shortened=0.0),
)}


def make_corpus(data: str | Path, copies: int = 5, processes: int = 1) -> Voices:
    """All voices under ``data`` at 16 kHz, canonical, with copies through codecs; those over a second long."""
    voices = prepared(read_voices(data), codecs=list(CODECS), copies=copies, processes=processes)
    return voices.take(np.flatnonzero([len(samples) > voices.rate for samples in voices.samples]))


def run_voice(name: str, data: str | Path, output: str | Path, minutes: float | None = None,
              cache: str | Path | None = None, fold: int | None = None, processes: int = 1) -> VoiceRun:
    """Train one of ``RUNS`` on the research data, as ``python -m kaggle_utils train voice`` does.

    Args:
        data: the folder of research data, which holds ``voice``.
        output: folder of results.
        minutes: limit on the training, the making of the corpus left aside.
        cache: file of the corpus (``voices.npz`` in ``output``), which the first run makes and every other one reads.
        fold: left out, and its systems with it, and judged; None: all voices are learnt from.
        processes: that make copies through codecs.

    Raises:
        ValueError: no run of that name.
    """
    if name not in RUNS:
        raise ValueError(f"expected one of {', '.join(RUNS)}, found {name!r}")
    settings, cache = RUNS[name], Path(cache or Path(output) / "voices.npz")
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        make_corpus(Path(data) / "voice", processes=processes).save(cache)
    voices = Voices.load(cache).at(settings.rate)
    rows = np.arange(len(voices.table))
    if fold is not None:
        rows, settings = training_rows(voices.table, folds(voices.table), fold), replace(settings, name=f"{name}_fold{fold}")
    return train_voice(settings, voices, rows, output, minutes)
