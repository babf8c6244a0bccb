"""Footage as people shoot and cut it: a table of clips made from the miniature, each with what must come of
it.

Reading, faces and tracks are the real ones. What the networks say does not count here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pytest
from fuzz_reading import OLD_FFMPEG
from helpers import clip_facts, ffmpeg
from stubs import one_by_one

from kaggle_utils import extraction
from kaggle_utils.datasets import dfdc
from kaggle_utils.face import detection, framing
from kaggle_utils.fusion import rules
from kaggle_utils.media import files, sound, video
from kaggle_utils.submission import FRAME_LADDER, TimeGuard, score_clips

FPS, SECONDS, WIDTH, HEIGHT = 10, 2.0, 426, 240
Maker = Callable[[Path, Path], None]  # (file to make, folder of sources)
MARKS = {"detected": "d", "interpolated": "i", "fallback": "."}


# --- makers -------------------------------------------------------------------------------------------------
def edit(*shots: tuple[str, float]) -> Maker:
    """Cut shots together: source, seconds. Each source goes on where its last shot ended."""

    def make(path, sources):
        inputs, chain, at = [], "", {}
        for number, (name, seconds) in enumerate(shots):
            start = at.get(name, 0.0)
            at[name] = start + seconds
            inputs += ["-ss", round(start, 3), "-t", seconds, "-i", sources / f"{name}.mp4"]
            chain += f"[{number}:v]setpts=PTS-STARTPTS[v{number}];"
        chain += "".join(f"[v{number}]" for number in range(len(shots))) + f"concat=n={len(shots)}[v]"
        ffmpeg(*inputs, "-filter_complex", chain, "-map", "[v]", "-crf", 16, path)

    return make


def coded(*options: object, before: tuple = (), source: str = "a.mp4") -> Maker:
    return lambda path, sources: ffmpeg(*before, "-i", sources / source, *options, path)


def shown(filters: str, *options: object) -> Maker:
    return coded("-vf", filters, "-crf", 12, *options)


def flagged(filters: str, *flags: object) -> Maker:
    """Stored through filters, with a display matrix that undoes them."""

    def make(path, sources):
        stored = path.with_name(f"stored {path.stem}.mp4")
        shown(filters, "-c:a", "copy")(stored, sources)
        ffmpeg(*flags, "-i", stored, "-c", "copy", path)

    return make


def bright(transfer: str) -> Maker:
    """As HDR of BT.2020; its white is that of ordinary pictures."""
    curve = f"format=yuv420p10le,zscale=tin=709:min=709:pin=709:rin=tv:t={transfer}:p=2020:m=2020_ncl:npl=203"
    return shown(curve, "-c:v", "libx265", "-x265-params", "log-level=none")


def turning_interlaced(path: Path, sources: Path) -> None:
    for number, options in enumerate(((), ("-flags", "+ildct+ilme", "-x264opts", "tff=1"))):
        ffmpeg(
            "-ss",
            number,
            "-t",
            1,
            "-i",
            sources / "a.mp4",
            "-an",
            "-g",
            5,
            "-crf",
            12,
            *options,
            path.with_name(f"{path.stem} {number}.ts"),
        )
    parts = "|".join(str(path.with_name(f"{path.stem} {number}.ts")) for number in (0, 1))
    ffmpeg("-i", f"concat:{parts}", "-c", "copy", path)


def live(path: Path, sources: Path) -> None:
    """As a browser records: no duration, no index."""
    coded("-c:v", "libvpx", "-crf", 10, "-b:v", "2M", "-c:a", "libopus", "-live", 1)(path, sources)


def late(seconds: float) -> Maker:
    def make(path, sources):
        source = sources / "a.mp4"
        ffmpeg(
            "-i",
            source,
            "-itsoffset",
            seconds,
            "-i",
            source,
            "-map",
            "0:v",
            "-map",
            "1:a",
            "-c",
            "copy",
            path,
        )

    return make


def panned(left: float, right: float) -> Maker:
    return coded("-c:v", "copy", "-af", f"pan=stereo|c0={left}*c0|c1={right}*c0")


# --- checks -------------------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """What came of a clip, and of the plain clip it was made from."""

    path: Path
    frames: video.Frames
    people: Callable[[], list]
    plain: video.Frames


def rows(*wanted: str):
    """The sources of each person's ten rows, the people in any order."""

    def check(seen):
        found = sorted("".join(MARKS[source] for source in person.sources) for person in seen.people())
        assert found == sorted(wanted)

    return check


