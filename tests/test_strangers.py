"""Files that strangers or other programs wrote: one line of warning or error, and no damage."""

import json
import zipfile

import pytest

from conftest import ROOT
from kaggle_utils import Detector, check, storage, submission
from kaggle_utils.datasets import dfdc
from kaggle_utils.kaggle import push as kaggle_push


@pytest.fixture
def clips(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"a.mp4": 1}', '{"../a.mp4": {}}', "[" * 100_000, b"\xff\xfe"],
    ids=lambda content: str(content[:12]),
)
def test_a_foreign_metadata_file_only_costs_the_labels(clips, capsys, content):
    (clips / "metadata.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert dfdc.clips_to_score(clips)["label"].isna().all()
    assert capsys.readouterr().err.startswith("warning: labels are unknown")


@pytest.mark.parametrize("label", [["REAL"], {"x": 1}, 1, None])
def test_a_label_of_another_type_is_unknown(clips, label):
    (clips / "metadata.json").write_text(json.dumps({"a.mp4": {"label": label}, "b.mp4": {"label": "FAKE"}}))
    assert dfdc.clips_to_score(clips)["label"].fillna(-1).tolist() == [-1, 1]


def test_a_sample_submission_without_its_column_is_named(tmp_path):
    (tmp_path / "test_videos").mkdir()
    sample = tmp_path / "sample_submission.csv"
    sample.write_text("name,label\na.mp4,0.5\n")
    with pytest.raises(ValueError, match="expected a column filename"):
        dfdc.clips_to_score(tmp_path)
    sample.write_text("filename,label\na.mp4,0.5\n,0.5\n")
    assert dfdc.clips_to_score(tmp_path)["filename"].tolist() == ["a.mp4"]


@pytest.mark.parametrize(
    "row", [{}, {"probability": 7}, {"probability": float("nan")}, {"probability": None}]
)
def test_a_journal_row_without_a_probability_is_not_finished(tmp_path, row):
    path = tmp_path / "journal"
    rows = [{"fingerprint": "x"}, {"filename": "a.mp4", **row}, {"filename": "b.mp4", "probability": 0.25}]
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    assert list(submission.Journal(path, "x").finished) == ["b.mp4"]


@pytest.mark.parametrize("label", ["0_1", "\u0660", " 0.5", "0.5 ", "nan", "inf", "", "-0.1", "1.01", "0x1"])
def test_labels_that_kaggle_does_not_read_are_no_numbers(tmp_path, label):
    path = tmp_path / "submission.csv"
    path.write_text(f"filename,label\na.mp4,{label}\n")
    assert "labels that are not numbers" in check.problems_of(path)[0]


@pytest.mark.parametrize("label", ["0", "1", "0.5", ".5", "1.", "1e-3", "5E-1"])
def test_labels_that_kaggle_reads(tmp_path, label):
    path = tmp_path / "submission.csv"
    path.write_text(f"filename,label\na.mp4,{label}\n")
    assert check.problems_of(path) == []


def test_check_reads_a_very_long_field(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text(f"filename,label\n{'a' * 200_000},0.5\n")
    assert check.problems_of(path) == []


def test_push_removes_no_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.mp4").touch()
    kaggle_push.empty(tmp_path / "01_exploration")
    with pytest.raises(kaggle_push.KaggleError, match="not made by push"):
        kaggle_push.empty(tmp_path / "data")
    assert (tmp_path / "data" / "precious.mp4").exists()
    (tmp_path / "01_exploration" / "old").touch()
    assert not list(kaggle_push.empty(tmp_path / "01_exploration").iterdir())


def test_settings_and_weights_that_are_incomplete_are_named(tmp_path):
    (tmp_path / "detector.json").write_text("{}")
    (tmp_path / "SHA256SUMS").write_text("one two three\n\n")
    with pytest.raises(ValueError, match=r"detector\.json: expected SHA-256 None"):
        Detector.load(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"detector\.json: expected calibration, flip, fusion, range"):
        Detector.load(tmp_path)
    with zipfile.ZipFile(tmp_path / "face.keras", "w") as file:
        file.write(ROOT / "LICENSE", "LICENSE")
    with pytest.raises(ValueError, match=r"expected a \.keras file"):
        storage.load_network(tmp_path / "face.keras")
