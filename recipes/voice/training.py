"""Train the voice networks: folds of pages, balanced batches, channel effects on the device.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas, scipy and soundfile. Start with
``data.read_voices``, ``data.prepared`` and :func:`train_voice`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.kaggle.paths import models_folder
from kaggle_utils.media.sound import REFERENCE_RATE, REFERENCE_SAMPLES, SAMPLE_RATE
from kaggle_utils.voice.signal import WINDOW_SAMPLES, windows
from recipes import blocks
from recipes.loop import PlanEpochs, WarmupCosine, dtype_policy, fast_policy
from recipes.voice.data import CODECS, Voices, prepared, read_voices

from . import networks
from .augment import ChannelAugment
from .channels import make_channels, with_channels


# --- feeding ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VoiceSettings:
    """The settings of a training run of a voice network.

    Attributes:
        name: of the run and its files.
        network, network_options: a function of ``networks`` and its arguments; a dense 1 is added as its
            head.
        frozen: a file of ``models/`` whose embedding stays frozen. Only the head is fitted
            (:func:`fit_head`), and its logits are multiplied by ``gain``. None: train a new network.
        epochs, steps: an epoch is ``steps`` batches. batch_size: even, half of it spoofed.
        same_utterance: probability that a spoofed voice is paired with bona fide speech of its ``pair_key``,
            if there is any.
        same_page: of the others, probability of a pair from the same page, if there is any. The rest are
            paired with speech of a random page.
        augment: arguments of :class:`ChannelAugment`; None: no channel effects.
        recoded: fraction of the voices that are replaced by a copy through a codec, if there are copies.
        shortened: fraction of the voices that are cut to between half a window and a window, and repeated.
        average: decay of the moving average of the weights, which the run returns; None: the last weights.
        tuning: factor of the learning rate of pretrained layers. ranking: weight of a loss that ranks each
            spoofed voice above the bona fide voice beside it (both only in ``fleet``).
        policy: dtype policy; None: the fastest on this machine.
    """

    name: str = "linear"
    network: str = "voice_inception"
    network_options: dict = field(default_factory=dict)
    frozen: str | None = None
    gain: float = 1.0
    epochs: int = 16
    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 2e-2
    label_smoothing: float = 0.05
    average: float | None = 0.998
    tuning: float = 1.0
    ranking: float = 0.0
    same_utterance: float = 0.5
    same_page: float = 0.7
    augment: dict | None = field(default_factory=dict)
    recoded: float = 0.6
    shortened: float = 0.3
    seed: int = 0
    policy: str | None = None

    @property
    def reference(self) -> bool:
        """Whether the network is the study's, which takes 8 kHz."""
        return self.network == "voice_cnn"

    @property
    def rate(self) -> int:
        return REFERENCE_RATE if self.reference else SAMPLE_RATE

    @property
    def length(self) -> int:
        return REFERENCE_SAMPLES if self.reference else self.network_options.get("samples", WINDOW_SAMPLES)


def shares(table: pd.DataFrame) -> np.ndarray:
    """Probability that each spoofed voice of ``table`` is drawn, float (N,); 0 for bona fide speech.

    The weight of a page is the square root of its number of systems, shared equally among them. A page with
    fourteen systems therefore weighs less than fourteen pages. The voices of a system on a page share its
    weight equally, whatever their number.
    """
    fake = table["label"].eq(FAKE)
    systems = table.groupby("page")["system"].transform(lambda column: (column[column != ""]).nunique())
    files = table.groupby(["page", "system"])["label"].transform("size")
    weight = np.where(fake, 1 / (np.sqrt(systems.clip(lower=1)) * files), 0.0)
    return weight / weight.sum()