def people(count: int):
    def check(seen):
        assert [person.track for person in seen.people()] == list(range(count))

    return check


def same_picture(most: float = 4.0, counted: bool = True):
    """Frame by frame the plain clip, in mean grey levels."""

    def check(seen):
        assert [image.shape for image in seen.frames.images] == [image.shape for image in seen.plain.images]
        apart = [
            np.abs(one.astype(int) - other).mean()
            for one, other in zip(seen.frames.images, seen.plain.images, strict=True)
        ]
        assert max(apart) < most, apart
        assert seen.frames.warnings == [] or not counted

    return check


def spread_in_time(seconds: float = SECONDS, moving: float = 0.35):
    """Each picture is near the middle of its part, and the duration is right."""

    def check(seen):
        middles = (np.arange(10) + 0.5) / 10 * seconds
        assert np.abs(seen.frames.times_s - middles).max() < moving, seen.frames.times_s
        assert seen.frames.info.duration_s == pytest.approx(seconds, abs=0.3) and seen.frames.warnings == []

    return check


def sound_begins(seconds: float):
    def check(seen):
        assert files.survey(seen.path).sound_start_s == pytest.approx(seconds, abs=0.06)

    return check


def heard(level: float):
    """The loudness of the mono voice, as a share of the source's."""

    def check(seen):
        plain = sound.read_voice(seen.path.parent / "sources" / "a.mp4")
        ratio = np.std(sound.read_voice(seen.path)) / np.std(plain)
        assert ratio == pytest.approx(level, rel=0.15)

    return check


class Case(NamedTuple):
    name: str
    make: Maker
    check: Callable


