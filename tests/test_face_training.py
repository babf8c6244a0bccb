"""Batches, schedule, averaged weights, resume and evaluation of face training, on drawn crops."""

from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from keras import ops
from test_augment import drawn_landmarks

from kaggle_utils import metrics, storage
from kaggle_utils.kaggle import paths
from recipes import loop
from recipes.face import correction, landmarks
from recipes.face import data as face_data
from recipes.face import evaluation as face_evaluation
from recipes.face import training as face_training
from recipes.face.data import Faces
from recipes.face.training import FaceSettings

SIZE = 32
TINY = FaceSettings(
    name="tiny",
    network="mesoinception4",
    size=SIZE,
    epochs=3,
    batch_size=4,
    learning_rate=1e-2,
    average=0.9,
    policy="float32",
    crops=None,
)


def drawn_faces(originals=12, size=SIZE, seed=0):
    """Originals with one fake each (brighter on one side), a third of them for validation."""
    random = np.random.default_rng(seed)
    rows, crops = [], []
    for number in range(originals):
        split = "validation" if number % 3 == 2 else "train"
        real = random.uniform(0, 150, (size, size, 3))
        for label, name in ((0, f"real{number}"), (1, f"fake{number}")):
            crops.append(real + label * np.linspace(0, 100, size)[:, None])
            rows.append(
                {
                    "stem": name,
                    "label": label,
                    "group": f"real{number}",
                    "part": 40 + number % 3 * 3,
                    "source_px": 100 + 20 * number,
                    "p99": 20.0 if label else np.nan,
                    "split": split,
                }
            )
    points = np.repeat(drawn_landmarks((size / 2, size / 2), size * 0.4, size * 0.5)[None], len(rows), 0)
    return Faces(pd.DataFrame(rows), np.array(crops).astype("uint8"), points)


@pytest.fixture(scope="module")
def faces():
    return drawn_faces()


def batches_of(faces, **changes):
    settings = replace(TINY, **changes)
    return face_training.FaceBatches(faces, face_training.training_rows(faces, settings), settings, workers=1)


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
    rows = face_training.training_rows(faces, replace(TINY, crops=8))
    np.testing.assert_array_equal(rows, face_training.training_rows(faces, replace(TINY, crops=8, seed=5)))
    assert len(rows) == 8 and faces.table["label"][rows].mean() == 0.5
    assert (faces.table["split"][rows] == "train").all()


def test_schedule_warms_up_and_ends_at_zero():
    rates = [float(loop.WarmupCosine(1e-3, 5, 50.0)(step)) for step in range(51)]
    assert rates[0] == pytest.approx(2e-4) and max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert np.argmax(rates) in (4, 5) and (np.diff(rates[5:]) <= 0).all()


def test_run_learns_and_saves(faces, tmp_path):
    run = face_training.train_face(
        replace(TINY, epochs=10, self_blended=0.0, augment=None), faces, tmp_path, workers=1
    )
    assert len(run.history) == 10 and run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert list(run.scores["stem"]) == list(faces.table["stem"][faces.rows("validation")])
    assert not (tmp_path / "tiny.checkpoint.npz").exists()
    again = storage.load_network(tmp_path / "tiny.keras")
    logits = face_evaluation.predict_logits(again, faces.crops[faces.rows("validation")], SIZE)
    np.testing.assert_allclose(logits, run.scores["logit"], atol=0.05)


