"""Clips as strangers send them: a table of cases, each with what must come of it, through the whole chain.

The networks are small and untrained, the reading, the faces and the folder's run are the real ones.
"""

import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pytest
from fuzz_reading import OLD_FFMPEG
from helpers import ffmpeg

from kaggle_utils.check import problems_of
from kaggle_utils.datasets import dfdc
from kaggle_utils.detector import Detector
from kaggle_utils.fusion import rules
from recipes import blocks
from recipes.face import networks as face_networks
from recipes.voice import networks as voice_networks

Maker = Callable[[Path, Path], None]  # (file to make, folder of sources)
FACE, PART, NOTHING = "a face", "no face", "nothing"  # what is seen
VOICE, SILENCE = True, False  # what is heard


class Case(NamedTuple):
    name: str
    make: Maker
    seen: str
    heard: bool
    warnings: tuple[
        str, ...
    ] = ()  # parts of the verdict's warnings, in their order, the last line on what decides left out


# --- makers -------------------------------------------------------------------------------------------------
def coded(*options: object, source: str = "face.mp4") -> Maker:
    """Encode a source again."""
    return lambda path, sources: ffmpeg("-i", sources / source, *options, path)


def copied(*options: object, source: str = "face.mp4") -> Maker:
    return coded("-c", "copy", *options, source=source)


def shown(filters: str, *options: object) -> Maker:
    """The face's clip through filters of ffmpeg."""
    return coded("-vf", filters, "-c:a", "copy", *options)


def turned(counterclockwise: int) -> Maker:
    """Stored lying, with the turn in the header that puts it upright."""

    def make(path, sources):
        ffmpeg(
            "-display_rotation",
            counterclockwise,
            "-i",
            sources / f"lying {counterclockwise}.mp4",
            "-c",
            "copy",
            path,
        )

    return make


def bytes_of(content: bytes) -> Maker:
    return lambda path, sources: path.write_bytes(content)


def same(source: str = "face.mp4") -> Maker:
    return lambda path, sources: path.write_bytes((sources / source).read_bytes())


def cut(share: float, source: str = "face.mp4") -> Maker:
    """The first part of a file, its index included where that comes first."""

    def make(path, sources):
        content = (sources / source).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def patched(mark: bytes, offset: int, new: bytes, source: str) -> Maker:
    """Overwrite bytes after the first ``mark``."""

    def make(path, sources):
        content = bytearray((sources / source).read_bytes())
        start = content.index(mark) + offset
        content[start : start + len(new)] = new
        path.write_bytes(content)

    return make


def pictures(draw: Callable[[np.ndarray, int], np.ndarray]) -> Maker:
    """Twelve pictures that ``draw`` makes of the portrait (512, 512, 3), BGR, with the sound of the face's
    clip.
    """

    def make(path, sources):
        portrait = cv2.imread(str(sources / "portrait.png"))
        frames = np.stack([draw(portrait, number) for number in range(12)])
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        raw = ("-f", "rawvideo", "-pix_fmt", "bgr24", "-s", size, "-r", "10", "-i", "-")
        sound = ("-i", sources / "face.mp4", "-map", "0:v", "-map", "1:a")
        ffmpeg(*raw, *sound, "-pix_fmt", "yuv420p", path, stdin=frames.tobytes())

    return make


def forty(portrait: np.ndarray, number: int) -> np.ndarray:
    return np.tile(portrait[40:200, 144:304], (5, 8, 1))  # the head alone, eight in a row


def at_border(portrait: np.ndarray, number: int) -> np.ndarray:
    return portrait[80:400, 190:510]  # the face's left part is outside


def for_one_frame(portrait: np.ndarray, number: int) -> np.ndarray:
    return portrait if number == 6 else np.full_like(portrait, 90)


def playlist(content: str) -> Maker:
    """A text that names a good clip by ``{}``."""
    return lambda path, sources: path.write_text(content.format(sources / "face.mp4"))


ID3 = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)  # an empty tag, which ffmpeg skips before it looks at what follows
M3U8 = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation>'
    "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"
)


def behind_id3(content: str, target: str) -> Maker:
    return bytes_of(ID3 + content.format(target).encode())


LINKS = {"link.mp4": "ordinary.mp4", "dangling.mp4": "nowhere.mp4", "loop.mp4": "loop.mp4"}


def link(path: Path, sources: Path) -> None:
    path.symlink_to(LINKS[path.name])


def folder(path: Path, sources: Path) -> None:
    path.mkdir()


def pipe(path: Path, sources: Path) -> None:
    os.mkfifo(path)


