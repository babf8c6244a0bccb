"""Recordings from git clones, folds of pages, balanced batches, channel effects, figures of the folds."""

import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy import signal
from scipy.io import wavfile

from kaggle_utils import storage
from kaggle_utils.kaggle.paths import models_folder
from recipes import blocks
from recipes.voice import augment, channels, corpus
from recipes.voice import data as voice_data
from recipes.voice import evaluation as voice_evaluation
from recipes.voice import training as voice_training

LENGTH = 20000


@pytest.fixture
def voices() -> voice_data.Voices:
    """Two pages with both classes, one with spoofed, one with bona fide speech; a system on two pages."""
    random = np.random.default_rng(0)
    rows = [
        (0, "", "a", "1", "a:1"),
        (0, "", "a", "2", "a:2"),
        (1, "x", "a", "1", "a:1"),
        (1, "y", "a", "1", ""),
        (0, "", "b", "3", ""),
        (1, "x", "b", "3", ""),
        (1, "z", "c", "4", ""),
        (0, "", "d", "5", ""),
    ]
    table = pd.DataFrame(rows, columns=["label", "system", "page", "speaker", "pair_key"])
    table["file"] = [f"{row}.flac" for row in range(len(rows))]
    samples = [voice_data.to_int16(0.1 * random.standard_normal(LENGTH + 500 * i)) for i in range(len(rows))]
    return voice_data.Voices(table, samples)


# --- recordings ------------------------------------------------------------------------------------------
def tone(seconds: float, rate: int) -> np.ndarray:
    return voice_data.to_int16(0.3 * np.sin(2 * np.pi * 500 * np.arange(int(seconds * rate)) / rate))


def commit(repository, files: dict[str, np.ndarray | bytes], rate: int) -> str:
    """Make a git repository of these sound files and return its commit."""
    repository.mkdir(parents=True)
    for name, samples in files.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(samples, bytes):
            (repository / name).write_bytes(samples)
        else:
            wavfile.write(repository / name, rate, samples)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(repository)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "demo"], check=True)
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_corpus_is_built_from_clones(tmp_path):
    demo = commit(
        tmp_path / "one/demo",
        {"real.wav": np.pad(tone(6, 24000), 3000), "fake/a b.wav": tone(1, 24000)},
        24000,
    )
    other = commit(tmp_path / "two/demo", {"lfs.wav": b"version https://git-lfs.github.com/spec/v1\n"}, 8000)
    rows = [
        ("one/demo", demo, "real.wav", "bona_fide", ""),
        ("one/demo", demo, "fake/a b.wav", "spoof", "tts"),
        ("one/demo", demo, "gone.wav", "spoof", "tts"),
        ("two/demo", other, "lfs.wav", "spoof", "tts"),
        ("no/clone", demo, "real.wav", "bona_fide", ""),
    ]
    manifest = pd.DataFrame(rows, columns=["repository", "commit", "path", "label", "system"])
    manifest = manifest.assign(speaker="s", language="en", licence="MIT", pair_key="")
    manifest.to_csv(tmp_path / "manifest.csv", index=False)
    missing = corpus.build(tmp_path, tmp_path / "voice/systems", tmp_path / "manifest.csv")
    assert missing["repository"].tolist() == ["one/demo", "two/demo", "no/clone"]
    assert "Git LFS" in missing["reason"].iloc[1]
    read = voice_data.read_voices(tmp_path / "voice")
    assert read.table[["label", "system", "page"]].values.tolist() == [
        [0, "", "one/demo"],
        [1, "tts", "one/demo"],
    ]
    assert len(read.samples[0]) == 64000 and 15900 <= len(read.samples[1]) <= 16000


def test_the_manifest_names_each_recording_once():
    table = corpus.read_manifest()
    assert not table.duplicated(["repository", "path"]).any() and (table["commit"].str.len() == 40).all()
    assert (table["system"].eq("") == table["label"].eq("bona_fide")).all()
    assert table.loc[table["label"] == "spoof", "system"].nunique() > 50