def test_interrupted_and_resumed_run_ends_where_the_whole_one_does(faces, tmp_path, monkeypatch):
    settings = replace(TINY, epochs=4)
    whole = face_training.train_face(settings, faces, tmp_path / "whole", workers=1)
    plan = loop.PlanEpochs

    def interrupted(*arguments, **options):
        monkeypatch.setattr(face_training, "PlanEpochs", plan)
        callback = plan(*arguments, **options)
        batch_end = callback.on_train_batch_end

        def pull_the_plug(batch, logs=None):
            batch_end(batch, logs)
            if len(callback.history) == 2 and batch == 1:
                raise KeyboardInterrupt

        callback.on_train_batch_end, callback.async_safe = pull_the_plug, False
        return callback

    monkeypatch.setattr(face_training, "PlanEpochs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        face_training.train_face(settings, faces, tmp_path / "cut", workers=1)
    assert (tmp_path / "cut" / "tiny.checkpoint.npz").is_file()
    resumed = face_training.train_face(settings, faces, tmp_path / "cut", workers=1)
    assert list(resumed.history["epoch"]) == [1, 2, 3, 4]
    np.testing.assert_allclose(resumed.history["loss"], whole.history["loss"], rtol=1e-3)
    np.testing.assert_allclose(resumed.scores["logit"], whole.scores["logit"], atol=1e-2)


def test_a_run_killed_in_its_last_scoring_resumes_with_the_average(faces, tmp_path, monkeypatch):
    settings = replace(TINY, epochs=4)
    whole = face_training.train_face(settings, faces, tmp_path / "whole", workers=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(face_training, "score_faces", killed)
        with pytest.raises(KeyboardInterrupt):
            face_training.train_face(settings, faces, tmp_path / "cut", workers=1)
    resumed = face_training.train_face(settings, faces, tmp_path / "cut", workers=1)
    np.testing.assert_allclose(resumed.scores["logit"], whole.scores["logit"], atol=1e-2)


def test_a_time_limit_brings_the_end_of_the_schedule_nearer(faces, tmp_path):
    settings = replace(TINY, epochs=100000, self_blended=0.0, augment=None)
    run = face_training.train_face(
        settings, faces, tmp_path, minutes=0.2, workers=1, checkpoints=False, validate_every=0
    )
    assert 1 <= len(run.history) < 100000 and run.scores is not None


def test_averaged_weights_leave_the_trainer_as_it_is(faces):
    network = face_training.build_face_network(TINY)
    batches = batches_of(faces)
    trainer, _ = face_training.make_trainer(network, TINY, SIZE, batches.num_batches)
    for index in range(4):
        trainer.train_on_batch(*batches[index])
    before = [np.array(weight) for weight in network.get_weights()]
    averaged = loop.averaged_weights(trainer, network)
    assert all(np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True))
    assert any(not np.allclose(a, b) for a, b in zip(before, averaged, strict=True))


def test_teachers_pull_a_run_towards_their_mean_logit(faces, tmp_path):
    quick = {"workers": 1, "checkpoints": False, "validate_every": 0}
    labelled = face_training.train_face(
        replace(TINY, epochs=60, self_blended=0.0, augment=None), faces, tmp_path, **quick
    )
    taught = replace(
        labelled.settings, name="pupil", teachers=(str(tmp_path / "tiny.keras"),), taught=1.0, seed=9
    )
    pupil = face_training.train_face(taught, faces, tmp_path, **quick)
    random = face_training.build_face_network(taught)
    teacher, start = (
        face_evaluation.predict_logits(net, faces.crops, SIZE) for net in (labelled.network, random)
    )
    assert np.corrcoef(face_evaluation.predict_logits(pupil.network, faces.crops, SIZE), teacher)[0, 1] > 0.9
    assert np.corrcoef(start, teacher)[0, 1] < 0.9


def test_teachers_move_the_target_of_the_rows_that_they_teach():
    pixels = keras.Input((8, 8, 3))
    logit = keras.layers.GlobalAveragePooling2D()(pixels)[:, :1]
    teacher = keras.Model(pixels, {"logit": logit})
    layer = face_training.DistillationLoss([teacher], weight=0.5)
    given, label, taught = (np.array(values, "float32")[:, None] for values in ((0.3, -1.0), (1, 0), (1, 0)))
    seen = np.stack([np.full((8, 8, 3), value, "float32") for value in (1.5, -0.5)])
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(given, seen, label, taught)), given)

    def cross_entropy(target):
        return -np.mean(
            target * np.log(metrics.sigmoid(given)) + (1 - target) * np.log(1 - metrics.sigmoid(given))
        )

    target = np.array(
        [[0.5 + 0.5 * metrics.sigmoid(1.5)], [0.0]]
    )  # half label, half teacher; the other keeps its label
    assert float(layer.losses[0]) == pytest.approx(cross_entropy(target) - cross_entropy(label), rel=1e-4)


def test_twins_stand_beside_their_original(faces):
    settings = replace(TINY, self_blended=0.0, twins=0.5)
    batches = face_training.FaceBatches(
        faces, face_training.training_rows(faces, settings), settings, workers=1
    )
    batches.twins = {row: (np.full_like(faces.crops[row], 255),) for row in batches.reals}
    found = 0
    for index in range(batches.num_batches):
        inputs, labels = batches[index]
        for fake in range(1, 4, 2):
            if not inputs["taught"][fake]:
                found += 1
                assert inputs["crop"][fake].mean() > inputs["crop"][fake - 1].mean()
                assert labels[fake] == 1 and labels[fake - 1] == 0
    assert found == 4


