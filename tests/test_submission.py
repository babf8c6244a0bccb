"""Every clip gets a row, a stopped run goes on where it was, and a time budget is kept."""

import pandas as pd
import pytest

from kaggle_utils.submission import FRAME_LADDER, Journal, TimeGuard, score_clips


@pytest.fixture
def clips(tmp_path):
    names = ["a.mp4", "b,c.mp4", "영상.mp4", "d.mp4"]
    return pd.DataFrame({"filename": names, "path": [tmp_path / name for name in names], "label": [0.0, 1.0, None, None]})


def unscored(name):
    return {"probability": 0.3, "warnings": [f"{name}: not scored"]}


def stub(name, path, frames):
    return {"probability": len(name) / 100, "warnings": []}


def test_every_clip_has_its_row_with_five_decimals(clips, tmp_path):
    table = score_clips(clips, stub, tmp_path / "out.csv", unscored, "x", progress=False)
    written = pd.read_csv(tmp_path / "out.csv")
    assert written["filename"].tolist() == clips["filename"].tolist()
    assert written["label"].tolist() == pytest.approx([len(name) / 100 for name in clips["filename"]])
    assert table["label"].tolist() == written["label"].tolist()
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[1] == "a.mp4,0.05000"


def test_the_file_is_complete_before_the_first_clip_is_done(clips, tmp_path):
    def look(name, path, frames):
        assert len(pd.read_csv(tmp_path / "out.csv")) == len(clips)
        return stub(name, path, frames)

    score_clips(clips, look, tmp_path / "out.csv", unscored, "x", progress=False)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(clips, tmp_path):
    score_clips(clips, stub, tmp_path / "whole.csv", unscored, "x", progress=False)
    seen = []

    def stops(name, path, frames):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(name)
        return stub(name, path, frames)

    with pytest.raises(KeyboardInterrupt):
        score_clips(clips, stops, tmp_path / "out.csv", unscored, "x", progress=False)
    with (tmp_path / "out.csv.journal").open("ab") as journal:
        journal.write(b'{"filename": "d.mp4", "probab')  # torn by a kill

    def goes_on(name, path, frames):
        assert name not in seen
        return stub(name, path, frames)

    score_clips(clips, goes_on, tmp_path / "out.csv", unscored, "x", progress=False)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_clip_that_was_replaced_under_its_name_is_scored_again(clips, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"first")
    score_clips(clips, stub, tmp_path / "out.csv", unscored, "x", progress=False)
    (tmp_path / "a.mp4").write_bytes(b"another")
    seen = []

    def sees(name, path, frames):
        seen.append(name)
        return {"probability": 0.9, "warnings": []}

    table = score_clips(clips, sees, tmp_path / "out.csv", unscored, "x", progress=False)
    assert seen == ["a.mp4"] and table["label"].tolist()[:2] == [0.9, 0.07] and "stamp" not in table
    assert len(score_clips(clips, sees, tmp_path / "out.csv", unscored, "x", progress=False)) == 4 and seen == ["a.mp4"]


def test_a_journal_of_other_weights_is_not_continued(tmp_path):
    Journal(tmp_path / "j", "old").add({"filename": "a.mp4", "probability": 0.1})
    assert list(Journal(tmp_path / "j", "old").finished) == ["a.mp4"]
    assert not Journal(tmp_path / "j", "new").finished


def test_the_time_guard_steps_down_and_stops():
    now = [0.0]
    guard = TimeGuard(hours=100 / 3600 / 0.95, clips_left=50, clock=lambda: now[0])
    frames = []
    while not guard.exhausted and guard.left:
        frames.append(guard.frames)
        seconds = guard.frames  # a clip costs a second for each frame
        now[0] += seconds
        guard.finished(seconds)
    assert list(dict.fromkeys(frames)) == list(FRAME_LADDER)
    assert now[0] <= 100


def test_no_budget_keeps_all_frames():
    guard = TimeGuard(None, 10)
    guard.finished(1e9)
    assert guard.frames == FRAME_LADDER[0] and not guard.exhausted


def test_what_the_budget_leaves_out_keeps_the_prior(clips, tmp_path):
    table = score_clips(clips, stub, tmp_path / "out.csv", unscored, "x", hours=-1, progress=False)
    assert (table["label"] == 0.3).all()
