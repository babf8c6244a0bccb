"""Augment face crops and make self-blended fakes, with ``keras.ops``, inside the compiled training step.

Images are float32 RGB (N, S, S, 3) in 0–255, masks float32 (N, S, S, 1) in 0–1, and landmarks (N, 81, 2) in
pixels (x, y). Blur and down-scaling are linear along the rows and columns of an image. Each is a product with
one S × S matrix per image, and therefore each image of a batch can have its own strength.

Self-blended images follow Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images" (CVPR 2022):
a fake is a real face blended with a slightly altered copy of itself. The host draws the masks
(:func:`landmarks.face_mask`).
"""

import keras
import numpy as np
from keras import ops

from .compression import CHROMINANCE_TABLE, jpeg

BLEND_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
CHROMINANCE_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


class Draws:
    """Random numbers for a batch: one per image, of shape (N, 1, 1, 1), to multiply with images."""

    def __init__(self, count, seed: keras.random.SeedGenerator):
        self.count, self.seed = count, seed

    def uniform(self, low: float, high: float, channels: int = 1):
        return keras.random.uniform((self.count, 1, 1, channels), low, high, dtype="float32", seed=self.seed)

    def chance(self, probability: float):
        """1.0 with ``probability``, else 0.0."""
        return ops.cast(self.uniform(0, 1) < probability, "float32")

    def choice(self, values):
        index = keras.random.randint((self.count, 1, 1, 1), 0, len(values), seed=self.seed)
        return ops.take(ops.convert_to_tensor(values, "float32"), index)

    def normal(self, size: int, channels: int):
        return keras.random.normal((self.count, size, size, channels), dtype="float32", seed=self.seed)


# --- sampling -----------------------------------------------------------------------------------------------
def pixel_grid(size: int):
    """Pixel centres as two (1, size, size, 1) grids, x then y."""
    steps = ops.arange(size, dtype="float32")
    x, y = ops.meshgrid(steps, steps)
    return x[None, :, :, None], y[None, :, :, None]


def affine_grid(size: int, out_size: int, angle=0.0, zoom=1.0, shift_x=0.0, shift_y=0.0, flip=0.0):
    """Input coordinates of each output pixel, for rotation and zoom about the centre.

    Args:
        size, out_size: sides of input and output in pixels.
        angle: radians. zoom: above 1 enlarges the face. shift_x, shift_y: fraction of the side.
        flip: 1.0 mirrors left and right. These five broadcast to (N, 1, 1, 1).

    Returns:
        x and y, each (N, out_size, out_size, 1), in input pixels.
    """
    x, y = pixel_grid(out_size)
    centre = (out_size - 1) / 2
    scale = size / out_size / zoom
    x, y = (x - centre) * scale * (1 - 2 * flip), (y - centre) * scale
    cos, sin = ops.cos(angle), ops.sin(angle)
    middle = (size - 1) / 2
    return cos * x - sin * y + middle + shift_x * size, sin * x + cos * y + middle + shift_y * size


def sample(images, x, y):
    """Sample ``images`` (N, S, S, C) bilinearly at pixels ``x``, ``y`` (N, T, T, 1); repeat the border."""
    count, size, channels = ops.shape(images)[0], images.shape[1], images.shape[-1]
    x, y = ops.clip(x, 0.0, size - 1.0), ops.clip(y, 0.0, size - 1.0)
    left, top = ops.floor(x), ops.floor(y)
    right_share, bottom_share = x - left, y - top
    left, top = ops.cast(left, "int32"), ops.cast(top, "int32")
    right, bottom = ops.minimum(left + 1, size - 1), ops.minimum(top + 1, size - 1)
    flat = ops.reshape(images, (-1, channels))
    first = ops.reshape(ops.arange(count, dtype="int32") * (size * size), (-1, 1, 1, 1))

    def at(row, column):
        return ops.take(flat, (first + row * size + column)[..., 0], axis=0)

    above = at(top, left) * (1 - right_share) + at(top, right) * right_share
    below = at(bottom, left) * (1 - right_share) + at(bottom, right) * right_share
    return above * (1 - bottom_share) + below * bottom_share


