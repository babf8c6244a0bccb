"""Networks are trained on JAX or PyTorch and served on TensorFlow: the same file must give the same scores.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from conftest import ROOT
from kaggle_utils.datasets import babble
from kaggle_utils.datasets.drawing import Person
from kaggle_utils.kaggle import paths
from kaggle_utils.media import sound

# P(fake) that the shipped weights, named by their fingerprint, give to `drawn_crops` and `drawn_voice`
KNOWN = {"fingerprint": "83a8fa85d8746932", "crops": [0.9093, 0.6245], "voice": 0.614}

SCORE = """
import json, sys
import numpy as np
from kaggle_utils import storage
network = storage.load_branch(sys.argv[1], "face")
crops = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype("float32")
crops[1] = crops[1].mean((1, 2), keepdims=True)
print(json.dumps(np.ravel(np.asarray(network.predict_on_batch(crops)["logit"])).tolist()))
"""


def logits(folder, backend) -> np.ndarray:
    compile_fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0"} if backend == "jax" else {}
    run = subprocess.run(
        [sys.executable, "-c", SCORE, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **compile_fast, "KERAS_BACKEND": backend},
    )
    return np.array(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_gives_the_same_scores_as_tensorflow(backend):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    folder = paths.models_folder()
    theirs, ours = (1 / (1 + np.exp(-logits(folder, name))) for name in (backend, "tensorflow"))
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


def drawn_crops() -> np.ndarray:
    """Two smooth pictures, uint8 (2, 224, 224, 3): the same on every platform and release, unlike a decoded
    clip.
    """
    y, x = np.mgrid[:224, :224][..., None] / 224
    waves = [
        [np.sin(2 * np.pi * (u * x + v * y) + np.arange(3)) for u, v in of]
        for of in ([(1, 2), (5, 3)], [(2, 1), (17, 9)])
    ]
    return np.rint(127.5 + 60 * np.sum(waves, axis=1)).clip(0, 255).astype(np.uint8)


def drawn_voice() -> np.ndarray:
    """Four seconds of babble, float32: the same on every platform."""
    return babble.speak(Person(), 4.0, np.random.default_rng(0))[0].astype(np.float32)


def test_every_release_of_keras_gives_the_known_scores(detector):
    """The same figures hold in `make test` and in `make test-kaggle`, on the oldest releases allowed."""
    found = {
        "fingerprint": detector.fingerprint,
        "crops": detector.score_faces(drawn_crops(), framed=True).tolist(),
        "voice": detector.score_voice(drawn_voice(), sound.SAMPLE_RATE),
    }
    assert found["fingerprint"] == KNOWN["fingerprint"], (
        f"the weights are new: note what they say in KNOWN: {found}"
    )
    assert found["crops"] == pytest.approx(KNOWN["crops"], abs=1e-3) and found["voice"] == pytest.approx(
        KNOWN["voice"], abs=1e-3
    )
