"""The networks that notebooks 04 to 06 build layer by layer are those of the package."""

import json
import math
from collections import Counter

import keras
import numpy as np
import pytest
from keras import layers

from conftest import ROOT
from kaggle_utils.voice import layers as voice_layers
from recipes import blocks
from recipes.face import networks as face_networks
from recipes.fusion import networks as fusion_networks
from recipes.voice import networks as voice_networks

SMALL = {"kinds": ("linear",), "samples": 16000, "width": 8, "normalization": "group", "dropout": 0.2,
         "standardize": "clip"}  # fmt: skip


def built(notebook: str) -> dict:
    """The variables of a notebook's cells that are tagged ``network``, run on their own."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if "network" in cell["metadata"].get("tags", ())]
    names = {"keras": keras, "layers": layers, "math": math, "voice_layers": voice_layers, "WINDOW": 16000,
             "FACE_OUTPUTS": blocks.FACE_OUTPUTS, "VOICE_OUTPUTS": blocks.VOICE_OUTPUTS,
             "NORMALIZATION": "batch"}  # fmt: skip
    exec("\n".join(line for line in "\n".join(code).splitlines() if ".summary(" not in line), names)
    return names


def plan(model: keras.Model) -> Counter:
    """Each layer's kind, shape and number of parameters."""
    kept = (layer for layer in model.layers if not isinstance(layer, layers.InputLayer | layers.Identity))
    return Counter((type(layer).__name__, layer.output.shape, layer.count_params()) for layer in kept)


def answers(model: keras.Model, inputs) -> list[np.ndarray]:
    found = model(inputs, training=False)
    return [np.asarray(x) for x in (found.values() if isinstance(found, dict) else [found])]


def random_inputs(model: keras.Model):
    random = np.random.default_rng(0)
    shapes = {x.name: [2, *(64 if side is None else side for side in x.shape[1:])] for x in model.inputs}
    drawn = {name: random.uniform(0, 1, shape).astype("float32") for name, shape in shapes.items()}
    return drawn if isinstance(model.input, dict) else next(iter(drawn.values()))


def small_voice_inception() -> keras.Model:
    whole = blocks.with_head(voice_networks.voice_inception(**SMALL))
    return keras.Model(whole.input, whole.output["logit"])


CASES = {
    "04, the study": ("04_face_inception", "study", face_networks.one_image_cnn),
    "04, InceptionV3": ("04_face_inception", "inception", lambda: blocks.with_head(face_networks.face_inception())),
    "05, the study": ("05_voice_inception", "study", voice_networks.voice_cnn),
    "05, spectrograms": ("05_voice_inception", "network", small_voice_inception),
    "06, the study": ("06_fusion_training", "last", fusion_networks.last_cnn),
}


@pytest.mark.parametrize("case", CASES)
def test_a_notebook_builds_the_network_of_the_package(case):
    notebook, name, make = CASES[case]
    shown, ours = built(notebook)[name], make()
    assert plan(shown) == plan(ours)
    shown.set_weights(ours.get_weights())
    inputs = random_inputs(ours)
    for found, expected in zip(answers(shown, inputs), answers(ours, inputs), strict=True):
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(found, expected, rtol=1e-4)
