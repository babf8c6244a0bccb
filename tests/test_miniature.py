"""The miniature data set: its layout, its cases, and that the same seed gives the same bytes."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import clip_mask

from kaggle_utils.datasets import babble, drawing
from kaggle_utils.datasets import miniature as made
from kaggle_utils.datasets.dfdc import clips_to_score, read_dfdc
from kaggle_utils.face.detection import FaceFinder
from kaggle_utils.media.video import probe, read_frames


@pytest.fixture(scope="module")
def facts(miniature) -> dict[str, dict]:
    return json.loads((miniature / made.MARK).read_text())["clips"]


def test_layout_is_read_like_dfdc(miniature, facts):
    train = read_dfdc(miniature)
    assert train["label"].value_counts().to_dict() == {"REAL": 4, "FAKE": 4}
    fakes = train[train["label"] == "FAKE"]
    assert set(fakes["original"]) == set(train[train["label"] == "REAL"]["filename"])
    test = clips_to_score(miniature)
    assert len(test) == 8 and test["label"].mean() == 0.5
    assert test["filename"].is_monotonic_increasing
    for table in (train, test):
        assert all(path.is_file() for path in table["path"])
        assert all(len(Path(name).stem) == 10 for name in table["filename"])
    assert set(facts) == set(train["filename"]) | set(test["filename"])
    sample = (miniature / "sample_submission.csv").read_text().splitlines()
    assert sample[0] == "filename,label" and all(row.endswith(".mp4,0.5") for row in sample[1:])


def test_clips_are_what_the_facts_say(miniature, facts):
    for path in sorted(miniature.glob("*/*.mp4")):
        info, fact = probe(path), facts[path.name]
        assert (info.width, info.height, info.fps) == (fact["width"], fact["height"], fact["fps"])
        assert info.codec in ("h264", "avc1") and 1 <= info.duration_s <= 4.1
        assert all(len(track) == info.frame_count for track in fact["faces"])
        assert (fact["label"] == "FAKE") == (fact["fake_voice"] or fact["fake_face"] is not None)


def test_awkward_cases_are_there(miniature, facts):
    test = {path.name: facts[path.name] for path in (miniature / "test_videos").glob("*.mp4")}
    (turned,) = (name for name, fact in test.items() if fact["turned"])
    info = probe(miniature / "test_videos" / turned)
    assert (info.width, info.height, info.rotation) == (360, 640, 270)
    assert sum(not fact["sound"] for fact in test.values()) == 1
    assert sorted(len(fact["faces"]) for fact in test.values()) == [0, 1, 1, 1, 1, 1, 1, 2]
    lengths = [probe(miniature / "test_videos" / name).duration_s for name in test]
    assert min(lengths) == pytest.approx(1.6, abs=0.05)


def test_fake_shares_all_but_the_face_with_its_original(miniature, facts):
    fake, fact = next(
        (name, fact) for name, fact in facts.items() if fact["original"] and fact["fake_face"] is not None
    )
    original, altered = (
        read_frames(miniature / "train_sample_videos" / name, 3) for name in (fact["original"], fake)
    )
    for time_s, before, after in zip(original.times_s, original.images, altered.images, strict=True):
        mask = clip_mask(miniature, fake, round(time_s * fact["fps"]))
        change = np.abs(before.astype(float) - after).mean(axis=2)
        assert change[mask == 1].mean() > 4 and change[mask == 1].mean() > 5 * change[mask == 0].mean()
    assert not clip_mask(miniature, fact["original"], 0).any()


def test_seed_decides_the_bytes(tmp_path, monkeypatch):
    """Two short clips instead of sixteen: one with a fake face and voice, one lying on its side."""
    clips = [replace(made.plan(3)[index], size=(320, 180), seconds=0.5, fps=15) for index in (7, 13)]
    monkeypatch.setattr(made, "plan", lambda seed: clips)
    digests = []
    for name in ("first", "second"):
        folder = made.make_miniature(tmp_path / name, seed=3, progress=False)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests.append(
            [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
        )
    assert digests[0] == digests[1] and len(digests[0]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first",
        "second",
    ]  # nothing unfinished is left


def test_seeds_differ_and_names_do_not_repeat():
    plans = [made.plan(seed) for seed in range(3)]
    names = [clip.name for clips in plans for clip in clips]
    assert len(set(names)) == len(names) == 48
    assert made.plan(1) == plans[1]
    assert [[clip.fake for clip in clips] for clips in plans] == 3 * [[clip.fake for clip in plans[0]]]


def test_finished_miniature_is_left_alone(miniature):
    before = {path: path.stat().st_mtime_ns for path in miniature.rglob("*")}
    assert made.make_miniature(miniature, seed=0) == miniature
    assert {path: path.stat().st_mtime_ns for path in miniature.rglob("*")} == before


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other files"):
        made.make_miniature(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


def test_failure_of_ffmpeg_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"clip\.mp4: ffmpeg failed: .+"):
        made._ffmpeg(Path("clip.mp4"), ["-i", str(tmp_path / "missing.mp4"), "-f", "null", "-"])


def test_blend_mask_is_a_soft_ellipse():
    mask = drawing.blend_mask(120, 160, (80, 60, 20, 40, 0))
    assert mask.shape == (120, 160) and mask.dtype == np.float32
    assert (mask[60, 80], mask[60, 110], mask[10, 80]) == (1, 0, 0) and 0 < mask[60, 100] < 1
    np.testing.assert_allclose(mask[:, 81:], mask[:, 79:0:-1], atol=1e-6)
    turned = drawing.blend_mask(120, 160, (80, 60, 40, 20, 90))
    np.testing.assert_allclose(mask, turned, atol=1e-5)
    assert drawing.blend_mask(50, 50, (200, 200, 20, 20, 0)).max() == 0  # outside the picture
    assert drawing.blend_mask(50, 50, (0, 0, 20, 20, 0))[0, 0] == 1  # over its border


def test_self_blend_changes_the_face_alone():
    image = np.random.default_rng(0).integers(60, 200, (120, 160, 3), dtype=np.uint8)
    ellipse = (80, 60, 20, 30, 10)
    blended = drawing.self_blend(image, ellipse, np.random.default_rng(1))
    outside = drawing.blend_mask(120, 160, ellipse) == 0
    assert blended.dtype == np.uint8 and np.array_equal(blended[outside], image[outside])
    assert np.abs(blended.astype(int) - image)[~outside].mean() > 5


def test_voice_is_audible_and_pitched():
    person = drawing.Person(pitch=120.0)
    samples, opening = babble.speak(person, 2.0, np.random.default_rng(0))
    assert len(samples) == len(opening) == 2 * babble.SOUND_RATE
    assert np.abs(samples).max() == pytest.approx(0.6) and 0 <= opening.min() <= opening.max() <= 1
    frame = samples[np.argmax(opening) - 1024 :][:2048]
    correlation = np.correlate(frame, frame, "full")[2047:]
    lag = 80 + np.argmax(correlation[80:200])  # 80 to 200 Hz
    assert babble.SOUND_RATE / lag == pytest.approx(120, rel=0.25)


def test_resynthesis_keeps_level_and_length_but_not_the_wave():
    samples, _ = babble.speak(drawing.Person(), 1.0, np.random.default_rng(0))
    spoofed = babble.resynthesize(samples)
    assert spoofed.shape == samples.shape and np.abs(spoofed).max() == pytest.approx(0.6)
    assert abs(np.corrcoef(samples, spoofed)[0, 1]) < 0.9
    assert np.array_equal(spoofed, babble.resynthesize(samples))


def test_mtcnn_finds_every_face_upright(miniature, facts):
    """In the middle frame of each clip, as many faces as there are people, where the facts say, eyes above
    mouth.
    """
    finder = FaceFinder()
    for path in sorted(miniature.glob("*/*.mp4")):
        frames = read_frames(path, 1)
        index = round(frames.times_s[0] * facts[path.name]["fps"])
        known = [track[index] for track in facts[path.name]["faces"]]
        found = [face for face in finder(frames.images)[0] if face.confidence > 0.9]
        assert len(found) == len(known), path.name
        for x, y, half_width, half_height, _ in known:
            eye, _, nose, mouth, _ = min(
                (face.landmarks for face in found), key=lambda points: abs(points[2, 0] - x)
            )
            assert np.hypot(*(nose - (x, y))) < half_width
            assert mouth[1] - eye[1] > 0.4 * half_height


def test_import_is_cheap():
    script = (
        "import sys, kaggle_utils.media.video, kaggle_utils.datasets.miniature\n"
        "print([name for name in ('tensorflow', 'keras', 'mtcnn', 'moviepy', 'librosa', 'skimage', 'scipy') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
