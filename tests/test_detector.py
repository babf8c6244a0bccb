"""The whole chain on the miniature, on broken files and, where they are at hand, on real clips."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from kaggle_utils import Detector, Verdict, dataset, fusion
from kaggle_utils.miniature import clip_facts


@pytest.fixture(scope="module")
def detector():
    return Detector.load()


@pytest.fixture(scope="module")
def clips(miniature):
    return dataset.clips_to_score(miniature)


def outputs(logit, rows=10):
    return {"logit": np.full((rows, 1), logit, np.float32)}


def test_a_verdict_is_json_ready():
    verdict = Verdict(0.5, frames=[{"time_s": np.float32(1), "probability": None}])
    assert json.loads(json.dumps(verdict.to_dict()))["face"] is None


def test_noisy_or_leaves_a_silent_branch_out():
    join = fusion.NoisyOr(fusion.Calibration({}, (0, 1)), voice_share=0.1)
    seen, unseen = np.ones(10, bool), np.zeros(10, bool)
    for prior in (0.1, 0.5):
        assert join(outputs(0.0), unseen, None, prior) == pytest.approx(prior)
        assert join(outputs(0.0), seen, outputs(0.0), prior) == pytest.approx(prior)
        assert join(outputs(3.0), seen, None, prior) == pytest.approx(join(outputs(3.0), seen, outputs(0.0), prior))
    assert join(outputs(-5.0), seen, outputs(8.0), 0.5) > 0.9
    assert join(outputs(-5.0), seen, outputs(-8.0), 0.5) < 0.05


def test_every_kind_of_clip_is_scored(detector, clips, miniature):
    for clip in clips.itertuples():
        verdict = detector.predict(clip.path)
        assert 0 <= verdict.probability <= 1
        assert len(verdict.frames) == 10 * len(verdict.tracks)
        facts = clip_facts(miniature, clip.filename)
        assert math.isnan(verdict.voice) == (not facts["sound"])
        assert math.isnan(verdict.face) == (not facts["faces"])


def test_folder_gives_a_row_for_each_clip_and_a_warning_for_the_broken(detector, clips, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    whole = clips["path"].iloc[0]
    shutil.copy(whole, folder / "whole.mp4")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:2000])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    table = detector.predict_folder(folder, tmp_path / "submission.csv", progress=False).set_index("filename")
    for name in ("cut.mp4", "empty.mp4", "text.mp4"):
        assert table.loc[name, "label"] == 0.5
        assert name in table.loc[name, "warnings"][0]
    assert table.loc["whole.mp4", "label"] == pytest.approx(detector.predict(whole).probability, abs=1e-5)
    assert pd.read_csv(tmp_path / "submission.csv")["label"].between(0, 1).all()


def test_score_faces(detector):
    crops = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    scores = detector.score_faces(crops, framed=True)
    assert scores.shape == (3,) and scores.dtype == np.float32 and ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_allclose(detector.score_faces(crops[1:2], framed=True), scores[1:2], atol=1e-5)
    assert detector.score_faces(crops[:1]).shape == (1,)
    assert detector.score_faces(crops[:0]).shape == (0,)
    with pytest.raises(ValueError, match="uint8"):
        detector.score_faces(crops.astype(float))


def test_score_voice_takes_any_rate_and_type(detector):
    t = np.arange(3 * 44100) / 44100
    samples = (0.3 * np.sin(2 * np.pi * 200 * t) * (1 + np.sin(2 * np.pi * 3 * t))).astype(np.float32)
    score = detector.score_voice(samples, 44100)
    assert 0 <= score <= 1
    assert detector.score_voice((samples * 32767).astype(np.int16), 44100) == pytest.approx(score, abs=0.02)
    assert detector.score_voice(np.stack([samples, samples], axis=1), 44100) == pytest.approx(score, abs=0.02)
    assert math.isnan(detector.score_voice(np.zeros(16000), 16000))


def test_the_prior_moves_the_answer_the_right_way(detector, clips):
    path = clips["path"].iloc[0]
    low = Detector(detector.face, detector.voice, detector.fuse, detector.calibration, detector.flip, prior=0.05)
    assert low.predict(path).probability < detector.predict(path).probability


def test_the_study_s_networks_can_be_chosen(clips):
    from kaggle_utils.platform import models_folder

    verdict = Detector.load(models_folder() / "reference").predict(clips["path"].iloc[0])
    assert 0 <= verdict.probability <= 1


def test_real_and_fake_are_the_right_way_round(detector, real_clips):
    scores = {row.filename: detector.predict(row.path).probability
              for row in dataset.clips_to_score(real_clips).itertuples()}
    assert scores["hsbwhlolsn.mp4"] < 0.5 < scores["rtpbawlmxr.mp4"]
