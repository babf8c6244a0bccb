"""Voices: read at the right pitch on every moviepy, made alike, cut to what the networks take."""

import time

import numpy as np
import pytest
from helpers import ffmpeg
from scipy import signal

from kaggle_utils.datasets import babble, drawing
from kaggle_utils.kaggle.paths import research_data
from kaggle_utils.media import sound
from kaggle_utils.media.video import UnreadableClip
from kaggle_utils.voice import signal as voice_signal
from kaggle_utils.voice import speech

RATE, SECONDS = 48000, 3
START_HZ, HZ_PER_S = 200.0, 1000.0  # a chirp that stays under 3.4 kHz


def chirp(times: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * (START_HZ * times + HZ_PER_S / 2 * times**2))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """``sound.mp4``: left a chirp, right a tone of 7 kHz; ``mute.mp4``: no sound track."""
    from scipy.io import wavfile

    folder = tmp_path_factory.mktemp("voice")
    times = np.arange(SECONDS * RATE) / RATE
    stereo = np.stack([0.5 * chirp(times), 0.25 * np.sin(2 * np.pi * 7000 * times)], axis=1)
    wavfile.write(folder / "sound.wav", RATE, (stereo * 32767).astype(np.int16))
    picture = ("-f", "lavfi", "-i", f"color=c=gray:s=64x64:r=10:d={SECONDS}")
    ffmpeg(
        *picture,
        "-i",
        folder / "sound.wav",
        "-c:v",
        "libx264",
        "-c:a",
        "aac",
        "-b:a",
        "192k",
        folder / "sound.mp4",
    )
    ffmpeg(*picture, "-c:v", "libx264", folder / "mute.mp4")
    return folder


def level_at(samples: np.ndarray, rate: int, frequency: float) -> float:
    """Amplitude of a steady tone in the middle of ``samples``."""
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    times = np.arange(len(middle)) / rate
    return 2 * abs(np.mean(middle * np.hanning(len(middle)) * np.exp(-2j * np.pi * frequency * times))) * 2


def without_tone(samples: np.ndarray, rate: int) -> np.ndarray:
    """Nothing above 5 kHz."""
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / rate) > 5000] = 0
    return np.fft.irfft(spectrum, len(samples))


@pytest.mark.parametrize("rate", [8000, 16000])
def test_chirp_is_read_at_its_frequency_in_every_quarter(clips, rate):
    samples = sound.read_voice(clips / "sound.mp4", rate)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - SECONDS * rate) < 0.1 * rate
    left = without_tone(samples[: int(0.98 * SECONDS * rate)], rate)
    for quarter in np.array_split(np.arange(len(left)), 4):
        assert np.corrcoef(left[quarter], chirp(quarter / rate))[0, 1] > 0.99


def test_what_lies_above_the_new_band_vanishes_and_does_not_fold_back(clips):
    right = 0.125  # amplitude of the 7 kHz tone after mixing to one channel
    assert level_at(sound.read_voice(clips / "sound.mp4", 16000), 16000, 7000) == pytest.approx(
        right, rel=0.1
    )
    times = np.arange(2 * RATE) / RATE
    tone = voice_signal.to_mono(0.5 * np.sin(2 * np.pi * 7000 * times), RATE, 8000)
    assert level_at(tone, 8000, 1000) < 1e-3  # 8 − 7 kHz


def test_reference_voice_is_the_left_channel_padded_with_zeros(clips):
    samples = sound.read_reference_voice(clips / "sound.mp4")
    assert samples.shape == (30000, 1) and samples.dtype == np.float32
    left = 0.5 * chirp(np.arange(SECONDS * 8000) / 8000)
    assert np.corrcoef(samples[2000:22000, 0], left[2000:22000])[0, 1] > 0.99
    assert np.std(samples[2000:22000]) == pytest.approx(
        0.5 / np.sqrt(2), rel=0.02
    )  # AAC overshoots the peak at its edges
    assert not samples[int((SECONDS + 0.1) * 8000) :].any()


def test_only_the_asked_seconds_are_read(clips):
    assert len(sound.read_voice(clips / "sound.mp4", 16000, seconds=1)) == 16000


def test_no_sound_track_is_none(clips):
    assert sound.read_voice(clips / "mute.mp4") is None
    assert sound.read_reference_voice(clips / "mute.mp4") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a clip",
        b"#EXTM3U\n#EXTINF:3,\nsound.mp4\n",
        b"ffconcat version 1.0\nfile sound.mp4",
        b"\0\0\0\x18ftypmp42" + bytes(300),
    ],
    ids=["empty", "text", "playlist", "concat", "no index"],
)
def test_what_is_no_clip_is_refused_by_name(clips, content):
    path = clips / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableClip, match="broken.mp4"):
        sound.read_voice(path)


def test_both_dfdc_clips_of_a_pair_have_one_voice(real_clips):
    first, second = (sound.read_voice(real_clips / name) for name in ("hsbwhlolsn.mp4", "rtpbawlmxr.mp4"))
    assert np.array_equal(first, second) and not voice_signal.is_silent(first)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [0, 1, 2])
def test_to_mono_takes_every_type_and_number_of_channels(kind, channels):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    scale = {np.int16: 2**15, np.int32: 2**31, np.uint8: 128}.get(kind, 1)
    samples = (tone * scale + (128 if kind is np.uint8 else 0)).astype(kind)
    samples = samples if channels == 0 else np.repeat(samples[:, None], channels, axis=1)
    mono = voice_signal.to_mono(samples, 22050)
    assert mono.dtype == np.float32 and mono.shape == (16000,)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(mono - expected)[200:-200].max() < 0.02


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 9)), "shape"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.array(["a"]), "type"),
    ],
)
def test_to_mono_refuses_what_is_no_sound(samples, message):
    with pytest.raises(ValueError, match=message):
        voice_signal.to_mono(samples, 8000)