class VoiceBatches(keras.utils.PyDataset):
    """Balanced batches: spoofed voices, each paired with bona fide speech, of its page or utterance if any.

    A batch depends only on the seed, the epoch and its number. Set ``epoch`` before the epoch begins.

    Args:
        voices: canonical. rows: the training rows.
    """

    def __init__(self, voices: Voices, rows: np.ndarray, settings: VoiceSettings, workers: int = 4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        self.voices, self.settings, self.epoch = voices.take(rows), settings, 0
        table = self.voices.table
        reals = np.flatnonzero(table["label"] == REAL)
        if not 0 < len(reals) < len(table):
            raise ValueError(
                f"expected bona fide and spoofed voices, found {len(reals)} and {len(table) - len(reals)}"
            )
        self.share = shares(table)
        self.pages = [reals[table["page"].iloc[reals] == page] for page in table["page"].iloc[reals].unique()]
        self.of_page = {table["page"].iat[rows[0]]: rows for rows in self.pages}
        size = np.sqrt([len(rows) for rows in self.pages])
        self.page_share = size / size.sum()
        keys = table["pair_key"].iloc[reals]
        self.of_key = {key: reals[keys == key] for key in keys.unique() if key}
        self.beside = list(zip(table["pair_key"], table["page"], strict=True))

    @property
    def num_batches(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """int16 (batch_size, length) and labels float32 (batch_size, 1)."""
        drawn = self.draw(index)
        samples = [
            np.resize(self.versions(row)[version][start : start + kept], self.settings.length)
            for row, version, start, kept in drawn
        ]
        labels = self.voices.table["label"].to_numpy(np.float32)[drawn[:, 0]]
        return np.stack(samples), labels[:, None]

    def versions(self, row: int) -> list[np.ndarray]:
        """A voice as recorded, and its copies."""
        return [self.voices.samples[row], *(self.voices.copies[row] if self.voices.copies else [])]

    def draw(self, index: int) -> np.ndarray:
        """Row, version, first sample and number of samples of each window: int (batch_size, 4).

        The spoofed voices come first; the bona fide voice paired with each follows in the same order.
        """
        random = np.random.default_rng([self.settings.seed, self.epoch, index])
        fakes = random.choice(len(self.share), self.settings.batch_size // 2, p=self.share)
        rows = np.concatenate([fakes, [self._beside(row, random) for row in fakes]])
        return np.array([self._window(row, random) for row in rows])

    def _beside(self, fake: int, random: np.random.Generator) -> int:
        key, page = self.beside[fake]
        same_utterance = self.of_key.get(key)
        if same_utterance is not None and random.random() < self.settings.same_utterance:
            return random.choice(same_utterance)
        same_page = self.of_page.get(page)
        if same_page is not None and random.random() < self.settings.same_page:
            return random.choice(same_page)
        return random.choice(self.pages[random.choice(len(self.pages), p=self.page_share)])

    def _window(self, row: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        versions, version, length = self.versions(row), 0, self.settings.length
        if len(versions) > 1 and random.random() < self.settings.recoded:
            version = 1 + random.integers(len(versions) - 1)
        kept = length if random.random() > self.settings.shortened else random.integers(length // 2, length)
        start = random.integers(max(len(versions[version]) - kept, 0) + 1)
        return row, version, start, min(kept, len(versions[version]) - start)


# --- runs ---------------------------------------------------------------------------------------------------
@dataclass
class VoiceRun:
    """A finished run: the float32 network with the averaged weights, and its history, one row per epoch."""

    settings: VoiceSettings
    network: keras.Model
    history: pd.DataFrame


def build_voice_network(settings: VoiceSettings, policy: str = "float32") -> keras.Model:
    """The network of ``settings`` with its head: samples -> a dict with ``logit`` (1)."""
    with dtype_policy(policy):
        return blocks.with_head(getattr(networks, settings.network)(**settings.network_options))


def make_trainer(network: keras.Model, settings: VoiceSettings) -> tuple:
    """Compile channel effects and ``network`` as one model; return it and the variable of planned steps."""
    samples = keras.Input((settings.length,), dtype="int16", name="window")
    x = ChannelAugment(
        settings.rate, enabled=settings.augment is not None, seed=settings.seed, **(settings.augment or {})
    )(samples)
    x = keras.layers.Reshape(network.input_shape[1:], dtype="float32")(x)
    logit = keras.layers.Activation("linear", dtype="float32")(network(x)["logit"])
    optimizer = keras.optimizers.AdamW(
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        clipnorm=5.0,
        use_ema=settings.average is not None,
        ema_momentum=settings.average or 0.99,
    )
    planned = optimizer.add_variable((), initializer="zeros", dtype="float32", name="planned_steps")
    planned.assign(settings.steps * settings.epochs)
    optimizer.learning_rate = WarmupCosine(settings.learning_rate, settings.steps, planned)
    trainer = keras.Model(samples, logit, name=f"{network.name}_trainer")
    trainer.compile(
        optimizer, keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    )
    return trainer, planned


def predict_logits(
    network: keras.Model, voices: Voices, rows: np.ndarray, length: int, batch: int = 64
) -> np.ndarray:
    """Logit of each voice, the mean over its windows: float32 (len(rows),)."""
    return over_windows(network, "logit", [voices.samples[row] for row in rows], length, batch)[:, 0]


def over_windows(
    network: keras.Model, output: str, samples: Sequence[np.ndarray], length: int, batch: int = 64
) -> np.ndarray:
    """One output of the network for each int16 voice, averaged over its windows: float32 (n, size)."""
    found = []
    for start in range(0, len(samples), 100):
        cut = [windows(voice / np.float32(32768), length) for voice in samples[start : start + 100]]
        inputs = np.concatenate(cut).reshape(-1, *network.input_shape[1:])
        whole = np.resize(
            inputs, (-(-len(inputs) // batch) * batch, *inputs.shape[1:])
        )  # one shape: compiled once
        values = np.asarray(network.predict(whole, batch_size=batch, verbose=0)[output])[: len(inputs)]
        found += [part.mean(axis=0) for part in np.split(values, np.cumsum([len(part) for part in cut])[:-1])]
    return np.array(found, np.float32)


def train_voice(
    settings: VoiceSettings,
    voices: Voices,
    rows: np.ndarray,
    folder: str | Path,
    minutes: float | None = None,
    workers: int = 4,
) -> VoiceRun:
    """Train a voice network on some rows.

    Args:
        settings: of the run.
        voices: canonical, at ``settings.rate``. rows: the training rows.
        folder: gets ``NAME.keras`` (float16), ``NAME.history.csv``, ``NAME.json``.
        minutes: limit on the wall-clock time; fewer epochs are planned if they would not fit.
        workers: threads that gather batches.
    """
    if voices.rate != settings.rate:
        raise ValueError(
            f"voices: found {voices.rate} Hz, expected {settings.rate} Hz for {settings.network}"
        )
    began, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.frozen:
        network, history = fit_head(settings, voices.take(rows)), []
    else:
        network, history = _fit(settings, voices, rows, minutes, workers)
    name = settings.name
    storage.save_network(network, folder / f"{name}.keras")
    run = VoiceRun(settings, network, pd.DataFrame(history))
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    summary = {
        "settings": asdict(settings),
        "minutes": (time.monotonic() - began) / 60,
        "learnt": len(rows),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return run


def _fit(settings, voices, rows, minutes, workers) -> tuple[keras.Model, list[dict]]:
    """Train a network; return it in float32 with the averaged weights, and one dict per epoch."""
    keras.utils.set_random_seed(settings.seed)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else None
    network = build_voice_network(settings, settings.policy or fast_policy())
    batches = VoiceBatches(voices, rows, settings, workers)
    trainer, planned = make_trainer(network, settings)
    plan = PlanEpochs(batches, planned, settings.epochs, deadline)
    trainer.fit(batches, epochs=settings.epochs, callbacks=[plan], shuffle=False, verbose=0)
    trained = build_voice_network(settings)
    trained.set_weights(network.get_weights())  # the averaged weights: fit copies them at its end
    return trained, plan.history


def fit_head(settings: VoiceSettings, voices: Voices) -> keras.Model:
    """Fit a logistic regression on the frozen embedding of ``settings.frozen``, as the output ``logit``.

    It is fitted on each voice and its copies. Both classes have the same total weight. Spoofed voices are
    weighted by :func:`shares`. The bona fide voices of a page together weigh the square root of their number.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    copies = voices.copies or [[] for _ in voices.samples]
    heard = [[samples, *some] for samples, some in zip(voices.samples, copies, strict=True)]
    frozen = storage.load_network(models_folder() / settings.frozen)
    features = over_windows(frozen, "embedding", [one for some in heard for one in some], settings.length, 16)
    times = [len(some) for some in heard]
    table, labels = voices.table, np.repeat(voices.table["label"], times)
    of_page = table.groupby("page")["label"].transform(lambda column: column.eq(REAL).sum())
    weight = np.where(table["label"] == REAL, 1 / np.sqrt(np.maximum(of_page, 1)), 0.0)
    weight = np.repeat((shares(table) + weight / weight.sum()) * len(table), times)
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=0.01, max_iter=500).fit(
        scaler.transform(features), labels, sample_weight=weight
    )
    kernel = model.coef_[0] / scaler.scale_ * settings.gain
    bias = model.intercept_[0] * settings.gain - kernel @ scaler.mean_
    network = blocks.with_head(
        keras.Model(frozen.input, {"embedding": frozen.output["embedding"]}, name=frozen.name)
    )
    network.get_layer("logit").set_weights([kernel[:, None], np.array([bias])])
    return network


# --- named runs ---------------------------------------------------------------------------------------------
LINEAR = VoiceSettings(name="linear", network_options={"kinds": ("linear",), "attentive": True})
GAIN = 0.9  # the frozen member then weighs as much as the two others together
RUNS = {
    run.name: run
    for run in (
        LINEAR,
        replace(LINEAR, name="lfcc", network_options={"kinds": ("lfcc",), "attentive": True}),
        replace(
            LINEAR,
            name="quality",
            network_options={},
            network="voice_quality",
            frozen="voice_quality.keras",
            gain=GAIN,
        ),
        replace(
            LINEAR,
            name="voice_cnn",
            network="voice_cnn",
            network_options={},
            learning_rate=3e-4,
            shortened=0.0,
        ),
    )
}


def make_corpus(folder: str | Path, copies: int = 5, processes: int = 1) -> Voices:
    """All voices under ``folder`` (``data.read_voices``), canonical, with copies through codecs.

    Voices of a second or less are left out.
    """
    voices = prepared(read_voices(folder), codecs=list(CODECS), copies=copies, processes=processes)
    return voices.take(np.flatnonzero([len(samples) > voices.rate for samples in voices.samples]))


def load_corpus(cache: Path, folder: str | Path, processes: int = 1) -> Voices:
    """Read the result of :func:`make_corpus` from the file ``cache``; write it first if it is missing."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        make_corpus(folder, processes=processes).save(cache)
    return Voices.load(cache)


def run_voice(name: str, data: str | Path, output: str | Path, minutes: float | None = None) -> VoiceRun:
    """Train one of ``RUNS`` on all research data, as ``python -m recipes train voice`` does.

    ``evaluation.judge_folds`` trains the same runs on folds.

    Args:
        data: the folder of research data, which holds ``voice``.
        output: folder of results, and of the corpus (``voices.npz``), which the first run writes.
        minutes: time limit of the training, without the preparation of the corpus.

    Raises:
        ValueError: no run of that name.
    """
    if name not in RUNS:
        raise ValueError(f"expected one of {', '.join(RUNS)}, found {name!r}")
    folder = Path(data) / "voice"
    voices = load_corpus(Path(output) / "voices.npz", folder)
    if RUNS[name].frozen:
        make_channels(folder, voices, output)
        voices = with_channels(voices, output)
    voices = voices.at(RUNS[name].rate)
    return train_voice(RUNS[name], voices, np.arange(len(voices.table)), output, minutes)
