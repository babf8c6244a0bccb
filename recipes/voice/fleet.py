"""Train the networks of all folds side by side on one device, with JAX.

All voices and their copies lie in the device's memory. One compiled step serves every network in turn, so the
device never waits. The batches are those of ``training.VoiceBatches``; the channel effects, the network and
the loss are those of ``training.make_trainer``.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pandas as pd

from kaggle_utils import storage
from kaggle_utils.metrics import equal_error_rate, sigmoid
from kaggle_utils.voice.signal import windows
from recipes.loop import fast_policy

from .channels import CHANNELS, channel_file
from .data import FOLDS, Voices
from .evaluation import SPEAKERS, split_fold, split_speakers
from .training import RUNS as BASE
from .training import VoiceBatches, VoiceSettings, build_voice_network, make_trainer

PRETRAINED = re.compile(r"(conv\d|projection|attention\d|norm\d|dense\d|pool_)")  # networks.load_distill_mos
CLIP = 5.0  # largest norm of all gradients together


@dataclass
class Member:
    """A network in training: its name, its batches, and its state on the device."""

    name: str
    batches: VoiceBatches
    rows: np.ndarray
    state: dict
    steps: int = 0
    losses: list = field(default_factory=list)


class Fleet:
    """Networks with the same settings on different rows, trained in turn.

    Args:
        settings: of all networks; they start from the same weights, and their batches and effects differ.
        voices: canonical, with copies, at ``settings.rate``.
        rows: the training rows of each network, by its name.
    """

    def __init__(self, settings: VoiceSettings, voices: Voices, rows: dict[str, np.ndarray]):
        self.settings, self.voices = settings, voices
        self.policy = settings.policy or fast_policy()
        versions = [
            [voice, *(voices.copies[row] if voices.copies else [])]
            for row, voice in enumerate(voices.samples)
        ]
        lengths = [[len(version) for version in some] for some in versions]
        ends = np.cumsum([length for some in lengths for length in some])
        self.places = np.split(
            ends - np.concatenate(lengths), np.cumsum([len(some) for some in lengths])[:-1]
        )
        self.pool = jnp.asarray(np.concatenate([version for some in versions for version in some]))
        keras.utils.set_random_seed(settings.seed)
        self.network = build_voice_network(settings, self.policy)
        self.trainer, _ = make_trainer(self.network, settings)
        trained = self.trainer.trainable_variables
        self.rates = [settings.tuning if PRETRAINED.match(variable.path) else 1.0 for variable in trained]
        self.decays = [settings.weight_decay * (len(variable.shape) > 1) for variable in trained]
        self.members = [self._member(name, number, some) for number, (name, some) in enumerate(rows.items())]
        self.step = jax.jit(self._step, donate_argnums=0)

    def _member(self, name: str, number: int, rows: np.ndarray) -> Member:
        settings = replace(self.settings, name=name, seed=self.settings.seed + number)
        weights = [variable.value for variable in self.trainer.trainable_variables]
        others = [variable.value for variable in self.trainer.non_trainable_variables]
        state = {
            "weights": [jnp.array(value, copy=True) for value in weights],
            "others": [value + jnp.asarray(number if value.dtype == np.uint32 else 0, value.dtype)
                       for value in others],  # the states of random numbers differ
            "first": [jnp.zeros_like(value) for value in weights],
            "second": [jnp.zeros_like(value) for value in weights],
            "average": [jnp.array(value, copy=True) for value in weights],
            "count": jnp.zeros(()),
        }  # fmt: skip
        return Member(name, VoiceBatches(self.voices, rows, settings), rows, state)

    def _step(self, state, pool, places, labels, rate):
        """AdamW (Loshchilov and Hutter 2019) with clipped gradients and averaged weights."""
        start, kept = places[:, :1], places[:, 1:]
        samples = pool[start + jnp.arange(self.settings.length) % kept]

        def loss_of(weights):
            logit, others = self.trainer.stateless_call(weights, state["others"], samples, training=True)
            logit, smooth = logit[:, 0], self.settings.label_smoothing
            target = labels * (1 - smooth) + smooth / 2
            loss = jnp.mean(jax.nn.softplus(logit) - target * logit)
            if self.settings.ranking:
                fakes, reals = jnp.split(logit, 2)
                loss = loss + self.settings.ranking * jnp.mean(jax.nn.softplus(reals - fakes))
            return loss, others

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["weights"])
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))
        good = jnp.isfinite(norm)
        scale = jnp.where(good, jnp.minimum(1.0, CLIP / (norm + 1e-6)), 0.0)
        count = state["count"] + 1
        kept_average = jnp.minimum(self.settings.average or 0.0, (count + 1) / (count + 10))
        new = {
            "others": [
                jnp.where(good, a, b).astype(b.dtype) if jnp.issubdtype(b.dtype, jnp.floating) else a
                for a, b in zip(others, state["others"], strict=True)
            ],
            "count": count,
            "weights": [],
            "first": [],
            "second": [],
            "average": [],
        }
        for weight, gradient, first, second, average, factor, decay in zip(
            state["weights"],
            gradients,
            state["first"],
            state["second"],
            state["average"],
            self.rates,
            self.decays,
            strict=True,
        ):
            gradient = jnp.where(good, gradient * scale, 0.0)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * jnp.square(gradient)
            move = first / (1 - 0.9**count) / (jnp.sqrt(second / (1 - 0.999**count)) + 1e-7)
            weight = weight - rate * factor * (move + decay * weight)
            new["weights"].append(weight)
            new["first"].append(first)
            new["second"].append(second)
            new["average"].append(kept_average * average + (1 - kept_average) * weight)
        return new, loss

    def _drawn(self, member: Member, number: int) -> np.ndarray:
        """Place in the pool and length of each window of a batch: int32 (batch_size, 2)."""
        drawn = member.batches.draw(number)
        first = [self.places[member.rows[row]][version] for row, version, _, _ in drawn]
        return np.stack([np.array(first) + drawn[:, 2], drawn[:, 3]], axis=1).astype(np.int32)

    def compile(self) -> None:
        """Compile the step, before time counts."""
        member = self.members[0]
        labels = jnp.asarray(np.repeat([1.0, 0.0], self.settings.batch_size // 2), jnp.float32)
        arguments = member.state, self.pool, jnp.asarray(self._drawn(member, 0)), labels, jnp.float32(0)
        self.step = self.step.lower(*arguments).compile()

    def train(
        self,
        seconds: float,
        most: int | None = None,
        report: Callable[[float], None] | None = None,
        reports: int = 4,
        threads: int = 4,
    ) -> None:
        """Train all networks for this long: the rate follows a cosine of the time that has passed.

        Args:
            most: maximum number of steps of each network; the cosine then ends there.
            report: called ``reports`` times on the way with the fraction done; its time counts.
        """
        labels = jnp.asarray(np.repeat([1.0, 0.0], self.settings.batch_size // 2), jnp.float32)
        began, told, done = time.monotonic(), 1, 0.0
        warmup = 100 if most is None else max(min(100, most // 10), 1)
        with ThreadPoolExecutor(threads) as gather:
            ahead = {
                (member.name, step): gather.submit(self._drawn, member, step)
                for step in range(2)
                for member in self.members
            }
            step, loss = 0, None
            while done < 1.0 and (most is None or step < most):
                done = (time.monotonic() - began) / seconds
                if most is not None:
                    done = max(done, step / most)
                rate = self.settings.learning_rate * min((step + 1) / warmup, 1.0)
                rate *= 0.5 * (1 + np.cos(np.pi * min(done, 1.0)))
                for member in self.members:
                    places = ahead.pop((member.name, step)).result()
                    ahead[member.name, step + 2] = gather.submit(self._drawn, member, step + 2)
                    member.state, loss = self.step(
                        member.state, self.pool, jnp.asarray(places), labels, jnp.float32(rate)
                    )
                    member.losses.append(loss)
                    member.steps = step + 1
                step += 1
                if step % 4 == 0:
                    jax.block_until_ready(loss)  # the clock must not run ahead of the device
                if report is not None and told < reports and done >= told / reports:
                    told += 1
                    report(done)
            for left in ahead.values():
                left.cancel()

    def build(self) -> keras.Model:
        """A float32 network of the fleet's architecture, for :meth:`averaged`."""
        options = {**self.settings.network_options}
        if "pretrained" in options:
            options["pretrained"] = None
        return build_voice_network(replace(self.settings, network_options=options))

    def averaged(self, member: Member) -> list[np.ndarray]:
        """The averaged weights of a member, for ``set_weights``."""
        trained = [variable.path for variable in self.trainer.trainable_variables]
        values = dict(zip(trained, member.state["average"], strict=True))
        others = [variable.path for variable in self.trainer.non_trainable_variables]
        values |= dict(zip(others, member.state["others"], strict=True))
        return [np.asarray(values[weight.path]) for weight in self.network.weights]

    def loss(self, member: Member, last: int = 100) -> float:
        """Mean training loss of the last steps."""
        return float(np.mean([float(loss) for loss in member.losses[-last:]]))


