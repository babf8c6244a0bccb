"""Boxes, tracks and framings by arithmetic; the detector against the mtcnn package on a portrait."""

import os
from pathlib import Path

import numpy as np
import pytest

from kaggle_utils.face import framing
from kaggle_utils.face.detection import Detection, FaceFinder
from kaggle_utils.face.framing import REFERENCE, TIGHT, Track
from kaggle_utils.media import video

GREY = np.full((108, 192, 3), 128, np.uint8)


def face(x, y, side=40.0, confidence=0.99):
    """A square face around a centre, without landmarks of its own."""
    return Detection(np.array([x - side / 2, y - side / 2, side, side]), confidence, np.zeros((5, 2)))


class StubFinder:
    """Returns given faces, call after call, and keeps the frames that it was shown."""

    def __init__(self, *found):
        self.found, self.shown = list(found), []

    def __call__(self, frames):
        self.shown += list(frames)
        return [self.found.pop(0) if self.found else [] for _ in frames]


# Framings


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1080, 1920, (300, 0, 1320, 780)),
        (1920, 1080, (150, 0, 780, 1320)),
        (1080, 1080, (150, 0, 780, 480)),
        (540, 960, (150, 0, 660, 390)),
    ],
)
def test_fallback_follows_the_figure(height, width, expected):
    np.testing.assert_allclose(framing.fallback_box(height, width), expected)


def test_fallback_of_a_tiny_picture_is_not_empty():
    assert framing.cut(np.zeros((2, 3, 3), np.uint8), framing.fallback_box(2, 3)).shape == (256, 256, 3)


def test_tight_box_is_a_square_below_the_centre():
    np.testing.assert_allclose(framing.tight_box(np.array([100, 200, 80, 100])), (100, 220, 80, 80))


def test_reference_box_is_clipped_without_shortening():
    np.testing.assert_allclose(framing.reference_box(np.array([10, 100, 80, 90])), (0, 60, 160, 170))


def test_cut_repeats_the_border_and_keeps_a_square_square():
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, :50], image[50:, :, 1] = (200, 0, 0), 90
    crop = framing.cut(image, np.array([-100, -100, 200, 200]), size=200)
    assert (
        crop[:100, :150] == (200, 0, 0)
    ).all()  # everything left of and above the picture is its corner's colour
    assert (crop[160:, 160:] == (0, 90, 0)).all()
    assert (crop[110, 100:149, 0] == 200).all() and (crop[110, 151:, 0] == 0).all()


@pytest.mark.parametrize("side", [16, 256, 900])
def test_cut_keeps_plain_colour_at_any_scale(side):
    crop = framing.cut(np.full((1000, 1000, 3), 77, np.uint8), np.array([40.4, 3.3, side, side]))
    assert crop.dtype == np.uint8 and crop.shape == (256, 256, 3) and (crop == 77).all()


# Tracks


def test_two_persons_keep_their_tracks_whatever_the_order_of_the_detections():
    left, right = [face(100 + 5 * i, 100, 60) for i in range(5)], [face(220 - 5 * i, 100) for i in range(5)]
    tracks = framing.link_tracks(
        [[a, b] if i % 2 else [b, a] for i, (a, b) in enumerate(zip(left, right, strict=True))]
    )
    assert [track.id for track in tracks] == [0, 1]
    assert list(tracks[0].detections.values()) == left and list(tracks[1].detections.values()) == right


def test_most_persistent_times_largest_comes_first():
    frames = [[face(50, 50, 30), *([face(300, 100, 60)] if i < 2 else [])] for i in range(10)]
    assert len(framing.link_tracks(frames)[0].detections) == 10
    frames = [[face(50, 50, 30), *([face(300, 100, 60)] if i < 8 else [])] for i in range(10)]
    assert len(framing.link_tracks(frames)[0].detections) == 8


