"""Random effects of recording and transmission on voices, on the device."""

import keras
import numpy as np
from keras import ops

from kaggle_utils.media.sound import SAMPLE_RATE


@keras.saving.register_keras_serializable("kaggle_utils")
class ChannelAugment(keras.layers.Layer):
    """Effects of recording and transmission, drawn for each voice by the same rule in both classes.

    int16 (n, T) -> float32 (n, T). In training: a room, an equaliser of up to ``equaliser`` dB, the telephone
    band or a low-pass at 3.4 to 7.5 kHz, clipping, coloured noise ``snr`` dB below the voice, a flipped sign,
    and an RMS of −26 dBFS.

    Args:
        rate: of the samples, in Hz.
        equaliser: maximum gain in dB. snr: lowest and highest signal-to-noise ratio in dB.
        band, noise, clip, room: fractions of the voices that get each effect.
        enabled: False switches all effects off.
    """

    def __init__(
        self,
        rate: int = SAMPLE_RATE,
        equaliser: float = 8.0,
        snr: tuple[float, float] = (5.0, 40.0),
        band: float = 0.6,
        noise: float = 0.6,
        clip: float = 0.15,
        room: float = 0.3,
        enabled: bool = True,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # half precision would ruin the samples
        self.settings = {
            "rate": rate,
            "equaliser": equaliser,
            "snr": tuple(snr),
            "band": band,
            "noise": noise,
            "clip": clip,
            "room": room,
            "enabled": enabled,
        }
        self.seed, self.random = seed, keras.random.SeedGenerator(seed)

    def get_config(self):
        return {**super().get_config(), **self.settings, "seed": self.seed}

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, samples, training=False):
        x = ops.cast(samples, "float32") / 32768.0
        if not training or not self.settings["enabled"]:
            return x
        count, length = ops.shape(x)[0], samples.shape[1]
        frequency = np.fft.rfftfreq(length, 1 / self.settings["rate"]).astype(np.float32)[None]
        if self.settings["room"]:
            x = ops.where(self._some(count, "room"), self._in_a_room(x, count, length), x)
        x = self._filtered(x, self._response(count, frequency), length)
        limit = self._uniform(count, 1.5, 4.0) * _rms(x)
        x = ops.where(self._some(count, "clip"), ops.clip(x, -limit, limit), x)
        colour = (frequency + 50.0) ** -self._uniform(count, 0.0, 1.0)
        noise = self._filtered(keras.random.normal((count, length), seed=self.random), colour, length)
        level = 10.0 ** (-self._uniform(count, *self.settings["snr"]) / 20)
        level = ops.where(self._some(count, "noise"), level, 0.0)
        x = x + noise * (level * _rms(x) / _rms(noise))
        sign = ops.where(self._uniform(count, 0.0, 1.0) < 0.5, -1.0, 1.0)
        return x * (sign * 0.05 / _rms(x))

    def _in_a_room(self, x, count, length):
        """Add reverberation at −12 to +3 dB: noise that decays by 60 dB in 0.15 to 0.8 s (Moorer 1979)."""
        seconds = np.arange(length, dtype=np.float32)[None] / self.settings["rate"]
        decay = ops.exp(-6.9 * seconds / self._uniform(count, 0.15, 0.8))
        tail = keras.random.normal((count, length), seed=self.random) * decay
        level = 10.0 ** (self._uniform(count, -12.0, 3.0) / 20)
        room = tail * level / ops.sqrt(ops.sum(ops.square(tail), axis=1, keepdims=True))
        (a, b), (c, d) = ops.rfft(x), ops.rfft(room + np.eye(1, length, dtype=np.float32))
        return ops.irfft((a * c - b * d, a * d + b * c), fft_length=length)

    def _response(self, count, frequency):
        """Gain (count, bins): a smooth random equaliser and, for some voices, a band limit."""
        place = np.log2(np.maximum(frequency, 50.0) / 50.0)  # octaves
        db = 0.0
        for octaves in (1.5, 3.0, 6.0):
            phase = self._uniform(count, 0.0, 2 * np.pi)
            db = db + self._uniform(count, -1.0, 1.0) * ops.sin(2 * np.pi * place / octaves + phase)
        top = self._uniform(count, 3400.0, 0.47 * self.settings["rate"])
        bottom = ops.where(self._uniform(count, 0.0, 1.0) < 0.5, 300.0, 20.0)
        limited = ops.sigmoid((top - frequency) / 60.0) * ops.sigmoid((frequency - bottom) / 20.0)
        limited = ops.where(self._some(count, "band"), limited, 1.0)
        return limited * 10.0 ** (db * self.settings["equaliser"] / 60.0)

    def _filtered(self, x, response, length):
        real, imaginary = ops.rfft(x)
        return ops.irfft((real * response, imaginary * response), fft_length=length)

    def _uniform(self, count, low, high):
        return keras.random.uniform((count, 1), low, high, seed=self.random)

    def _some(self, count, what):
        return self._uniform(count, 0.0, 1.0) < self.settings[what]


def _rms(x):
    return ops.sqrt(ops.mean(ops.square(x), axis=1, keepdims=True) + 1e-10)
