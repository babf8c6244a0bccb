"""The networks of all folds, trained side by side with JAX on a tiny corpus."""

import keras
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("jax")
if keras.backend.backend() != "jax":
    pytest.skip("needs KERAS_BACKEND=jax", allow_module_level=True)

from recipes.voice import fleet
from recipes.voice.channels import CHANNELS, channel_file
from recipes.voice.data import Voices
from recipes.voice.training import VoiceSettings

LENGTH = 4800


@pytest.fixture(scope="module")
def corpus():
    random, rows, samples, copies = np.random.default_rng(0), [], [], []
    time = np.arange(8000) / 16000
    for number in range(60):
        fake = number % 2
        system = f"s{number % 10}" if fake else ""
        rows.append(dict(label=fake, system=system, page=f"p{number % 10 // 2}", speaker=f"v{number % 12}",
                         pair_key=f"k{number // 2}", file=f"{number}.flac"))  # fmt: skip
        hum = np.sin(2 * np.pi * (3000 if fake else 500) * time) + 0.3 * random.standard_normal(len(time))
        samples.append((3000 * hum).astype(np.int16))
        copies.append([samples[-1][200:], samples[-1] // 2])
    return Voices(pd.DataFrame(rows), samples, 16000, copies)


def test_folds_side_by_side(corpus, tmp_path):
    for channel in CHANNELS:
        lost = [voice if row or channel != "room" else voice[:0] for row, voice in enumerate(corpus.samples)]
        Voices(corpus.table, lost).save(channel_file(tmp_path, channel))
    options = {
        "kinds": ("linear",),
        "samples": LENGTH,
        "width": 4,
        "normalization": "none",
        "standardize": "none",
    }
    settings = VoiceSettings(name="tiny", network_options=options, batch_size=16, learning_rate=3e-3,
                             average=0.9, augment=None, ranking=0.5, policy="float32")  # fmt: skip
    said = []
    fleet.judge_fleet(settings, corpus, tmp_path, tmp_path, lambda: 300.0, most=40, say=said.append)
    scores = fleet.read_scores(tmp_path, corpus.table)
    folds = scores[(scores["fold"] >= 0) & (scores["channel"] == CHANNELS[0])]
    assert sorted(folds["row"]) == list(range(60))
    assert len(scores[(scores["fold"] >= 0) & (scores["channel"] == "room")]) == 59
    real, fake = (folds.loc[folds["label"] == label, "logit"] for label in (0, 1))
    assert fake.mean() > real.mean() + 0.5
    assert (scores["fold"] == -1).any()
    assert {path.name for path in tmp_path.glob("*.keras")} == {
        f"tiny_{name}.keras" for name in (0, 1, 2, 3, 4, "speakers", "whole")
    }
    # the saved network gives the scores that were written
    from kaggle_utils.storage import load_network
    from recipes.voice.training import predict_logits

    network = load_network(tmp_path / "tiny_2.keras")
    some = folds[folds["fold"] == 2]
    again = predict_logits(network, corpus, some["row"].to_numpy(), LENGTH)
    np.testing.assert_allclose(again, some["logit"], atol=2e-3)