def test_a_person_missed_for_long_stays_one_person():
    (track,) = framing.link_tracks([[face(100, 100)], [], [], [], [face(120, 90)]])
    assert sorted(track.detections) == [0, 4]


def test_a_lone_person_may_walk_and_a_second_one_is_not_jumped_to():
    walk = [[face(60 * i + 50, 100)] for i in range(5)]
    assert len(framing.link_tracks(walk)) == 1
    jump = [[face(50, 100), face(110, 100)], [face(170, 100)], [face(170, 100)]]
    assert [sorted(track.detections) for track in framing.link_tracks(jump)] == [[1, 2], [0], [0]]


def test_a_face_of_another_size_is_another_person():
    assert len(framing.link_tracks([[face(100, 100, 40)], [face(100, 100, 90)]])) == 2


def test_spurious_faces_are_dropped():
    doubtful = face(400, 100, 200, confidence=0.85)
    tracks = framing.link_tracks([[face(100, 100)] + ([doubtful] if i == 3 else []) for i in range(10)])
    assert len(tracks) == 1 and tracks[0].detections[3].confidence == 0.99
    small = face(300, 20, 10, confidence=0.9)
    assert len(framing.link_tracks([[face(100, 100)] + ([small] if i > 7 else []) for i in range(10)])) == 1
    assert framing.link_tracks([[], [doubtful], []]) == []
    assert len(framing.link_tracks([[doubtful]])) == 1  # the only frame of a clip


def test_no_faces_no_tracks():
    assert framing.link_tracks([[], []]) == [] and framing.link_tracks([]) == []


def test_box_between_and_beyond_detections():
    track = Track(0, {3: face(100, 100), 5: face(120, 110)})
    box, source = track.box_at(4)
    np.testing.assert_allclose(box, (90, 85, 40, 40))
    assert source == "interpolated" and track.box_at(3)[1] == "detected"
    np.testing.assert_allclose(track.box_at(7)[0], (100, 90, 40, 40))
    assert track.box_at(1)[1] == "interpolated" and track.box_at(0) is None and track.box_at(8) is None


# Crops of a clip


def test_rows_tell_where_they_come_from():
    found = [[], [], [], [face(90, 50)], [], [face(94, 52)], [], [], [], []]
    (crops,) = framing.extract_faces([GREY] * 10, StubFinder(*found))
    assert crops.images.shape == (10, 256, 256, 3) and crops.images.dtype == np.uint8
    assert crops.sources == (
        ["fallback"]
        + ["interpolated"] * 2
        + ["detected", "interpolated", "detected"]
        + ["interpolated"] * 2
        + ["fallback"] * 2
    )
    np.testing.assert_allclose(crops.boxes[4], framing.tight_box(np.array([72, 31, 40, 40])))
    np.testing.assert_allclose(crops.boxes[0], framing.fallback_box(108, 192))
    assert crops.frame_indices.tolist() == list(range(10)) and crops.track == 0


def test_short_clips_repeat_frames():
    pictures = [np.full((108, 192, 3), value, np.uint8) for value in (10, 20, 30)]
    (crops,) = framing.extract_faces(pictures, StubFinder(*[[face(90, 50)]] * 3))
    assert crops.frame_indices.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [int(image[0, 0, 0]) for image in crops.images] == [10] * 3 + [20] * 4 + [30] * 3


def test_a_clip_without_a_face_is_all_fallback():
    (crops,) = framing.extract_faces([GREY], StubFinder())
    assert (
        crops.sources == ["fallback"] * 10 and crops.track == -1 and crops.images.shape == (10, 256, 256, 3)
    )


def test_each_person_has_crops_of_its_own():
    found = [[face(40, 50, 40), face(150, 50, 30)] for _ in range(10)]
    first, second = framing.extract_faces([GREY] * 10, StubFinder(*found), framing=REFERENCE)
    assert (first.track, second.track) == (0, 1)
    np.testing.assert_allclose(first.boxes[0], (0, 0, 120, 120))
    assert len(framing.extract_faces([GREY] * 10, StubFinder(*found), max_tracks=1)) == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"expected one of \['tight', 'reference'\], found 'wide'"):
        framing.extract_faces([GREY], StubFinder(), framing="wide")
    with pytest.raises(ValueError, match="expected at least one picture"):
        framing.extract_faces([], StubFinder())


