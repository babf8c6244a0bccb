"""Pairs of faces degraded alike, and fine-tuning on a CPU in plain PyTorch, on drawn faces."""

import keras
import numpy as np
import pytest
from test_face_training import SIZE, drawn_faces

from recipes.face.pairs import FacePairs, deliver, delivery, self_blended


def sources():
    dfdc, frames = drawn_faces(), drawn_faces(seed=1)
    frames = frames.take(np.flatnonzero(frames.table["label"] == 0))
    return {"dfdc": dfdc, "frames": frames}


def test_a_batch_holds_a_real_and_a_fake_in_turn_and_is_drawn_again_alike():
    pairs = FacePairs(sources(), seed=3)
    crops, labels = pairs.batch(0, 8)
    assert crops.shape == (16, SIZE, SIZE, 3) and crops.dtype == np.uint8
    assert labels.tolist() == [0, 1] * 8
    again, _ = FacePairs(sources(), seed=3).batch(0, 8)
    other, _ = pairs.batch(1, 8)
    assert np.array_equal(crops, again) and not np.array_equal(crops, other)


def test_no_row_of_another_split_is_drawn():
    faces = sources()
    for part in faces.values():
        part.crops[part.table["split"].to_numpy() != "train"] = 0
        part.crops[part.table["split"].to_numpy() == "train"] = 200
    crops, _ = FacePairs(faces).batch(0, 32)
    assert crops.mean(axis=(1, 2, 3)).min() > 100


def test_a_source_without_fakes_is_self_blended_and_twins_come_from_the_autoencoder():
    frames = {"frames": sources()["frames"], "dfdc": sources()["dfdc"]}
    seen = []

    def rebuild(crop):
        seen.append(crop)
        return np.zeros_like(crop)

    pairs = FacePairs(frames, reals={"frames": 1.0}, rebuild=[rebuild])
    assert pairs.shares[0] == {"frames": 1.0} and pairs.shares[1] == {"dfdc": 0.55}
    pairs.batch(0, 64)
    assert 1 <= len(seen) <= 20


def test_self_blending_changes_the_face_and_keeps_the_size():
    faces = drawn_faces()
    blended = self_blended(faces.crops[0], faces.points[0], np.random.default_rng(0))
    difference = np.abs(blended.astype(int) - faces.crops[0])
    assert blended.shape == faces.crops[0].shape and blended.dtype == np.uint8 and difference.max() > 3


def test_a_wide_crop_is_delivered_in_the_tight_framing():
    crop = np.zeros((64, 64, 3), np.uint8)
    crop[16:48, 16:48] = 200  # the tight framing of a crop twice as wide
    way = delivery(np.random.default_rng(0)) | {"angle": 0, "zoom": 1.0, "shift": np.zeros(2), "gain": 1}
    way |= {"offset": 0, "blur": 0, "noise": 0, "jpeg": 0, "size": 1, "mirrored": False}
    assert deliver(crop, 2.0, way, np.random.default_rng(0)).mean() > 190


needs_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="needs KERAS_BACKEND=torch")


@pytest.fixture
def network():
    """Every kind of layer that the face networks have, small."""
    from recipes import blocks

    layers = keras.layers
    keras.utils.set_random_seed(0)
    pixels = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 255)(layers.Resizing(SIZE, SIZE, antialias=True)(pixels))
    x = layers.Conv2D(8, 3, 2, "same", use_bias=False)(x)
    x = layers.Activation("relu")(layers.BatchNormalization(scale=False)(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    grid = layers.Add(name="grid")([x, layers.Conv2D(8, 1)(x)])
    x = layers.Concatenate()(
        [layers.AveragePooling2D(3, 1, "same")(grid), layers.MaxPooling2D(3, 1, "same")(grid)]
    )
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)])
    outputs = {"embedding": blocks.leaky_dense(layers.Dropout(0.5)(x), 8, "embedding")}
    network = blocks.with_statistics(blocks.with_head(keras.Model(pixels, outputs)), ("grid",))
    random = np.random.default_rng(0)
    network.set_weights(
        [
            np.abs(weight + random.normal(0, 0.1, weight.shape))
            if "variance" in variable.path
            else weight + random.normal(0, 0.1, weight.shape)
            for weight, variable in zip(network.get_weights(), network.weights, strict=True)
        ]
    )
    return network


@needs_torch
def test_plain_network_answers_as_keras_does_and_writes_its_weights_back(network):
    import torch

    from recipes.face.plain import PlainNetwork

    crops = torch.from_numpy(drawn_faces().crops[:4].astype(np.float32))
    plain = PlainNetwork(network, torch.float32).eval()
    with torch.no_grad():
        expected = network(crops, training=False)["logit"]
        assert torch.allclose(plain(crops), expected, atol=1e-3)
        for weight in plain.weights.values():
            weight.mul_(1.1)
        plain.write_back()
        changed = network(crops, training=False)["logit"]
        assert torch.allclose(plain(crops), changed, atol=1e-3) and not torch.allclose(changed, expected)


@needs_torch
def test_fine_tuning_learns_resumes_and_leaves_the_frozen_layers(network, tmp_path):
    import torch

    from recipes.face.networks import between
    from recipes.face.plain import PlainNetwork
    from recipes.face.wide import fine_tune

    before = network.get_weights()
    plain, pairs = PlainNetwork(network, torch.float32), FacePairs({"dfdc": drawn_faces(48)})
    plain.freeze_before("depthwise")
    losses = fine_tune(plain, pairs, tmp_path / "state", 30, peak=1e-2, batch=8)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    again = PlainNetwork(network, torch.float32)
    again.freeze_before("depthwise")
    assert fine_tune(again, pairs, tmp_path / "state", 30) == losses
    assert all(torch.equal(again.weights[name], weight) for name, weight in plain.weights.items())
    again.write_back()
    after = network.get_weights()
    assert np.allclose(before[0], after[0], atol=1e-6)
    assert not np.allclose(before[-1], after[-1])
    half = between(before, after, 0.5)
    assert np.allclose(half[-1], (before[-1] + after[-1]) / 2)
