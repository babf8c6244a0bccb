"""The 81 facial landmarks: their mean positions in a crop, and masks drawn from landmarks."""

import cv2
import numpy as np

JAW, BROWS, NOSE_BRIDGE, MOUTH = range(17), range(17, 27), range(27, 31), range(48, 68)
MASK_SHAPES = {
    "parts": ((*JAW, *MOUTH), (*NOSE_BRIDGE, 33), (*BROWS, 0, 16)),
    "components": (
        (*range(9), 17), (*range(8, 17), 26), (17, 18, 19, 8), (24, 25, 26, 8), (*range(19, 25), 8),
        (*range(17, 22), 27, *range(31, 36), 8), (*range(22, 27), 27, *range(31, 36), 8), (*range(27, 36),),
    ),
    "hull": (tuple(range(81)),),
    "hull_without_forehead": (tuple(range(68)),),
    "mouth": ((*range(3, 14), 33, *MOUTH),),
}

# Mean over the training crops with a face (224 px, tight): x, y of the 68 usual points, then the forehead.
MEAN_LANDMARKS = np.array([
    18, 54, 19, 94, 20, 114, 29, 157, 38, 174, 48, 187, 71, 205, 97, 217, 114, 218, 132, 217, 158, 205,
    181, 187, 191, 174, 200, 157, 209, 113, 210, 94, 209, 54, 28, 41, 42, 35, 55, 30, 72, 30, 92, 32,
    134, 32, 154, 29, 171, 29, 184, 34, 199, 41, 113, 58, 113, 79, 113, 97, 113, 108, 95, 123, 103, 128,
    113, 127, 124, 128, 132, 123, 49, 67, 59, 62, 74, 61, 89, 69, 76, 72, 61, 72, 138, 68, 152, 61, 167, 62,
    177, 67, 166, 72, 151, 72, 78, 161, 92, 150, 103, 146, 114, 147, 124, 146, 135, 149, 150, 161, 135, 173,
    125, 176, 114, 177, 103, 176, 93, 173, 83, 160, 106, 157, 114, 157, 122, 157, 145, 160, 123, 163,
    114, 163, 105, 163, 22, 37, 30, 21, 43, 8, 64, -1, 86, -4, 113, -5, 139, -5, 162, -1, 183, 8, 196, 21,
    205, 37, 18, 54, 209, 54,
], "float32").reshape(81, 2)
MEAN_SIDE = 224


def mean_landmarks(size: int) -> np.ndarray:
    """Mean positions of the 81 landmarks in a tight crop of ``size`` pixels, float32 (81, 2)."""
    return MEAN_LANDMARKS * np.float32(size / MEAN_SIDE)


def face_mask(points: np.ndarray, shape: str, size: int) -> np.ndarray:
    """Draw the convex parts of a face that a forgery would replace, uint8 (size, size), 0 or 255.

    Args:
        points: landmarks (81, 2) in pixels: the usual 68, then 13 of the forehead; may be outside the crop.
        shape: a key of ``MASK_SHAPES``, or ``"raised_components"``: ``"components"`` with the brows raised by
            half their distance to the eyes.
    """
    points = np.asarray(points, np.float64).copy()
    if shape == "raised_components":
        points[17:22, 1] -= (points[36:42, 1].min() - points[17:22, 1].mean()) / 2
        points[22:27, 1] -= (points[42:48, 1].min() - points[22:27, 1].mean()) / 2
        shape = "components"
    mask = np.zeros((size, size), np.uint8)
    for part in MASK_SHAPES[shape]:
        hull = cv2.convexHull(np.rint(points[list(part)]).astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 255)
    return mask