# The study's extraction


@pytest.fixture
def clip(monkeypatch):
    """Stands for a clip of so many frames whose red channel is the frame's number."""

    def make(count):
        pictures = [
            np.zeros((108, 192, 3), np.uint8) + np.array([index, 0, 0], np.uint8) for index in range(count)
        ]
        frames = [(index, index / 30, picture) for index, picture in enumerate(pictures)]
        monkeypatch.setattr(video, "iter_frames", lambda path: iter(frames))
        return "clip.mp4"

    return make


def test_reference_tries_every_fourth_frame(clip):
    finder = StubFinder(*[[face(90, 50), face(10, 10)]] * 10)
    crops = framing.reference_faces(clip(100), finder)
    assert crops.frame_indices.tolist() == list(range(3, 43, 4)) and crops.sources == ["detected"] * 10
    np.testing.assert_allclose(crops.boxes[0], (30, 0, 120, 120))
    assert crops.images[:, 0, 0, 0].tolist() == list(range(3, 43, 4))  # RGB


@pytest.mark.parametrize(("colour", "channel"), [("BGR", 2), ("RGB", 0)])
def test_reference_shows_mtcnn_the_order_asked_for(clip, colour, channel):
    finder = StubFinder()
    framing.reference_faces(clip(60), finder, colour=colour)
    assert finder.shown[0][0, 0, channel] == 3


def test_reference_counts_failures_over_the_whole_clip(clip):
    finder = StubFinder([], [], [face(90, 50)], [], [face(90, 50)])
    crops = framing.reference_faces(clip(100), finder, rows=5, max_failures=3)
    # 3 and 4 fail, 5 is found; 9 fails, 10 is found; from 14 on every failure falls back at once
    assert crops.frame_indices.tolist() == [5, 10, 14, 18, 22]
    assert crops.sources == ["detected"] * 2 + ["fallback"] * 3


def test_reference_repeats_images_of_a_short_clip(clip):
    crops = framing.reference_faces(clip(9), StubFinder([face(90, 50)], [face(90, 50)]))
    assert crops.images.shape == (10, 256, 256, 3) and crops.frame_indices.tolist() == [3] * 5 + [7] * 5
    crops = framing.reference_faces(clip(2), StubFinder())
    assert crops.sources == ["fallback"] * 10 and crops.track == -1


# The detector itself


@pytest.fixture(scope="module")
def portrait():
    """The portrait that scikit-image carries, uint8 RGB (512, 512, 3)."""
    return pytest.importorskip("skimage.data").astronaut()


@pytest.fixture(scope="module")
def finder():
    pytest.importorskip("mtcnn")
    return FaceFinder()


