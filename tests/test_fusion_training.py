"""Assembled clips, the ways to join the branches, and their comparison, on drawn embeddings."""

import keras
import numpy as np
import pandas as pd
import pytest

from kaggle_utils import metrics
from kaggle_utils.fusion import rules
from recipes import blocks
from recipes.face import data as face_data
from recipes.face import landmarks
from recipes.face import networks as face_networks
from recipes.fusion import networks as fusion_networks
from recipes.fusion import training as fusion_training
from recipes.fusion.training import Embeddings

FRAMES = blocks.FRAMES


def drawn(widths, frames=(), count=200, seed=0):
    """Embeddings whose logit, and the first column of every output, tell the class with some noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    signal = (2 * labels - 1).reshape(-1, *(1 for _ in frames), 1)
    outputs = {name: random.normal(0, 1, (count, *frames, width)) + signal for name, width in widths.items()}
    outputs["logit"] = (
        random.normal(0, 1, (count, *frames, 1)) + 2.5 * signal + random.normal(0, 1, signal.shape)
    )
    groups = np.array([f"g{i // 2}" for i in range(count)])
    return Embeddings({name: x.astype(np.float32) for name, x in outputs.items()}, labels, groups)


@pytest.fixture(scope="module")
def faces():
    return drawn(blocks.FACE_OUTPUTS, (FRAMES,))


@pytest.fixture(scope="module")
def voices():
    return drawn(blocks.VOICE_OUTPUTS, seed=1)


def test_the_four_kinds_are_equally_many_and_labelled(faces, voices):
    clips = fusion_training.assemble(faces, voices, 2000, seed=0)
    kinds = fusion_training.kind_of(clips)
    assert set(kinds) == set(fusion_training.KINDS.values())
    assert all(abs((kinds == kind).mean() - 0.25) < 0.04 for kind in fusion_training.KINDS.values())
    np.testing.assert_array_equal(clips.labels, kinds != "real")
    assert clips.inputs["face_mask"].all() and clips.inputs["voice_mask"].all()
    np.testing.assert_allclose(clips.inputs["face_side1"].shape, (2000, FRAMES, blocks.FACE_OUTPUTS["side1"]))


def test_missing_parts_are_masked_and_never_both(faces, voices):
    clips = fusion_training.assemble(faces, voices, 1000, missing=0.2)
    seen, heard = clips.inputs["face_mask"].any(1), clips.inputs["voice_mask"][:, 0] > 0
    assert (seen | heard).all() and 0.1 < (~seen).mean() < 0.3 and 0.1 < (~heard).mean() < 0.3
    np.testing.assert_array_equal(np.isnan(clips.face), ~seen)
    np.testing.assert_array_equal(np.isnan(clips.voice), ~heard)
    assert (clips.labels[~seen] == (clips.table["voice"][~seen] == 1)).all()
    assert (fusion_training.branch_logits(clips, {"face": (1, 0), "voice": (1, 0)})[~seen, 0] == 0).all()


def test_halves_share_no_group(faces):
    first, second = faces.halves(0.6)
    assert not set(first.groups) & set(second.groups) and len(first.labels) + len(second.labels) == 200
    assert 0.5 < len(first.labels) / 200 < 0.7


def test_embeddings_are_saved_and_read_back(voices, tmp_path):
    voices.save(tmp_path / "voices.npz")
    again = Embeddings.load(tmp_path / "voices.npz")
    np.testing.assert_array_equal(again.groups, voices.groups)
    np.testing.assert_allclose(again.outputs["side2"], voices.outputs["side2"], atol=5e-3)


def test_faces_are_embedded_in_views_that_differ_and_repeat():
    table = pd.DataFrame({"label": np.arange(11) % 2, "group": [f"g{number}" for number in range(11)]})
    crops = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    faces = face_data.Faces(table, crops, np.repeat(landmarks.mean_landmarks(64)[None], 11, axis=0))
    network = blocks.with_head(face_networks.mesoinception4(64))
    found = fusion_training.embed_faces(network, faces, size=64, views=3)
    logits = found.outputs["logit"][..., 0]
    assert {name: x.shape for name, x in found.outputs.items()} == {
        name: (11, FRAMES, output.shape[-1]) for name, output in network.output.items()
    }
    np.testing.assert_array_equal(logits[:, 3:6], logits[:, :3])
    assert len(np.unique(logits[:, :3])) == 33
    assert (
        found.labels.tolist() == table["label"].tolist() and found.groups.tolist() == table["group"].tolist()
    )


def test_embeddings_are_made_once(voices, tmp_path):
    first = fusion_training.cached_embeddings(tmp_path / "voices.npz", lambda: voices)
    again = fusion_training.cached_embeddings(tmp_path / "voices.npz", lambda: pytest.fail("made twice"))
    np.testing.assert_array_equal(first.labels, again.labels)


def test_noisy_or_is_that_of_the_detector(faces, voices):
    clips = fusion_training.assemble(faces, voices, 20, missing=0.3)
    lines = {"face": (0.8, 0.1), "voice": (0.5, -0.2)}
    fuse = rules.NoisyOr(rules.Calibration(lines, (0, 1)), fusion_training.EVEN_SHARE)
    given = fusion_training.noisy_or(clips, lines)
    for i in range(20):
        seen = clips.inputs["face_mask"][i] > 0
        face = {"logit": np.full((FRAMES, 1), np.nan_to_num(clips.face[i]))}
        voice = None if np.isnan(clips.voice[i]) else {"logit": np.full((1, 1), clips.voice[i])}
        expected = fuse(face, seen, voice, fusion_training.PRIOR)
        assert rules.sigmoid(given[i] + rules.log_odds(fusion_training.PRIOR)) == pytest.approx(
            expected, abs=1e-5
        )


def test_joined_beats_each_branch_and_the_line_recovers_the_log_odds(faces, voices):
    train = fusion_training.assemble(*(part.halves()[0] for part in (faces, voices)), 1500, missing=0.1)
    rest = [part.halves()[1] for part in (faces, voices)]
    methods = fusion_training.fit_methods(train)
    calibrate, test = (fusion_training.assemble(*rest, 800, seed=seed) for seed in (1, 2))
    table = fusion_training.compare(methods, calibrate, test, False)
    assert (
        table.loc["noisy-or", "log loss"] < table.loc[["face alone", "voice alone"], "log loss"].min() - 0.05
    )
    for kind, branch in (("fake face", "face alone"), ("fake voice", "voice alone")):
        assert table.loc["noisy-or", f"log loss, {kind}"] < table.loc[branch, f"log loss, {kind}"] + 0.1
    assert table.loc["noisy-or", "AUC"] > table.loc[["face alone", "voice alone"], "AUC"].max() + 0.05
    assert table.loc["noisy-or", "ECE"] < 0.1 < table.loc[["face alone", "voice alone"], "ECE"].min()


def test_the_last_network_learns_from_assembled_clips(faces, voices):
    train = fusion_training.assemble(faces, voices, 1500, missing=0.1)
    keras.utils.set_random_seed(0)
    last = fusion_networks.last_cnn()
    last.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    last.fit(train.inputs, train.labels.astype("float32")[:, None], batch_size=64, epochs=3, verbose=0)
    test = fusion_training.assemble(faces, voices, 400, seed=1)
    assert metrics.auc(test.labels, metrics.sigmoid(fusion_training.last_logits(last, test))) > 0.9


def test_line_weighs_both_classes_alike():
    random = np.random.default_rng(0)
    labels = (random.random(200000) < 0.9).astype(int)
    logits = random.normal(0, 1, 200000) + np.where(
        labels == 1, 1.0, -1.0
    )  # log odds 2 x where the classes are balanced
    scale, shift = metrics.fit_line(labels, 3 * logits + 5)
    assert scale * 3 == pytest.approx(2, rel=0.05) and scale * 5 + shift == pytest.approx(0, abs=0.1)


def test_limits_widen_where_a_certainty_is_wrong():
    labels, sure = np.array([0, 1] * 50), np.array([0.0001, 0.9999] * 50)
    assert fusion_training.best_limits(labels, sure)[0] == 0.001
    wrong = sure.copy()
    wrong[:6] = 1 - wrong[:6]
    assert fusion_training.best_limits(labels, wrong)[0] == 0.05


def test_frames_are_pooled_as_the_detector_is_told():
    logits, seen = np.array([3.0, 3.0, 3.0, -1.0, 9.0]), np.array([1, 1, 1, 1, 0], bool)
    assert rules.pooled(logits, seen) == pytest.approx(2.0)
    sure = rules.sigmoid(3.0)
    assert rules.sigmoid(rules.pooled(logits, seen, "confident")) == pytest.approx(sure)
    alike = np.full(4, rules.log_odds(0.7))
    assert rules.sigmoid(rules.pooled(alike, np.ones(4, bool), "power")) == pytest.approx(0.8513, abs=1e-4)
    assert np.isnan(rules.pooled(logits, np.zeros(5, bool)))
    with pytest.raises(ValueError, match="pooling"):
        rules.Calibration({}, (0, 1), "median")
