"""Heat maps are what they say: gradients against finite differences, on both backends, and heat where a face
was altered.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import cv2
import keras
import numpy as np
import pytest
from helpers import clip_facts, clip_mask
from keras import layers

from conftest import ROOT
from kaggle_utils import explain, storage
from kaggle_utils.datasets.drawing import blend_mask
from kaggle_utils.face import detection, framing
from kaggle_utils.kaggle import paths
from kaggle_utils.media import video
from recipes import blocks

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def face():
    return storage.load_branch(paths.models_folder(), "face")


def tiny_face() -> keras.Model:
    """Two convolutions, a side output, an embedding; the last map is linear, so that its bias moves all of it
    alike.
    """
    keras.utils.set_random_seed(0)
    pixels = keras.Input((16, 16, 3))
    early = layers.Conv2D(5, 3, activation="tanh")(layers.Rescaling(1 / 127.5, -1)(pixels))
    side = layers.GlobalMaxPooling2D()(early)
    last = layers.Conv2D(4, 3, strides=3, name="last")(early)
    pooled = layers.Concatenate()([layers.GlobalAveragePooling2D()(last), side])
    outputs = {"embedding": layers.Dense(6, activation="tanh")(pooled), "side1": side}
    return blocks.with_head(keras.Model(pixels, outputs))


def tiny_voice(length: int = 2048) -> keras.Model:
    keras.utils.set_random_seed(0)
    samples = keras.Input((length,))
    x = layers.Conv1D(8, 9, strides=4, activation="tanh")(layers.Reshape((length, 1))(samples))
    return blocks.with_head(keras.Model(samples, {"embedding": layers.GlobalAveragePooling1D()(x)}))


def logits(network: keras.Model, batch: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(network(np.asarray(batch, np.float32), training=False)["logit"])[
        :, 0
    ].astype(float)


def test_gradients_are_finite_differences():
    network, batch = tiny_voice(), RNG.normal(0, 1, (2, 2048))
    found = explain.gradients(lambda samples: network(samples)["logit"], batch)
    for place in (3, 700, 2000):
        step = np.zeros(2048)
        step[place] = 0.05
        expected = (logits(network, batch + step) - logits(network, batch - step)) / 0.1
        np.testing.assert_allclose(found[:, place], expected, rtol=0.02, atol=2e-5)


def test_grad_cam_weighs_channels_by_finite_differences():
    network, crops = tiny_face(), RNG.uniform(0, 255, (2, 16, 16, 3))
    last = network.get_layer("last")
    maps = keras.ops.convert_to_numpy(keras.Function(network.inputs, last.output)([crops.astype(np.float32)]))
    weights, bias = np.zeros((2, 4)), keras.ops.convert_to_numpy(last.bias).copy()
    for channel in range(4):
        ends = []
        for sign in (1, -1):
            last.bias.assign(bias + 0.05 * sign * np.eye(4)[channel])
            ends.append(logits(network, crops))
        weights[:, channel] = (ends[0] - ends[1]) / 0.1
    last.bias.assign(bias)
    expected = np.maximum(np.einsum("nhwc,nc->nhw", maps, weights), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(
        explain.grad_cam(network, crops), expected, rtol=0.02, atol=0.01 * expected.max()
    )


def test_grad_cam_of_averaged_networks_is_the_mean_of_theirs():
    first, second = tiny_face(), tiny_face()
    second.get_layer("logit").kernel.assign(-2 * second.get_layer("logit").kernel)
    crops = RNG.uniform(0, 255, (3, 16, 16, 3))
    found = explain.grad_cam(storage.averaged(first, second), crops)
    np.testing.assert_allclose(
        found, (explain.grad_cam(first, crops) + explain.grad_cam(second, crops)) / 2, rtol=1e-5
    )


def test_saliency_is_what_a_louder_patch_adds_by_finite_differences():
    network, samples = tiny_voice(), RNG.normal(0, 1, (1, 2048)).astype(np.float32)
    found = explain.saliency(network, samples)[0]
    spectrum = explain.stft(samples[0])
    assert found.shape == spectrum.shape
    for bands, times in (
        (slice(0, 40), slice(5, 9)),
        (slice(60, 150), slice(7, 12)),
        (slice(0, 257), slice(6, 11)),
    ):
        patch = np.zeros_like(spectrum)
        patch[bands, times] = spectrum[bands, times]
        step = 0.05 * explain.TRANSFORM.istft(np.pad(patch, ((0, 0), (-explain.TRANSFORM.p_min, 4))), k1=2048)
        expected = (logits(network, samples + step) - logits(network, samples - step))[0] / 0.1
        assert found[bands, times].sum() == pytest.approx(expected, rel=0.03, abs=1e-4)


@pytest.mark.skipif(
    keras.backend.backend() == "jax" or find_spec("jax") is None, reason="needs JAX, and another backend here"
)
def test_the_same_on_jax():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "finite or averaged",
    ]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax"}
    )
    assert "4 passed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]


def test_another_backend_is_named(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match="found the backend 'torch'"):
        explain.gradients(lambda x: x, np.zeros((1, 2)))


def test_overlay_brightens_and_outlines_what_is_hot():
    crop, heat = np.full((64, 64, 3), 90, np.uint8), np.zeros((4, 4))
    assert np.array_equal(explain.overlay(crop, heat), crop)
    heat[2, 2] = 1
    hot = explain.overlay(crop, heat)
    assert hot.dtype == np.uint8 and np.array_equal(hot[:16, :16], crop[:16, :16])
    assert hot[40, 40].mean() > 120 and hot.min(axis=-1).max() > 200


# --- on faces -----------------------------------------------------------------------------------------------
def shares(network, crops: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of crops with any heat: the share of it inside the masks (N, H, W), and the masks' share of the area.
    """
    heat = np.stack([cv2.resize(heat, crops.shape[2:0:-1]) for heat in explain.grad_cam(network, crops)])
    hot = heat.sum(axis=(1, 2)) > 0
    return (heat * masks).sum(axis=(1, 2))[hot] / heat.sum(axis=(1, 2))[hot], masks.mean(axis=(1, 2))[hot]


