"""Reconstruction twins: real faces passed through small autoencoders, the counterpart of vocoded speech.

Face generators end in a decoder that builds pixels from a small grid of numbers. A twin shows only the traces
of such a decoder: person, light and pose are those of its original. Several designs (:data:`DESIGNS`) are
trained on real faces for a minute each. Face networks learn to tell the twins from their originals
(``feeding.FaceBatches``).

Images are uint8 or float32 RGB (N, S, S, 3) in 0–255.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import cv2
import keras
import numpy as np
from keras import layers, ops

from recipes.face.landmarks import face_mask
from recipes.loop import WarmupCosine, dtype_policy

SIDES = (128, 192, 256)  # pixels: a crop is rebuilt at one of these sizes, multiples of every design's stride
TRAINED_SIDE = 192
TWIN_SHAPES = ("whole", "whole", "hull", "hull_without_forehead", "mouth")  # parts of a face put back
CODES = 512  # size of the codebook of the quantised design


@dataclass(frozen=True)
class Design:
    """The design of an autoencoder.

    ``decoder``: up-sampling, ``nearest``, ``bilinear``, ``transposed`` or ``shuffle``. ``halvings``: number
    of down-sampling steps. ``latent``, ``width``: channels of the bottleneck and of the first block.
    ``bottleneck``: ``plain``, ``quantised`` (van den Oord et al. 2017) or ``variational`` (Kingma and Welling
    2014). ``adversary``: weight of a patch discriminator; 0: none.
    """

    decoder: str
    halvings: int
    latent: int
    width: int = 48
    bottleneck: str = "plain"
    adversary: float = 0.0


DESIGNS = {
    "nearest_8": Design("nearest", 3, 8, adversary=0.05),
    "transposed_8": Design("transposed", 3, 8),
    "shuffle_8": Design("shuffle", 3, 4, adversary=0.05),
    "bilinear_8": Design("bilinear", 3, 16),
    "nearest_4": Design("nearest", 2, 4, bottleneck="variational", adversary=0.02),
    "transposed_16": Design("transposed", 4, 16, adversary=0.05),
    "shuffle_16": Design("shuffle", 4, 16),
    "quantised_4": Design("nearest", 2, 8, bottleneck="quantised", adversary=0.02),
}


@keras.saving.register_keras_serializable("kaggle_utils")
class Quantised(layers.Layer):
    """Replace each cell by the nearest of ``codes`` vectors, with a straight-through gradient."""

    def __init__(self, codes: int = CODES, **kwargs):
        super().__init__(**kwargs)
        self.codes = codes

    def build(self, shape):
        initializer = keras.initializers.RandomNormal(stddev=0.5)
        self.book = self.add_weight(shape=(self.codes, shape[-1]), initializer=initializer)

    def call(self, x):
        book = ops.cast(self.book, x.dtype)
        distance = ops.sum(ops.square(book), -1) - 2 * ops.matmul(x, ops.transpose(book))
        chosen = ops.take(book, ops.argmin(distance, axis=-1), axis=0)
        moved, drawn = (ops.mean(ops.square(a - ops.stop_gradient(b))) for a, b in ((chosen, x), (x, chosen)))
        self.add_loss(moved + drawn / 4)
        return x + ops.stop_gradient(chosen - x)

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "codes": self.codes}


@keras.saving.register_keras_serializable("kaggle_utils")
class Variational(layers.Layer):
    """Mean and log variance (n, h, w, 2c) -> a random sample in training, else the mean; (n, h, w, c)."""

    def __init__(self, weight: float = 1e-4, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.seed, self.random = weight, seed, keras.random.SeedGenerator(seed)

    def call(self, x, training=False):
        mean, spread = ops.split(x, 2, axis=-1)
        spread = ops.clip(spread, -8.0, 4.0)
        self.add_loss(self.weight * ops.mean(ops.exp(spread) + ops.square(mean) - 1 - spread))
        if not training:
            return mean
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.random)
        return mean + ops.exp(spread / 2) * noise

    def compute_output_shape(self, shape):
        return (*shape[:-1], shape[-1] // 2)

    def get_config(self):
        return {**super().get_config(), "weight": self.weight, "seed": self.seed}


@keras.saving.register_keras_serializable("kaggle_utils")
class DepthToSpace(layers.Layer):
    """(n, h, w, 4c) -> (n, 2h, 2w, c), the pixel shuffle of Shi et al. (2016)."""

    def call(self, x):
        _, height, width, channels = x.shape
        height, width = (side or ops.shape(x)[axis] for axis, side in ((1, height), (2, width)))
        x = ops.reshape(x, (-1, height, width, 2, 2, channels // 4))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height * 2, width * 2, channels // 4))

    def compute_output_shape(self, shape):
        return (shape[0], *(side and 2 * side for side in shape[1:3]), shape[3] // 4)


def _block(x, filters: int, stride: int = 1):
    return layers.LeakyReLU(0.1)(layers.GroupNormalization(8)(layers.Conv2D(filters, 3, stride, "same")(x)))


def _doubled(x, filters: int, decoder: str):
    if decoder == "transposed":
        x = layers.Conv2DTranspose(filters, 4, 2, "same")(x)
        return layers.LeakyReLU(0.1)(layers.GroupNormalization(8)(x))
    if decoder == "shuffle":
        return DepthToSpace()(_block(x, 4 * filters))
    return _block(layers.UpSampling2D(2, interpolation=decoder)(x), filters)


def autoencoder(design: Design) -> keras.Model:
    """(n, S, S, 3) pixels 0–255 -> their reconstruction; S is a multiple of 2 ** ``design.halvings``."""
    pixels = keras.Input((None, None, 3))
    widths = [min(design.width * 2**step, 192) for step in range(design.halvings + 1)]
    x = _block(layers.Rescaling(1 / 127.5, -1)(pixels), widths[0])
    for filters in widths[1:]:
        x = _block(x, filters, 2)
        x = layers.Add()([x, _block(x, filters)])
    latent = design.latent * (2 if design.bottleneck == "variational" else 1)
    x = layers.Conv2D(latent, 1)(x)
    if design.bottleneck != "plain":
        x = Quantised()(x) if design.bottleneck == "quantised" else Variational()(x)
    x = _block(x, widths[-1])
    for filters in widths[-2::-1]:
        x = _doubled(x, filters, design.decoder)
        x = layers.Add()([x, _block(x, filters)])
    x = layers.Conv2D(3, 3, padding="same", dtype="float32")(x)
    return keras.Model(pixels, layers.Rescaling(127.5, 127.5, dtype="float32")(x), name="autoencoder")


def _patch_discriminator() -> keras.Model:
    pixels = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 127.5, -1)(pixels)
    for filters, stride in ((48, 2), (96, 2), (128, 1)):
        x = _block(x, filters, stride)
    return keras.Model(pixels, layers.Conv2D(1, 3, padding="same", dtype="float32")(x))


class Rebuilding(layers.Layer):
    """The loss of an autoencoder: absolute error of pixels and of details at three scales, and an adversary.

    The discriminator learns in the same step. The adversarial term of the autoencoder must not change the
    weights of the discriminator. Therefore the same term, on pixels without a gradient, is subtracted.
    """

    def __init__(self, adversary: float, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.adversary = adversary
        self.judge = _patch_discriminator() if adversary else None

    def call(self, rebuilt, pixels):
        first, second = ops.cast(rebuilt, "float32") / 255, ops.cast(pixels, "float32") / 255
        loss = ops.mean(ops.abs(first - second))
        difference = first - second
        for _ in range(3):
            coarse = ops.average_pool(difference, 2, 2)
            loss = loss + ops.mean(ops.abs(difference - ops.repeat(ops.repeat(coarse, 2, 1), 2, 2)))
            difference = coarse
        self.add_loss(loss)
        if self.adversary:
            still = ops.stop_gradient(rebuilt)
            seen = [self.judge(x) for x in (rebuilt, still, ops.cast(pixels, "float32"))]
            signed = -seen[0], -seen[1], seen[1], -seen[2]
            fooled, unmoved, caught, known = (ops.mean(ops.softplus(x)) for x in signed)
            self.add_loss(self.adversary * (fooled - unmoved + caught + known))
        return rebuilt

    def compute_output_shape(self, rebuilt_shape, pixels_shape):
        return rebuilt_shape


class _Windows(keras.utils.PyDataset):
    """Random windows of faces, resized to one size: the autoencoder sees faces at many scales."""

    def __init__(self, crops: np.ndarray, steps: int, batch: int, seed: int, **kwargs):
        super().__init__(**kwargs)
        self.crops, self.steps, self.batch, self.seed = crops, steps, batch, seed

    @property
    def num_batches(self) -> int:
        return self.steps

    def __getitem__(self, index: int):
        random = np.random.default_rng([self.seed, index])
        size, images = self.crops.shape[1], []
        for row in random.integers(len(self.crops), size=self.batch):
            side = int(random.integers(size // 2, size + 1))
            top, left = random.integers(size - side + 1, size=2)
            window = np.ascontiguousarray(self.crops[row][top : top + side, left : left + side])
            images.append(cv2.resize(window, (TRAINED_SIDE, TRAINED_SIDE), interpolation=cv2.INTER_AREA))
        return np.stack(images).astype(np.float32), np.zeros((self.batch, 1), np.float32)


def train_autoencoder(
    design: Design,
    crops: np.ndarray,
    steps: int = 900,
    batch: int = 32,
    seed: int = 0,
    policy: str = "float32",
    workers: int = 4,
) -> keras.Model:
    """Train an autoencoder of ``design`` on real faces uint8 (N, S, S, 3) and return it in float32."""
    keras.utils.set_random_seed(seed)
    with dtype_policy(policy):
        network = autoencoder(design)
        pixels = keras.Input((TRAINED_SIDE, TRAINED_SIDE, 3))
        trainer = keras.Model(pixels, Rebuilding(design.adversary)(network(pixels), pixels))
        schedule = WarmupCosine(1.5e-3, 50, steps)
        trainer.compile(keras.optimizers.Adam(schedule, beta_1=0.8, clipnorm=1.0), loss=None)
        feed = _Windows(crops, steps, batch, seed, workers=workers, max_queue_size=16)
        trainer.fit(feed, epochs=1, verbose=0)
    if policy == "float32":
        return network
    kept = autoencoder(design)
    kept.set_weights(network.get_weights())
    return kept


def _resized(crop: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)


def make_twins(
    crops: np.ndarray, networks: Sequence[keras.Model], seed: int = 0, batch: int = 64, threads: int = 8
) -> np.ndarray:
    """A twin of each crop, uint8 like ``crops`` (N, S, S, 3), by a random network at a random side."""
    random, size = np.random.default_rng(seed), crops.shape[1]
    chosen = random.integers(len(networks) * len(SIDES), size=len(crops))
    twins = np.empty_like(crops)

    def finish(row: int, given: np.ndarray, rebuilt: np.ndarray):
        side = given.shape[0]
        coarse = cv2.resize(given - rebuilt, (side // 8, side // 8), interpolation=cv2.INTER_AREA)
        image = rebuilt + cv2.resize(coarse, (side, side))  # restores the colours of the original
        image = np.clip(image, 0, 255).round().astype(np.uint8)
        twins[row] = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)

    with ThreadPoolExecutor(threads) as pool:
        for number in range(len(networks) * len(SIDES)):
            network, side = networks[number // len(SIDES)], SIDES[number % len(SIDES)]
            rows = np.flatnonzero(chosen == number)
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                given = np.zeros((batch, side, side, 3), np.float32)  # one shape: one compilation
                resized = pool.map(partial(_resized, side=side), crops[part])
                given[: len(part)] = np.stack(list(resized))
                list(pool.map(finish, part, given, np.array(network.predict_on_batch(given))))
    return twins


def put_back(
    original: np.ndarray, twin: np.ndarray, points: np.ndarray, shape: str, random: np.random.Generator
) -> np.ndarray:
    """Put a twin into its original, inside the softened mask of ``shape``; uint8.

    Args:
        original, twin: uint8 (S, S, 3). points: landmarks (81, 2), pixels.
        shape: as for :func:`landmarks.face_mask`, or ``whole``: return the twin.
    """
    if shape == "whole":
        return twin
    size = original.shape[0]
    core = cv2.erode(face_mask(points, shape, size), np.ones((5, 5), np.uint8)).astype(np.float32) / 255
    mask = cv2.GaussianBlur(core, (0, 0), float(random.uniform(2, 2 + size / 25)))[..., None]
    return (mask * twin + (1 - mask) * original).round().astype(np.uint8)


def as_delivered(images: Sequence[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """Give an original and its twin the same noise and JPEG quality, to make neither a clue; uint8 each."""
    quality = int(random.integers(45, 99))
    if random.random() < 0.25:
        return list(images)
    noise = float(random.choice([0.0, 0.0, 1.5, 3.0]))
    noisy = images
    if noise:
        grain = noise * random.standard_normal(images[0].shape, dtype=np.float32)
        noisy = [np.clip(image + grain, 0, 255).astype(np.uint8) for image in images]
    encoded = [
        cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for image in noisy
    ]
    return [cv2.imdecode(image, cv2.IMREAD_COLOR)[..., ::-1] for image in encoded]