HALF = "select='lt(n,10)+not(mod(n,4))'"  # ten frames a second, then two and a half
ANY = ("-fps_mode", "vfr")
CASES = [
    # 1. cutaways: sampled is every second frame
    Case("whole.mp4", edit(("a", 2.0)), rows("d" * 10)),
    Case("cutaway of four.mp4", edit(("a", 0.6), ("empty", 0.8), ("a", 0.6)), rows("ddd....ddd")),
    Case("cutaway of two.mp4", edit(("a", 0.6), ("empty", 0.4), ("a", 1.0)), rows("ddd..ddddd")),
    Case("cutaway of one.mp4", edit(("a", 0.8), ("empty", 0.2), ("a", 1.0)), rows("dddd.ddddd")),
    Case("cutaway first.mp4", edit(("empty", 0.6), ("a", 1.4)), rows("...ddddddd")),
    Case("cutaway last.mp4", edit(("a", 1.4), ("empty", 0.6)), rows("ddddddd...")),
    Case("to a chart.mp4", edit(("a", 0.8), ("chart", 0.4), ("a", 0.8)), rows("dddd..dddd")),
    Case("to black.mp4", edit(("a", 0.8), ("black", 0.4), ("a", 0.8)), rows("dddd..dddd")),
    Case(
        "two cutaways.mp4",
        edit(("a", 0.4), ("empty", 0.4), ("a", 0.4), ("chart", 0.4), ("a", 0.4)),
        rows("dd..dd..dd"),
    ),
    # 2. shot and reverse shot
    Case("two in turn.mp4", edit(*[("a", 0.2), ("b", 0.2)] * 5), rows("d.d.d.d.d.", ".d.d.d.d.d")),
    Case("two in long turns.mp4", edit(("a", 0.6), ("b", 0.8), ("a", 0.6)), rows("ddd....ddd", "...dddd...")),
    Case("one after the other.mp4", edit(("a", 1.0), ("b", 1.0)), rows("ddddd.....", ".....ddddd")),
    Case("three in turn.mp4", edit(("a", 0.6), ("b", 0.6), ("c", 0.8)), people(3)),
    Case("two and a cutaway.mp4", edit(("a", 0.6), ("empty", 0.4), ("b", 0.6), ("a", 0.4)), people(2)),
    Case("side by side.mp4", edit(("two", 2.0)), people(2)),
    Case("closer.mp4", edit(("a", 1.0), ("near", 1.0)), rows("d" * 10)),
    # 4. frames by time
    Case("slower.mp4", shown(HALF, *ANY), spread_in_time()),
    Case("slower.mkv", shown(HALF, *ANY), spread_in_time()),
    Case("slower.mov", shown(HALF, *ANY), spread_in_time()),
    Case("slower.webm", shown(HALF, *ANY, "-c:v", "libvpx", "-c:a", "libopus"), spread_in_time()),
    Case("browser.webm", live, spread_in_time(moving=0.06)),
    Case("remuxed.mkv", coded("-c", "copy"), same_picture(0.01)),
    Case("longer sound.mkv", coded("-c:v", "copy", "-af", "apad=pad_dur=2"), same_picture(0.01)),
    Case(
        "longer sound.webm",
        coded("-c:v", "libvpx", "-crf", 4, "-b:v", "4M", "-af", "apad=pad_dur=2", "-c:a", "libopus"),
        spread_in_time(moving=0.06),
    ),
    Case("stream.flv", coded("-c", "copy"), same_picture(0.01)),
    # 5. pixels that are no squares
    Case("64 to 45.mp4", shown("scale=300:240,setsar=64/45"), lambda seen: shape_is(seen, 427)),
    Case("4 to 3.mp4", shown("scale=320:240,setsar=4/3"), lambda seen: shape_is(seen, 427)),
    Case("8 to 9.mp4", shown("scale=480:240,setsar=8/9"), lambda seen: shape_is(seen, 427)),
    Case("4 to 3.mkv", shown("scale=320:240,setsar=4/3"), lambda seen: shape_is(seen, 427)),
    Case(
        "pal.mpg",
        shown("scale=300:240,setsar=64/45", "-r", 25, "-c:v", "mpeg2video", "-q:v", 2),
        lambda seen: shape_is(seen, 427),
    ),
    # 6. which way up, and how bright
    Case("hflip.mp4", flagged("hflip", "-display_hflip"), same_picture()),
    Case("vflip.mp4", flagged("vflip", "-display_vflip"), same_picture()),
    Case("turned 90.mp4", flagged("transpose=clock", "-display_rotation", 90), same_picture()),
    Case("turned 180.mp4", flagged("hflip,vflip", "-display_rotation", 180), same_picture()),
    Case("turned 270.mp4", flagged("transpose=cclock", "-display_rotation", 270), same_picture()),
    Case(
        "transposed.mp4",
        flagged("transpose=clock_flip", "-display_rotation", 90, "-display_hflip"),
        same_picture(),
    ),
    Case(
        "crossed.mp4",
        flagged("transpose=cclock_flip", "-display_rotation", 270, "-display_hflip"),
        same_picture(),
    ),
    Case("turned 90.mkv", flagged("transpose=clock", "-display_rotation", 90), same_picture()),
    Case("10 bits.mp4", shown("format=yuv420p10le"), same_picture()),
    Case("PQ.mp4", bright("smpte2084"), same_picture(8)),
    Case("HLG.mp4", bright("arib-std-b67"), same_picture(8)),
    # 7. streams that change
    Case("turning interlaced.mp4", turning_interlaced, same_picture(6, counted=False)),
    Case("turning interlaced.mkv", turning_interlaced, same_picture(6, counted=False)),
    Case("still.mp4", shown("loop=-1:1,trim=end_frame=20"), lambda seen: still(seen)),
    # 9. sound
    Case("sound at once.mp4", late(0.0), sound_begins(0.0)),
    Case("sound at 1 s.mp4", late(1.0), sound_begins(1.0)),
    Case("sound at 1 s.mkv", late(1.0), sound_begins(1.0)),
    Case("in phase.mp4", panned(1, 1), heard(1.0)),
    Case("antiphase.mp4", panned(1, -1), heard(1.0)),
    Case("nearly antiphase.mp4", panned(0.9, -1), heard(1.0)),
    Case("left alone.mp4", panned(1, 0), heard(0.5)),
]
if OLD_FFMPEG:  # it writes no display matrix that mirrors, and crashes at transport streams
    CASES = [case for case in CASES if not ("turning" in case.name or "-display_hflip" in case.name)]


def shape_is(seen: Seen, width: int) -> None:
    assert abs(seen.frames.images[0].shape[1] - width) <= 2 and seen.frames.images[0].shape[0] == HEIGHT
    apart = [
        np.abs(cv2.resize(one, (WIDTH, HEIGHT)).astype(int) - other).mean()
        for one, other in zip(seen.frames.images, seen.plain.images, strict=True)
    ]
    assert np.median(apart) < 6, apart


def still(seen: Seen) -> None:
    assert all(np.abs(image.astype(int) - seen.plain.images[0]).mean() < 8 for image in seen.frames.images)
    assert (np.diff(seen.frames.times_s) > 0).all()


