"""Train the voice networks: corpora split by speaker, spoofed twins, channel effects on the device, evaluation.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas, scipy and soundfile. Start with
:func:`read_voices`, :func:`add_twins` and :func:`train_voice`.
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
from ..metrics import auc, equal_error_rate, log_loss, sigmoid
from ..training import PlanEpochs, WarmupCosine, averaged_weights, dtype_policy, fast_policy
from . import networks, vocoders
from .data import CLASSICAL, PROMPTS_FOLDER, Voices, make_corpus
from .signal import WINDOW_SAMPLES, windows


# --- feeding --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VoiceSettings:
    """What a training run of a voice network depends on.

    Attributes:
        name: of the run and its files.
        network, network_options: a function of ``networks`` and its arguments; gets a dense 1 as its head.
        epochs, steps: an epoch is ``steps`` batches. batch_size: even, half of it spoofed.
        weights: share of each family of generators among the spoofed voices; 1 where not named, 0 leaves it out.
        start: ``NAME.keras`` of a run with the same network, whatever its window, to go on from; None: from scratch.
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
    start: str | None = None
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
        return REFERENCE_SAMPLES if self.reference else self.network_options.get("samples", WINDOW_SAMPLES)


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
    """A finished run: the float32 network with the averaged weights, its history, a score of every voice."""

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
    if settings.start is not None:
        network.set_weights(storage.load_network(settings.start).get_weights())
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
    trainer.fit(batches, epochs=settings.epochs, callbacks=[plan], shuffle=False, verbose=0)
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
    """Write history, scores, settings and figures of a run, last the network (float16)."""
    name = run.settings.name
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    run.scores.to_csv(folder / f"{name}.scores.csv", index=False, float_format="%.5f")
    figures = {split: by_generator(scores).round(4).to_dict("index") for split, scores in run.scores.groupby("split")
               if scores["label"].nunique() == 2}
    summary = {"settings": asdict(run.settings), "epochs": len(run.history), "keras": keras.__version__,
               "backend": keras.backend.backend(), **extra, **figures}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    storage.save_network(run.network, folder / f"{name}.keras")
NEURAL = ("hifigan", "melgan", "vocos", "diffusion")  # trained here
UNHEARD = ("flow", "kokoro")  # the one trained here, the other a text-to-speech system: no run trains on them
DEMOS = ("fastspeech2", "diffgan_tts", "portaspeech", "transformer_tts", "stylespeech", "wavegrad2")  # of voice/neural
SHARES = {**dict.fromkeys(NEURAL, 1.0), **dict.fromkeys(DEMOS, 0.6), **dict.fromkeys(CLASSICAL, 0.1),
          **dict.fromkeys(UNHEARD, 0.0), "world": 0.0}
LFCC = VoiceSettings(name="lfcc", network_options={"kinds": ("lfcc",)}, epochs=40, weights=SHARES, augment={"band": 0.45},
                     recoded=0.5)
ROOMS = replace(
    LFCC, name="lfcc_rooms", start="lfcc", network_options={"kinds": ("lfcc",), "samples": 32000}, batch_size=24, steps=40,
    epochs=6, learning_rate=2.5e-4, average=0.97, augment={"band": 0.45, "room": 0.35},
    weights=SHARES | {"world": 0.5, "linear_prediction": 0.15, "phase_vocoder": 0.15},
)
NARROW = replace(  # learns in minutes on two CPU cores, so that each family can be left out
    ROOMS, name="narrow", start=None, network_options={"kinds": ("lfcc",), "samples": 32000, "width": 12}, batch_size=32,
    steps=60, epochs=8, learning_rate=2e-3, augment={"band": 0.45, "room": 0.2},
)
SHIPPED = replace(LFCC, name="lfcc_more", augment={"band": 0.45, "room": 0.15}, epochs=60)
LEFT_OUT = {  # families that SHIPPED is trained without, and the narrow network too; what shares a design goes together
    "demos": DEMOS, "classical": CLASSICAL, "vocos": ("vocos",), "melgan": ("melgan", "stylespeech"), "hifigan": ("hifigan",),
    "diffusion": ("diffusion", "wavegrad2"), **{name: (name,) for name in DEMOS if name != "wavegrad2"},
}
RUNS = {run.name: run for run in (
    LFCC,
    ROOMS,
    replace(LFCC, name="linear", network_options={"kinds": ("linear",)}, batch_size=48),
    replace(LFCC, name="mel", network_options={"kinds": ("mel",)}),
    replace(LFCC, name="linear_mel", network_options={"kinds": ("linear", "mel")}, batch_size=32),
    replace(LFCC, name="voice_cnn", network="voice_cnn", network_options={}, batch_size=32, learning_rate=3e-4, shortened=0.0),
    NARROW,
    replace(NARROW, name="lfcc_without_systems", network_options={"kinds": ("lfcc",), "samples": 32000}, steps=100, epochs=6,
            learning_rate=1e-3, average=0.98, augment={"band": 0.3},
            weights=NARROW.weights | dict.fromkeys(("fastspeech2", "transformer_tts", "wavegrad2"), 0.0)),
    SHIPPED,
    replace(SHIPPED, name="lfcc_more_1", seed=1),
    *(replace(run, name=f"{prefix}without_{name}", epochs=epochs, weights=run.weights | dict.fromkeys(families, 0.0))
      for prefix, run, epochs in (("", SHIPPED, 25), ("narrow_", NARROW, NARROW.epochs)) for name, families in LEFT_OUT.items()),
)}


def run_voice(name: str, data: str | Path, output: str | Path, minutes: float | None = None,
              cache: str | Path | None = None, prompts: str | Path = PROMPTS_FOLDER, processes: int = 1) -> VoiceRun:
    """Train one of ``RUNS`` on the research data, as ``python -m kaggle_utils train voice`` does.

    Args:
        data: the folder of research data, which holds ``voice``.
        output: folder of results, and of the run that this one starts from.
        minutes: limit on the training, the making of the corpus left aside.
        cache: file of the corpus (``voices.npz`` in ``output``), which the first run makes and every other one reads.
        prompts, processes: of :func:`make_corpus`; a folder of prompts that does not exist is left out.

    Raises:
        ValueError: no run of that name.
    """
    if name not in RUNS:
        raise ValueError(f"expected one of {', '.join(RUNS)}, found {name!r}")
    settings, cache = RUNS[name], Path(cache or Path(output) / "voices.npz")
    if settings.start is not None:
        settings = replace(settings, start=str(Path(output) / f"{settings.start}.keras"))
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        prompts = prompts if Path(prompts).is_dir() else None
        make_corpus(Path(data) / "voice", prompts, processes=processes).save(cache)
    voices = Voices.load(cache)
    return train_voice(settings, voices.at(settings.rate), output, minutes)
