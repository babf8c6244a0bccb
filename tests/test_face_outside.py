"""The main rows of the face evaluation as entries of results.json."""

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.metrics import log_loss, sigmoid
from recipes.face import outside


def test_figures_name_the_main_rows(tmp_path):
    random = np.random.default_rng(0)
    labels = np.tile([0, 1], 20)
    clips = pd.DataFrame(
        {
            "clip": range(40),
            "label": labels,
            "generator": np.where(labels, "Some", "film"),
            "person": [f"p{n // 2}" for n in range(40)],
            "logit": labels + random.normal(0, 0.5, 40),
        }
    )
    clips.to_csv(tmp_path / "folds.csv", index=False)
    table = outside.evaluate_folds(outside.read_folds(tmp_path / "folds.csv"), (1.0, 0.0))
    entries = {entry["name"]: entry for entry in outside.figures(table, "folds")}
    assert entries["face/web folds/AUC"]["value"] == round(table.at["all", "auc"], 4)
    assert entries["face/web folds/AUC"]["low"] <= entries["face/web folds/AUC"]["value"]
    assert entries["face/web folds/real over one half"]["value"] == (clips["logit"][labels == 0] > 0).mean()

    portraits = pd.DataFrame({"UTKFace": {"pictures": 200.0, "over_half": 0.15}}).T
    (entry,) = outside.figures(portraits, "portraits")
    assert entry["name"] == "face/portraits/UTKFace/over one half" and entry["value"] == 0.15
    assert entry["data"] == "utkface, 200 portraits"

    scores = {
        "auc": 0.9,
        "auc_low": 0.8,
        "auc_high": 0.95,
        "log_loss": 0.3,
        "log_loss_low": 0.2,
        "log_loss_high": 0.4,
    }
    first, second = outside.figures(pd.DataFrame({"mean": scores}).T, "dfdc", "test")
    assert first["name"] == "face/DFDC test/AUC" and first["command"].endswith("--split test")
    assert (second["value"], second["low"], second["high"]) == (0.3, 0.2, 0.4)

    meaning = outside.words(labels, 10 * labels - 5, (1.0, 0.0))
    entries = {
        entry["name"]: entry["value"]
        for entry in outside.figures(meaning, "words", title="words on web_faces")
    }
    assert entries == {
        "face/words on web_faces/fakes among Likely fake": 1.0,
        "face/words on web_faces/fakes among No sign found": 0.0,
    }


def clips_around(centres: dict[int, float], count: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    labels = np.tile([0, 1], count // 2)
    return pd.DataFrame({"label": labels, "logit": [random.normal(centres[label]) for label in labels]})


def test_the_line_of_a_clip_keeps_real_web_clips_under_one_half():
    web, dfdc = clips_around({0: -1.0, 1: 1.0}, 146), clips_around({0: -3.0, 1: 3.0}, 1000)
    scale, shift = outside.fit_clip_line([web], dfdc)
    over = scale * web["logit"] + shift > 0
    assert scale > 0 and over[web["label"] == 0].sum() <= 3  # of 73
    assert over[web["label"] == 1].any()


def test_dfdc_bounds_the_line_of_a_clip():
    web, dfdc = clips_around({0: 2.0, 1: 4.0}, 146), clips_around({0: -2.0, 1: 2.0}, 1000)
    scale, shift = outside.fit_clip_line([web], dfdc, limit=0.15)
    assert log_loss(dfdc["label"], sigmoid(scale * dfdc["logit"] + shift)) <= 0.15
    assert (scale * web["logit"] + shift > 0)[web["label"] == 0].mean() > 0.05  # not at any price
    with pytest.raises(ValueError, match="log loss on DFDC"):
        outside.fit_clip_line([web], dfdc, limit=0.01)