def test_heat_lies_on_the_altered_part_of_miniature_faces(miniature, face):
    """Over 50 crops a quarter wider than the network's framing, so that more of them lies outside the mask.
    """
    crops, masks = [], []
    for path in sorted(miniature.glob("*_videos/*.mp4")):
        facts = clip_facts(miniature, path.name)
        if facts["fake_face"] is None:
            continue
        clip = video.read_frames(path, 10)
        for image, index in zip(clip.images, video.evenly_spread(clip.info.frame_count, 10), strict=True):
            x, y, _, height, _ = facts["faces"][facts["fake_face"]][index]
            side = 2.4 * height
            box = np.array([x - side / 2, y - side / 2, side, side])
            crops.append(framing.cut(image, box))
            mask = clip_mask(miniature, path.name, index)
            masks.append(
                framing.cut(np.repeat((255 * mask[..., None]).astype(np.uint8), 3, axis=2), box)[..., 0] / 255
            )
    inside, area = shares(face, np.stack(crops[:50]), np.stack(masks[:50]))
    print(
        f"{len(inside)} of 50 crops with heat: {inside.mean():.3f} of it inside the mask, which covers {area.mean():.3f}"
    )
    assert len(inside) >= 25
    assert (inside > area).mean() > 0.5 and inside.mean() > area.mean()


def test_heat_lies_on_the_face_of_a_real_fake(real_clips, face):
    """The face: the ellipse in MTCNN's box, against its share of a crop that shows as much again around it.
    """
    clip = video.read_frames(real_clips / "rtpbawlmxr.mp4", 10)
    crops, masks = [], []
    for image, found in zip(clip.images, detection.FaceFinder()(clip.images), strict=True):
        x, y, width, height = found[0].box
        side = 1.5 * height
        box = np.array([x + width / 2 - side / 2, y + height / 2 - side / 2, side, side])
        ellipse = (x + width / 2, y + height / 2, width / 2, height / 2, 0)
        crops.append(framing.cut(image, box))
        mask = blend_mask(*image.shape[:2], ellipse)
        masks.append(
            framing.cut(np.repeat((255 * mask[..., None]).astype(np.uint8), 3, axis=2), box)[..., 0] / 255
        )
    inside, area = shares(face, np.stack(crops), np.stack(masks))
    print(
        f"{len(inside)} of 10 crops with heat: {inside.mean():.3f} of it on the face, which covers {area.mean():.3f}"
    )
    assert len(inside) >= 8 and inside.mean() > 0.6 and (inside > area).all()
