"""A folder of clips on one page: complete, in order, escaped, small; resumed; nothing unjudged among the clean."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from browser import addresses, browser
from test_report import Page, clip_with

from kaggle_utils import overview, pictures, report
from kaggle_utils.__main__ import main

EVIL = "<img src=x onerror=alert(1)>&'\".mp4"


def row(name: str, probability: float | None, **others) -> dict:
    """A row as ``_judge`` makes it."""
    word = report.UNKNOWN.name if probability is None else report.zone_of(probability).name
    made = {
        **overview._unjudged(name, "x"),
        "word": word,
        "probability": probability,
        "face": probability,
        "voice": probability,
        "warnings": [],
        "people": 1,
        "duration_s": 10.0,
        "page": f"clips/{name}.html",
        **others,
    }
    return {**made, "group": overview._group(made)}


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    """Clips of two people, without a face and without sound, a text file, and a cut clip with an evil name."""
    folder = tmp_path_factory.mktemp("clips")
    shutil.copy(clip_with(miniature, people=2), folder / "two.mp4")
    shutil.copy(clip_with(miniature, people=0), folder / "empty.mp4")
    shutil.copy(clip_with(miniature, sound=False), folder / "=silent.mp4")
    (folder / EVIL).write_bytes((folder / "two.mp4").read_bytes()[:4000])
    (folder / "text.avi").write_text("no clip")
    return folder


@pytest.fixture(scope="module")
def made(folder, detector, tmp_path_factory):
    """The folder's report, written by the command; the networks are those of the test session."""
    output = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overview, "once", lambda make, *arguments: detector)
        assert main(["report", str(folder), "-o", str(output)]) == 0
    return output


def test_every_clip_has_a_row_a_page_and_the_same_order_everywhere(made, folder):
    table = json.loads((made / "index.json").read_text())["clips"]
    assert sorted(entry["file"] for entry in table) == sorted(os.listdir(folder))
    with open(made / "index.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"].lstrip("'") for line in lines] == [entry["file"] for entry in table]
    assert "'=silent.mp4" in {line["file"] for line in lines}, "a spreadsheet would run it"
    page = Page((made / "index.html").read_text())
    assert page.open == []
    links = [link["href"] for link in page.of("a")]
    assert len(links) == len(table) == len(os.listdir(made / "clips")) // 2
    assert [entry["file"] for entry in table] == sorted(
        (entry["file"] for entry in table), key=lambda name: page.text.index(name)
    )


def test_what_was_not_judged_stands_apart_with_its_reason(made):
    table = {entry["file"]: entry for entry in json.loads((made / "index.json").read_text())["clips"]}
    for name in (EVIL, "text.avi"):
        assert table[name]["group"] == overview.NOT_JUDGED and table[name]["probability"] is None
        assert "picture was not analysed" in " ".join(table[name]["warnings"])
    for name, reason in (("empty.mp4", "No face found"), ("=silent.mp4", "No sound track")):
        expected = overview.JUDGED if table[name]["word"] == "Likely fake" else overview.IN_PART
        assert table[name]["group"] == expected
        assert reason in " ".join(table[name]["warnings"])


def test_an_evil_name_stays_text(made):
    html = (made / "index.html").read_text()
    assert "<img src=x" not in html and EVIL in Page(html).text


def test_a_second_run_analyses_only_what_changed(made, folder, detector, monkeypatch, tmp_path):
    studied = []

    def study(path, *others):
        studied.append(path.name)
        return report_study(path, *others)

    report_study = report.study
    monkeypatch.setattr(report, "study", study)
    monkeypatch.setattr(overview, "once", lambda make, *arguments: detector)
    copy, output = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(folder, copy)
    shutil.copytree(made, output)
    before = overview.write_overview(copy, output, progress=False)
    assert studied == []
    os.utime(copy / "text.avi", (1, 1))
    (output / "clips" / "empty.mp4.json").write_text('{"key": ')
    after = overview.write_overview(copy, output, progress=False)
    assert sorted(studied) == ["empty.mp4", "text.avi"]
    assert [entry["file"] for entry in before] == [entry["file"] for entry in after]


def test_a_clip_that_fails_does_not_stop_the_others(miniature, detector, monkeypatch, tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clip_with(miniature, people=0), tmp_path / "clips" / name)

    def study(path, *others):
        if path.name == "a.mp4":
            raise MemoryError("too large")
        return report_study(path, *others)

    report_study = report.study
    monkeypatch.setattr(report, "study", study)
    monkeypatch.setattr(overview, "once", lambda make, *arguments: detector)
    rows = overview.write_overview(tmp_path / "clips", tmp_path / "out", progress=False)
    failed = next(entry for entry in rows if entry["file"] == "a.mp4")
    assert failed["group"] == overview.NOT_JUDGED and failed["warnings"] == ["MemoryError: too large"]
    assert not (tmp_path / "out" / "clips" / "a.mp4.html").exists()


def test_groups():
    assert row("a", 0.1)["group"] == overview.JUDGED
    assert row("a", 0.1, voice=None)["group"] == row("a", 0.5, face=None)["group"] == overview.IN_PART
    poor = ["The picture's quality is too low to rely on: it is very dark."]
    assert row("a", 0.1, warnings=poor)["group"] == overview.IN_PART
    assert row("a", 0.1, warnings=["9 frames decode of the 40 in its header."])["group"] == overview.IN_PART
    assert row("a", 0.9, voice=None, warnings=poor)["group"] == overview.JUDGED
    assert row("a", None)["group"] == overview.NOT_JUDGED
    rows = [row("c", None), row("b", 0.1), row("a", 0.9), row("d", 0.5, face=None), row("e", 0.4)]
    assert "".join(entry["file"] for entry in overview.in_order(rows)) == "aebdc"


@pytest.fixture(scope="module")
def many():
    """Rows of 200 clips, with pictures that compress badly."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (overview.SIDE, overview.SIDE, 3), np.uint8)
    faces = overview.FACES * [pictures.jpeg(noise, overview.QUALITY)]
    rows = [row(f"clip{number:03}.mp4", float(rng.uniform()), faces=faces) for number in range(199)]
    return overview.in_order([*rows, row(EVIL, None)])


def test_200_clips_stay_under_20_mb(many):
    assert len(overview.overview_page(many, 0.5).encode()) < 20e6


def test_the_browser_filters_by_word_and_text(many, tmp_path):
    (tmp_path / "index.html").write_text(overview.overview_page(many, 0.5), encoding="utf-8")
    with browser(tmp_path, 390) as window:
        addresses(window)
        window.get((tmp_path / "index.html").as_uri())

        def shown():
            return [item.text for item in window.find_elements("css selector", "li") if item.is_displayed()]

        assert len(shown()) == 200
        fakes = sum(entry["word"] == "Likely fake" for entry in many)
        window.find_element("css selector", "input[value='Likely fake']").click()
        assert len(shown()) == fakes and all("Likely fake" in text for text in shown())
        window.find_element("css selector", "input[value='']").click()
        window.find_element("id", "text").send_keys("clip01")
        assert len(shown()) == 10
        assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert window.get_log("browser") == []
        outside = {place for place in addresses(window) if not place.startswith(("file:", "data:", "chrome:"))}
        assert not outside
