"""Contestants in the project's environment: ``python project.py {reference,full,extraction,chain}``."""

import sys
from pathlib import Path

import contest
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaggle_utils.extraction import extract
from kaggle_utils.face import detection, framing
from kaggle_utils.media import video


class PackageFinder:
    """MTCNN as its package offers it, picture after picture at full size."""

    def __init__(self):
        from mtcnn import MTCNN

        self.mtcnn = MTCNN()

    def __call__(self, frames: list[np.ndarray]) -> list[list[detection.Detection]]:
        found = [self.mtcnn.detect_faces(frame, fit_to_image=False, output_type="numpy") for frame in frames]
        return [
            [detection.Detection(row[1:5], float(row[5]), row[6:].reshape(2, 5).T) for row in rows]
            for rows in found
        ]


def sampled_voice(path: str) -> np.ndarray:
    """The study's sound: 30,000 samples at 8 kHz, taken from moviepy one by one."""
    from moviepy.audio.io.AudioFileClip import AudioFileClip

    with AudioFileClip(path) as sound:
        return np.array(
            [
                sound.get_frame(n / sound.REFERENCE_RATE)[0]
                for n in range(min(sound.REFERENCE_SAMPLES, int(sound.duration * sound.REFERENCE_RATE)))
            ]
        )


def reference():
    """The study's extraction: frames one by one, full-size MTCNN on BGR, the voice sample by sample."""
    finder = PackageFinder()

    def work(path: str, stopwatch: contest.Stopwatch) -> None:
        with stopwatch("faces"):
            framing.reference_faces(path, finder)
        with stopwatch("voice"):
            sampled_voice(path)

    return work


def full():
    """MTCNN at full size on the ten frames that all others look at."""
    finder = PackageFinder()

    def work(path: str, stopwatch: contest.Stopwatch) -> list:
        with stopwatch("decode"):
            frames = video.read_frames(path).images
        with stopwatch("detect"):
            found = finder(frames)
        return boxes(found)

    return work


def extraction():
    """Ours: frames, faces and, beside them, the voice; what is not detection counts as decoding."""
    finder = detection.FaceFinder()

    def work(path: str, stopwatch: contest.Stopwatch) -> list:
        found = []

        def find(frames: list[np.ndarray]) -> list[list[detection.Detection]]:
            with stopwatch("detect"):
                found.extend(finder(frames))
            return found

        with stopwatch("decode"):
            extract(path, find)
        stopwatch.seconds["decode"] -= stopwatch.seconds["detect"]
        return boxes(found)

    return work


def chain():
    """Ours: a clip to its verdict."""
    from kaggle_utils import Detector

    detector = Detector.load()

    def work(path: str, _: contest.Stopwatch) -> None:
        detector.predict(path)

    return work


def boxes(found: list[list[detection.Detection]]) -> list[list[list[float]]]:
    """Of each frame, x, y, width, height and confidence of its faces."""
    return [[[*face.box.tolist(), face.confidence] for face in frame] for frame in found]


if __name__ == "__main__":
    contest.serve(
        {"reference": reference, "full": full, "extraction": extraction, "chain": chain}[sys.argv[1]]()
    )