# --- the run ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(miniature, tmp_path_factory) -> Path:
    """Two seconds of three people, of two together, of a close-up, and of pictures without a face."""
    folder = tmp_path_factory.mktemp("footage") / "sources"
    folder.mkdir()
    same = (
        "-t",
        SECONDS,
        "-r",
        FPS,
        "-pix_fmt",
        "yuv420p",
        "-crf",
        8,
        "-g",
        5,
        "-bf",
        0,
        "-movflags",
        "+faststart",
    )
    size = f"scale={WIDTH}:{HEIGHT},setsar=1"
    clips = sorted(dfdc.clips_to_score(miniature)["path"], key=lambda path: path.name)
    facts = {path: clip_facts(miniature, path.name) for path in clips}
    upright = [path for path in clips if not facts[path]["turned"]]
    (empty,) = (path for path in upright if not facts[path]["faces"])
    (two,) = (path for path in upright if len(facts[path]["faces"]) == 2)
    train = sorted((miniature / "train_sample_videos").glob("*.mp4"))
    alone = [path for path in train if not clip_facts(miniature, path.name)["original"]]
    for name, path in zip("abc", alone, strict=False):
        ffmpeg("-i", path, "-vf", size, *same, folder / f"{name}.mp4")
    ffmpeg("-i", alone[0], "-vf", f"crop=iw*0.8:ih*0.8,{size}", *same, folder / "near.mp4")
    ffmpeg("-i", two, "-vf", size, *same, folder / "two.mp4")
    ffmpeg("-stream_loop", 1, "-i", empty, "-vf", size, "-an", *same, folder / "empty.mp4")
    for name, source in {"chart": "testsrc", "black": "color=black"}.items():
        mark = ":" if "=" in source else "="
        ffmpeg(
            "-f",
            "lavfi",
            "-i",
            f"{source}{mark}s={WIDTH}x{HEIGHT}:r={FPS}:d=2",
            *same,
            folder / f"{name}.mp4",
        )
    return folder


FINDER = []


def detection_finder() -> detection.FaceFinder:
    FINDER.extend([] if FINDER else [detection.FaceFinder()])
    return FINDER[0]


@pytest.fixture(scope="module")
def plain(sources) -> video.Frames:
    return video.read_frames(sources / "a.mp4")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, sources, plain):
    path = sources.parent / case.name
    case.make(path, sources)
    frames = video.read_frames(path)
    case.check(Seen(path, frames, lambda: extraction.extract(path, detection_finder()).people, plain))


def test_the_copy_shows_every_orientation_alike(sources, plain):
    for name in ("hflip.mp4", "vflip.mp4", "transposed.mp4", "turned 90.mp4"):
        if (path := sources.parent / name).is_file():
            copied, _ = video._read_copy(path, list(range(1, 20, 2)), files.survey(path))
            assert all(
                np.abs(one.astype(int) - other).mean() < 4
                for one, other in zip(copied, plain.images, strict=True)
            )


@pytest.mark.parametrize(
    ("missed", "other", "expected"),
    [
        ((4,), (), "ddddiddddd"),
        ((4, 5), (), "ddddiidddd"),
        ((4, 5, 6), (), "dddd...ddd"),
        ((4, 5), (5,), "ddddi.dddd"),
        ((0, 1, 2), (), ".iiddddddd"),
        ((8, 9), (8, 9), "dddddddd.."),
    ],
)
def test_boxes_are_estimated_over_two_frames_of_one_scene(plain, missed, other, expected):
    """A face is missed in some frames; some of these show another scene."""

    def finder(frames):
        face = detection.Detection(np.array([180, 57, 59, 78.0]), 0.99, np.zeros((5, 2)))
        return [[] if index in missed else [face] for index in range(len(frames))]

    images = [255 - image if index in other else image for index, image in enumerate(plain.images)]
    (person,) = framing.extract_faces(images, finder)
    assert "".join(MARKS[source] for source in person.sources) == expected


def test_a_picture_that_lies_on_its_side_is_turned(plain, tmp_path):
    class Finder:  # sees faces in pictures of the upright shape alone
        def __call__(self, frames):
            face = detection.Detection(np.array([180, 80, 60, 80.0]), 0.99, np.zeros((5, 2)))
            return [[face] if frame.shape[0] == HEIGHT else [] for frame in frames]

    lying = video.Frames(
        [cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE) for image in plain.images], plain.times_s, plain.info
    )
    turned = extraction.upright(tmp_path / "lying.mp4", lying, Finder())
    assert turned.images[0].shape == plain.images[0].shape
    assert turned.warnings == ["lying.mp4: the picture was not upright and was rotated by 90°"]
    assert extraction.upright(tmp_path / "no face.mp4", lying, lambda frames: [[] for _ in frames]) is None