# --- linear operations along rows and columns ---------------------------------------------------------------
def _distance(size: int):
    steps = ops.arange(size, dtype="float32")
    return ops.abs(steps[None, :, None] - steps[None, None, :])


def _normalised(matrix):
    return matrix / ops.sum(matrix, axis=-1, keepdims=True)


def gaussian_matrix(size: int, sigma, radius):
    """Gaussian blur as matrices (N, size, size).

    The kernel has 2 · ``radius`` + 1 pixels. ``sigma`` and ``radius`` are (N, 1, 1, 1) or (N, 1, 1).
    """
    sigma, radius = ops.reshape(sigma, (-1, 1, 1)), ops.reshape(radius, (-1, 1, 1))
    distance = _distance(size)
    return _normalised(ops.exp(-0.5 * ops.square(distance / sigma)) * ops.cast(distance <= radius, "float32"))


def rescaling_matrix(size: int, factor):
    """Down-scaling by ``factor`` >= 1 (triangle filter), then linear up-scaling: matrices (N, size, size)."""
    factor = ops.reshape(factor, (-1, 1, 1))
    small = ops.arange(size, dtype="float32")[None, :, None] + 0.5
    full = ops.arange(size, dtype="float32")[None, None, :] + 0.5
    kept = ops.cast(small * factor < size, "float32")  # rows beyond the small image are zero
    down = ops.relu(1 - ops.abs(small * factor - full) / factor) * kept
    down = down / ops.maximum(ops.sum(down, axis=-1, keepdims=True), 1e-6)
    up = ops.relu(1 - ops.abs(full / factor - small)) * kept
    up = ops.transpose(up, (0, 2, 1))
    return ops.matmul(up / ops.maximum(ops.sum(up, axis=-1, keepdims=True), 1e-6), down)


def along_rows_and_columns(images, matrix):
    """Apply ``matrix`` (N or 1, S, S) to the columns and the rows of ``images`` (N, S, S, C)."""
    size, channels = images.shape[1], images.shape[-1]
    images = ops.matmul(matrix, ops.reshape(images, (-1, size, size * channels)))
    images = ops.reshape(images, (-1, size, size, channels))
    images = ops.reshape(ops.transpose(images, (0, 2, 1, 3)), (-1, size, size * channels))
    images = ops.reshape(ops.matmul(matrix, images), (-1, size, size, channels))
    return ops.transpose(images, (0, 2, 1, 3))


# --- self-blended images ------------------------------------------------------------------------------------
def erode(mask, radius):
    """Keep the pixels whose whole (2 · radius + 1)² neighbourhood is full.

    These pixels stay at 1 when a **float** mask is blurred. On a uint8 mask, the blur rounds back to 0 and 1
    and erodes nothing.

    Args:
        mask: (N, S, S, 1), 0–1; a pixel is full from 0.999.
        radius: (N, 1, 1, 1).

    Returns:
        0.0 or 1.0, (N, S, S, 1).
    """
    distance = _distance(mask.shape[1])
    box = ops.cast(distance <= ops.reshape(radius, (-1, 1, 1)), "float32")
    empty = ops.cast(mask < 0.999, "float32")
    return ops.cast(along_rows_and_columns(empty, box) < 0.5, "float32")


def soften(mask, first_radius, second_radius, sigma):
    """Erode with the first radius, blur with the second, and scale the maximum back to 1 (float masks)."""
    core = erode(mask, first_radius)
    soft = along_rows_and_columns(core, gaussian_matrix(mask.shape[1], sigma, second_radius))
    return soft / ops.maximum(ops.max(soft, axis=(1, 2, 3), keepdims=True), 1e-3)


def inner_window(size: int, untouched: float, ramp):
    """A window that is 0 near the edges and 1 inside.

    It is 0 over the outer fraction ``untouched`` of the side and rises to 1 over the next fraction ``ramp``
    (N, 1, 1, 1).
    """
    steps = (ops.arange(size, dtype="float32") + 0.5) / size
    edge = ops.minimum(steps, 1 - steps)
    x, y = edge[None, None, :, None], edge[None, :, None, None]
    rise_x, rise_y = (ops.clip((side - untouched) / ramp, 0.0, 1.0) for side in (x, y))
    return rise_x * rise_y


