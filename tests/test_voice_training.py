"""Corpora split by speaker, balanced batches, channel effects that leave level and length alone, no tell-tale nuisances."""

import numpy as np
import pandas as pd
import pytest
from scipy import signal

from kaggle_utils import metrics, storage
from kaggle_utils.kaggle.paths import research_data
from kaggle_utils.voice import data as voice_data
from kaggle_utils.voice import evaluation as voice_evaluation
from kaggle_utils.voice import training as voice_training

LENGTH = 20000


@pytest.fixture
def voices() -> voice_data.Voices:
    """Six recordings and six spoofed voices in three corpora, one of them spoofed only."""
    random = np.random.default_rng(0)
    table = pd.DataFrame({
        "label": [0] * 6 + [1] * 6,
        "generator": ["bona_fide"] * 6 + ["griffin_lim:mel80"] * 3 + ["fastspeech2"] * 3,
        "corpus": ["LibriSpeech"] * 3 + ["LibriTTS"] * 3 + ["LibriSpeech"] * 3 + ["VCTK", "LibriTTS", "LJSpeech"],
        "speaker": ["26", "27", "28", "26", "27", "28", "26", "27", "28", "p225", "26", "LJ"],
        "source": [-1] * 6 + [0, 1, 2] + [-1] * 3,
    })
    samples = [voice_data.to_int16(0.1 * random.standard_normal(LENGTH + 500 * i)) for i in range(12)]
    return voice_data.Voices(table, samples)


def test_no_person_is_on_two_sides(voices):
    table = voice_data.split_by_speaker(pd.concat([voices.table] * 3, ignore_index=True))
    libri = table[table["corpus"].str.startswith("Libri")]
    assert (libri.groupby("speaker")["split"].nunique() == 1).all()
    assert set(table.loc[table["corpus"] == "VCTK", "split"]) == {"test"}
    assert set(table.loc[table["speaker"] == "LJ", "split"]) == {"train"}


def test_batches_are_balanced_and_pair_a_twin_with_its_recording(voices):
    settings = voice_training.VoiceSettings(batch_size=8, steps=3, weights={"fastspeech2": 0})
    batches = voice_training.VoiceBatches(voices, np.arange(12), settings)
    samples, labels = batches[0]
    assert samples.shape == (8, 64600) and samples.dtype == np.int16 and batches.num_batches == 3
    assert labels[:, 0].tolist() == [1] * 4 + [0] * 4
    assert set(batches.fakes) == {6, 7, 8}
    assert batches._recording(7, np.random.default_rng(0)) == 1
    assert batches._recording(10, np.random.default_rng(0)) in (3, 4, 5)
    again, _ = batches[0]
    assert np.array_equal(samples, again)
    batches.epoch = 1
    assert not np.array_equal(samples, batches[0][0])


def test_batches_need_both_classes(voices):
    with pytest.raises(ValueError, match="6 and 0"):
        voice_training.VoiceBatches(voices, np.arange(6), voice_training.VoiceSettings())


def test_voices_are_saved_and_read_back(voices, tmp_path):
    voices.copies = [[samples[:100]] * (i % 3) for i, samples in enumerate(voices.samples)]
    voices.save(tmp_path / "voices.npz")
    read = voice_data.Voices.load(tmp_path / "voices.npz")
    assert read.table.equals(voices.table) and read.rate == voices.rate
    assert all(np.array_equal(a, b) for a, b in zip(read.samples, voices.samples, strict=True))
    assert [len(some) for some in read.copies] == [i % 3 for i in range(12)]


@pytest.mark.parametrize("codec", ["aac_64", "opus_24", "telephone"])
def test_a_codec_keeps_the_voice(codec):
    tone = voice_data.to_int16(0.3 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))
    heard = voice_data.recode(tone, 16000, codec)
    assert heard.dtype == np.int16 and abs(len(heard) - len(tone)) < 2500
    spectrum = np.abs(np.fft.rfft(heard[4000:12000] * np.hanning(8000)))
    assert abs(np.argmax(spectrum) * 2 - 1000) < 10
    assert not np.array_equal(heard[: len(tone)], tone)


def test_noise_has_the_asked_level():
    tone = voice_data.to_int16(0.3 * np.sin(np.arange(16000) / 3))
    noise = voice_data.noisy(tone, 15).astype(float) - tone
    assert 10 * np.log10(np.mean(np.square(tone, dtype=float)) / np.mean(noise**2)) == pytest.approx(15, abs=0.2)