def test_silence_is_judged_by_its_peak():
    noise = np.random.default_rng(0).uniform(-1, 1, 8000).astype(np.float32)
    assert voice_signal.is_silent(np.zeros(0)) and voice_signal.is_silent(np.full(100, 0.3))
    assert voice_signal.is_silent(0.0009 * noise) and not voice_signal.is_silent(0.0015 * noise)


def test_canonical_voices_differ_in_nothing_but_the_voice():
    random = np.random.default_rng(0)
    speech = random.standard_normal(32000).astype(np.float32)
    quiet = np.concatenate([np.zeros(5000), 0.01 * speech, np.zeros(9000)]).astype(np.float32) + 0.2
    a, b = voice_signal.canonical(0.3 * speech, 16000), voice_signal.canonical(quiet, 16000)
    assert a.dtype == np.float32 and abs(len(a) - len(b)) <= 1600
    for samples in (a, b):
        assert np.sqrt(np.mean(samples**2)) == pytest.approx(10 ** (-26 / 20), rel=1e-3)
        spectrum = np.abs(np.fft.rfft(samples)) ** 2
        frequency = np.fft.rfftfreq(len(samples), 1 / 16000)
        assert spectrum[frequency < 30].mean() < 0.05 * spectrum.mean()
        assert spectrum[frequency > 7800].mean() < 0.05 * spectrum.mean()
    assert len(voice_signal.canonical(np.zeros(1000), 16000)) == 0


def test_windows_cover_long_voices_and_repeat_short_ones():
    samples = np.arange(10.0)
    assert np.array_equal(voice_signal.windows(samples, 4), [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
    assert np.array_equal(voice_signal.windows(samples[:3], 7), [[0, 1, 2, 0, 1, 2, 0]])
    assert voice_signal.windows(np.arange(1000.0), 4, most=5).shape == (5, 4)


def babble_for(seconds: float) -> np.ndarray:
    """Synthesised speech at 16 kHz, float32 (T,)."""
    person = drawing.Person(pitch=180, tract=1.0)
    return babble.speak(person, seconds, np.random.default_rng(0))[0].astype(np.float32)


@pytest.mark.parametrize("level", [1.0, 0.01], ids=["loud", "quiet"])
def test_speech_is_heard_and_its_windows_are_scored(level):
    recorded = level * np.concatenate([np.zeros(16000), babble_for(5), np.zeros(80000), babble_for(3)])
    heard = voice_signal.hear(recorded, 16000)
    assert heard.windows.shape[1:] == (64600,) and heard.windows.dtype == np.float32
    assert 0.7 < heard.start_s < 1.3 and len(heard.samples) / 16000 == pytest.approx(13, abs=0.6)
    spans = heard.start_s + heard.starts / 16000
    assert all(start < 6 or start + 4.04 > 11.5 for start in spans)  # none between the two
    assert voice_signal.hear(recorded, 16000, reference=True).windows.shape[1:] == (30000,)


TIMES = np.arange(80000) / 16000
NO_SPEECH = {
    "tone": np.sin(2 * np.pi * 440 * TIMES),
    "sweep": signal.chirp(TIMES, 50, 5, 7000),
    "hum": sum(np.sin(100 * np.pi * k * TIMES) / k for k in range(1, 9)),
    "noise": np.random.default_rng(0).standard_normal(80000),
    "clicks": (np.arange(80000) % 5000 == 0).astype(float),
    "chord": sum(np.sin(2 * np.pi * f * TIMES) * np.exp(-3 * (TIMES % 1)) for f in (220, 277, 330, 440)),
    "silence": np.zeros(80000),
    "short speech": babble_for(3)[:9000],
    "30 ms of noise": np.random.default_rng(0).standard_normal(480),
    "30 ms of noise in silence": np.pad(np.random.default_rng(0).standard_normal(480), (40000, 39520)),
}


@pytest.mark.parametrize("name", NO_SPEECH)
def test_no_voice_is_made_of_what_is_no_speech(name):
    assert voice_signal.hear((0.3 * NO_SPEECH[name]).astype(np.float32), 16000) is None


@pytest.mark.parametrize("name", ["test_tone.mp4", "sine.mpg", "outdoors.mov", "crowd.mp4"])
def test_sound_tracks_without_speech(name):
    folder = research_data("odd_clips")
    if folder is None:
        pytest.skip("needs odd_clips: set DEEPFAKE_DATA to the folder that holds it")
    assert voice_signal.hear(sound.read_voice(folder / name), 16000) is None


def test_speech_costs_little():
    samples = babble_for(10)
    speech.speech_frames(samples)
    began = time.process_time()
    speech.speech_frames(samples)
    assert (time.process_time() - began) / 10 < 0.02  # s for each second of sound


def test_spectrograms_show_a_tone_where_it_is():
    tone = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000).astype(np.float32)
    for transform in (voice_signal.log_power, voice_signal.log_mel):
        levels, times, frequencies = transform(tone, 16000)
        assert levels.shape == (len(frequencies), len(times)) and levels.max() == 0 and levels.min() >= -80
        assert abs(frequencies[levels[:, 50].argmax()] - 2000) < 100
    assert voice_signal.lfcc(tone, 16000).shape == (60, 101)
