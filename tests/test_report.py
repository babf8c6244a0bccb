"""The page of one clip: complete, escaped, alone, small, and right about who and what it shows."""

import base64
import copy
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import addresses, browser
from helpers import clip_facts

from kaggle_utils import report
from kaggle_utils.__main__ import main

EVIL = "<img src=a.example onerror=alert(1)>&\"'{{7*7}}.mp4"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Tags with their attributes, text, and whether the tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def checked(html: str) -> Page:
    """What holds of every page."""
    page = Page(html)
    assert page.open == [] and len(html) < 5e6
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import", html)
    assert all(image["alt"] for image in page.of("img"))
    assert all(svg["aria-label"] for svg in page.of("svg"))
    assert "A score is evidence, not proof." in page.text
    return page


def clip_with(miniature, **wanted):
    """The first test clip whose facts hold what is wanted; ``people``: how many are in it."""
    for path in sorted((miniature / "test_videos").glob("*.mp4")):
        facts = clip_facts(miniature, path.name)
        if all((facts | {"people": len(facts["faces"])})[name] == value for name, value in wanted.items()):
            return path
    raise LookupError(wanted)


@pytest.fixture(scope="module")
def two_people(miniature, detector, tmp_path_factory):
    """A clip of two people under an evil name, studied."""
    path = tmp_path_factory.mktemp("clips") / EVIL
    shutil.copy(clip_with(miniature, people=2), path)
    return report.study(path, detector)


def test_two_people_have_two_curves_and_the_score_names_one(two_people):
    found, page = two_people, checked(report.page(two_people))
    assert [person.name for person in found.people] == ["Person A", "Person B"]
    assert [person.decides for person in found.people].count(True) == 1
    deciding = next(person for person in found.people if person.decides)
    assert (
        deciding.probability == max(person.probability for person in found.people) > found.verdict.face
    )  # the prior is shared
    assert page.text.count("the clip’s score comes from this person") == 1
    assert f"{deciding.name}, the most suspicious of 2 people" in page.text
    labels = [svg["aria-label"] for svg in page.of("svg")]
    assert [sum(name in label for label in labels) for name in ("Person A", "Person B", "of the voice")] == [
        1,
        1,
        1,
    ]
    assert len(page.of("polyline")) >= 2


def test_the_verdict_is_that_of_predict(two_people, detector):
    ours, theirs = two_people.verdict, detector.predict(two_people.path)
    assert ours.probability == pytest.approx(theirs.probability, abs=1e-4)
    assert [row["time_s"] for row in ours.frames] == [row["time_s"] for row in theirs.frames]


def test_curves_have_more_frames_than_the_verdict(two_people):
    assert len(two_people.clip.images) == report.SAMPLED
    for person in two_people.people:
        assert len(person.scores) == report.SAMPLED and np.isfinite(person.scores).any()
        assert person.scores[person.most[0]] == np.nanmax(person.scores)
        assert person.scores[person.least[0]] == np.nanmin(person.scores)
        assert set(person.heat) == set(person.most + person.least)


def test_an_evil_name_stays_text(two_people):
    html = report.page(two_people)
    page = checked(html)
    assert EVIL in page.text
    assert "<img src=a" not in html and "49.mp4" not in html


def test_a_rarer_fake_makes_the_same_signs_weigh_less(two_people):
    assert two_people.rare < two_people.verdict.probability


def test_page_says_what_it_was_made_with(two_people, detector):
    text = checked(report.page(two_people)).text
    assert len(detector.digests) >= 4
    for part in ("kaggle_utils", "Keras", "face.keras", *detector.digests.values()):
        assert part in text


def test_gaps_of_a_curve_are_gaps(two_people):
    person = two_people.people[0]
    whole, points = report._curve(person, two_people)
    gap = report.Person(
        **{**vars(person), "scores": np.where(np.arange(report.SAMPLED) == 12, np.nan, person.scores)}
    )
    lines, fewer = report._curve(gap, two_people)
    assert len(whole) == 1 and len(lines) == 2 and len(fewer) == len(points) - 1


def test_without_a_face_the_voice_alone_decides(miniature, detector):
    found = report.study(clip_with(miniature, people=0), detector)
    page = checked(report.page(found))
    assert found.people == [] and found.voice is not None
    assert "No face was judged. No face found in 10 frames, the voice alone decides." in page.text
    assert page.text.index("No face was judged.") < page.text.index("The voice over time")
    assert found.zone == report.zone_of(found.verdict.voice)


