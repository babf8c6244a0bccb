"""Every clip gets a row, a stopped run goes on where it was, and a time budget is kept."""

import pandas as pd
import pytest
from stubs import one_by_one

from kaggle_utils.__main__ import main
from kaggle_utils.check import problems_of
from kaggle_utils.submission import FRAME_LADDER, Journal, TimeGuard, score_clips


@pytest.fixture
def clips(tmp_path):
    names = ["a.mp4", "b,c.mp4", "영상.mp4", "d.mp4"]
    return pd.DataFrame(
        {"filename": names, "path": [tmp_path / name for name in names], "label": [0.0, 1.0, None, None]}
    )


def unscored(name, reason):
    return {"probability": 0.3, "warnings": [f"{name}: {reason}"]}


def stub(name, path, frames):
    return {"probability": len(name) / 100, "warnings": []}


def test_every_clip_has_its_row_with_five_decimals(clips, tmp_path):
    table = score_clips(clips, one_by_one(stub), tmp_path / "out.csv", unscored, "x", progress=False)
    written = pd.read_csv(tmp_path / "out.csv")
    assert written["filename"].tolist() == clips["filename"].tolist()
    assert written["label"].tolist() == pytest.approx([len(name) / 100 for name in clips["filename"]])
    assert table["label"].tolist() == written["label"].tolist()
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[1] == "a.mp4,0.05000"


def test_the_file_is_complete_before_the_first_clip_is_done(clips, tmp_path):
    def look(name, path, frames):
        assert len(pd.read_csv(tmp_path / "out.csv")) == len(clips)
        return stub(name, path, frames)

    score_clips(clips, one_by_one(look), tmp_path / "out.csv", unscored, "x", progress=False)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(clips, tmp_path):
    score_clips(clips, one_by_one(stub), tmp_path / "whole.csv", unscored, "x", progress=False)
    seen = []

    def stops(name, path, frames):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(name)
        return stub(name, path, frames)

    with pytest.raises(KeyboardInterrupt):
        score_clips(clips, one_by_one(stops), tmp_path / "out.csv", unscored, "x", progress=False)
    with (tmp_path / "out.csv.journal").open("ab") as journal:
        journal.write(b'{"filename": "d.mp4", "probab')  # torn by a kill

    def goes_on(name, path, frames):
        assert name not in seen
        return stub(name, path, frames)

    score_clips(clips, one_by_one(goes_on), tmp_path / "out.csv", unscored, "x", progress=False)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_clip_that_was_replaced_under_its_name_is_scored_again(clips, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"first")
    score_clips(clips, one_by_one(stub), tmp_path / "out.csv", unscored, "x", progress=False)
    (tmp_path / "a.mp4").write_bytes(b"another")
    seen = []

    def sees(name, path, frames):
        seen.append(name)
        return {"probability": 0.9, "warnings": []}

    table = score_clips(clips, one_by_one(sees), tmp_path / "out.csv", unscored, "x", progress=False)
    assert seen == ["a.mp4"] and table["label"].tolist()[:2] == [0.9, 0.07] and "stamp" not in table
    assert len(
        score_clips(clips, one_by_one(sees), tmp_path / "out.csv", unscored, "x", progress=False)
    ) == 4 and seen == ["a.mp4"]


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
    table = score_clips(clips, one_by_one(stub), tmp_path / "out.csv", unscored, "x", hours=-1, progress=False)
    assert (table["label"] == 0.3).all()


# --- the check ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("filename,label\na.mp4,0.5\nb.mp4,1\n", []),
        ('filename,label\r\nb.mp4,0\r\n"a.mp4",1e-3\r\n', []),
        ("", ["wrong header: expected 'filename,label', found ''"]),
        (
            "\ufefffilename,label\na.mp4,0.5\nb.mp4,1\n",
            ["wrong header: expected 'filename,label', found '\\ufefffilename,label'"],
        ),
        ("a.mp4,0.5\nb.mp4,0.5\n", ["wrong header: expected 'filename,label', found 'a.mp4,0.5'"]),
        (
            ",filename,label\n0,a.mp4,0.5\n",
            ["wrong header: expected 'filename,label', found ',filename,label'"],
        ),
        ("filename,label\n", ["2 missing rows: a.mp4, b.mp4"]),
        ("filename,label\na.mp4,0.5\n", ["1 missing rows: b.mp4"]),
        ("filename,label\na.mp4,0.5\nb.mp4,0.5\nc.mp4,0.5\n", ["1 extra rows: c.mp4"]),
        ("filename,label\na.mp4,0.5\nb.mp4,0.5\na.mp4,0.6\n", ["1 duplicate rows: a.mp4"]),
        (
            "filename,label\na.mp4,1.01\nb.mp4,-0.1\n",
            ["2 labels that are not numbers in [0, 1]: row 2: '1.01', row 3: '-0.1'"],
        ),
        (
            "filename,label\na.mp4,NaN\nb.mp4,\n",
            ["2 labels that are not numbers in [0, 1]: row 2: 'NaN', row 3: ''"],
        ),
        (
            "filename,label\na.mp4,inf\nb.mp4,FAKE\n",
            ["2 labels that are not numbers in [0, 1]: row 2: 'inf', row 3: 'FAKE'"],
        ),
        (
            "filename,label\na.mp4,0.5,1\n\nb.mp4,1\n",
            [
                "2 rows that do not have two fields: row 2: ['a.mp4', '0.5', '1'], row 3: []",
                "1 missing rows: a.mp4",
            ],
        ),
    ],
)
def test_the_check_finds_what_kaggle_would_refuse(tmp_path, content, found):
    (tmp_path / "s.csv").write_bytes(content.encode())
    assert problems_of(tmp_path / "s.csv", ["a.mp4", "b.mp4"]) == found


def test_without_a_data_set_names_are_not_compared(tmp_path):
    (tmp_path / "s.csv").write_text("filename,label\nanything,0.5\n")
    assert problems_of(tmp_path / "s.csv") == []
    (tmp_path / "s.csv").write_text("filename,label\n")
    assert problems_of(tmp_path / "s.csv") == ["no rows"]


def test_what_was_written_passes_the_check(clips, tmp_path, capsys, miniature):
    score_clips(clips, one_by_one(stub), tmp_path / "out.csv", unscored, "x", progress=False)
    assert problems_of(tmp_path / "out.csv", clips["filename"]) == []
    assert main(["check", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.csv'}: valid, names not checked (no --data)\n"
    assert main(["check", str(miniature / "sample_submission.csv"), "--data", str(miniature)]) == 0
    assert (
        capsys.readouterr().out
        == f"{miniature / 'sample_submission.csv'}: valid, one row per clip of {miniature}\n"
    )


def test_the_check_fails_by_its_exit_code(clips, tmp_path, capsys, miniature):
    score_clips(clips, one_by_one(stub), tmp_path / "out.csv", unscored, "x", progress=False)
    assert main(["check", str(tmp_path / "out.csv"), "--data", str(miniature)]) == 1
    message = capsys.readouterr().err
    assert (
        message.startswith("error:")
        and "8 missing rows" in message
        and "4 extra rows: a.mp4, b,c.mp4" in message
    )
    assert main(["check", str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err
