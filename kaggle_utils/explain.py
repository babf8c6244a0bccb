"""Where do the networks look and listen? Heat maps over a face crop and over the spectrogram of a voice.

A map says what moved the answer of this network; it does not say that the clip was altered there. The maps run on
TensorFlow and on JAX: all that differs between them is how a slope is taken (:func:`gradients`).
"""

from collections.abc import Callable

import cv2
import keras
import numpy as np
from scipy import signal

FFT_LENGTH, HOP = 512, 128  # samples; of the spectrograms below


def gradients(function: Callable, inputs: np.ndarray) -> np.ndarray:
    """The slope of the sum of ``function(inputs)`` by each value of ``inputs``: float32, of their shape.

    Args:
        function: of one tensor, made of Keras layers and operations; rows must not depend on each other.
        inputs: float32 (n, …).

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow and JAX.
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


# --- faces ----------------------------------------------------------------------------------------------------------
def grad_cam(network: keras.Model, crops: np.ndarray) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) on the last convolution map of a face network: what speaks for FAKE.

    Each channel of the map weighs as much as the logit rises with it; the weighted sum is cut at 0. The side outputs, which
    look at earlier maps, are held. Of averaged networks (``networks.averaged``) it is the mean of their maps.

    Args:
        network: a face network with its ``logit``.
        crops: (N, H, W, 3) RGB in 0..255, of the size that the network takes.

    Returns:
        float32 (N, h, w) of the map's size, on one scale for all crops: the mean over the map is what it adds to the
        logit, in the first order.
    """
    members = [network, *(layer for layer in network.layers if isinstance(layer, keras.Model))]
    heats = [_grad_cam(member, np.asarray(crops, np.float32)) for member in members]
    size = max(heat.shape[2:0:-1] for heat in heats)
    return np.mean([[cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC).clip(0) for heat in some] for some in heats], axis=0)


def _grad_cam(network: keras.Model, crops: np.ndarray) -> np.ndarray:
    held = [output for name, output in network.output.items() if name not in ("embedding", "logit")]  # the side outputs
    cut = [last_map(network), *held]
    maps, *sides = keras.Function(network.inputs, cut)([crops])
    head = keras.Model(cut, network.get_layer("logit").output)  # Function refuses such inputs in Keras 3.13
    maps = keras.ops.convert_to_numpy(maps)
    weights = gradients(lambda values: head([values, *sides]), maps).sum(axis=(1, 2), keepdims=True)
    return np.maximum((weights * maps).sum(axis=-1), 0)


def overlay(crop: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A crop with its heat map: hot is bright, and a line runs round what is above half, for eyes and printers without colour.

    Args:
        crop: uint8 RGB (H, W, 3).
        heat: float (h, w), shown as full heat from 1 on.

    Returns:
        uint8 RGB (H, W, 3).
    """
    heat = cv2.resize(np.asarray(heat, np.float32), crop.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    mixed = crop + 0.55 * heat[..., None] * (colours.astype(np.float32) - crop)
    outlines = cv2.findContours((heat > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(mixed.round().astype(np.uint8), outlines, -1, (255, 255, 255), max(1, len(crop) // 128), cv2.LINE_AA)


def last_map(network: keras.Model):
    """The last output (n, h, w, channels) inside a network, as a symbolic tensor."""
    return next(layer.output for layer in reversed(network.layers) if len(getattr(layer.output, "shape", ())) == 4)


# --- voices ---------------------------------------------------------------------------------------------------------
TRANSFORM = signal.ShortTimeFFT(signal.get_window("hann", FFT_LENGTH), HOP, fs=1)


def stft(samples: np.ndarray) -> np.ndarray:
    """Hann windows centred on every ``HOP``-th sample: complex (FFT_LENGTH / 2 + 1, frames)."""
    return TRANSFORM.stft(samples, p0=0, p1=-(-len(samples) // HOP) + 1)


def istft(spectrum: np.ndarray, length: int) -> np.ndarray:
    """The inverse of :func:`stft`: (length,)."""
    return TRANSFORM.istft(np.pad(spectrum, ((0, 0), (-TRANSFORM.p_min, FFT_LENGTH // HOP))), k1=length)


def saliency(network: keras.Model, windows: np.ndarray) -> np.ndarray:
    """How the logit of a voice network answers to each place of the spectrogram, in the first order.

    Slope times input in time and frequency: a patch that becomes louder by the share e raises the logit by e times its
    sum (for small e). Positive where louder speaks for FAKE; a network that hears no level sums to about 0.

    Args:
        network: a voice network with its ``logit``.
        windows: float32, as the network takes them, (n, T) or (n, T, 1).

    Returns:
        float32 (n, FFT_LENGTH / 2 + 1, frames), lowest frequency first, a frame every ``HOP`` samples.
    """
    rises = gradients(lambda samples: network(samples, training=False)["logit"], windows).reshape(len(windows), -1)
    return np.stack([_gradient_times_input(samples.ravel(), rise) for samples, rise in zip(windows, rises, strict=True)])


def _gradient_times_input(samples: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """The inner product of a slope (T,) with what each bin adds to the samples (T,) when ``istft`` puts them together."""
    overlap = 3 / 8 * FFT_LENGTH / HOP  # sum of the squared Hann windows that cover a sample
    product = np.real(stft(samples) * stft(rise).conj()) / (overlap * FFT_LENGTH)
    product[1:-1] *= 2  # for the negative frequencies
    return product.astype(np.float32)


def exchange_map(network: keras.Model, spoofed: np.ndarray, recording: np.ndarray, times: int = 8,
                 bands: int = 8) -> np.ndarray:
    """How far the logit of a twin falls when one patch of its spectrogram is exchanged for that of its recording.

    A patch that is blanked (Zeiler and Fergus 2014) would itself sound made; one from the recording does not.

    Args:
        network: a voice network for 16 kHz with its head.
        spoofed, recording: float32 windows (T,) of a canonical recording and of the twin made from it, sample by sample
            at the same place.
        times, bands: patches along each axis.

    Returns:
        float32 (bands, times), lowest band first; positive where the patch speaks for FAKE.
    """
    made, real = (stft(samples) for samples in (spoofed, recording))
    band, frame = (np.arange(size) * count // size for size, count in zip(made.shape, (bands, times), strict=True))
    patches = [(band == b)[:, None] & (frame == t) for b in range(bands) for t in range(times)]
    mixed = [istft(np.where(patch, real, made), len(spoofed)) for patch in patches]
    logits = network.predict(np.stack([spoofed, *mixed]).astype(np.float32), batch_size=8, verbose=0)["logit"][:, 0]
    return (logits[0] - logits[1:]).reshape(bands, times)