def test_sources_are_drawn_by_their_shares_and_folds_are_kept_aside(faces):
    web = faces.take(np.arange(len(faces.table)))
    web.table = web.table.assign(
        source="web",
        split="train",
        stem="w" + web.table["stem"],
        group="w" + web.table["group"],
        person=["ann", "ann+bob"] * 6 + ["cyd"] * 12,
        fold=[0, 1] * 6 + [2] * 12,
    )
    whole = face_data.keep_aside(face_data.joined([faces, web]), (0,))
    splits = whole.table[whole.sources == "web"].groupby("person")["split"].first().to_dict()
    assert splits == {"ann": "web", "ann+bob": "left_out", "cyd": "train"}
    settings = replace(
        TINY, pairs=40, self_blended=0.0, reals_of={"dfdc": 0.25, "web": 0.75}, fakes_of={"dfdc": 1.0}
    )
    batches = face_training.FaceBatches(
        whole, face_training.training_rows(whole, settings), settings, workers=1
    )
    drawn = batches.sources[batches._rows]
    assert (drawn[::2] == "web").sum() == 30 and (drawn[1::2] == "dfdc").all()


def test_parts_kept_aside_are_refused(faces):
    table = faces.table.assign(videoname=faces.table["stem"], part=8)
    with pytest.raises(ValueError, match="parts 0 to 8"):
        face_data.check_kept_aside(table)


def test_located_counts_reals_and_blended_but_no_other_fakes():
    layer = face_training.LocalisationLoss(weight=1.0)
    grid, masks = np.zeros((4, 4, 4, 6), "float32"), np.zeros((4, 32, 32, 1), "float32")
    masks[3, :16] = 1
    labels = np.array([[0], [1], [0], [1]], "float32")  # the second is a fake of which nothing is known
    logit = np.zeros((4, 1), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(logit, grid, masks, labels)), logit)
    assert float(layer.losses[0]) == pytest.approx(np.log(2) * 3 / 4, rel=1e-4)


def test_faces_wider_than_the_tight_framing_are_all_blended(faces):
    wide = Faces(
        faces.table.iloc[:4].assign(label=0, group="x", split="train", stem=list("abcd")),
        faces.crops[:4],
        faces.points[:4],
        np.full(4, 1.3, np.float32),
    )
    batches = batches_of(faces + wide, self_blended=0.4)
    parts = [batches[index][0] for index in range(batches.num_batches)]
    widths, blended = (
        np.concatenate([part[name].reshape(4, -1).max(1) for part in parts]) for name in ("width", "mask")
    )
    assert (widths > 1.2).sum() == 8 and ((widths > 1.2) & (blended > 0)).sum() == 4


def test_real_frames_of_web_video_show_the_face_in_the_middle():
    folder = paths.research_data("real_frames")
    if folder is None:
        pytest.skip("DEEPFAKE_DATA does not name the research data")
    frames = face_data.read_real_frames(folder)
    assert frames.crops.shape[1:] == (224, 224, 3) and frames.crops.dtype == np.uint8
    assert len(frames.crops) == len(frames.points) == len(frames.table) == len(frames.widths)
    middle = frames.points.mean(1)
    assert (np.abs(middle - landmarks.mean_landmarks(224).mean(0)) < 30).all()
    assert frames.table["group"].nunique() > 300


def test_temperature_recovers_the_scale_of_the_logits():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 20000)
    labels = (random.random(20000) < metrics.sigmoid(logits)).astype(int)
    assert face_evaluation.fit_temperature(labels, 1.7 * logits) == pytest.approx(1.7, rel=0.05)


def test_compare_reads_the_saved_scores_of_all_runs(tmp_path):
    random, labels = np.random.default_rng(0), np.arange(200) % 2
    for name, noise in (("good", 1.0), ("fair", 2.0), ("weak", 4.0), ("poor", 9.0)):
        logits = (2 * labels - 1) + random.normal(0, noise, 200)
        scores = pd.DataFrame({"label": labels, "logit": logits, "logit_flipped": logits})
        scores["stem"], scores["group"] = [f"c{i}" for i in range(200)], [f"g{i // 2}" for i in range(200)]
        scores.to_csv(tmp_path / f"{name}.validation.csv", index=False)
    table = face_evaluation.compare(tmp_path, interval=False)
    assert list(table.index[table.index.isin(["good", "fair", "weak", "poor"])]) == [
        "good",
        "fair",
        "weak",
        "poor",
    ]
    assert "average of good, fair, weak" in table.index
    assert (table["calibrated"] <= table["log_loss"] + 1e-9).all()


