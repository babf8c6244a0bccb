"""The whole chain on the miniature, on broken files and, where they are at hand, on real clips."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import clip_facts, ffmpeg
from scipy import signal

from kaggle_utils import Detector, Verdict, extraction, extracts
from kaggle_utils.__main__ import draw, summary
from kaggle_utils.datasets import babble, dfdc
from kaggle_utils.datasets.drawing import Person
from kaggle_utils.detector import checked_digests
from kaggle_utils.face import framing
from kaggle_utils.fusion import rules
from kaggle_utils.media import video


@pytest.fixture(scope="module")
def clips(miniature):
    return dfdc.clips_to_score(miniature)


def outputs(logit, rows=10):
    return {"logit": np.full((rows, 1), logit, np.float32)}


def test_a_verdict_is_json_ready():
    verdict = Verdict(0.5, frames=[{"time_s": np.float32(1), "probability": None}])
    assert json.loads(json.dumps(verdict.to_dict()))["face"] is None


def test_noisy_or_gives_the_whole_prior_to_what_is_there():
    fuse = rules.NoisyOr(rules.Calibration({}, (0, 1)), voice_share=0.1)
    seen, unseen = np.ones(10, bool), np.zeros(10, bool)
    for prior in (0.1, 0.5):
        assert fuse(outputs(0.0), unseen, None, prior) == pytest.approx(prior)
        assert fuse(outputs(0.0), seen, outputs(0.0), prior) == pytest.approx(prior)
        assert fuse(outputs(3.0), seen, None, prior) == pytest.approx(
            rules.sigmoid(3 + rules.log_odds(prior))
        )
        assert fuse(outputs(0.0), unseen, outputs(-2.0), prior) == pytest.approx(
            rules.sigmoid(rules.log_odds(prior) - 2)
        )
    assert fuse(outputs(-5.0), seen, outputs(8.0), 0.5) > 0.9
    assert fuse(outputs(-5.0), seen, outputs(-8.0), 0.5) < 0.05


def test_every_kind_of_clip_is_scored(detector, clips, miniature):
    for clip in clips.itertuples():
        verdict = detector.predict(clip.path)
        assert 0 <= verdict.probability <= 1
        assert len(verdict.frames) == 10 * len(verdict.tracks)
        facts = clip_facts(miniature, clip.filename)
        assert len(verdict.tracks) == max(1, len(facts["faces"]))
        assert math.isnan(verdict.voice) == (not facts["sound"])
        assert math.isnan(verdict.face) == (not facts["faces"])


@pytest.fixture(scope="module")
def damaged(detector, clips, tmp_path_factory):
    """Copies of one clip, whole and damaged in different ways, scored as a folder: the table by file name."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = clips["path"].iloc[0]
    shutil.copy(whole, folder / "whole.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:2000])
    ffmpeg("-i", whole, "-c", "copy", "-movflags", "+faststart", folder / "half.mp4")  # its index comes first
    content = (folder / "half.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])
    ffmpeg(
        "-i", whole, "-c", "copy", "-bsf:v", "noise=amount=1", folder / "noise.mp4"
    )  # no byte of the picture is left
    ffmpeg("-i", whole, "-c", "copy", "-vn", folder / "sound.mp4")
    ffmpeg("-i", folder / "noise.mp4", "-c", "copy", "-an", folder / "mute.mp4")
    return detector.predict_folder(folder, folder / "out" / "submission.csv", progress=False).set_index(
        "filename"
    )


def test_every_clip_of_a_folder_has_a_row(damaged):
    assert len(damaged) == 8 and damaged["label"].between(0, 1).all()
    written = pd.read_csv(damaged["path"].iloc[0].parent / "out" / "submission.csv", index_col="filename")
    assert written["label"].to_dict() == damaged["label"].to_dict()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "empty file"),
        ("text.mp4", "not a video"),
        ("cut.mp4", "cut before its index"),
        ("mute.mp4", "without a picture track that decodes"),
    ],
)
def test_what_can_be_neither_seen_nor_heard_gets_the_prior_and_a_reason(damaged, name, reason):
    row = damaged.loc[name]
    assert row["label"] == 0.5 and pd.isna(row["face"]) and pd.isna(row["voice"]) and not row["frames"]
    assert name in row["warnings"][0] and reason in row["warnings"][0]
    assert row["warnings"][-1] == f"{name}: the score is the prior"


@pytest.mark.parametrize(
    ("name", "reason"), [("noise.mp4", "no frame decodes"), ("sound.mp4", "without a picture track")]
)
def test_a_voice_without_a_picture_is_scored(damaged, name, reason):
    row, whole = damaged.loc[name], damaged.loc["whole.mp4"]
    assert row["voice"] == pytest.approx(whole["voice"], abs=1e-5)
    assert (
        row["label"] not in (0.5, whole["label"])
        and pd.isna(row["face"])
        and not row["frames"]
        and not row["tracks"]
    )
    assert name in row["warnings"][0] and reason in row["warnings"][0]
    assert row["warnings"][-1] == f"{name}: the voice alone decides"


def test_a_clip_of_which_some_frames_decode_is_scored_from_those(damaged):
    row, whole = damaged.loc["half.mp4"], damaged.loc["whole.mp4"]
    assert any(re.match(r"half\.mp4: \d+ frames decode of the \d+", warning) for warning in row["warnings"])
    assert len(row["frames"]) == 10 and row["face"] == pytest.approx(whole["face"], abs=0.3)
    assert max(frame["time_s"] for frame in row["frames"]) < 0.8 * max(
        frame["time_s"] for frame in whole["frames"]
    )