def colour_shift(images, draw: Draws, strength: float = 1.0):
    """The source transform: RGB shift (in 30 %), brightness and contrast, then down-scaling or sharpening."""
    size = images.shape[1]
    images = images + draw.chance(0.3) * draw.uniform(-20 * strength, 20 * strength, channels=3)
    mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
    images = (images - mean) * draw.uniform(1 - 0.1 * strength, 1 + 0.1 * strength) + mean
    images = images + draw.uniform(-25.5 * strength, 25.5 * strength)
    coarse = along_rows_and_columns(images, rescaling_matrix(size, draw.choice((2.0, 4.0))))
    one = ops.ones((1, 1, 1))
    smooth = along_rows_and_columns(images, gaussian_matrix(size, one, 2 * one))
    rescaled = draw.chance(0.5)
    sharper = images + draw.uniform(0.4, 1.5) * (images - smooth)
    return ops.clip(rescaled * coarse + (1 - rescaled) * sharper, 0.0, 255.0)


def resynthesised(crops, draw: Draws):
    """The source transform of a forgery without a blending edge: the face is deformed slightly, in place.

    Reenactment and neural textures keep the position and the colour of a face. They leave a smooth local
    displacement (up to about 3 % of the side) and lose some detail.
    """
    size, one = crops.shape[1], ops.ones((1, 1, 1))
    x, y = pixel_grid(size)
    field = along_rows_and_columns(draw.normal(size, 2), gaussian_matrix(size, 14 * one, 42 * one))
    field = field * (size * 0.5 * draw.uniform(0, 1))  # the blur leaves a deviation of about 0.02
    moved = sample(crops, x + field[..., :1], y + field[..., 1:])
    return along_rows_and_columns(moved, rescaling_matrix(size, draw.uniform(1.2, 3.0)))


def self_blend(crops, masks, draw: Draws, untouched: float = 0.06, warp: float = 1.0,
               in_place: float = 0.0) -> dict:
    """Blend each face with an altered copy of itself inside its mask.

    Args:
        crops: (N, S, S, 3), 0–255, real faces.
        masks: (N, S, S, 1), 0–1, from :func:`landmarks.face_mask`. An empty mask leaves the crop unchanged.
        draw: random numbers for the batch.
        untouched: fraction of the side that stays unchanged at each edge.
        warp: scales the misalignment of source and target (translation, scale).
        in_place: fraction of the sources that keep position and colour and are only :func:`resynthesised`.

    Returns:
        ``real`` (the target), ``source``, ``mask`` (as blended, 0–1) and ``fake``, in the shapes of the
        arguments.
    """
    size = crops.shape[1]
    shifted = colour_shift(crops, draw)
    on_source = draw.chance(0.5)
    used = ops.max(masks, axis=(1, 2, 3), keepdims=True)
    target = crops + (1 - on_source) * used * (shifted - crops)
    source = crops + on_source * (shifted - crops)
    moved = {
        "zoom": draw.uniform(1 - 0.05 * warp, 1 + 0.05 * warp),
        "shift_x": draw.uniform(-0.03 * warp, 0.03 * warp),
        "shift_y": draw.uniform(-0.015 * warp, 0.015 * warp),
    }
    x, y = affine_grid(size, size, **moved)
    source = sample(source, x, y)
    if in_place:
        stays = used * draw.chance(in_place)
        source = source + stays * (resynthesised(crops, draw) - source)
        target = target + stays * (crops - target)
    one = ops.ones((1, 1, 1))
    field = along_rows_and_columns(draw.normal(size, 2), gaussian_matrix(size, 7 * one, 21 * one))
    field = field * (50 / 3**0.5)  # α 50, σ 7, of noise uniform in ±1
    mask = sample(masks, x + field[..., :1], y + field[..., 1:])
    radii = tuple(range(2, 13))
    mask = soften(mask, draw.choice(radii), draw.choice(radii), draw.uniform(5, 45))
    mask = mask * inner_window(size, untouched, draw.uniform(0.04, 0.15)) * draw.choice(BLEND_RATIOS)
    return {"real": target, "source": source, "mask": mask, "fake": mask * source + (1 - mask) * target}


