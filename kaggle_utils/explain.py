"""Where do the networks look and listen? Heat maps over face crops and voice spectrograms.

A map shows what moved this network's answer; it does not show that the clip was altered there. The maps run
on TensorFlow and JAX, which differ only in how gradients are taken (:func:`gradients`).
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import keras
import numpy as np
from scipy import signal

from . import storage

FFT_LENGTH, HOP = 512, 128  # samples
CROPS = 6  # that a network sees at once


def gradients(function: Callable, inputs: np.ndarray) -> np.ndarray:
    """Gradient of the sum of ``function(inputs)`` with respect to ``inputs``: float32, of the same shape.

    Args:
        function: takes one tensor and uses Keras layers and operations; rows must not depend on each other.
        inputs: float32 (n, …).

    Raises:
        RuntimeError: Keras runs on a backend other than TensorFlow and JAX.
    """
    backend = keras.backend.backend()
    if backend not in GRADIENTS:
        raise RuntimeError(f"expected Keras on {' or '.join(GRADIENTS)}, found the backend {backend!r}")
    return np.asarray(GRADIENTS[backend](function, np.asarray(inputs, np.float32)))


def _tensorflow_gradients(function: Callable, inputs: np.ndarray):
    import tensorflow as tf

    inputs = tf.convert_to_tensor(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = tf.reduce_sum(function(inputs))
    return tape.gradient(total, inputs)


def _jax_gradients(function: Callable, inputs: np.ndarray):
    import jax

    return jax.grad(lambda values: function(values).sum())(inputs)

GRADIENTS = {"tensorflow": _tensorflow_gradients, "jax": _jax_gradients}


# --- faces --------------------------------------------------------------------------------------------------
def grad_cam(network: keras.Model, crops: np.ndarray) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) on the last convolution map of a face network: evidence for FAKE.

    Each channel is weighted by the gradient of the logit; the weighted sum is clipped at 0. The side outputs,
    which read earlier maps, are held constant. An ensemble gives the mean of its members' maps.

    Args:
        crops: (N, H, W, 3) RGB in 0..255, at the network's input size.

    Returns:
        float32 (N, h, w) at the map's resolution, on one scale for all crops: the mean over the map is its
        first-order contribution to the logit.
    """
    members = [network, *(layer for layer in network.layers if isinstance(layer, keras.Model))]
    heats = [_grad_cam(member, np.asarray(crops, np.float32)) for member in members]
    size = max(heat.shape[2:0:-1] for heat in heats)
    return np.mean([[cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC).clip(0) for heat in some]
                    for some in heats], axis=0)


def _grad_cam(network: keras.Model, crops: np.ndarray) -> np.ndarray:
    body, head = _halves(network)
    outputs = storage.run(body, crops, CROPS)
    maps, *sides = (keras.ops.convert_to_tensor(outputs[name]) for name in body.output)
    weights = gradients(lambda values: head([values, *sides]), maps).sum(axis=(1, 2), keepdims=True)
    return np.maximum((weights * np.asarray(maps)).sum(axis=-1), 0)


@lru_cache(maxsize=8)
def _halves(network: keras.Model) -> tuple[keras.Model, keras.Model]:
    """A face network up to its last map and its side outputs, and from these to its logit.

    The first one is compiled: called eagerly, it holds every feature map, 0.3 GiB, to its end.
    """
    sides = {name: output for name, output in network.output.items() if name not in ("embedding", "logit")}
    cut = {"": last_map(network)} | dict(sorted(sides.items()))  # as Keras sorts them
    logit = network.get_layer("logit").output
    return keras.Model(network.inputs, cut), keras.Model(list(cut.values()), logit)


def overlay(crop: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Overlay a heat map on a crop: uint8 RGB (H, W, 3), hot is bright, with a contour at half heat.

    Args:
        crop: uint8 RGB (H, W, 3).
        heat: float (h, w); values from 1 up are shown as full heat.
    """
    heat = cv2.resize(np.asarray(heat, np.float32), crop.shape[1::-1],
                      interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    mixed = crop + 0.55 * heat[..., None] * (colours.astype(np.float32) - crop)
    outlines = cv2.findContours((heat > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(mixed.round().astype(np.uint8), outlines, -1, (255, 255, 255),
                            max(1, len(crop) // 128), cv2.LINE_AA)


def last_map(network: keras.Model):
    """The last feature map (n, h, w, channels) inside a network, as a symbolic tensor."""
    outputs = (layer.output for layer in reversed(network.layers))
    return next(output for output in outputs if len(getattr(output, "shape", ())) == 4)


# --- voices -------------------------------------------------------------------------------------------------
TRANSFORM = signal.ShortTimeFFT(signal.get_window("hann", FFT_LENGTH), HOP, fs=1)


def stft(samples: np.ndarray) -> np.ndarray:
    """STFT with Hann windows centred on every ``HOP``-th sample: complex (FFT_LENGTH / 2 + 1, frames)."""
    return TRANSFORM.stft(samples, p0=0, p1=-(-len(samples) // HOP) + 1)


def saliency(network: keras.Model, windows: np.ndarray) -> np.ndarray:
    """First-order sensitivity of a voice network's logit to each bin of the spectrogram.

    Gradient × input in time and frequency: amplifying a patch by a small share e raises the logit by e times
    its sum. Positive: louder means more FAKE. The map of a level-invariant network sums to about 0.

    Args:
        windows: float32 network inputs, (n, T) or (n, T, 1).

    Returns:
        float32 (n, FFT_LENGTH / 2 + 1, frames), lowest frequency first, one frame every ``HOP`` samples.
    """
    rises = [gradients(lambda samples: network(samples, training=False)["logit"], windows[row : row + 1])
             for row in range(len(windows))]  # one at a time: all at once keep 0.4 GiB
    rises = np.concatenate(rises).reshape(len(windows), -1)
    return np.stack([_gradient_times_input(samples.ravel(), rise)
                     for samples, rise in zip(windows, rises, strict=True)])


def _gradient_times_input(samples: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """Inner product of a gradient (T,) and each bin's contribution to the samples (T,) after ``istft``."""
    overlap = 3 / 8 * FFT_LENGTH / HOP  # sum of the squared Hann windows that cover a sample
    product = np.real(stft(samples) * stft(rise).conj()) / (overlap * FFT_LENGTH)
    product[1:-1] *= 2  # for the negative frequencies
    return product.astype(np.float32)
