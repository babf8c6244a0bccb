"""Reconstruction twins: autoencoders of every design, what is put back, the same delivery for both."""

import numpy as np
import pytest
from test_augment import drawn_landmarks

from recipes.face import twins

SMALL = {"width": 8, "latent": 4}


@pytest.mark.parametrize("name", twins.DESIGNS)
def test_every_design_keeps_the_size(name):
    design = twins.DESIGNS[name]
    network = twins.autoencoder(
        twins.Design(design.decoder, design.halvings, bottleneck=design.bottleneck, **SMALL)
    )
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    assert np.asarray(network(pictures)).shape == pictures.shape


def test_an_autoencoder_learns_with_its_adversary(monkeypatch):
    monkeypatch.setattr(twins, "TRAINED_SIDE", 32)
    monkeypatch.setattr(twins, "SIDES", (32,))
    ramp = np.linspace(40, 200, 32)[:, None, None] * np.ones((32, 32, 3))
    faces = np.stack([np.roll(ramp, shift, axis=0) for shift in range(8)]).astype(np.uint8)
    network = twins.train_autoencoder(
        twins.Design("nearest", 2, adversary=0.02, **SMALL), faces, steps=40, batch=4, workers=1
    )
    made = twins.make_twins(faces, [network], batch=4, threads=2)
    assert made.shape == faces.shape and made.dtype == np.uint8
    assert np.abs(made.astype(float) - faces).mean() < 40
    assert np.abs(made.astype(float).mean((1, 2)) - faces.mean((1, 2))).max() < 6  # colours are kept


def test_a_mouth_alone_leaves_the_rest_as_it_was():
    random, points = np.random.default_rng(0), drawn_landmarks((48, 48), 30, 40)
    original, twin = np.zeros((96, 96, 3), np.uint8), np.full((96, 96, 3), 200, np.uint8)
    part = twins.put_back(original, twin, points, "mouth", random)
    assert twins.put_back(original, twin, points, "whole", random) is twin
    assert part[5, 5].max() == 0 and part.max() > 100


def test_original_and_twin_are_delivered_alike():
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for seed in range(8):
        first, second = twins.as_delivered((picture, picture.copy()), np.random.default_rng(seed))
        np.testing.assert_array_equal(first, second)
