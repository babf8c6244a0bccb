"""DFDC's layout, labels, splits by original, and names that try to leave the folder."""

import json

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.datasets import dfdc
from kaggle_utils.kaggle.paths import research_data
from recipes.face import data as face_data


@pytest.fixture
def layout(tmp_path):
    """A data set in DFDC's layout, with empty files for clips."""
    train, test = tmp_path / "train_sample_videos", tmp_path / "test_videos"
    for folder in (train, test):
        folder.mkdir()
    (train / "metadata.json").write_text(
        json.dumps(
            {
                "aaaaaaaaaa.mp4": {"label": "REAL", "split": "train", "original": None},
                "bbbbbbbbbb.mp4": {"label": "FAKE", "split": "train", "original": "aaaaaaaaaa.mp4"},
            }
        )
    )
    for name in ("zz.mp4", "yy.mp4", "notes.txt"):
        (test / name).touch()
    (tmp_path / "sample_submission.csv").write_text(
        "filename,label\nzz.mp4,0.5\nyy.mp4,0.5\nmissing.mp4,0.5\n"
    )
    return tmp_path


def test_read_dfdc_groups_a_fake_with_its_original(layout):
    clips = dfdc.read_dfdc(layout)
    assert clips["label"].tolist() == ["REAL", "FAKE"]
    assert clips["group"].tolist() == ["aaaaaaaaaa.mp4"] * 2


def test_rows_follow_the_sample_submission_also_for_a_missing_clip(layout):
    clips = dfdc.clips_to_score(layout)
    assert clips["filename"].tolist() == ["zz.mp4", "yy.mp4", "missing.mp4"]
    assert clips["label"].isna().all()


def test_a_flat_folder_takes_every_clip_and_its_labels(layout):
    flat = layout / "test_videos"
    (flat / "metadata.json").write_text(json.dumps({"zz.mp4": {"label": "FAKE"}}))
    clips = dfdc.clips_to_score(flat)
    assert clips["filename"].tolist() == ["yy.mp4", "zz.mp4"]
    assert clips["label"].tolist()[1] == dfdc.FAKE and np.isnan(clips["label"].iloc[0])


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "/etc/passwd", "a/b.mp4", "..", "", "c\\d.mp4", "e\0f.mp4"]
)
def test_metadata_cannot_leave_the_folder(layout, name):
    (layout / "train_sample_videos" / "metadata.json").write_text(json.dumps({name: {"label": "REAL"}}))
    with pytest.raises(ValueError, match="plain file names"):
        dfdc.read_dfdc(layout)


def test_a_sample_submission_that_points_outside_keeps_its_row_without_a_path(layout):
    (layout / "sample_submission.csv").write_text("filename,label\n../zz.mp4,0.5\n")
    assert dfdc.clips_to_score(layout)["path"].tolist() == [None]


@pytest.mark.parametrize("content", ["[1]", "not json", '{"a.mp4": 3}'])
def test_broken_metadata_names_the_file(layout, content):
    (layout / "train_sample_videos" / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json"):
        dfdc.read_dfdc(layout)


def test_a_file_s_stamp_changes_with_it_and_is_none_where_no_file_can_be(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"one")
    before = dfdc.file_stamp(clip)
    assert before == [3, clip.stat().st_mtime_ns]
    clip.write_bytes(b"other")
    assert dfdc.file_stamp(clip) != before
    assert [dfdc.file_stamp(path) for path in (None, tmp_path / "none.mp4", tmp_path / ("x" * 300))] == [
        None
    ] * 3


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected clips"):
        dfdc.clips_to_score(tmp_path)


def test_split_by_part_refuses_an_original_on_two_sides():
    table = pd.DataFrame({"part": [9, 45, 48], "group": ["a", "b", "c"]})
    assert face_data.split_by_part(table)["split"].tolist() == ["train", "validation", "test"]
    with pytest.raises(ValueError, match="in one split"):
        face_data.split_by_part(table.assign(group="a"))


def test_real_face_table_splits_by_original():
    folder = research_data("dfdc_faces")
    if folder is None:
        pytest.skip("needs the DFDC face crops: set DEEPFAKE_DATA to the folder that holds dfdc_faces")
    table = face_data.split_by_part(face_data.read_face_table(folder))
    assert (table.groupby("group")["split"].nunique() == 1).all()
    assert 0 < face_data.is_unaltered(table).mean() < 0.05