def test_without_a_voice_the_face_alone_decides(miniature, detector):
    found = report.study(clip_with(miniature, sound=False), detector)
    page = checked(report.page(found))
    assert found.voice is None and len(found.people) == 1
    assert "not judged: No sound track" in page.text and "The voice over time" not in page.text


def test_one_person_comes_first_and_the_quality_has_its_line(miniature, detector):
    stages = []
    found = report.study(clip_with(miniature, people=1, sound=True), detector, stages.append)
    page = checked(report.page(found))
    assert stages == list(report.STAGES[:-1])
    assert page.of("img")[0]["alt"].startswith("The face at ")
    assert "Person A" not in page.text, "there is no other"
    assert found.quality and found.quality in page.text
    record = report.record(found)
    assert record["word"] == found.zone.name and record["sha256"] in page.text
    assert record["probability"] == found.verdict.probability


def test_progress_may_stop_the_analysis(miniature, detector):
    def stop(stage):
        if stage == "faces":
            raise InterruptedError(stage)

    with pytest.raises(InterruptedError):
        report.study(clip_with(miniature, people=0), detector, stop)


def test_sampled_frames_are_counted_only_where_some_were_left_out(two_people):
    total = two_people.clip.info.frame_count
    assert f"{total - report.SAMPLED} of the clip's {total} frames" in " ".join(report.left_out(two_people))
    whole = copy.copy(two_people)
    whole.clip = replace(two_people.clip, info=replace(two_people.clip.info, frame_count=report.SAMPLED))
    assert "frames:" not in " ".join(report.left_out(whole))


def test_of_a_damaged_clip_nothing_is_claimed(miniature, detector, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip_with(miniature, people=2).read_bytes()[:4000])
    found = report.write_report(path, tmp_path / "cut.html", detector)
    page = checked((tmp_path / "cut.html").read_text(encoding="utf-8"))
    assert found.zone == report.UNKNOWN and "Cannot tell: no face, no voice" in page.text
    assert "the picture was not analysed" in page.text and str(tmp_path) not in page.text
    assert "no probability is given" in page.text and "% probability" not in page.text


def test_zones():
    assert [report.zone_of(chance).name for chance in (0.99, 0.8, 0.79, 0.2, 0.19, 0.0, np.nan)] == [
        "Likely fake",
        "Likely fake",
        "Uncertain",
        "Uncertain",
        "No sign found",
        "No sign found",
        "Cannot tell: no face, no voice",
    ]


def test_command_line_names_a_missing_clip(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.mp4")]) == 1
    assert "none.mp4: expected a clip" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "predict"])
def test_several_clips_belong_into_a_folder(command, capsys):
    assert main([command, "a.mp4", "b.mp4"]) == 2
    assert capsys.readouterr().err == "error: expected one clip or one folder: put the clips into a folder\n"


@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_it_and_complains_of_nothing(two_people, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(report.page(two_people), encoding="utf-8")
    with browser(tmp_path, width) as window:
        addresses(window)
        window.get(page.as_uri())
        assert window.get_log("browser") == []
        assert {place.partition(":")[0] for place in addresses(window)} <= {"file", "data", "chrome"}
        assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert window.execute_script(
            "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )


def test_it_prints_on_a4(two_people, tmp_path):
    """Nothing is wider than the sheet, and no picture or chart is cut by its end."""
    page = tmp_path / "page.html"
    page.write_text(report.page(two_people), encoding="utf-8")
    with browser(tmp_path, 1280) as window:
        window.get(page.as_uri())
        sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
        printed = base64.b64decode(window.execute_cdp_cmd("Page.printToPDF", sheet)["data"])
        sizes = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", printed)
        assert {(round(float(width)), round(float(height))) for width, height in sizes} <= {
            (595, 842),
            (594, 842),
            (596, 842),
        }
        assert 2 <= len(sizes) <= 8
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        window.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 718, "height": 1047, "deviceScaleFactor": 1, "mobile": False},
        )  # A4 at 96 dpi without Chromium's margins of 1 cm
        assert window.execute_script("return document.documentElement.scrollWidth") <= 718
        tall = window.execute_script(
            "return [...document.querySelectorAll('.chart, .pair, figure')].map(x => x.offsetHeight)"
        )
        assert tall and max(tall) < 1047
        kept = window.execute_script(
            "return [...document.querySelectorAll('.chart, .pair, .seen')]"
            ".map(x => getComputedStyle(x).breakInside)"
        )
        assert set(kept) == {"avoid"}