# --- cut-out ------------------------------------------------------------------------------------------------
def part_cutout(images, points, draw: Draws, probability: float):
    """Black out the eyes, the nose or the mouth with a bar along the part, scaled by its length.

    Follows the face cut-out of the winner of the Deepfake Detection Challenge (S. Seferbekov, 2020).

    Args:
        images: (N, S, S, 3). points: landmarks (N, 81, 2), pixels.
    """
    ends = ops.stack([
        ops.stack([ops.mean(points[:, 36:42], axis=1), ops.mean(points[:, 42:48], axis=1)], axis=1),
        ops.stack([points[:, 27], points[:, 33]], axis=1),
        ops.stack([points[:, 48], points[:, 54]], axis=1),
    ], axis=1)  # (N, part, end, xy)
    part = ops.reshape(draw.choice((0.0, 0.0, 1.0, 2.0)), (-1, 1))
    chosen = ops.cast(ops.equal(part, ops.arange(3, dtype="float32")[None]), "float32")
    ends = ops.sum(ends * chosen[:, :, None, None], axis=1)
    start, line = ends[:, 0][:, None, None], (ends[:, 1] - ends[:, 0])[:, None, None]
    pixels = ops.concatenate(pixel_grid(images.shape[1]), axis=-1)
    length = ops.maximum(ops.sum(ops.square(line), axis=-1, keepdims=True), 1.0)
    along = ops.clip(ops.sum((pixels - start) * line, axis=-1, keepdims=True) / length, 0.0, 1.0)
    away = ops.sum(ops.square(pixels - start - along * line), axis=-1, keepdims=True)
    inside = ops.cast(away < length * ops.square(draw.uniform(0.25, 0.4)), "float32")
    return images * (1 - inside * draw.chance(probability))


def rectangle_cutout(images, draw: Draws, probability: float):
    """Black out a rectangle of 10–40 % of each side at a random position."""
    x, y = (grid / images.shape[1] for grid in pixel_grid(images.shape[1]))
    inside_x = ops.abs(x - draw.uniform(0, 1)) < draw.uniform(0.05, 0.2)
    inside_y = ops.abs(y - draw.uniform(0, 1)) < draw.uniform(0.05, 0.2)
    inside = ops.cast(ops.logical_and(inside_x, inside_y), "float32")
    return images * (1 - inside * draw.chance(probability))