def nothing(path: Path, sources: Path) -> None:
    """The sample submission names it and the folder lacks it."""


NOT_A_VIDEO = ("not a video", "not a clip or sound file")
COUNTED = "frames decode of the"
NO_PICTURE = ("without a picture track",)
CUT_SHORT = ("no frame decodes", "sound track cannot be decoded")
LONG = "a" * 251 + ".mp4"  # as long as a name may be

# --- the table ----------------------------------------------------------------------------------------------
CASES = [
    # name, how it is made, what is seen, whether it is heard, warnings
    Case("ordinary.mp4", same(), FACE, VOICE),
    # broken files
    Case("empty.mp4", bytes_of(b""), NOTHING, SILENCE, ("empty file", "empty file")),
    Case("noise.mp4", bytes_of(np.random.default_rng(0).bytes(20000)), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("zeros.mp4", bytes_of(bytes(20000)), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("text.mp4", bytes_of(b"Dear reader, this is not a film."), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("page.mp4", bytes_of(b"<html><body>404 Not Found</body></html>"), NOTHING, SILENCE, NOT_A_VIDEO),
    Case(
        "box.mp4",
        bytes_of(b"\0\0\0\x18ftypmp42" + bytes(300)),
        NOTHING,
        SILENCE,
        ("cut before its index", "no clip or sound"),
    ),
    Case(
        "no index.mp4",
        cut(0.5, "index last.mp4"),
        NOTHING,
        SILENCE,
        ("cut before its index", "no clip or sound"),
    ),
    Case("cut at 1.mp4", cut(0.1), NOTHING, SILENCE, CUT_SHORT),
    Case("cut at 2.mp4", cut(0.2), FACE, SILENCE, (COUNTED, "no speech heard")),
    Case("cut at 3.mp4", cut(0.3), FACE, SILENCE, (COUNTED, "no speech heard")),
    Case("cut at 4.mp4", cut(0.4), FACE, VOICE, (COUNTED,)),
    Case("cut at 5.mp4", cut(0.5), FACE, VOICE, (COUNTED,)),
    Case("cut at 6.mp4", cut(0.6), FACE, VOICE, (COUNTED,)),
    Case("cut at 7.mp4", cut(0.7), FACE, VOICE, (COUNTED,)),
    Case("cut at 8.mp4", cut(0.8), FACE, VOICE, (COUNTED,)),
    Case("cut at 9.mp4", cut(0.9), FACE, VOICE, (COUNTED,)),
    Case("cut.mkv", cut(0.5, "face.mkv"), FACE, VOICE, (COUNTED,)),
    Case("picture destroyed.mp4", copied("-bsf:v", "noise=amount=1"), NOTHING, VOICE, ("no frame decodes",)),
    Case(
        "sound destroyed.mp4",
        copied("-bsf:a", "noise=amount=1"),
        FACE,
        SILENCE,
        ("sound track cannot be decoded",),
    ),
    # lengths, sizes and what the header says
    Case(
        "no frames.mp4",
        copied("-frames:v", 0, "-frames:a", 0),
        NOTHING,
        SILENCE,
        (*NO_PICTURE, "no clip or sound"),
    ),
    Case("one frame.mp4", copied("-frames:v", 1), FACE, SILENCE, ("no speech",)),
    Case("three frames.mp4", copied("-frames:v", 3, "-an"), FACE, SILENCE, ("no sound track",)),
    Case("claims 0.avi", patched(b"strh", 40, bytes(4), "face.avi"), FACE, VOICE),
    Case("claims 999.avi", patched(b"strh", 40, b"\xe7\3\0\0", "face.avi"), FACE, VOICE, (COUNTED,)),
    Case("no rate.avi", patched(b"strh", 28, bytes(8), "face.avi"), FACE, VOICE),
    Case("0 x 0.avi", patched(b"strf", 12, bytes(8), "raw.avi"), NOTHING, SILENCE, ("no frame decodes", "no speech")),
    Case("2 x 2.mp4", shown("scale=2:2"), PART, VOICE),
    Case("8 x 8.mp4", shown("scale=8:8"), PART, VOICE),
    Case("2000 x 8.mp4", shown("scale=2000:8"), PART, VOICE),
    Case("8 x 2000.mp4", shown("scale=8:2000"), PART, VOICE),
    Case(
        "8K still.mov",
        coded("-vf", "scale=7680:4320", "-frames:v", 1, "-c:v", "mjpeg"),
        FACE,
        SILENCE,
        ("were shrunk to", "no speech"),
    ),
    Case("odd sides.avi", coded("-vf", "scale=427:241", "-c:v", "mjpeg"), FACE, VOICE),
    Case("variable rate.mp4", shown("select='lt(n,4)+eq(n,8)+eq(n,11)'", "-fps_mode", "vfr"), FACE, VOICE),
    Case("1 fps.mp4", coded("-vf", "setpts=N/TB", "-r", 1, "-c:a", "copy"), FACE, VOICE),
    Case("240 fps.mp4", coded("-r", 240, "-c:a", "copy"), FACE, VOICE),
    # which way up
    Case("turned 90.mp4", turned(90), FACE, VOICE),
    Case("turned 180.mp4", turned(180), FACE, VOICE),
    Case("turned 270.mp4", turned(270), FACE, VOICE),
    # colours
    Case("grey.mp4", coded("-pix_fmt", "gray"), FACE, VOICE),
    Case("10 bits.mp4", coded("-pix_fmt", "yuv420p10le"), FACE, VOICE),
    Case("alpha.mov", coded("-c:v", "qtrle", "-pix_fmt", "argb"), FACE, VOICE),
    Case("alpha.webm", coded("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-c:a", "libopus"), FACE, VOICE),
    Case("interlaced.mp4", coded("-flags", "+ildct+ilme", "-x264opts", "tff=1"), FACE, VOICE),
    # codecs and containers
    Case("h265.mp4", coded("-c:v", "libx265", "-x265-params", "log-level=none"), FACE, VOICE),
    Case("av1.mp4", coded("-c:v", "libaom-av1", "-cpu-used", 8, "-crf", 40), FACE, VOICE),
    Case("vp9.webm", coded("-c:v", "libvpx-vp9", "-deadline", "realtime", "-c:a", "libvorbis"), FACE, VOICE),
    Case("vp8.webm", coded("-c:v", "libvpx", "-c:a", "libopus"), FACE, VOICE),
    Case("mpeg4.avi", coded("-c:v", "mpeg4", "-q:v", 3, "-c:a", "libmp3lame"), FACE, VOICE),
    Case("mpeg2.mpg", coded("-c:v", "mpeg2video", "-r", 25, "-q:v", 3), FACE, VOICE),
    Case(
        "stream.ts", coded(), *((NOTHING, SILENCE, ("ffmpeg crashed",) * 2) if OLD_FFMPEG else (FACE, VOICE))
    ),
    Case("h264.mkv", copied(), FACE, VOICE),
    Case("prores.mov", coded("-c:v", "prores"), FACE, VOICE),
    Case("lossless.mkv", coded("-c:v", "ffv1"), FACE, VOICE),
    Case("flash.flv", coded("-c:v", "flv", "-q:v", 3, "-ar", 44100), FACE, VOICE),
    Case("windows.wmv", coded("-c:v", "wmv2", "-q:v", 3), FACE, VOICE),
    Case(
        "phone.3gp",
        coded("-c:v", "h263", "-s", "352x288", "-q:v", 3, "-ar", 8000, "-ac", 1),
        FACE,  # babble at 8 kHz is hardly speech; an older AMR decoder decides otherwise
        *((VOICE, ()) if OLD_FFMPEG else (SILENCE, ("no speech",))),
    ),
    Case("picture.mp4", same("portrait.png"), NOTHING, SILENCE, NOT_A_VIDEO),
    # sound
    Case("8 bits.avi", coded("-c:v", "copy", "-c:a", "pcm_u8", "-ac", 1), FACE, VOICE),
    Case("24 bits at 96 kHz.mov", coded("-c:v", "copy", "-c:a", "pcm_s24le", "-ar", 96000), FACE, VOICE),
    Case("5.1 channels.mkv", coded("-c:v", "copy", "-c:a", "ac3", "-ac", 6), FACE, VOICE),
    Case("flac.mkv", coded("-c:v", "copy", "-c:a", "flac", "-ar", 96000), FACE, VOICE),
    Case("longer sound.mp4", coded("-c:v", "copy", "-af", "aloop=loop=3:size=50000"), FACE, VOICE),
    Case("shorter sound.mp4", coded("-c:v", "copy", "-af", "atrim=end=0.3"), FACE, SILENCE, ("no speech",)),
    Case("silent.mp4", coded("-c:v", "copy", "-af", "volume=0"), FACE, SILENCE, ("no speech",)),
    Case("no sound.mp4", copied("-an"), FACE, SILENCE, ("no sound track",)),
    Case("sound only.mp4", copied("-vn"), NOTHING, VOICE, NO_PICTURE),
    Case("wave.mp4", coded("-f", "wav"), NOTHING, VOICE, ("not a video",)),
    # faces
    Case("no face.mp4", shown("drawbox=color=gray:t=fill"), PART, VOICE),
    Case("forty faces.mp4", pictures(forty), FACE, VOICE),
    Case("at the border.mp4", pictures(at_border), FACE, VOICE),
    Case("for one frame.mp4", pictures(for_one_frame), FACE, VOICE),
    # files and names
    Case("missing.mp4", nothing, NOTHING, SILENCE, ("no such file", "no such file")),
    Case("../outside.mp4", nothing, NOTHING, SILENCE, ("expected a plain file name",)),
    Case("b" * 300 + ".mp4", nothing, NOTHING, SILENCE, ("cannot be opened", "cannot be opened")),
    Case("folder.mp4", folder, NOTHING, SILENCE, ("not a regular file", "not a regular file")),
    Case("pipe.mp4", pipe, NOTHING, SILENCE, ("not a regular file", "not a regular file")),
    Case("link.mp4", link, FACE, VOICE),
    Case("dangling.mp4", link, NOTHING, SILENCE, ("no such file", "no such file")),
    Case("loop.mp4", link, NOTHING, SILENCE, ("cannot be opened", "cannot be opened")),
    Case("space 'single' \"double\".mp4", same(), FACE, VOICE),
    Case("영상.mp4", same(), FACE, VOICE),
    Case("😀.mp4", same(), FACE, VOICE),
    Case("two\nlines.mp4", same(), FACE, VOICE),
    Case("a,comma;$(x)`y`.mp4", same(), FACE, VOICE),
    Case("-i.mp4", same(), FACE, VOICE),
    Case("%03d.mp4", same(), FACE, VOICE),
    Case("concat:a|b.mp4", same(), FACE, VOICE),
    Case("UPPER.MP4", same(), FACE, VOICE),
    Case(LONG, same(), FACE, VOICE),
    # scripts that would lead ffmpeg to another file, a good clip beside them
    Case("hls.mp4", playlist(M3U8), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("hls beside.mp4", bytes_of(M3U8.format("ordinary.mp4").encode()), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("concat.mp4", playlist(CONCAT), NOTHING, SILENCE, NOT_A_VIDEO),
    Case(
        "concat beside.mp4", bytes_of(CONCAT.format("ordinary.mp4").encode()), NOTHING, SILENCE, NOT_A_VIDEO
    ),
    Case(
        "hls behind a tag.mp4",
        behind_id3(M3U8, "ordinary.mp4"),
        NOTHING,
        SILENCE,
        ("not a video", "no clip or sound"),
    ),
    Case(
        "concat behind a tag.mp4",
        behind_id3(CONCAT, "ordinary.mp4"),
        NOTHING,
        SILENCE,
        ("not a video", "no clip or sound"),
    ),
    Case("session.mp4", bytes_of(SDP.encode()), NOTHING, SILENCE, NOT_A_VIDEO),
    Case("dash.mp4", playlist(DASH), NOTHING, SILENCE, NOT_A_VIDEO),
]


# --- the run ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(tmp_path_factory, miniature) -> Path:
    """What the cases are made of: 4 s of a talking face with the index first, and the like."""
    from skimage.data import astronaut

    folder = tmp_path_factory.mktemp("sources")
    cv2.imwrite(str(folder / "portrait.png"), astronaut()[..., ::-1])
    clip = dfdc.clips_to_score(miniature)["path"].iloc[0]  # a plain one
    ffmpeg(
        "-stream_loop",
        2,
        "-i",
        clip,
        "-t",
        4.0,
        "-r",
        10,
        "-vf",
        "scale=-2:240",
        "-bf",
        0,
        "-movflags",
        "+faststart",
        folder / "face.mp4",
    )
    copied()(folder / "index last.mp4", folder)
    copied()(folder / "face.mkv", folder)
    coded("-c:v", "mjpeg", "-q:v", 3, "-c:a", "pcm_s16le")(folder / "face.avi", folder)
    coded("-c:v", "rawvideo", "-pix_fmt", "yuv420p", "-c:a", "pcm_s16le", "-frames:v", 3)(
        folder / "raw.avi", folder
    )
    for turn, filters in {90: "transpose=clock", 180: "hflip,vflip", 270: "transpose=cclock"}.items():
        shown(filters)(folder / f"lying {turn}.mp4", folder)
    return folder


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Small untrained networks."""
    calibration = rules.Calibration({}, (0.01, 0.99))
    branches = face_networks.mesoinception4(64), voice_networks.voice_inception(width=8)
    face, voice = (blocks.with_head(branch) for branch in branches)
    return Detector(face, voice, rules.NoisyOr(calibration, voice_share=0.3), calibration)


@pytest.fixture(scope="module")
def table(detector, sources, tmp_path_factory) -> pd.DataFrame:
    """Every case made and scored in one run over a folder in DFDC's layout, by file name."""
    root = tmp_path_factory.mktemp("root")
    videos = root / "test_videos"
    videos.mkdir()
    with ThreadPoolExecutor(2) as makers:
        list(makers.map(lambda case: case.make(videos / case.name, sources), CASES))
    pd.DataFrame({"filename": [case.name for case in CASES], "label": 0.5}).to_csv(
        root / "sample_submission.csv", index=False
    )
    table = detector.predict_folder(root, root / "out.csv", progress=False)
    assert problems_of(root / "out.csv", [case.name for case in CASES]) == []
    return table.set_index("filename")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:40])
def test_case(table, case):
    row = table.loc[case.name]
    seen = NOTHING if not row["frames"] else FACE if not pd.isna(row["face"]) else PART
    assert (seen, not pd.isna(row["voice"])) == (case.seen, case.heard), row["warnings"]
    assert (row["label"] == 0.5) == (seen != FACE and not case.heard)
    assert len(row["frames"]) == 10 * len(row["tracks"])
    warnings = [
        text
        for text in row["warnings"]
        if (COUNTED not in text or COUNTED in case.warnings) and "quality is too low" not in text
    ]  # muxers miscount, and the faces are small
    decided = 0 if seen == FACE or case.warnings == ("expected a plain file name",) else 1
    assert len(warnings) == len(case.warnings) + decided, warnings
    for part, warning in zip(case.warnings, warnings, strict=False):
        assert case.name in warning and part in warning
    if decided:
        assert warnings[-1].endswith("the voice alone decides" if case.heard else "the score is the prior")


def test_of_forty_faces_four_are_followed(table):
    assert len(table.loc["forty faces.mp4", "tracks"]) == 4


def test_a_face_of_one_frame_is_seen_once(table):
    assert [track["frames"] for track in table.loc["for one frame.mp4", "tracks"]] == [1]


def test_what_is_upright_is_the_same_face_from_every_side(table):
    for name in ("turned 90.mp4", "turned 180.mp4", "turned 270.mp4"):
        boxes = [
            np.mean([frame["box"] for frame in table.loc[clip, "frames"]], axis=0)
            for clip in (name, "ordinary.mp4")
        ]
        np.testing.assert_allclose(*boxes, atol=6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets any byte stand in a name")
def test_a_name_that_is_no_utf8_has_its_row(detector, sources, tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    (tmp_path / name).write_bytes((sources / "face.mp4").read_bytes())
    table = detector.predict_folder(tmp_path, tmp_path / "out.csv", progress=False)
    assert table["label"].tolist() == [0.5] and "not valid UTF-8" in table["warnings"][0][0]
    assert (tmp_path / "out.csv").read_bytes() == b"filename,label\n\xff.mp4,0.50000\n"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_says_so(detector, sources, tmp_path):
    (tmp_path / "closed.mp4").write_bytes((sources / "face.mp4").read_bytes())
    (tmp_path / "closed.mp4").chmod(0)
    verdict = detector.predict(tmp_path / "closed.mp4")
    assert verdict.probability == 0.5 and "cannot be opened: Permission denied" in verdict.warnings[0]


# --- the same clip, the same answer -------------------------------------------------------------------------
def test_a_row_does_not_hang_on_its_neighbours_or_on_the_run(detector, sources, table):
    alone = [detector.predict(sources / "face.mp4") for _ in range(2)]
    for verdict in alone:
        row = table.loc["ordinary.mp4"]
        assert verdict.probability == pytest.approx(row["probability"], abs=1e-6)
        assert verdict.face == pytest.approx(row["face"], abs=1e-6) and verdict.voice == pytest.approx(
            row["voice"], abs=1e-6
        )
    assert table.loc["h264.mkv", "face"] == pytest.approx(table.loc["ordinary.mp4", "face"], abs=1e-6)
    for name in ("영상.mp4", "link.mp4", *(() if OLD_FFMPEG else ("h264.mkv",))):
        assert table.loc[name, "probability"] == pytest.approx(
            table.loc["ordinary.mp4", "probability"], abs=1e-6
        )


def test_fewer_frames_are_repeated_to_ten_rows(detector, sources):
    for frames in (10, 6, 3, 1):
        verdict = detector.predict(sources / "face.mp4", frames)
        assert len(verdict.frames) == 10 and len({frame["time_s"] for frame in verdict.frames}) == frames
        assert not math.isnan(verdict.face)
