"""Networks are trained on JAX or PyTorch and served on TensorFlow: the same file must give the same scores."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from conftest import ROOT
from kaggle_utils import platform

SCORE = """
import json, sys
import numpy as np
from kaggle_utils import networks
network = networks.load_branch(sys.argv[1], "face")
crops = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype("float32")
crops[1] = crops[1].mean((1, 2), keepdims=True)
print(json.dumps(np.ravel(np.asarray(network.predict_on_batch(crops)["logit"])).tolist()))
"""


def logits(folder, backend) -> np.ndarray:
    run = subprocess.run([sys.executable, "-c", SCORE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True,
                         env={**os.environ, "KERAS_BACKEND": backend})
    return np.array(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_gives_the_same_scores_as_tensorflow(backend):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    folder = platform.models_folder()
    theirs, ours = (1 / (1 + np.exp(-logits(folder, name))) for name in (backend, "tensorflow"))
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
