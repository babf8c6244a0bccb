"""Spoofed twins: as long and as loud as the recording, the same spectrum, other samples; the same from the same seed."""

import keras
import numpy as np
import pytest
from scipy import signal

from kaggle_utils.voice import neural_vocoders, vocoders
from kaggle_utils.voice.signal import log_power

RATE = 16000


@pytest.fixture(scope="module")
def vowel() -> np.ndarray:
    """Half a second of pulses at 120 Hz through two resonances, with a little noise."""
    pulses = np.zeros(RATE // 2)
    pulses[:: RATE // 120] = 1
    for centre in (700, 1200):
        pulses = signal.lfilter([1], [1, -1.9 * np.cos(2 * np.pi * centre / RATE), 0.9025], pulses)
    noise = np.random.default_rng(0).standard_normal(len(pulses))
    return (0.1 * pulses / np.abs(pulses).max() + 0.001 * noise).astype(np.float32)


@pytest.mark.parametrize("generator", vocoders.GENERATORS)
def test_twin_keeps_length_level_and_spectrum_but_not_the_samples(vowel, generator):
    if vocoders.family(generator) == "world":
        pytest.importorskip("pyworld", reason="WORLD needs the optional package pyworld")
    twin = vocoders.copy_synthesis(vowel, RATE, generator, seed=1)
    assert twin.shape == vowel.shape and twin.dtype == np.float32 and np.isfinite(twin).all()
    assert np.sqrt(np.mean(twin**2)) == pytest.approx(np.sqrt(np.mean(vowel**2)), rel=1e-3)
    before, after = (log_power(x, RATE)[0].mean(axis=1) for x in (vowel, twin))
    assert np.corrcoef(before, after)[0, 1] > 0.8
    assert not np.allclose(twin, vowel, atol=1e-3)
    assert np.array_equal(twin, vocoders.copy_synthesis(vowel, RATE, generator, seed=1))


def test_griffin_lim_of_all_bins_converges():
    noise = np.random.default_rng(0).standard_normal(4000)
    target = np.abs(vocoders.stft(noise, 256, 64))
    errors = []
    for iterations in (1, 30):
        made = vocoders.griffin_lim(noise, RATE, 0, bands=None, iterations=iterations, fft_length=256, hop=64)
        errors.append(np.linalg.norm(np.abs(vocoders.stft(made, 256, 64)) - target) / np.linalg.norm(target))
    assert errors[1] < 0.6 * errors[0]


def test_transform_is_inverted():
    noise = np.random.default_rng(0).standard_normal(3001)
    assert np.allclose(vocoders.istft(vocoders.stft(noise, 256, 64), 256, 64, 3001), noise)


def test_unknown_generator_is_named():
    with pytest.raises(ValueError, match="wavenet"):
        vocoders.copy_synthesis(np.zeros(100), RATE, "wavenet")


def test_families_group_the_variants():
    assert {vocoders.family(name) for name in vocoders.GENERATORS} == {
        "griffin_lim", "world", "linear_prediction", "phase_vocoder"}


def test_mel_correction_brings_the_spectrum_nearer_and_keeps_the_length(vowel):
    twin = vocoders.copy_synthesis(vowel, RATE, "linear_prediction:20", seed=1)
    fixed = vocoders.mel_corrected(twin, vowel, RATE)
    filters = vocoders.mel_filters(80, RATE, 1024)
    mels = [np.log(filters @ np.abs(vocoders.stft(x, 1024, 256)) + 1e-3) for x in (vowel, twin, fixed)]
    assert fixed.shape == vowel.shape and fixed.dtype == np.float32
    assert np.abs(mels[2] - mels[0]).mean() < 0.5 * np.abs(mels[1] - mels[0]).mean()


# --- neural vocoders, untrained -------------------------------------------------------------------------------------
def small(family: str) -> neural_vocoders.Vocoder:
    """A vocoder of 8 channels that works at 24 kHz in steps of 256 samples."""
    return neural_vocoders.Vocoder(family, rate=24000, bands=20, fft_length=1024, hop=256, factors=(8, 8, 4), channels=8)


@pytest.mark.parametrize("name", neural_vocoders.VOCODERS)
def test_every_vocoder_upsamples_by_its_hop(name):
    vocoder = neural_vocoders.VOCODERS[name]
    if vocoder.family in ("hifigan", "melgan"):
        assert np.prod(vocoder.factors) == vocoder.hop
    assert vocoder.top <= vocoder.rate / 2 and vocoder.family in neural_vocoders.BUILDERS


@pytest.mark.parametrize("family", neural_vocoders.BUILDERS)
def test_neural_twin_is_as_long_as_the_voice(vowel, family):
    vocoder = small(family)
    twins = neural_vocoders.vocode(vocoder, vocoder.build(), [vowel, vowel[:5000]], RATE, batch=2)
    assert [len(twin) for twin in twins] == [len(vowel), 5000]
    assert all(np.isfinite(twin).all() and twin.dtype == np.float32 for twin in twins)


def test_flow_is_inverted(vowel):
    vocoder = small("flow")
    network = vocoder.build(16)
    random = np.random.default_rng(0)
    network.set_weights([x + 0.02 * random.standard_normal(x.shape).astype(np.float32) for x in network.get_weights()])
    samples = vowel[None, :4096]
    mel = vocoder.log_mel(samples)
    layer = next(layer for layer in network.layers if isinstance(layer, neural_vocoders.Flow))
    noise, _ = layer(keras.ops.convert_to_tensor(samples), mel)
    assert not np.allclose(keras.ops.reshape(noise, (1, -1)), samples, atol=1e-2)
    assert np.allclose(layer.inverse(noise, mel), samples, atol=1e-3)


def test_inverse_transform_of_a_spectrum_gives_the_samples(vowel):
    samples = vowel[None, :4096]
    real, imaginary = (keras.ops.convert_to_numpy(x)[:, :-1] for x in keras.ops.stft(samples, 1024, 256, 1024))
    spectrum = real + 1j * imaginary
    parts = np.concatenate([np.log(np.abs(spectrum) + 1e-9), np.angle(spectrum)], axis=-1).astype(np.float32)
    made = keras.ops.convert_to_numpy(neural_vocoders.InverseSTFT(1024, 256)(parts))
    assert np.allclose(made[0, 512:3000], samples[0, 512:3000], atol=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the training of vocoders runs on JAX (KERAS_BACKEND=jax)")
@pytest.mark.parametrize("family", ["vocos", "flow"])
def test_a_vocoder_learns(vowel, family):
    voice = np.tile(vowel, 4)
    lines = []
    networks = neural_vocoders.train_vocoder(small(family), [voice], seconds=8, report=lines.append, early=0.5)
    assert len(networks) == 2 and "steps" in lines[-1]
    assert not all(np.array_equal(a, b) for a, b in zip(*(network.get_weights() for network in networks), strict=True))