class Judge:
    """Scores many voices with many networks of one architecture: their windows stay on the device.

    Args:
        network: in float32. samples: int16 voices; an empty one has no score.
    """

    def __init__(self, network: keras.Model, samples: Sequence[np.ndarray], length: int, batch: int = 128):
        self.network, self.batch = network, batch
        cut = [windows(voice, length) if len(voice) else np.zeros((0, length), np.int16) for voice in samples]
        self.ends = np.cumsum([len(part) for part in cut])
        self.counts = np.array([len(part) for part in cut])
        self.windows = jnp.asarray(np.concatenate(cut))
        self.run = jax.jit(self._run)

    def _run(self, weights, others, windows, places):
        samples = windows[places].astype(jnp.float32) / 32768
        samples = samples.reshape(-1, *self.network.input_shape[1:])
        outputs, _ = self.network.stateless_call(weights, others, samples, training=False)
        return outputs["logit"][:, 0]

    def logits(self, values: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Mean logit over the windows of each row by a network with these weights, NaN without any: (n,)."""
        self.network.set_weights(values)
        weights = [jnp.asarray(variable.value) for variable in self.network.trainable_variables]
        others = [jnp.asarray(variable.value) for variable in self.network.non_trainable_variables]
        places = [np.arange(self.ends[row] - self.counts[row], self.ends[row]) for row in rows]
        flat = np.concatenate(places)
        whole = np.resize(flat, -(-len(flat) // self.batch) * self.batch).reshape(-1, self.batch)
        run = partial(self.run, weights, others, self.windows)
        values = np.concatenate([np.asarray(part) for part in [run(jnp.asarray(some)) for some in whole]])
        parts = np.split(values[: len(flat)], np.cumsum([len(some) for some in places])[:-1])
        return np.array([part.mean() if len(part) else np.nan for part in parts], np.float32)


# --- folds --------------------------------------------------------------------------------------------------
GENTLE = {"equaliser": 6.0, "snr": (10.0, 40.0), "band": 0.35, "noise": 0.35, "clip": 0.08, "room": 0.15}
WHOLE = "whole"  # instead of a fold: all voices; these weights ship
TRANSFORMER = VoiceSettings(
    name="transformer",
    network="voice_transformer",
    tuning=0.2,
    augment=GENTLE,
    recoded=0.5,
    shortened=0.2,
)
RUNS = {
    run.name: run
    for run in (
        TRANSFORMER,
        replace(TRANSFORMER, name="transformer_hard", augment={}, recoded=0.6, ranking=0.5, seed=10),
        replace(BASE["linear"], batch_size=128, learning_rate=1.5e-3, augment=GENTLE, recoded=0.5),
        replace(
            BASE["lfcc"],
            network_options=BASE["lfcc"].network_options | {"width": 48},
            batch_size=128,
            learning_rate=1.5e-3,
        ),
        BASE["voice_cnn"],
    )
}


def judge_fleet(
    settings: VoiceSettings,
    corpus: Voices,
    channels: str | Path,
    output: str | Path,
    seconds: Callable[[], float],
    splits: Sequence[int | str] = (*range(FOLDS), SPEAKERS, WHOLE),
    most: int | None = None,
    say: Callable[[str], None] = print,
    batch: int = 128,
) -> None:
    """Train a network for each split side by side, and score its test rows through every channel.

    Args:
        corpus: canonical, with copies. channels: folder of ``channels.make_channels``.
        output: gets ``NAME_SPLIT.keras``, ``NAME.history.csv`` and ``NAME.scores.npz``: ``row``,
            ``fold`` (−1: known systems, unseen speakers; −2: the network of all voices, on them), ``channel``
            (its number in ``CHANNELS``), ``logit``.
        seconds: called when all is compiled; returns the time to train. splits: in order of their value.
        most: maximum number of steps. batch: windows scored at once.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    table, everything = corpus.table, np.arange(len(corpus.table))
    parts = {
        str(split): split_speakers(table)
        if split == SPEAKERS
        else (everything, everything)
        if split == WHOLE
        else split_fold(table, split)
        for split in splits
    }
    fleet = Fleet(settings, corpus, {name: learnt for name, (learnt, _) in parts.items()})
    labels, folds = table["label"].to_numpy(), [member for member in fleet.members if member.name.isdigit()]
    say(f"{settings.name}: compiling")
    fleet.compile()
    heard = [
        voice
        for channel in CHANNELS
        for voice in Voices.load(channel_file(channels, channel)).at(settings.rate).samples
    ]
    judge = Judge(fleet.build(), heard, settings.length, batch)
    judge.logits(judge.network.get_weights(), parts[fleet.members[0].name][1][:2])
    history = []

    def report(done: float) -> None:
        found = np.full(len(table), np.nan, np.float32)
        for member in folds:
            rows = parts[member.name][1]
            found[rows] = judge.logits(fleet.averaged(member), rows)
        judged = np.isfinite(found)
        if len(np.unique(labels[judged])) == 2:
            rate = equal_error_rate(labels[judged], sigmoid(found[judged]))
            loss = np.mean([fleet.loss(member) for member in fleet.members])
            steps = fleet.members[0].steps
            history.append({"done": done, "steps": steps, "loss": loss, "EER": rate})
            say(f"{settings.name}: {done:.2f}, {steps} steps, loss {loss:.4f}, EER of the folds {rate:.4f}")

    fleet.train(time_left := seconds(), most, report=report, reports=3)
    weights = {member.name: fleet.averaged(member) for member in fleet.members}
    for name, values in weights.items():
        judge.network.set_weights(values)
        storage.save_network(judge.network, output / f"{settings.name}_{name}.keras")
    say(f"{settings.name}: weights written after {time_left:.0f} s")
    report(1.0)
    pd.DataFrame(history).to_csv(output / f"{settings.name}.history.csv", index=False)
    found = []
    for name, values in weights.items():
        rows, fold = parts[name][1], {SPEAKERS: -1, WHOLE: -2}.get(name, name)
        stored = [value.astype("float16").astype("float32") for value in values]  # as shipped
        for number in range(len(CHANNELS)):
            logits = judge.logits(stored, rows + number * len(table))
            found.append(np.stack([rows, np.full(len(rows), int(fold)), np.full(len(rows), number), logits]))
        row, fold, channel, logit = np.concatenate(found, axis=1)
        np.savez_compressed(output / f"{settings.name}.scores.npz", row=row.astype(np.int16),
                            fold=fold.astype(np.int8), channel=channel.astype(np.int8),
                            logit=logit.astype(np.float32))  # fmt: skip
    say(f"{settings.name}: scored")


def read_scores(folder: str | Path, table: pd.DataFrame, names: Sequence[str] = ()) -> pd.DataFrame:
    """The scores of :func:`judge_fleet` in the form of ``evaluation.judge_folds``, without fold −2."""
    files = [Path(folder) / f"{name}.scores.npz" for name in names]
    parts = []
    for path in files or sorted(Path(folder).glob("*.scores.npz")):
        with np.load(path) as file:
            kept = (file["fold"] > -2) & np.isfinite(file["logit"])
            row = file["row"][kept].astype(int)
            columns = {name: file[name][kept] for name in ("fold", "logit")}
            channel = np.array(CHANNELS)[file["channel"][kept]]
        network = path.name.removesuffix(".scores.npz")
        part = table.iloc[row].reset_index(drop=True)
        parts.append(part.assign(row=row, channel=channel, **columns, network=network))
    return pd.concat(parts, ignore_index=True)