def test_a_folder_is_scored_like_its_clips(detector, damaged):
    verdict, row = detector.predict(damaged.loc["whole.mp4", "path"]), damaged.loc["whole.mp4"]
    assert (
        row["label"] == pytest.approx(verdict.probability, abs=1e-5)
        and row["warnings"] == verdict.warnings == []
    )


def test_a_cached_extract_gives_the_same_verdict(detector, clips, tmp_path):
    path = clips["path"].iloc[0]
    extracts.save_extract(tmp_path / "clip.npz", extraction.extract(path, detector.finder))
    verdict, people = detector.examine_extract(path, extracts.load_extract(tmp_path / "clip.npz"))
    fresh = detector.predict(path)
    assert (verdict.probability, verdict.face, verdict.voice) == (fresh.probability, fresh.face, fresh.voice)
    assert len(people) == len(verdict.tracks) and verdict.frames[0]["time_s"] == fresh.frames[0]["time_s"]


def test_clips_that_the_time_budget_leaves_out_keep_the_prior_and_say_so(detector, miniature, tmp_path):
    table = detector.predict_folder(miniature, tmp_path / "submission.csv", hours=0, progress=False)
    assert (table["label"] == 0.5).all()
    assert all(
        name in warnings[0] for name, warnings in zip(table["filename"], table["warnings"], strict=True)
    )
    assert "time budget" in summary(table) and set(draw(table, tmp_path / "submission.csv")) == {"scores"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing")
def test_a_named_pipe_does_not_block(detector, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert detector.predict(tmp_path / "pipe.mp4").probability == 0.5


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
    spoken = babble.speak(Person(), 4.0, np.random.default_rng(0))[0]
    samples = signal.resample_poly(spoken, 441, 160).astype(np.float32)  # at 44.1 kHz
    score = detector.score_voice(samples, 44100)
    assert 0 <= score <= 1
    assert detector.score_voice((samples * 32767).astype(np.int16), 44100) == pytest.approx(score, abs=0.02)
    assert detector.score_voice(np.stack([samples, samples], axis=1), 44100) == pytest.approx(score, abs=0.02)
    assert math.isnan(detector.score_voice(np.zeros(16000), 16000))


def test_the_prior_moves_the_answer_the_right_way(detector, clips):
    path = clips["path"].iloc[0]
    low = Detector(
        detector.face, detector.voice, detector.fuse, detector.calibration, detector.flip, prior=0.05
    )
    assert low.predict(path).probability < detector.predict(path).probability


def test_the_study_s_networks_can_be_chosen(clips):
    from kaggle_utils.kaggle.paths import models_folder

    verdict = Detector.load(models_folder() / "reference").predict(clips["path"].iloc[0])
    assert 0 <= verdict.probability <= 1


@pytest.fixture
def weights(tmp_path):
    """A copy of the study's weights with their list of hashes."""
    from kaggle_utils.kaggle.paths import models_folder

    return Path(shutil.copytree(models_folder() / "reference", tmp_path / "weights"))


def test_listed_weights_load_and_others_are_refused_before_they_are_opened(weights):
    expected = dict(reversed(line.split()) for line in (weights / "SHA256SUMS").read_text().splitlines())
    assert checked_digests(weights) == expected and len(expected) == 4
    with (weights / "voice.keras").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        ValueError, match=r"voice\.keras: expected SHA-256 \w{64} by .*SHA256SUMS, found .*make checksums"
    ):
        Detector.load(weights)
    (weights / "voice.keras").rename(weights / "other.keras")
    with pytest.raises(ValueError, match=r"other\.keras: expected SHA-256 None"):
        Detector.load(weights)


def test_changed_settings_are_refused(weights):
    (weights / "detector.json").write_text((weights / "detector.json").read_text().replace("0.99", "0.98"))
    with pytest.raises(ValueError, match=r"detector\.json: expected SHA-256"):
        Detector.load(weights)


def test_a_folder_without_a_list_is_not_checked(weights):
    (weights / "SHA256SUMS").unlink()
    (weights / "detector.json").write_text((weights / "detector.json").read_text() + "\n")
    assert (
        checked_digests(weights)["detector.json"]
        == hashlib.sha256((weights / "detector.json").read_bytes()).hexdigest()
    )


def test_real_and_fake_are_the_right_way_round(detector, real_clips):
    scores = {
        row.filename: detector.predict(row.path).probability
        for row in dfdc.clips_to_score(real_clips).itertuples()
    }
    assert scores["hsbwhlolsn.mp4"] < 0.2 and scores["rtpbawlmxr.mp4"] > 0.8


@pytest.mark.parametrize("name", ["hsbwhlolsn.mp4", "rtpbawlmxr.mp4"])
def test_the_score_does_not_hang_on_the_framing(detector, real_clips, name):
    frames = video.read_frames(real_clips / name, 4).images
    person = framing.extract_faces(frames, detector.finder, rows=4)[0]

    def probability(right: float, down: float) -> float:
        moved = person.boxes + np.array([right, down, 0, 0]) * person.boxes[:, 2:3]
        crops = [
            framing.cut(frames[index], box) for index, box in zip(person.frame_indices, moved, strict=True)
        ]
        return float(np.mean(detector.score_faces(np.stack(crops), framed=True)))

    still = probability(0, 0)
    for shift in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
        assert abs(probability(*shift) - still) < 0.1
