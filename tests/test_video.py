"""Reading clips: which frames, when, which way up, in which colours, and what is refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from fuzz_reading import OLD_FFMPEG
from helpers import ffmpeg

from kaggle_utils.media import files, video
from kaggle_utils.media.video import UnreadableClip, evenly_spread, iter_frames, probe, read_frames

CORNERS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
COUNTER = (
    "geq=lum='16+8*N+8*random(1)-4':cb=128:cr=128"  # frame n has the mean 16 + 8 n; noise gives it some bytes
)


def generate(path: Path, source: str, *options: object) -> Path:
    """Encode an FFmpeg test source; H.264 without B-frames unless ``options`` say otherwise."""
    ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-bf", 0, *options, path)
    return path


def index_of(image: np.ndarray) -> int:
    """Which frame of ``COUNTER`` an image is (limited range: level 16 is black, 235 white)."""
    return round((image.mean() * 219 / 255) / 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def counter(folder) -> Path:
    """24 frames at 12 frames a second, 48 × 32 pixels, each with its number as grey level; the index comes
    first.
    """
    source = f"nullsrc=s=48x32:r=12:d=2,format=yuv420p,{COUNTER}"
    return generate(folder / "counter.mp4", source, "-crf", 8, "-g", 4, "-movflags", "+faststart")


@pytest.fixture(scope="module")
def corners(folder) -> Path:
    """Red, lime above blue, white; 64 × 32 pixels."""
    boxes = ",".join(
        f"drawbox={x}:{y}:32:16:{colour}:fill"
        for colour, (x, y) in zip(CORNERS, ((0, 0), (32, 0), (0, 16), (32, 16)), strict=True)
    )
    return generate(folder / "corners.mp4", f"color=black:s=64x32:r=5:d=1,{boxes}", "-crf", 1)


def colours_at_corners(image: np.ndarray) -> list[str]:
    """The colour names at the middles of the four quarters, in reading order."""
    height, width = image.shape[:2]
    points = [image[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [
        min(CORNERS, key=lambda name: np.abs(np.subtract(CORNERS[name], point.astype(int))).sum())
        for point in points
    ]


def test_frames_are_the_middles_of_equal_parts(counter):
    frames = read_frames(counter, 6)
    assert [index_of(image) for image in frames.images] == [2, 6, 10, 14, 18, 22]
    np.testing.assert_allclose(frames.times_s, np.array([2, 6, 10, 14, 18, 22]) / 12, atol=1e-6)
    assert all(image.shape == (32, 48, 3) and image.dtype == np.uint8 for image in frames.images)
    assert frames.warnings == []


def test_header(counter):
    info = probe(counter)
    assert (info.width, info.height, info.fps, info.frame_count, info.rotation) == (48, 32, 12.0, 24, 0)
    assert info.duration_s == pytest.approx(2.0)
    assert info.codec in ("h264", "avc1")
    assert read_frames(counter, 3).info == info


@pytest.mark.parametrize(
    "frame_count, count", [(300, 10), (24, 10), (10, 10), (11, 10), (3, 10), (1, 1), (0, 5)]
)
def test_spread_is_even_and_distinct(frame_count, count):
    wanted = evenly_spread(frame_count, count)
    assert len(wanted) == len(set(wanted)) == min(frame_count, count)
    assert all(0 <= index < frame_count for index in wanted)
    assert len(wanted) < 2 or np.ptp(np.diff(wanted)) <= 1


def test_at_least_one_frame_must_be_wanted(counter):
    with pytest.raises(ValueError, match="at least 1"):
        read_frames(counter, 0)


def test_short_clip_gives_each_frame_once(counter):
    frames = read_frames(counter, 100)
    assert [index_of(image) for image in frames.images] == list(range(24))


def test_every_frame_in_turn(counter):
    indices, times, images = zip(*iter_frames(counter), strict=True)
    assert list(indices) == [index_of(image) for image in images] == list(range(24))
    np.testing.assert_allclose(times, np.arange(24) / 12, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_files_are_closed_when_the_caller_stops_early(counter):
    def opened():
        links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return sum(link == str(counter.resolve()) for link in links)

    frames = iter_frames(counter)
    next(frames)
    assert opened() == 1
    frames.close()
    assert opened() == 0
    read_frames(counter, 2)
    assert opened() == 0


def test_colours_are_rgb(corners):
    assert colours_at_corners(read_frames(corners, 1).images[0]) == ["red", "lime", "blue", "white"]


@pytest.mark.parametrize(
    "counterclockwise, expected",
    [
        (90, ["lime", "white", "red", "blue"]),
        (180, ["white", "blue", "lime", "red"]),
        (270, ["blue", "red", "white", "lime"]),
    ],
)
def test_rotation_flag_is_honoured(corners, folder, counterclockwise, expected):
    turned = folder / f"turned{counterclockwise}.mp4"
    ffmpeg("-display_rotation", counterclockwise, "-i", corners, "-c", "copy", turned)
    frames = read_frames(turned, 2)
    sideways = counterclockwise != 180
    assert frames.info.rotation == 360 - counterclockwise
    assert (frames.info.width, frames.info.height) == ((32, 64) if sideways else (64, 32))
    for image in [*frames.images, next(iter_frames(turned))[2]]:
        assert image.shape == ((64, 32, 3) if sideways else (32, 64, 3))
        assert colours_at_corners(image) == expected
    ffmpeg("-i", turned, "-frames:v", 1, turned.with_suffix(".png"))  # ffmpeg's own idea of upright
    assert colours_at_corners(cv2.imread(str(turned.with_suffix(".png")))[..., ::-1]) == expected


@pytest.mark.parametrize(
    "name, options",
    [
        ("grey.mp4", ["-pix_fmt", "gray"]),
        ("ten_bits.mp4", ["-pix_fmt", "yuv420p10le"]),
        ("full_chroma.mp4", ["-pix_fmt", "yuv444p"]),
        ("alpha.mov", ["-c:v", "qtrle", "-pix_fmt", "argb"]),
        ("grey.mkv", ["-c:v", "ffv1", "-pix_fmt", "gray"]),
        ("alpha.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"]),
        ("hevc.mp4", ["-c:v", "libx265", "-x265-params", "log-level=none"]),
        ("mpeg4.avi", ["-c:v", "mpeg4"]),
        ("old.mpg", ["-c:v", "mpeg1video", "-r", 25]),
        pytest.param(
            "stream.ts",
            [],
            marks=pytest.mark.skipif(OLD_FFMPEG, reason="this ffmpeg dies at transport streams"),
        ),
        ("eight.mp4", ["-s", "8x8"]),
    ],
)
def test_any_pixel_format_gives_three_channels(folder, name, options):
    path = generate(folder / name, "testsrc=s=32x32:r=10:d=0.5", *options)
    frames = read_frames(path, 3)
    assert [(image.ndim, image.shape[2], image.dtype) for image in frames.images] == [(3, 3, np.uint8)] * 3
    assert np.all(np.diff(frames.times_s) > 0)


def test_variable_frame_rate_keeps_the_time_stamps(counter, folder):
    path = folder / "variable.mp4"
    ffmpeg("-i", counter, "-vf", "select='lt(n,6)+eq(n,12)+eq(n,23)'", "-fps_mode", "vfr", "-bf", 0, path)
    frames = read_frames(path, 8)
    np.testing.assert_allclose(frames.times_s, np.array([0, 1, 2, 3, 4, 5, 12, 23]) / 12, atol=2e-3)


@pytest.mark.parametrize(
    "name, options",
    [
        ("fields.mp4", ["-flags", "+ildct+ilme", "-x264opts", "tff=1"]),
        ("fields.avi", ["-s", "720x576", "-c:v", "dvvideo", "-flags", "+ildct"]),
        # no key frames where the noise looks like a cut: ffmpeg's muxer stamps the frame after one a step too
        # late
        (
            "fields.mpg",
            ["-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-q:v", 2, "-sc_threshold", 1_000_000_000],
        ),
        ("av1.mp4", ["-c:v", "libaom-av1", "-cpu-used", 8, "-crf", 40]),
    ],
)
def test_what_opencv_cannot_show_is_read_through_a_copy(folder, name, options):
    path = generate(folder / name, f"nullsrc=s=64x48:r=25:d=0.96,format=yuv420p,{COUNTER}", *options)
    frames = read_frames(path, 6)
    assert [index_of(image) for image in frames.images] == [2, 6, 10, 14, 18, 22]
    np.testing.assert_allclose(np.diff(frames.times_s), 4 / 25, atol=2e-3)
    assert frames.info.frame_count == 24


# --- damage -------------------------------------------------------------------------------------------------


def test_truncated_clip_is_read_from_what_decodes(counter, folder):
    cut = folder / "truncated.mp4"
    whole = counter.read_bytes()
    cut.write_bytes(whole[: len(whole) - (len(whole) - whole.index(b"mdat")) // 2])
    frames = read_frames(cut, 4)
    decoded = frames.info.frame_count
    assert 8 <= decoded <= 16 and len(frames.images) == 4
    assert [index_of(image) for image in frames.images] == evenly_spread(decoded, 4)
    assert frames.warnings == [f"truncated.mp4: {decoded} frames decode of the 24 in its header"]


@pytest.mark.parametrize("claimed", [0, 3, 1000])
def test_header_that_lies_about_the_number_of_frames(counter, folder, claimed):
    path = folder / f"claims{claimed}.avi"
    ffmpeg("-i", counter, "-c:v", "mjpeg", "-q:v", 1, path)
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32  # AVISTREAMHEADER.dwLength
    content[length : length + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    frames = read_frames(path, 6)
    assert [index_of(image) for image in frames.images] == [2, 6, 10, 14, 18, 22]
    assert frames.info.frame_count == 24 and frames.info.duration_s == pytest.approx(2.0)
    if claimed and probe(path).frame_count == claimed:
        assert frames.warnings == [f"{path.name}: 24 frames decode of the {claimed} in its header"]


@pytest.mark.skipif(os.name != "posix", reason="stands a shell script in for ffmpeg")
@pytest.mark.parametrize(
    "does, reason",
    [("kill -SEGV $$", "ffmpeg crashed (signal 11)"), ("exec sleep 60", "ffmpeg did not finish in 1 s")],
)
def test_ffmpeg_that_crashes_or_hangs_is_a_reason(counter, tmp_path, monkeypatch, does, reason):
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\n{does}\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr("moviepy.config.FFMPEG_BINARY", str(tmp_path / "ffmpeg"))
    monkeypatch.setattr(files, "LIMIT_S", 1.0)
    assert unreadable_by(lambda: files.run_ffmpeg(counter)) == reason


def unreadable_by(read) -> str:
    with pytest.raises(UnreadableClip) as caught:
        read()
    return caught.value.reason


def test_damage_in_the_middle_is_survived(counter, folder):
    content = bytearray(counter.read_bytes())
    start = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[start : start + 60] = bytes(60)
    path = folder / "scratched.mp4"
    path.write_bytes(content)
    assert len(read_frames(path, 10).images) == 10


def unreadable(path: Path) -> str:
    with pytest.raises(UnreadableClip) as caught:
        read_frames(path)
    with pytest.raises(UnreadableClip):
        next(iter_frames(path))
    assert caught.value.path == path and str(path) in str(caught.value)
    return caught.value.reason


def test_what_is_no_clip_says_why(counter, folder):
    cases = {
        "empty.mp4": (b"", "empty file"),
        "text.mp4": (b"Dear reader, this is not a film.", "not a video: expected one of"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "not a video: expected one of"),
        "headless.mp4": (counter.read_bytes()[:600], "cut before its index"),
    }
    for name, (content, reason) in cases.items():
        (folder / name).write_bytes(content)
        assert unreadable(folder / name).startswith(reason)
    assert unreadable(folder / "missing.mp4") == "no such file"
    assert unreadable(folder) == "not a regular file"


def test_index_at_the_end_that_was_cut_off(corners, folder):
    content = corners.read_bytes()  # written without faststart: the index is the last box
    path = folder / "no_index.mp4"
    path.write_bytes(content[: content.index(b"moov") - 4])
    assert unreadable(path).startswith("cut before its index")


def test_sound_alone_is_no_clip(folder):
    path = folder / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.3", path)
    assert unreadable(path) == "not a video: an MP4 file without a picture track that decodes"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing")
def test_named_pipe_does_not_block(folder):
    os.mkfifo(folder / "pipe.mp4")
    assert unreadable(folder / "pipe.mp4") == "not a regular file"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets any byte stand in a name")
def test_name_that_is_not_utf8(counter, folder):
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4"))
    path.write_bytes(counter.read_bytes())
    assert unreadable(path) == "its name is not valid UTF-8"


@pytest.mark.parametrize("name", ["a b'\"c.mp4", "영상 😀.mp4", "%03d.mp4", "concat:x|y.mp4", "-i.mp4", "x"])
def test_odd_names_are_read(counter, folder, name, monkeypatch):
    (folder / name).write_bytes(counter.read_bytes())
    assert len(read_frames(folder / name, 2).images) == 2
    monkeypatch.chdir(folder)
    assert probe(name).frame_count == 24


def test_symbolic_link_is_followed(counter, folder):
    (folder / "link.mp4").symlink_to(counter)
    assert probe(folder / "link.mp4").frame_count == 24


@pytest.mark.parametrize("where", ["absolute", "relative"])
@pytest.mark.parametrize("kind", ["m3u8", "ffconcat", "ffconcat behind a space"])
def test_playlist_named_mp4_is_refused(counter, folder, kind, where):
    target = counter if where == "absolute" else counter.name
    text = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {target}\n",
        "ffconcat behind a space": f" \nffconcat version 1.0\nfile {target}\n",
    }[kind]
    path = folder / f"{kind}_{where}.mp4"
    path.write_text(text)
    assert unreadable(path).startswith("not a video")


def test_whitelist_stands_even_if_the_environment_says_otherwise(counter, folder, monkeypatch):
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "safe;0")
    path = folder / "script.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {counter.name}\n")
    assert unreadable(path) == "not a video: a playlist, which might open other files"


def test_exception_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableClip("clip.mp4", "empty file")))
    assert (str(error), error.path, error.reason) == ("clip.mp4: empty file", Path("clip.mp4"), "empty file")


def test_time_stamps_that_stand_still_are_replaced(counter, monkeypatch):
    class Capture:
        stamps = iter([0.0, 0.0, 50.0, float("nan"), 10.0, -1.0])

        def grab(self):
            self.stamp = next(self.stamps, None)
            return self.stamp is not None

        def get(self, _):
            return self.stamp

    times = [time_s for _, time_s in video._grab(Capture(), fps=100.0)]
    np.testing.assert_allclose(times, [0, 0.01, 0.05, 0.06, 0.07, 0.08])


def test_nothing_is_printed_for_a_broken_clip(folder):
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    script = (
        "from kaggle_utils.media.video import probe, UnreadableClip\nimport sys\n"
        "try: probe(sys.argv[1])\nexcept UnreadableClip as error: print(error.reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder / "broken.mp4"], capture_output=True, text=True
    )
    assert (done.stdout.startswith("cut before its index"), done.stderr) == (True, "")


def test_real_clips(real_clips):
    for path in sorted(real_clips.glob("*.mp4")):
        frames = read_frames(path, 10)
        assert frames.info.frame_count == 300 and (frames.info.width, frames.info.height) == (1920, 1080)
        np.testing.assert_allclose(frames.times_s, (np.arange(10) * 30 + 15) * 1001 / 30000, atol=2e-3)