def test_a_manifest_with_other_columns_is_refused(tmp_path):
    (tmp_path / "manifest.csv").write_text("repository,path\n")
    with pytest.raises(ValueError, match="commit"):
        corpus.read_manifest(tmp_path / "manifest.csv")


def test_voices_are_saved_and_read_back(voices, tmp_path):
    voices.copies = [[samples[:100]] * (i % 3) for i, samples in enumerate(voices.samples)]
    voices.save(tmp_path / "voices.npz")
    read = voice_data.Voices.load(tmp_path / "voices.npz")
    assert read.table.equals(voices.table) and read.rate == voices.rate
    assert all(np.array_equal(a, b) for a, b in zip(read.samples, voices.samples, strict=True))
    assert [len(some) for some in read.copies] == [i % 3 for i in range(8)]
    narrow = read.take(np.arange(2)).at(8000)
    assert narrow.rate == 8000 and abs(len(narrow.samples[0]) - LENGTH / 2) < 200


# --- folds -----------------------------------------------------------------------------------------------
def test_no_page_and_no_system_is_on_two_sides(voices):
    fold = voice_data.folds(voices.table, 3)
    assert voices.table.groupby(fold)["page"].nunique().sum() == 4
    for judged in range(3):
        learnt = voices.table.iloc[voice_data.training_rows(voices.table, fold, judged)]
        there = voices.table[fold == judged]
        assert not set(learnt["page"]) & set(there["page"])
        assert not (set(learnt["system"]) & set(there["system"])) - {""}


def test_known_systems_are_judged_on_unknown_speakers(voices):
    learnt, judged = voice_evaluation.split_speakers(voices.table)
    learnt, judged = voices.table.iloc[learnt], voices.table.iloc[judged]
    assert not set(learnt["speaker"]) & set(judged["speaker"]) and set(judged["system"]) <= set(
        learnt["system"]
    )


# --- batches ---------------------------------------------------------------------------------------------
def test_systems_weigh_alike_whatever_their_files():
    rows = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "z")]
    table = pd.DataFrame(rows, columns=["page", "system"]).assign(label=1)
    share = voice_training.shares(table)
    assert share.sum() == pytest.approx(1)
    assert share[0] + share[1] == pytest.approx(share[2])
    assert share[:3].sum() == pytest.approx(np.sqrt(2) * share[3])


def test_batches_are_balanced_and_pair_voices_of_a_page(voices):
    settings = voice_training.VoiceSettings(batch_size=8, steps=3, same_utterance=1, same_page=1)
    batches = voice_training.VoiceBatches(voices, np.arange(8), settings)
    samples, labels = batches[0]
    assert samples.shape == (8, 64600) and samples.dtype == np.int16 and batches.num_batches == 3
    assert labels[:, 0].tolist() == [1] * 4 + [0] * 4
    random = np.random.default_rng(0)
    assert {batches._beside(2, random) for _ in range(20)} == {0}  # the same utterance
    assert {batches._beside(3, random) for _ in range(20)} == {0, 1}  # the same page
    assert {batches._beside(6, random) for _ in range(60)} == {0, 1, 4, 7}  # a page without bona fide speech
    assert np.array_equal(samples, batches[0][0])
    batches.epoch = 1
    assert not np.array_equal(samples, batches[0][0])


def test_batches_need_both_classes(voices):
    with pytest.raises(ValueError, match="2 and 0"):
        voice_training.VoiceBatches(voices, np.arange(2), voice_training.VoiceSettings())


# --- channels --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", ["aac_64", "opus_24", "telephone", "slower"])
def test_a_codec_keeps_the_voices_apart(codec):
    tones = [
        voice_data.to_int16(0.3 * np.sin(2 * np.pi * f * np.arange(16000) / 16000)) for f in (1000, 2000)
    ]
    for frequency, heard in zip((1000, 2000), voice_data.recoded(tones, codec), strict=True):
        speed = 0.92 if codec == "slower" else 1.0
        assert heard.dtype == np.int16 and abs(len(heard) - 20000 / speed) < 600
        spectrum = np.abs(np.fft.rfft(heard[4000:12000] * np.hanning(8000)))
        assert abs(np.argmax(spectrum) * 2 - frequency * speed) < 10