def test_packed_scores_compare_as_the_folder_does(tmp_path):
    random, labels = np.random.default_rng(1), np.arange(60) % 2
    for name in ("one", "two"):
        scores = pd.DataFrame(
            {
                "stem": [f"c{i}" for i in range(60)],
                "label": labels,
                "group": [f"g{i // 2}" for i in range(60)],
                "logit": labels + random.normal(0, 1, 60),
                "split": "validation",
            }
        )
        scores.assign(logit_flipped=scores["logit"] + 0.1).to_csv(
            tmp_path / f"{name}.validation.csv", index=False
        )
    face_evaluation.pack_scores(tmp_path, tmp_path / "all.csv")
    expected = face_evaluation.compare(tmp_path, interval=False)
    pd.testing.assert_frame_equal(
        face_evaluation.compare(tmp_path / "all.csv", interval=False), expected, atol=2e-3
    )


def test_balanced_log_loss_is_that_of_a_balanced_set():
    labels, chances = np.array([0, 1, 1, 1]), np.array([0.4, 0.7, 0.7, 0.7])
    expected = metrics.log_loss(np.array([0, 1]), np.array([0.4, 0.7]))
    assert face_evaluation.balanced_log_loss(labels, chances) == pytest.approx(expected)


def test_evaluation_tells_sizes_and_unaltered_fakes_apart(faces):
    table = faces.table.assign(logit=np.where(faces.table["label"] == 1, 2.0, -2.0))
    table.loc[1, "p99"] = 3.0
    lines = face_evaluation.evaluate(table, 1.0, interval=False)
    assert lines.loc["without unaltered fakes", "crops"] == len(table) - 1
    assert lines.loc["all", "auc"] == 1.0 and {"source 0–185 px", "part 40"} <= set(lines.index)


def test_research_faces_have_landmarks_and_a_clean_split():
    folder = paths.research_data("dfdc_faces")
    if folder is None:
        pytest.skip("DEEPFAKE_DATA does not name the research data")
    table = face_data.split_by_part(face_data.read_face_table(folder))
    few = table[table["archive"] == table["archive"].min()].groupby("split").head(2).reset_index(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face_data, "read_face_table", lambda _: few)
        faces = face_data.read_faces(folder)
    assert faces.crops.shape == (6, 224, 224, 3) and faces.points.shape == (6, 81, 2)
    eyes, mouth = faces.points[:, 36:48].mean(1), faces.points[:, 48:].mean(1)
    assert (mouth[:, 1] > eyes[:, 1]).mean() > 0.6


def test_scores_are_the_same_for_padded_and_single_crops(faces):
    network = face_training.build_face_network(TINY)
    whole = face_evaluation.predict_logits(network, faces.crops, SIZE, batch=16)
    np.testing.assert_allclose(
        face_evaluation.predict_logits(network, faces.crops[:3], SIZE, batch=5), whole[:3], atol=1e-4
    )
    assert ops.convert_to_numpy(network.weights[0]).dtype == np.float32


def test_qualities_keep_the_size_and_change_the_picture(faces):
    crop = faces.crops[1]
    for name, worse in face_evaluation.QUALITIES.items():
        changed = worse(crop)
        assert changed.shape == crop.shape and changed.dtype == np.uint8
        assert np.array_equal(changed, crop) == (name == "as it is")


def test_a_correction_moves_other_sources_and_leaves_dfdc():
    random = np.random.default_rng(0)
    other, still = (
        random.normal(0, 1, (400, 8)).astype("float32"),
        random.normal(0, 1, (400, 8)).astype("float32"),
    )
    other[:, 0] = np.repeat([-1, 1], 200) + random.normal(0, 0.3, 400)
    still[:, 0] = random.normal(0, 0.05, 400)
    labels = np.repeat([0.0, 1.0], 200)
    slope, bias = correction.fit_correction(other, labels, np.zeros(400), np.ones(400), still, 0.01, 10.0)
    assert (
        metrics.auc(labels, metrics.sigmoid(other @ slope + bias)) > 0.95
        and np.abs(still @ slope + bias).mean() < 0.2
    )


def test_statistics_leave_a_network_as_it_is_until_they_are_fitted(tmp_path):
    network = face_training.build_face_network(replace(TINY, network="efficientnet_lite"))
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    before = np.asarray(network(pictures)["logit"])
    width = correction.read_statistics(network)(pictures)[0].shape[1]
    corrected = correction._with_correction(network, np.zeros(width), np.ones(width), np.zeros(width), 0.5)
    storage.save_network(corrected, tmp_path / "face.keras", "float32")
    again = storage.load_network(tmp_path / "face.keras")
    np.testing.assert_allclose(np.asarray(again(pictures)["logit"]), before + 0.5, atol=1e-4)
