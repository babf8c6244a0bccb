"""Pictures of a report page: a frame with boxes, thumbnails, heat maps, spectrograms; as data URLs."""

import base64
from collections.abc import Sequence

import cv2
import numpy as np

STILL = 640  # px, long side of the full frame
THUMB = 112  # px, side of a thumbnail in the strip


def boxed(picture: np.ndarray, boxes: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """A frame, uint8 RGB (H, W, 3), at most ``STILL`` pixels long, with a lettered box around each face.

    Args:
        boxes: a letter and x, y, width, height in pixels of the frame.
    """
    scale = min(1.0, STILL / max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for letter, box in boxes:
        x, y, width, height = (int(side) for side in (box * scale).round())
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 2)):
            cv2.rectangle(picture, (x, y), (x + width, y + height), colour, thickness, cv2.LINE_AA)
            place = max(x + 4, 4), max(y + 24, 24)
            cv2.putText(picture, letter, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, colour, thickness, cv2.LINE_AA)
    return picture


def thumb(crop: np.ndarray, side: int = THUMB) -> np.ndarray:
    """A crop, uint8 RGB (H, W, 3), at ``side`` × ``side`` pixels."""
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)


def grey(levels: np.ndarray) -> np.ndarray:
    """Levels in dB (bands, frames) as uint8 (bands, frames, 3), lowest band at the bottom, loud dark."""
    shade = 255 * np.clip(levels / -70, 0, 1)
    return np.repeat(shade[::-1, :, None], 3, axis=2).astype(np.uint8)


def warm(shares: np.ndarray) -> np.ndarray:
    """Values in 0..1 as a picture, from white over orange to dark red; the order survives grey print."""
    stops = np.array([[255, 255, 255], [253, 190, 130], [205, 70, 30], [90, 0, 20]])
    picture = [np.interp(shares[::-1], np.linspace(0, 1, len(stops)), channel) for channel in stops.T]
    return np.stack(picture, axis=-1).astype(np.uint8)


def jpeg(picture: np.ndarray, quality: int = 85) -> str:
    """A uint8 RGB picture as a data URL."""
    return _inline(picture, "jpeg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def png(picture: np.ndarray) -> str:
    """A uint8 RGB picture as a data URL, without loss."""
    return _inline(picture, "png", [])


def _inline(picture: np.ndarray, kind: str, options: list[int]) -> str:
    data = cv2.imencode(f".{kind}", np.ascontiguousarray(picture[..., ::-1]), options)[1]
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
