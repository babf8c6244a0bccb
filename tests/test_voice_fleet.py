"""The networks of several folds, trained side by side with JAX on a tiny corpus."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.storage import load_network
from recipes.voice import fleet
from recipes.voice.channels import CHANNELS, channel_file
from recipes.voice.data import Voices
from recipes.voice.evaluation import SPEAKERS
from recipes.voice.training import VoiceSettings, predict_logits

LENGTH, folder = 4800, Path(sys.argv[1])
random, rows, samples, copies = np.random.default_rng(0), [], [], []
time = np.arange(8000) / 16000
for number in range(60):
    fake = number % 2
    rows.append(dict(label=fake, system=f"s{number % 10}" if fake else "", page=f"p{number % 10 // 2}",
                     speaker=f"v{number % 12}", pair_key=f"k{number // 2}", file=f"{number}.flac"))
    hum = np.sin(2 * np.pi * (3000 if fake else 500) * time) + 0.3 * random.standard_normal(len(time))
    samples.append((3000 * hum).astype(np.int16))
    copies.append([samples[-1][200:], samples[-1] // 2])
corpus = Voices(pd.DataFrame(rows), samples, 16000, copies)
for channel in CHANNELS:
    lost = [voice if row or channel != "room" else voice[:0] for row, voice in enumerate(samples)]
    Voices(corpus.table, lost).save(channel_file(folder, channel))

options = dict(kinds=("linear",), samples=LENGTH, width=4, normalization="none", standardize="none")
settings = VoiceSettings(name="tiny", network_options=options, batch_size=16, learning_rate=3e-3, average=0.9,
                         augment=None, ranking=0.5, policy="float32")
fleet.judge_fleet(settings, corpus, folder, folder, lambda: 300.0, splits=(0, 2, SPEAKERS), most=40)
scores = fleet.read_scores(folder, corpus.table)
folds = scores[(scores["fold"] >= 0) & (scores["channel"] == CHANNELS[0])]
judged = set(corpus.table.index[corpus.table["page"].isin(folds["page"])])
assert set(folds["row"]) == judged and folds["page"].nunique() == 2, "two pages, each judged whole"
rooms = scores[(scores["fold"] >= 0) & (scores["channel"] == "room")]
assert set(rooms["row"]) == judged - {0}, "a voice that its channel makes silent has no score"
assert (scores["fold"] == -1).any()
real, fake = (folds.loc[folds["label"] == label, "logit"] for label in (0, 1))
assert fake.mean() > real.mean() + 0.5, "it learnt"
assert {path.name for path in folder.glob("*.keras")} == {f"tiny_{name}.keras" for name in (0, 2, SPEAKERS)}
some = folds[folds["fold"] == 2]
again = predict_logits(load_network(folder / "tiny_2.keras"), corpus, some["row"].to_numpy(), LENGTH)
np.testing.assert_allclose(again, some["logit"], atol=2e-3, err_msg="the saved network gives these scores")
"""


def test_folds_side_by_side(tmp_path):
    if find_spec("jax") is None:
        pytest.skip("jax is not installed")
    variables = {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True,
                         env=os.environ | variables)
    assert run.returncode == 0, run.stdout + run.stderr
