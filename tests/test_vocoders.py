"""Spoofed twins: as long and as loud as the recording, the same spectrum, other samples; the same from the same seed."""

import numpy as np
import pytest
from scipy import signal

from kaggle_utils import vocoders
from kaggle_utils.voice import log_power

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
    target = np.abs(vocoders._stft(noise, 256, 64))
    errors = []
    for iterations in (1, 30):
        made = vocoders.griffin_lim(noise, RATE, 0, bands=None, iterations=iterations, fft_length=256, hop=64)
        errors.append(np.linalg.norm(np.abs(vocoders._stft(made, 256, 64)) - target) / np.linalg.norm(target))
    assert errors[1] < 0.6 * errors[0]


def test_transform_is_inverted():
    noise = np.random.default_rng(0).standard_normal(3001)
    assert np.allclose(vocoders._istft(vocoders._stft(noise, 256, 64), 256, 64, 3001), noise)


def test_unknown_generator_is_named():
    with pytest.raises(ValueError, match="wavenet"):
        vocoders.copy_synthesis(np.zeros(100), RATE, "wavenet")


def test_families_group_the_variants():
    assert {vocoders.family(name) for name in vocoders.GENERATORS} == {
        "griffin_lim", "world", "linear_prediction", "phase_vocoder"}
