"""One batch over two devices: the same weights as on one. Devices are virtual: two that share this machine's
processor.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import json, sys
from dataclasses import replace
import keras
import numpy as np
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
from recipes import loop
from recipes.face import training as face_training
from test_face_training import TINY, drawn_faces

def weights(most):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    with loop.data_parallel(8, most) as count:
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(random.normal(size=(64, 5)), random.normal(size=(64, 1)), 8, epochs=3, shuffle=False, verbose=0)
    return count, [value.tolist() for value in map(np.asarray, model.get_weights())]

with loop.data_parallel(9) as uneven:
    pass
losses = []
if sys.argv[2:]:
    tiny = replace(TINY, epochs=2, augment=None, self_blended=0.0)
    losses = face_training.train_face(tiny, drawn_faces(), sys.argv[1], workers=1).history["val_loss"].tolist()
print(json.dumps({"alone": weights(1), "both": weights(None), "uneven": uneven, "losses": losses}))
"""


def train(backend: str, *arguments: str) -> dict:
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(("backend", "whole"), [("jax", True), ("tensorflow", "DEEPFAKE_LONG" in os.environ)])
def test_two_devices_train_as_one(backend, whole, tmp_path):
    """A small model to the last digit; and ``train_face`` through, on TensorFlow only in ``make
    test-cluster``.
    """
    pytest.importorskip(backend)
    found = train(backend, str(tmp_path), *(["whole"] if whole else []))
    (one, alone), (two, both) = found["alone"], found["both"]
    assert (one, two, found["uneven"]) == (1, 2, 1)
    for a, b in zip(alone, both, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if whole:
        assert (
            len(found["losses"]) == 2
            and np.isfinite(found["losses"]).all()
            and (tmp_path / "tiny.keras").is_file()
        )