def overlap(a, b):
    """Intersection over union of two boxes."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    common = np.prod(np.maximum(high - low, 0))
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_finder_returns_the_boxes_of_the_package(portrait):
    from mtcnn import MTCNN

    expected = MTCNN().detect_faces(portrait, fit_to_image=False, output_type="numpy")
    (found,) = FaceFinder(smallest=0)([portrait])
    assert len(found) == len(expected) == 1
    np.testing.assert_allclose(found[0].box, expected[0, 1:5], atol=0.01)
    np.testing.assert_allclose(found[0].landmarks.T.ravel(), expected[0, 6:], atol=0.01)
    assert found[0].confidence == pytest.approx(expected[0, 5], abs=1e-5)


def test_skipped_levels_do_not_change_a_large_face(portrait, finder):
    np.testing.assert_allclose(
        finder([portrait])[0][0].box, FaceFinder(smallest=0)([portrait])[0][0].box, atol=0.01
    )


def test_frames_of_several_sizes_keep_their_order(portrait, finder):
    moved = np.roll(portrait, 40, axis=1)
    found = finder([portrait, GREY, np.ascontiguousarray(portrait[:400, 60:460]), moved])
    assert [len(one) for one in found] == [1, 0, 1, 1]
    np.testing.assert_allclose(found[2][0].centre - found[0][0].centre, (-60, 0), atol=4)
    np.testing.assert_allclose(found[3][0].centre - found[0][0].centre, (40, 0), atol=4)


def test_boxes_are_in_source_pixels(portrait, finder):
    import cv2

    large = cv2.resize(portrait, (1536, 1536), interpolation=cv2.INTER_CUBIC)
    assert overlap(finder([large])[0][0].box / 3, finder([portrait])[0][0].box) > 0.85


@pytest.mark.parametrize("shape", [(360, 640, 3), (10, 10, 3), (1, 700, 3)])
def test_no_face_in_black_or_tiny_frames(finder, shape):
    assert finder([np.zeros(shape, np.uint8)]) == [[]]


@pytest.mark.parametrize(
    "frame", [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 3), np.float32), "clip.mp4"]
)
def test_only_rgb_pictures_are_searched(finder, frame):
    with pytest.raises(ValueError, match="expected a uint8 RGB picture"):
        finder([frame])


def test_stages_narrow_down_to_the_face(portrait, finder):
    stages = finder.stages(portrait)
    counts = [sum(map(len, stages.candidates)), len(stages.proposals), len(stages.refined), len(stages.faces)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert len(stages.pyramid) == len(stages.candidates)
    sides = [max(level.shape) for _, level in stages.pyramid]
    assert sides == sorted(sides, reverse=True) and all(
        level.dtype == np.uint8 for _, level in stages.pyramid
    )
    np.testing.assert_allclose(stages.faces[0].box, finder([portrait])[0][0].box, atol=0.01)


def test_the_face_is_found_again_in_a_crop(portrait, finder):
    box = finder([portrait])[0][0].box
    tight = framing.cut(portrait, framing.tight_box(box))
    wide = framing.cut(portrait, box + box[3] * np.array([-0.4, -0.3, 0.8, 0.6]))
    wide_again, black = framing.tight_from_crops(np.stack([wide, np.zeros_like(wide)]), finder)
    assert np.abs(wide_again.astype(float) - tight).mean() < 20
    assert not black.any() and black.shape == tight.shape


def test_a_crop_without_a_face_keeps_its_central_part():
    crops = np.zeros((2, 100, 120, 3), np.uint8)
    crops[:, 50 - 32 : 50 + 32, 60 - 32 : 60 + 32] = 255
    assert (framing.tight_from_crops(crops, StubFinder(), size=64)[:, 1:-1, 1:-1] == 255).all()


def test_tight_framing_lands_on_the_training_crop(real_clips, finder):
    """The DFDC training crop of this clip's first frame is a square of 268 px around (1107, 424)."""
    _, _, frame = next(video.iter_frames(real_clips / "hsbwhlolsn.mp4"))
    x, y, side, _ = framing.FRAMINGS[TIGHT](finder([frame])[0][0].box)
    np.testing.assert_allclose((x + side / 2, y + side / 2, side), (1107, 424, 268), atol=0.15 * 268)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads resident memory from /proc")
def test_memory_does_not_grow_from_clip_to_clip(miniature, finder):
    """A clip's ten frames are 7 MiB and more: if each of sixteen clips left its frames behind, 110 MiB would
    show.
    """

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    clips = sorted((miniature / "train_sample_videos").glob("*.mp4"))
    for path in clips:  # memory pools fill
        framing.extract_faces(video.read_frames(path).images, finder)
    before = resident()
    for path in 2 * clips:
        framing.extract_faces(video.read_frames(path).images, finder)
    assert resident() - before < 40
