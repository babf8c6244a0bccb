"""The pool of augmented crops that all face runs share: pairs, held-out folds, training, weights. Needs JAX."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax, keras, numpy as np
from keras import layers
from test_face_training import drawn_faces

from kaggle_utils import storage
from recipes.face import pool as pools
from recipes.face.data import keep_aside
from recipes.face.networks import between
from recipes.face.training import FaceSettings

folder = Path(sys.argv[1])
keras.utils.set_random_seed(0)
pixels = keras.Input((None, None, 3))
x = layers.Conv2D(8, 5, 2, use_bias=False)(layers.Rescaling(1 / 255)(pixels))
x = layers.LeakyReLU()(layers.BatchNormalization()(x))
x = layers.Dense(8, "tanh", name="embedding")(layers.GlobalAveragePooling2D()(x))
network = keras.Model(pixels, {"embedding": x, "logit": layers.Dense(1, name="logit")(x)})
storage.save_network(network, folder / "face.keras", "float32")

faces = drawn_faces(24, 32)
table = faces.table.assign(source="web", person=faces.table["group"], generator="", fold=-1)
table.loc[table["group"].isin(["real0", "real1"]), "fold"] = 3
faces.table = table
settings = FaceSettings(size=32, crop_size=32, self_blended=0.2, mixed=0.2, taught=0.2, seed=1, pairs=16)
sizes = replace(pools.SMALL, chunk=32, made=16, batch=8, row=16)
teacher = storage.load_network(folder / "face.keras")
pool = pools.make_pool(faces, settings, [teacher], sizes)
allowed = (keep_aside(faces, (3,)).table["split"].to_numpy() == "train")[pool.rows]
draw = pools.Draw(pool, faces.sources, allowed, 8, 0)
places = np.concatenate([rows for (_, _, rows), _ in zip(draw, range(40))])

with ThreadPoolExecutor(2) as threads:
    trainer = pools.Trainer(folder / "face.keras", sizes, threads, 32)
    plain = jax.jit(pools.plain_pixels)
    average = pools.train(trainer, pool, draw, 150, 1e-2, plain)
    logits = trainer.logits(average, faces.crops, False)
    trainer.save([np.asarray(value) for value in average], folder / "new.keras")
new = storage.load_network(folder / "new.keras")
again = np.asarray(new.predict_on_batch(faces.crops.astype("float32"))["logit"])[:, 0]
labels = table["label"].to_numpy()
print("RESULT", json.dumps({
    "crops": [list(chunk.shape) for chunk in pool.chunks],
    "reals": pool.labels[::2].max().item(),
    "held": bool((table["fold"].to_numpy()[pool.rows[places]] == 3).any()),
    "drawn_at_all": bool((table["fold"].to_numpy()[pool.rows] == 3).any()),
    "half": float(np.mean(places % 2)),
    "apart": float(logits[labels == 1].mean() - logits[labels == 0].mean()),
    "saved": float(np.abs(again - logits).max()),
    "moved": [float(np.abs(a - b).max()) for a, b in zip(average, trainer.start)],
    "still": float(np.abs(between(trainer.start, average, 0.0)[0] - trainer.start[0]).max()),
}))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    if find_spec("jax") is None:
        pytest.skip("jax is not installed")
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("pool"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_a_pool_holds_a_real_and_a_fake_in_turn(result):
    assert result["crops"] == [[32, 32, 32, 3]] * 2
    assert result["reals"] == 0


def test_a_run_never_draws_a_fold_that_it_holds_out(result):
    assert result["drawn_at_all"] and not result["held"]
    assert result["half"] == 0.5


def test_a_run_learns_and_its_weights_are_saved(result):
    assert result["apart"] > 0.2
    assert result["saved"] < 0.05
    assert min(result["moved"]) > 0 and result["still"] == 0
