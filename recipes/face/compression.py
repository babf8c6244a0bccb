"""JPEG compression in ``keras.ops``, for use inside the jitted train step."""

import numpy as np
from keras import ops

LUMINANCE_TABLE = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
], "float32")
CHROMINANCE_TABLE = np.full((8, 8), 99, "float32")
TO_YCBCR = np.array([
    [0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312],
], "float32")


# --- compression --------------------------------------------------------------------------------------------
def _dct_matrix() -> np.ndarray:
    frequency, position = np.arange(8)[:, None], np.arange(8)[None]
    matrix = np.cos((2 * position + 1) * frequency * np.pi / 16) / 2
    matrix[0] /= 2**0.5
    return matrix.astype("float32")


def _quantise(planes, table):
    """Round the 8 × 8 DCT coefficients of ``planes`` (N, S, S, C) to multiples of ``table`` (N, 8, 8)."""
    size, channels = planes.shape[1], planes.shape[-1]
    dct, table = _dct_matrix(), table[:, None]
    blocks = ops.reshape(planes, (-1, size // 8, 8, size // 8, 8, channels))
    blocks = ops.reshape(ops.transpose(blocks, (0, 1, 3, 5, 2, 4)), (-1, (size // 8) ** 2 * channels, 8, 8))
    coefficients = ops.round(ops.matmul(ops.matmul(dct, blocks), dct.T) / table) * table
    blocks = ops.reshape(ops.matmul(ops.matmul(dct.T, coefficients), dct),
                         (-1, size // 8, size // 8, channels, 8, 8))
    return ops.reshape(ops.transpose(blocks, (0, 1, 4, 2, 5, 3)), (-1, size, size, channels))


def _doubled(planes):
    """Upsample planes by two, as libjpeg does for chroma: 3/4 the nearest and 1/4 the next pixel."""
    for axis in (1, 2):
        count = planes.shape[axis]
        places = np.arange(count)
        before, after = (ops.take(planes, np.clip(places + step, 0, count - 1), axis=axis)
                         for step in (-1, 1))
        pair = ops.stack([0.75 * planes + 0.25 * before, 0.75 * planes + 0.25 * after], axis=axis + 1)
        sides = [side * (1 + (number == axis)) for number, side in enumerate(planes.shape[1:], 1)]
        planes = ops.reshape(pair, (-1, *sides))
    return planes


def jpeg(images, quality):
    """Compress and decompress ``images`` as JPEG of ``quality`` (N, 1, 1, 1; 1–100), 4:2:0, standard tables.

    Follows ITU-T T.81 without its lossless entropy coding; the side must be a multiple of 16.
    """
    size = images.shape[1]
    quality = ops.reshape(quality, (-1, 1, 1))
    scale = ops.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    luminance, chrominance = (
        ops.clip(ops.floor((table[None] * scale + 50) / 100), 1.0, 255.0)
        for table in (LUMINANCE_TABLE, CHROMINANCE_TABLE)
    )
    planes = ops.matmul(images, TO_YCBCR.T)
    luma = _quantise(planes[..., :1] - 128, luminance) + 128
    half = ops.reshape(planes[..., 1:], (-1, size // 2, 2, size // 2, 2, 2))
    chroma = _doubled(_quantise(ops.mean(half, axis=(2, 4)), chrominance))
    planes = ops.concatenate([luma, chroma], axis=-1)
    return ops.clip(ops.matmul(planes, np.linalg.inv(TO_YCBCR).T.astype("float32")), 0.0, 255.0)