def test_channel_effects_keep_level_and_length_and_rest_at_inference(voices):
    layer = voice_training.ChannelAugment(seed=0, room=0.5)
    samples = np.stack([part[:16000] for part in voices.samples])
    heard = np.asarray(layer(samples, training=True))
    assert heard.shape == samples.shape and np.isfinite(heard).all()
    assert np.allclose(np.sqrt(np.mean(heard**2, axis=1)), 0.05, rtol=0.01)
    assert np.allclose(np.asarray(layer(samples)), samples / 32768)
    assert voice_training.ChannelAugment.from_config(layer.get_config()).settings == layer.settings


def nuisances(samples: np.ndarray) -> list[float]:
    """What tells nothing of the voice: length, level, peak, DC, what is left of silence at both ends, band limits."""
    x = samples / 32768
    spectrum = np.square(np.abs(np.fft.rfft(x)))
    frequency = np.fft.rfftfreq(len(x), 1 / 16000)
    edges = [np.log(np.mean(np.square(part)) + 1e-9) for part in (x[:320], x[-320:])]
    bands = [np.log(spectrum[keep].sum() / spectrum.sum() + 1e-9) for keep in (frequency < 40, frequency > 7700)]
    return [len(x), len(x) % 256, np.log(np.sqrt(np.mean(x**2))), x.mean(), *edges, *bands]


def test_nuisances_alone_do_not_tell_the_classes_apart():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folder = research_data("voice")
    if folder is None:
        pytest.skip("needs real speech: set DEEPFAKE_DATA to the folder that holds voice")
    read = voice_data.read_voices(folder)
    voices = read.take(np.flatnonzero(read.table["label"] == 0)[::6])
    voices = voice_data.add_twins(voices, ["griffin_lim:mel80_8"]).canonical()
    table = voices.table.assign(logit=0.0)
    features = np.array([nuisances(samples) for samples in voices.samples])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    groups = table["corpus"] + table["speaker"]
    chances = cross_val_predict(model, features, table["label"], groups=groups, cv=GroupKFold(5), method="predict_proba")
    assert voice_training.equal_error_rate(table["label"].to_numpy(), chances[:, 1]) > 0.35


def test_a_run_takes_its_batches_in_order_and_is_saved(voices, tmp_path, monkeypatch):
    def build(settings, policy="float32"):  # a line on the samples learns in no time
        window = voice_training.keras.Input((settings.length,))
        return voice_training.keras.Model(window, {"logit": voice_training.keras.layers.Dense(1)(window)})

    seen, getitem = [], voice_training.VoiceBatches.__getitem__
    monkeypatch.setattr(voice_training.VoiceBatches, "__getitem__",
                        lambda self, index: (seen.append(index), getitem(self, index))[1])
    monkeypatch.setattr(voice_training, "build_voice_network", build)
    some = voice_data.Voices(voices.table.assign(split=["train", "test"] * 6), voices.samples)
    settings = voice_training.VoiceSettings("short", network_options={"samples": 8000}, epochs=1, steps=6, batch_size=4)
    run = voice_training.train_voice(settings, some, tmp_path, workers=1)
    assert seen[-6:] == list(range(6))  # Keras asks for the first ones twice
    loaded = storage.load_network(tmp_path / "short.keras")
    scores = voice_training.score_voices(loaded, some, some.rows("test"), settings.length)
    assert np.allclose(scores["logit"], run.scores["logit"], atol=0.02) and run.scores["logit"].std() > 0.02


# --- evaluation -----------------------------------------------------------------------------------------------------
def scored(fakes: dict[str, list[float]], reals: list[float]) -> pd.DataFrame:
    rows = [{"label": 0, "generator": "bona_fide", "speaker": str(i), "logit": x} for i, x in enumerate(reals)]
    rows += [{"label": 1, "generator": name, "speaker": str(i), "logit": x}
             for name, some in fakes.items() for i, x in enumerate(some)]
    return pd.DataFrame(rows).assign(row=range(len(rows)), split="test")


def test_variants_of_a_family_are_judged_together():
    scores = scored({"hifigan:22k": [3.0, 4.0], "hifigan:24k_mel": [5.0], "wavegrad2": [-5.0, -4.0]}, [-2.0, -1.0, 0.0])
    table = voice_evaluation.by_family(scores)
    assert table.loc["hifigan", ["voices", "eer", "auc"]].tolist() == [3, 0, 1]
    assert table.loc["wavegrad2", ["voices", "speakers", "auc"]].tolist() == [2, 2, 0]
    settings = voice_training.VoiceSettings(weights={"hifigan": 1.0, "wavegrad2": 0.0})
    assert voice_evaluation.left_out(scores, settings).index.tolist() == ["wavegrad2"]