@pytest.mark.parametrize("channel", [name for name in channels.CHANNELS if name not in voice_data.CODECS])
def test_a_channel_keeps_the_length(voices, channel):
    some = voices.take(np.arange(2))
    heard = channels.heard_through(some, channel)
    assert all(abs(len(a) - len(b)) <= 320 for a, b in zip(heard.samples, some.samples, strict=True))


def test_noise_has_the_asked_level():
    noise = voice_data.noisy(tone(1, 16000), 15).astype(float) - tone(1, 16000)
    power = np.mean(np.square(tone(1, 16000), dtype=float))
    assert 10 * np.log10(power / np.mean(noise**2)) == pytest.approx(15, abs=0.2)


def test_channel_effects_keep_level_and_length_and_rest_at_inference(voices):
    layer = augment.ChannelAugment(seed=0, room=0.5)
    samples = np.stack([part[:16000] for part in voices.samples])
    heard = np.asarray(layer(samples, training=True))
    assert heard.shape == samples.shape and np.isfinite(heard).all()
    assert np.allclose(np.sqrt(np.mean(heard**2, axis=1)), 0.05, rtol=0.01)
    assert np.allclose(np.asarray(layer(samples)), samples / 32768)
    assert augment.ChannelAugment.from_config(layer.get_config()).settings == layer.settings


# --- runs ------------------------------------------------------------------------------------------------
def test_a_run_takes_its_batches_in_order_and_is_saved(voices, tmp_path, monkeypatch):
    def build(settings, policy="float32"):  # a line on the samples learns in no time
        window = voice_training.keras.Input((settings.length,))
        return voice_training.keras.Model(window, {"logit": voice_training.keras.layers.Dense(1)(window)})

    seen, getitem = [], voice_training.VoiceBatches.__getitem__
    monkeypatch.setattr(
        voice_training.VoiceBatches,
        "__getitem__",
        lambda self, index: (seen.append(index), getitem(self, index))[1],
    )
    monkeypatch.setattr(voice_training, "build_voice_network", build)
    settings = voice_training.VoiceSettings(
        "short", network_options={"samples": 8000}, epochs=1, steps=6, batch_size=4
    )
    run = voice_training.train_voice(settings, voices, np.arange(8), tmp_path, workers=1)
    assert seen[-6:] == list(range(6))  # Keras asks for the first ones twice
    loaded = storage.load_network(tmp_path / "short.keras")
    logits = [
        voice_training.predict_logits(network, voices, np.arange(8), settings.length, batch=3)
        for network in (loaded, run.network)
    ]
    assert np.allclose(*logits, atol=0.02) and logits[0].std() > 0.02


def test_the_frozen_embedding_gets_a_head(voices):
    settings = voice_training.RUNS["quality"]
    if not (models_folder() / settings.frozen).is_file():
        pytest.skip("needs the weights of models/")
    low = [signal.sosfilt(signal.butter(4, 0.3, output="sos"), samples) for samples in voices.samples]
    samples = [
        voice_data.to_int16(x / 32768) if label else s
        for x, s, label in zip(low, voices.samples, voices.table["label"], strict=True)
    ]
    network = voice_training.fit_head(settings, voice_data.Voices(voices.table, samples))
    logits = voice_training.predict_logits(
        network, voice_data.Voices(voices.table, samples), np.arange(8), 64600, 4
    )
    assert ((logits > 0) == (voices.table["label"] == 1)).all()


