"""Batches, schedule, averaged weights, resume and evaluation of face training, on drawn crops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from keras import ops
from test_augment import drawn_landmarks

from kaggle_utils import platform, training
from kaggle_utils.training import Faces, FaceSettings

SIZE = 32
TINY = FaceSettings(name="tiny", network="mesoinception4", size=SIZE, epochs=3, batch_size=4, learning_rate=1e-2,
                    average=0.9, policy="float32", crops=None)


def drawn_faces(originals=12, size=SIZE, seed=0):
    """Originals with one fake each (brighter on one side), a third of them for validation."""
    random = np.random.default_rng(seed)
    rows, crops = [], []
    for number in range(originals):
        split = "validation" if number % 3 == 2 else "train"
        real = random.uniform(0, 150, (size, size, 3))
        for label, name in ((0, f"real{number}"), (1, f"fake{number}")):
            crops.append(real + label * np.linspace(0, 100, size)[:, None])
            rows.append({"stem": name, "label": label, "group": f"real{number}", "part": 40 + number % 3 * 3,
                         "source_px": 100 + 20 * number, "p99": 20.0 if label else np.nan, "split": split})
    points = np.repeat(drawn_landmarks((size / 2, size / 2), size * 0.4, size * 0.5)[None], len(rows), 0)
    return Faces(pd.DataFrame(rows), np.array(crops).astype("uint8"), points)


@pytest.fixture(scope="module")
def faces():
    return drawn_faces()


def batches_of(faces, **changes):
    settings = replace(TINY, **changes)
    return training.FaceBatches(faces, training.training_rows(faces, settings), settings, workers=1)


def test_batches_are_balanced_and_of_the_training_split(faces):
    batches = batches_of(faces, self_blended=0.0)
    seen = []
    for index in range(batches.num_batches):
        inputs, labels = batches[index]
        assert labels.shape == (4, 1) and labels.mean() == 0.5
        assert inputs["crop"].dtype == np.uint8 and not inputs["mask"].any()
        seen += [crop.tobytes() for crop in inputs["crop"]]
    validation = {crop.tobytes() for crop in faces.crops[faces.rows("validation")]}
    assert len(set(seen)) == 16 and not validation & set(seen)


def test_two_fakes_in_five_are_self_blended_reals(faces):
    batches = batches_of(faces, self_blended=0.5)
    parts = [batches[index] for index in range(batches.num_batches)]
    labels = np.concatenate([labels for _, labels in parts])
    blended = np.concatenate([inputs["mask"].any((1, 2, 3)) for inputs, _ in parts])
    assert blended.sum() == 4 and (labels[blended] == 1).all() and labels.mean() == 0.5


def test_each_epoch_draws_anew_and_the_same_epoch_alike(faces):
    batches = batches_of(faces)
    first = batches[1][0]["crop"]
    batches.epoch = 1
    assert not np.array_equal(batches[1][0]["crop"], first)
    batches.epoch = 0
    np.testing.assert_array_equal(batches[1][0]["crop"], first)


def test_mixed_pairs_lie_between_real_and_fake(faces):
    batches = batches_of(faces, mixed=1.0, self_blended=0.0)
    parts = [batches[index] for index in range(batches.num_batches)]
    labels = np.concatenate([labels for _, labels in parts])[:, 0]
    crops = np.concatenate([inputs["crop"] for inputs, _ in parts]).astype(float)
    rise = crops[:, :, -3:].mean((1, 2, 3)) - crops[:, :, :3].mean((1, 2, 3))  # 0 in reals, about 94 in fakes
    soft = (labels > 0) & (labels < 1)
    assert soft.sum() == 8 and labels.max() <= 1
    np.testing.assert_allclose(rise[soft], 94 * labels[soft], atol=25)


def test_subset_is_balanced_and_the_same_for_each_seed(faces):
    rows = training.training_rows(faces, replace(TINY, crops=8))
    np.testing.assert_array_equal(rows, training.training_rows(faces, replace(TINY, crops=8, seed=5)))
    assert len(rows) == 8 and faces.table["label"][rows].mean() == 0.5
    assert (faces.table["split"][rows] == "train").all()


def test_schedule_warms_up_and_ends_at_zero():
    rates = [float(training.WarmupCosine(1e-3, 5, 50.0)(step)) for step in range(51)]
    assert rates[0] == pytest.approx(2e-4) and max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert np.argmax(rates) in (4, 5) and (np.diff(rates[5:]) <= 0).all()


def test_run_learns_and_saves(faces, tmp_path):
    run = training.train_face(replace(TINY, epochs=10, self_blended=0.0, augment=None), faces, tmp_path, workers=1)
    assert len(run.history) == 10 and run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert list(run.scores["stem"]) == list(faces.table["stem"][faces.rows("validation")])
    assert not (tmp_path / "tiny.checkpoint.npz").exists()
    again = training.load_run(tmp_path / "tiny.weights.npz", run.settings)
    logits = training.predict_logits(again, faces.crops[faces.rows("validation")], SIZE)
    np.testing.assert_allclose(logits, run.scores["logit"], atol=0.05)


def test_interrupted_and_resumed_run_ends_where_the_whole_one_does(faces, tmp_path, monkeypatch):
    settings = replace(TINY, epochs=4)
    whole = training.train_face(settings, faces, tmp_path / "whole", workers=1)
    plan = training.PlanEpochs

    def interrupted(*arguments, **options):
        monkeypatch.setattr(training, "PlanEpochs", plan)
        callback = plan(*arguments, **options)
        batch_end = callback.on_train_batch_end

        def pull_the_plug(batch, logs=None):
            batch_end(batch, logs)
            if len(callback.history) == 2 and batch == 1:
                raise KeyboardInterrupt
        callback.on_train_batch_end, callback.async_safe = pull_the_plug, False
        return callback

    monkeypatch.setattr(training, "PlanEpochs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train_face(settings, faces, tmp_path / "cut", workers=1)
    assert (tmp_path / "cut" / "tiny.checkpoint.npz").is_file()
    resumed = training.train_face(settings, faces, tmp_path / "cut", workers=1)
    assert list(resumed.history["epoch"]) == [1, 2, 3, 4]
    np.testing.assert_allclose(resumed.history["loss"], whole.history["loss"], rtol=1e-3)
    np.testing.assert_allclose(resumed.scores["logit"], whole.scores["logit"], atol=1e-2)


def test_a_time_limit_brings_the_end_of_the_schedule_nearer(faces, tmp_path):
    settings = replace(TINY, epochs=100000, self_blended=0.0, augment=None)
    run = training.train_face(settings, faces, tmp_path, minutes=0.2, workers=1, checkpoints=False, validate_every=0)
    assert 1 <= len(run.history) < 100000 and run.scores is not None


def test_averaged_weights_leave_the_trainer_as_it_is(faces):
    network = training.build_face_network(TINY)
    batches = batches_of(faces)
    trainer, _ = training.make_trainer(network, TINY, SIZE, batches.num_batches)
    for index in range(4):
        trainer.train_on_batch(*batches[index])
    before = [np.array(weight) for weight in network.get_weights()]
    averaged = training.averaged_weights(trainer, network)
    assert all(np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True))
    assert any(not np.allclose(a, b) for a, b in zip(before, averaged, strict=True))


def test_temperature_recovers_the_scale_of_the_logits():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 20000)
    labels = (random.random(20000) < training.sigmoid(logits)).astype(int)
    assert training.fit_temperature(labels, 1.7 * logits) == pytest.approx(1.7, rel=0.05)


def test_compare_reads_the_saved_scores_of_all_runs(tmp_path):
    random, labels = np.random.default_rng(0), np.arange(200) % 2
    for name, noise in (("good", 1.0), ("fair", 2.0), ("weak", 4.0), ("poor", 9.0)):
        logits = (2 * labels - 1) + random.normal(0, noise, 200)
        scores = pd.DataFrame({"label": labels, "logit": logits, "logit_flipped": logits})
        scores["stem"], scores["group"] = [f"c{i}" for i in range(200)], [f"g{i // 2}" for i in range(200)]
        scores.to_csv(tmp_path / f"{name}.validation.csv", index=False)
    table = training.compare(tmp_path, interval=False)
    assert list(table.index[table.index.isin(["good", "fair", "weak", "poor"])]) == ["good", "fair", "weak", "poor"]
    assert "average of good, fair, weak" in table.index
    assert (table["calibrated"] <= table["log_loss"] + 1e-9).all()


def test_evaluation_tells_sizes_and_unaltered_fakes_apart(faces):
    table = faces.table.assign(logit=np.where(faces.table["label"] == 1, 2.0, -2.0))
    table.loc[1, "p99"] = 3.0
    lines = training.evaluate(table, 1.0, interval=False)
    assert lines.loc["without unaltered fakes", "crops"] == len(table) - 1
    assert lines.loc["all", "auc"] == 1.0 and {"source 0–185 px", "part 40"} <= set(lines.index)


def test_research_faces_have_landmarks_and_a_clean_split():
    folder = platform.research_data("dfdc_faces")
    if folder is None:
        pytest.skip("DEEPFAKE_DATA does not name the research data")
    table = training.split_by_part(training.read_face_table(folder))
    few = table[table["archive"] == table["archive"].min()].groupby("split").head(2).reset_index(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "read_face_table", lambda _: few)
        faces = training.read_faces(folder)
    assert faces.crops.shape == (6, 224, 224, 3) and faces.points.shape == (6, 81, 2)
    eyes, mouth = faces.points[:, 36:48].mean(1), faces.points[:, 48:].mean(1)
    assert (mouth[:, 1] > eyes[:, 1]).mean() > 0.6


def test_scores_are_the_same_for_padded_and_single_crops(faces):
    network = training.build_face_network(TINY)
    whole = training.predict_logits(network, faces.crops, SIZE, batch=16)
    np.testing.assert_allclose(training.predict_logits(network, faces.crops[:3], SIZE, batch=5), whole[:3], atol=1e-4)
    assert ops.convert_to_numpy(network.weights[0]).dtype == np.float32