def test_a_run_is_judged_on_unheard_speakers_and_generators(voices):
    table = voices.table.assign(split=["train", "test"] * 6)
    some = voice_data.Voices(table, voices.samples)
    settings = voice_training.VoiceSettings(weights={"fastspeech2": 0.0, "griffin_lim": 0.0})
    # the text-to-speech voices on the training side too, for that run never heard them; a twin of a training speaker, no
    assert voice_training.unheard(some, settings).tolist() == [1, 3, 5, 7, 9, 10, 11]
    assert voice_training.unheard(some, voice_training.VoiceSettings()).tolist() == [1, 3, 5, 7, 9, 11]


def test_every_named_run_leaves_out_what_its_name_says():
    never = {*voice_training.UNHEARD, "world"}
    for name, families in voice_training.LEFT_OUT.items():
        weights = voice_training.RUNS[f"without_{name}"].weights
        assert {family for family, share in weights.items() if share == 0} == {*families, *never}
        narrow = voice_training.RUNS[f"narrow_without_{name}"].weights
        assert {family for family, share in narrow.items() if share == 0} == {*families, *never} - ({"world"} - {*families})
    assert set(voice_training.NEURAL) <= {family for family, share in voice_training.SHIPPED.weights.items() if share == 1}


def test_threshold_and_line_of_logits():
    random = np.random.default_rng(0)
    reals, fakes = random.normal(-2, 2, 2000), random.normal(4, 2, 400)
    scores = scored({"flow": list(fakes)}, list(reals))
    assert voice_evaluation.threshold_of_eer(scores) == pytest.approx(1, abs=0.3)
    scale, shift = metrics.fit_line(scores["label"].to_numpy(), scores["logit"].to_numpy())
    assert scale == pytest.approx(1.5, rel=0.2) and -shift / scale == pytest.approx(1, abs=0.3)  # log odds: 1.5 (x − 1)
    with pytest.raises(ValueError, match="same rows"):
        voice_evaluation.averaged([scores, scores.iloc[:-1]])
    mean = voice_evaluation.averaged([scores, scores.assign(logit=0.0)])
    assert np.allclose(mean["logit"], scores["logit"] / 2)


def test_plain_baseline_finds_a_low_pass(voices):
    random = np.random.default_rng(0)
    noise = [0.05 * random.standard_normal(20000) for _ in range(12)]
    samples = [signal.sosfilt(signal.butter(4, 0.5, output="sos"), x) if i > 5 else x for i, x in enumerate(noise)]
    table = voices.table.assign(split=["train", "train", "test"] * 4)
    some = voice_data.Voices(table, [voice_data.to_int16(x) for x in samples])
    features = np.stack([voice_evaluation.lfcc_statistics(x) for x in samples])
    scores = voice_evaluation.lfcc_baseline(features, some, voice_training.VoiceSettings())
    assert scores["row"].tolist() == [2, 5, 8, 11] and (scores["logit"] > 0).tolist() == [False, False, True, True]


def test_a_speaker_is_flagged_by_the_mean_of_the_voices(voices):
    class Loudest:  # answers 1 for the voices whose sixth sample is positive: about half
        input_shape = (None, 64600)

        def predict(self, inputs, **_):
            return {"logit": np.sign(inputs[:, 5:6])}

    found = voice_evaluation.false_alarms([Loudest()], voices, 0.0, 64600)
    assert found.index.tolist() == list(voice_evaluation.CHANNELS)
    assert (found["speakers"] == 6).all() and found.loc["as recorded", "share"] == found.loc["as recorded", "share of voices"]
    assert (voice_evaluation.false_alarms([Loudest()], voices, 1.5, 64600)["flagged"] == 0).all()
    assert (voice_evaluation.false_alarms([Loudest()], voices, -1.5, 64600)["share"] == 1).all()


def test_joined_voices_keep_their_sources(voices):
    both = voices + voices
    assert both.table["source"].tolist()[6:9] == [0, 1, 2] and both.table["source"].tolist()[18:21] == [12, 13, 14]
    assert len(both.samples) == 24
    narrow = both.take(np.arange(2)).at(8000)
    assert narrow.rate == 8000 and abs(len(narrow.samples[0]) - LENGTH / 2) < 200