def test_members_are_averaged():
    window = voice_training.keras.Input((64600,))
    level = voice_training.keras.ops.mean(window, axis=1, keepdims=True)
    branch = voice_training.keras.Model(window, {"embedding": level})
    first, second = blocks.with_head(branch), blocks.with_head(branch)
    first.get_layer("logit").set_weights([np.array([[2.0]]), np.array([0.0])])
    second.get_layer("logit").set_weights([np.array([[4.0]]), np.array([1.0])])
    both = storage.averaged(first, second)
    assert np.asarray(both(np.ones((1, 64600)))["logit"])[0, 0] == pytest.approx(3.5)


# --- figures ---------------------------------------------------------------------------------------------
def scored(real: list[float], fake: list[float], **columns) -> pd.DataFrame:
    table = pd.DataFrame({"label": [0] * len(real) + [1] * len(fake), "logit": real + fake})
    table = table.assign(
        system=np.where(table["label"], "x", ""),
        page="a",
        channel="as recorded",
        fold=0,
        network="linear",
        speaker="",
        pair_key="",
        file=[f"{row}" for row in table.index],
    )
    return table.assign(row=table.index, **columns)


def test_figures_of_known_scores():
    reals, fakes = list(np.linspace(-3, 1, 100)), list(np.linspace(0, 4, 100))
    one = scored(reals, fakes)
    assert voice_evaluation.error_rates(one).loc["a", "EER"] == pytest.approx(1 / 8, abs=0.01)
    assert voice_evaluation.recall(one).loc["x", "share"] == pytest.approx(0.8, abs=0.01)
    alarms = voice_evaluation.false_alarms(one, (1.0, 0.0), "page").loc["all"]
    assert alarms["share"] == 0.25 and alarms["low"] < 0.25 < alarms["high"]
    scale, shift = voice_evaluation.careful_line(one)
    assert scale > 0 and -shift / scale == pytest.approx(0.84, abs=0.02)


def test_an_average_needs_every_score():
    one = scored([0.0, 1.0], [2.0, 3.0])
    other = one.assign(network="lfcc", logit=0.0)
    mean = voice_evaluation.averaged(pd.concat([one, other]), ("linear", "lfcc"))
    assert mean["logit"].tolist() == [0, 0.5, 1, 1.5]
    with pytest.raises(ValueError, match="every voice"):
        voice_evaluation.averaged(pd.concat([one, other.iloc[1:]]), ("linear", "lfcc"))


def test_figures_are_results():
    random = np.random.default_rng(0)
    parts = [
        scored(
            list(random.normal(-1, 1, 30)),
            list(random.normal(1, 1, 30)),
            fold=fold,
            network=name,
            channel=channel,
            page=page,
        )
        for fold, page in ((0, "a"), (1, "b"), (-1, "a"))
        for name in voice_evaluation.MEMBERS
        for channel in channels.CHANNELS[:2]
    ]
    entries = voice_evaluation.figures(pd.concat(parts, ignore_index=True), (1.0, 0.0))
    found = {entry["name"]: entry for entry in entries}
    assert {
        "voice/EER/a",
        "voice/EER/all",
        "voice/EER through/aac_64",
        "voice/over one half/b",
        "voice/EER of/linear",
        "voice/recall/x",
    } <= set(found)
    assert all(0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1 for entry in entries)


def test_plain_baseline_finds_a_low_pass(voices):
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"label": [0, 1] * 10, "page": np.repeat(list("abcde"), 4), "speaker": "", "pair_key": ""}
    )
    table = table.assign(system=np.where(table["label"], table["page"], ""), file=table.index.astype(str))
    noise = [0.05 * random.standard_normal(20000) for _ in range(20)]
    narrow = signal.butter(4, 0.5, output="sos")
    samples = [
        signal.sosfilt(narrow, x) if label else x for x, label in zip(noise, table["label"], strict=True)
    ]
    some = voice_data.Voices(table, [voice_data.to_int16(x) for x in samples])
    scores = voice_evaluation.lfcc_baseline(some)
    assert len(scores) == 20 and ((scores["logit"] > 0) == (scores["label"] == 1)).all()