@keras.saving.register_keras_serializable("kaggle_utils")
class FaceAugment(keras.layers.Layer):
    """Augment a batch in training. Outside training, only resize it to ``size``.

    Inputs: a dict of ``crop`` (N, S, S, 3) uint8, ``mask`` (N, S, S, 1) uint8 (0 or 255; empty: do not
    blend), ``points`` (N, 81, 2) in pixels, ``label`` (N, 1), 0–1, and ``width`` (N, 1), the side of the crop
    in multiples of the tight framing. Output: float32 (N, size, size, 3), 0–255, in the tight framing.

    Args:
        size: side of the output in pixels; a multiple of 16.
        zoom: largest factor by which a face grows or shrinks.
        shift: largest shift, as a fraction of the side. angle: largest rotation in degrees.
        cutout: probability of each kind of cut-out.
        quality: probability of a loss of quality (JPEG, blur or down-scaling).
        shifted_reals: fraction of the reals that get the colour shift of the self-blended fakes. Otherwise
            the shift alone would give a fake away.
        in_place: fraction of the self-blended fakes that are :func:`resynthesised` in place.
        with_masks: also return the blending masks: a dict of ``pixels`` (the output above) and ``mask``,
            float32 (N, size, size, 1), 0–1.
        seed: of the random numbers. enabled: False switches all augmentation off.
    """

    def __init__(self, size=224, zoom=1.15, shift=0.12, angle=10.0, cutout=0.15, quality=0.5,
                 shifted_reals=0.3, in_place=0.0, with_masks=False, seed=0, enabled=True, **options):
        super().__init__(**{"dtype": "float32", **options})
        self.settings = {"size": size, "zoom": zoom, "shift": shift, "angle": angle, "cutout": cutout,
                         "quality": quality, "shifted_reals": shifted_reals, "in_place": in_place,
                         "with_masks": with_masks, "seed": seed, "enabled": enabled}
        self.seeds = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        crops = ops.cast(inputs["crop"], "float32")
        size = self.settings["size"]
        if not (training and self.settings["enabled"]):
            pixels = crops if crops.shape[1] == size else ops.image.resize(crops, (size, size))
            if not self.settings["with_masks"]:
                return pixels
            return {"pixels": pixels, "mask": ops.zeros_like(pixels[..., :1])}
        draw = Draws(ops.shape(crops)[0], self.seeds)
        crops, masks = self.blended(crops, inputs, draw)
        crops = part_cutout(crops, ops.cast(inputs["points"], "float32"), draw, self.settings["cutout"])
        crops = rectangle_cutout(crops, draw, self.settings["cutout"])
        if not self.settings["with_masks"]:
            return self.degraded(self.moved(crops, inputs["width"], draw), draw)
        moved = self.moved(ops.concatenate([crops, masks], axis=-1), inputs["width"], draw)
        return {"pixels": self.degraded(moved[..., :3], draw), "mask": moved[..., 3:]}

    def blended(self, crops, inputs, draw):
        """Self-blend where there is a mask; shift the colour of some reals. Returns crops and masks."""
        masks = ops.cast(inputs["mask"], "float32") / 255
        blend = self_blend(crops, masks, draw, in_place=self.settings["in_place"])
        real = ops.cast(ops.reshape(inputs["label"], (-1, 1, 1, 1)) < 0.5, "float32")
        shifted = real * draw.chance(self.settings["shifted_reals"])
        return blend["fake"] + shifted * (colour_shift(crops, draw) - blend["fake"]), blend["mask"]

    def moved(self, images, width, draw):
        """Flip, rotate, zoom, shift, crop to the tight framing and resize, with one interpolation."""
        settings, width = self.settings, ops.reshape(ops.cast(width, "float32"), (-1, 1, 1, 1))
        angle, shift, zoom = np.radians(settings["angle"]), settings["shift"], np.log(settings["zoom"])
        return sample(images, *affine_grid(
            images.shape[1], settings["size"], flip=draw.chance(0.5), angle=draw.uniform(-angle, angle),
            zoom=width * ops.exp(draw.uniform(-zoom, zoom)),
            shift_x=draw.uniform(-shift, shift) / width, shift_y=draw.uniform(-shift, shift) / width,
        ))

    def degraded(self, crops, draw):
        """Change contrast and brightness of all crops; add noise, blur, down-scaling and JPEG to some."""
        mean = ops.mean(crops, axis=(1, 2, 3), keepdims=True)
        crops = (crops - mean) * draw.uniform(0.75, 1.25) + mean + draw.uniform(-25, 25)
        size, lossy = crops.shape[1], draw.chance(self.settings["quality"])
        blurred = draw.chance(0.5)
        sigma = 0.2 + lossy * blurred * draw.uniform(0, 1.8)
        factor = 1 + lossy * (1 - blurred) * draw.chance(0.6) * draw.uniform(0, 2)
        blur = gaussian_matrix(size, sigma, 6 * ops.ones_like(sigma))
        crops = along_rows_and_columns(crops, ops.matmul(blur, rescaling_matrix(size, factor)))
        crops = crops + draw.chance(0.3) * draw.uniform(0, 8) * draw.normal(size, 3)
        crops = ops.clip(crops, 0.0, 255.0)
        compressed = lossy * draw.chance(0.7)
        return crops + compressed * (jpeg(crops, draw.uniform(35, 95)) - crops)

    def compute_output_shape(self, input_shape):
        sides = (input_shape["crop"][0], self.settings["size"], self.settings["size"])
        return {"pixels": (*sides, 3), "mask": (*sides, 1)} if self.settings["with_masks"] else (*sides, 3)

    def get_config(self):
        return {**super().get_config(), **self.settings}
