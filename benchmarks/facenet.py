"""Contestant: MTCNN of facenet-pytorch, the ten frames in one batch: ``python facenet.py [LONG_SIDE]``."""

import sys

import contest
import cv2
import decoding
import numpy as np
import torch
from facenet_pytorch import MTCNN

finder, long_side = MTCNN(keep_all=True, device="cpu"), int(sys.argv[1]) if len(sys.argv) > 1 else None


@torch.no_grad()
def work(path: str, stopwatch: contest.Stopwatch) -> list:
    with stopwatch("decode"):
        pictures = decoding.read(path, stopwatch)
    with stopwatch("detect"):
        scale = min(1.0, long_side / max(pictures[0].shape)) if long_side else 1.0
        small = [
            cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            for picture in pictures
        ]
        found, _ = finder.detect([np.ascontiguousarray(picture[..., ::-1]) for picture in small])
    return [
        []
        if corners is None
        else [[x, y, right - x, bottom - y] for x, y, right, bottom in (corners / scale).tolist()]
        for corners in found
    ]


contest.serve(work)