# --- 3 and 13: several people, priors and limits ------------------------------------------------------------
def test_people_share_the_prior():
    for prior in (0.005, 0.1, 0.5, 0.9):
        for count in (1, 2, 4):
            assert rules.any_fake([0.0] * count, prior) == pytest.approx(prior)
        assert rules.any_fake([1.3], prior) == pytest.approx(rules.sigmoid(1.3 + rules.log_odds(prior)))
    assert rules.any_fake([3.9, -2.4, -2.0, -2.2], 0.5) > 0.85  # one clear fake decides
    assert rules.any_fake([-1.0, -1.0, -1.0], 0.5) < rules.any_fake(
        [-1.0], 0.5
    )  # three real ones are no alarm


def test_limits_follow_the_prior():
    calibration = rules.Calibration({}, (0.01, 0.99))
    for prior in (0.005, 0.5, 0.9):
        clear, unknown, fake = (
            float(calibration.probability(logit, "face", prior)) for logit in (-20.0, 0.0, 20.0)
        )
        assert clear < unknown == pytest.approx(prior) and unknown < fake
        assert calibration.within_limits(0.0, prior) == pytest.approx(clear)
        assert calibration.within_limits(1.0, prior) == pytest.approx(fake)
    assert float(calibration.probability(20.0, "face", 0.5)) == pytest.approx(0.99)


# --- 8: long clips of few bytes -----------------------------------------------------------------------------
def test_the_time_limit_grows_with_the_pictures(tmp_path):
    (tmp_path / "call.mp4").write_bytes(bytes(17_000_000))
    call = files.Survey(np.arange(72_000) / 30, np.zeros(0), 2400.0, 1920 * 1080, False)
    assert files.time_limit(tmp_path / "call.mp4", call) > 2400
    forged = files.Survey(np.arange(1_000_000) / 30, np.zeros(0), 1.0, 8192 * 8192, False)
    assert files.time_limit(tmp_path / "call.mp4", forged) < 4000
    assert files.time_limit(tmp_path / "call.mp4") < 100


# --- 10: the time guard on a fake clock ---------------------------------------------------------------------
def run_guard(
    seconds_of: Callable[[int, int], float], clips: int, budget_s: float
) -> tuple[list[int], float]:
    """The frames wanted of each clip; each clip is read ahead with the frames wanted before it."""
    now, read, ahead = [0.0], [], None
    guard = TimeGuard(budget_s / 3600 / 0.95, clips, clock=lambda: now[0])
    while guard.left and not guard.exhausted:
        frames, ahead = ahead or guard.frames, guard.frames
        seconds = seconds_of(len(read), frames)
        read.append(frames)
        now[0] += seconds
        guard.finished(seconds)
    return read, now[0]


def test_a_slow_first_clip_costs_no_frames():
    read, used = run_guard(lambda clip, frames: 30.0 if clip == 0 else 1.0, 100, 140)
    assert set(read) == {FRAME_LADDER[0]} and len(read) == 100 and used <= 140


def test_one_step_down_is_not_two():
    read, used = run_guard(lambda clip, frames: frames / 10, 100, 75)
    assert len(read) == 100 and used <= 75
    assert 3 not in read and read.count(6) > 50  # and more again where time is left at the end


def test_it_steps_up_again():
    read, used = run_guard(lambda clip, frames: frames / (2 if clip < 10 else 20), 100, 90)
    assert len(read) == 100 and used <= 90 and read[-1] == FRAME_LADDER[0] and min(read) < FRAME_LADDER[0]


# --- 12: hurried rows of a journal --------------------------------------------------------------------------
def test_hurried_rows_are_scored_again_without_hurry(tmp_path):
    clips = pd.DataFrame({"filename": ["a.mp4", "b.mp4"], "path": None, "label": None})
    calls = []

    def predict(name, path, frames):
        calls.append(name)
        return {"probability": 0.9, "warnings": []} | (
            {"read": 3} if name == "a.mp4" and len(calls) < 3 else {}
        )

    def run(hours, key="x"):
        calls.clear()
        score_clips(
            clips,
            one_by_one(predict),
            tmp_path / "out.csv",
            lambda *_: {"probability": 0.5, "warnings": []},
            key,
            hours,
            False,
        )
        return list(calls)

    assert run(1.0) == ["a.mp4", "b.mp4"]
    assert run(1.0) == []
    calls.extend("xx")
    assert run(None) == ["a.mp4"]
    assert run(None, "another reading") == ["a.mp4", "b.mp4"]
