"""The networks against the description of the study, and their files.

Building is symbolic and cheap; what is run is run on tiny inputs.
"""

import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

from kaggle_utils import storage
from kaggle_utils.kaggle.paths import research_data
from kaggle_utils.voice import layers as voice_layers
from recipes import blocks
from recipes.face import networks as face_networks
from recipes.fusion import networks as fusion_networks
from recipes.voice import networks as voice_networks


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def shapes(model):
    return {key: tuple(x.shape[1:]) for key, x in model.output.items()}


def widths(outputs):
    return {key: (units,) for key, units in outputs.items()}


def pixels(count=2, size=64, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (count, size, size, 3)).astype("float32")


def run(model, x):
    return {key: np.asarray(value) for key, value in model.predict_on_batch(x).items()}


# --- the study's networks ----------------------------------------------------------------------------------


def test_one_image_cnn():
    model = face_networks.one_image_cnn()
    assert model.count_params() == 524_520
    assert shapes(model) == widths(blocks.FACE_OUTPUTS)
    pooled = [x.output.shape[1:] for x in model.layers if isinstance(x, keras.layers.MaxPooling2D)]
    assert pooled == [(128, 128, 200), (64, 64, 88), (32, 32, 64), (8, 8, 64)]
    norms = [x.output.shape[1:] for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert norms == [(256, 256, 200), (128, 128, 88), (64, 64, 64), (32, 32, 64)]
    dilations = [x.dilation_rate[0] for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert sorted(dilations)[-4:] == [2, 2, 3, 3]


@pytest.mark.parametrize("option", [
    {"normalization": "group"}, {"attention": "bam"}, {"attention": "time_series"},
    {"block": "residual"}, {"block": "gated"}, {"block": "dense"},
])  # fmt: skip
def test_remedies_keep_the_outputs(option):
    model = face_networks.one_image_cnn(64, **option)
    assert shapes(model) == widths(blocks.FACE_OUTPUTS)
    outputs = run(model, pixels())
    assert all(np.isfinite(x).all() and np.ptp(x) > 0 for x in outputs.values())


@pytest.fixture
def double_precision():
    """In float32 the order of summation, which depends on the batch, moves a GroupNorm by up to 4e-4."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)


def test_group_norm_scores_a_crop_alone_as_in_a_batch(double_precision):
    model, x = face_networks.one_image_cnn(64, "group"), pixels(4)
    outputs = [np.asarray(model(part, training=False)["side3"]) for part in (x, x[:1])]
    assert outputs[0].dtype == np.float64
    np.testing.assert_allclose(outputs[0][:1], outputs[1], rtol=1e-9, atol=1e-9)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)


@pytest.mark.parametrize("option", [{"normalization": "layer"}, {"attention": "se"}, {"block": "plain"}])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match="expected"):
        face_networks.one_image_cnn(64, **option)


@pytest.mark.parametrize(("as_run", "parameters"), [(True, 4_598_264), (False, 5_584_440)])
def test_voice_cnn(as_run, parameters):
    model = voice_networks.voice_cnn(as_run)
    assert model.count_params() == parameters
    assert shapes(model) == widths(blocks.VOICE_OUTPUTS)
    described = {
        "stem": (30000, 77), "c1": (2996, 128), "c2": (1484, 64), "c3": (733, 128), "c4": (724, 256),
        "stage1_n1": (2996, 132), "stage1_n2": (2996, 264), "stage1_n3": (2996, 528), "stage1_n4": (2996, 1056),
        "stage3_n1": (733, 160), "stage3_n2": (733, 320), "stage3_n3": (733, 640), "stage3_n4": (733, 672),
    }  # fmt: skip
    second = {f"stage2_n{i}": (1484, channels) for i, channels in enumerate((80, 160, 320, 336), 1)}
    found = {x.name: x.output.shape[1:] for x in model.layers if x.name in {**described, **second}}
    assert found == (described if as_run else {**described, **second})


def test_pooling_of_the_voice_cnn():
    x = np.random.default_rng(0).normal(size=(1, 50, 2)).astype("float32")
    smallest = np.asarray(voice_layers.MinPooling1D(10)(x))
    expected = [x[:, max(0, i - 4) : i + 6].min(axis=1) for i in range(50)]
    np.testing.assert_allclose(smallest, np.stack(expected, axis=1))


@pytest.mark.parametrize(("as_run", "parameters", "d"), [(True, 383_393, 2080), (False, 726_657, 2464)])
def test_last_cnn(as_run, parameters, d):
    model = fusion_networks.last_cnn(as_run)
    assert model.count_params() == parameters
    assert model.get_layer("y").output.shape == (None, 672)
    assert model.get_layer("d").output.shape == (None, d)
    assert model.output.shape == (None, 1)


def fusion_inputs(model, seed):
    random = np.random.default_rng(seed)
    inputs = {key: random.normal(size=(3, *x.shape[1:])).astype("float32") for key, x in model.input.items()}
    return {**inputs, "face_mask": np.ones((3, 10), "float32"), "voice_mask": np.ones((3, 1), "float32")}


@pytest.mark.parametrize("part", ["face", "voice"])
def test_masked_parts_do_not_count(part):
    model = fusion_networks.last_cnn(normalization="group")
    first, second = fusion_inputs(model, 0), fusion_inputs(model, 1)
    mixed = {key: second[key] if key.startswith(part) else x for key, x in first.items()}
    assert np.abs(model.predict_on_batch(first) - model.predict_on_batch(mixed)).max() > 1e-3
    first[f"{part}_mask"] = mixed[f"{part}_mask"] = first[f"{part}_mask"] * 0
    np.testing.assert_allclose(model.predict_on_batch(first), model.predict_on_batch(mixed))


def test_one_masked_frame_does_not_count():
    model = fusion_networks.last_cnn()
    first = fusion_inputs(model, 0)
    first["face_mask"][:, 4] = 0
    mixed = {key: x.copy() for key, x in first.items()}
    for key in blocks.FACE_OUTPUTS:
        mixed[f"face_{key}"][:, 4] = 7
    np.testing.assert_allclose(model.predict_on_batch(first), model.predict_on_batch(mixed))


def test_whole_network_as_run():
    face, voice, last = (
        face_networks.one_image_cnn(),
        voice_networks.voice_cnn(True),
        fusion_networks.last_cnn(True),
    )
    assert face.count_params() + voice.count_params() + last.count_params() == 5_506_177
    assert 10 * face.count_params() + voice.count_params() + last.count_params() == 10_226_857


# --- the networks of others --------------------------------------------------------------------------------


def test_mesoinception4():
    model = blocks.with_head(face_networks.mesoinception4())
    assert sum(np.prod(x.shape) for x in model.trainable_weights) == 28_615  # as Afchar et al. give it
    assert shapes(model) == {"embedding": (16,), "logit": (1,)}


@pytest.fixture(scope="module")
def inception():
    return blocks.with_head(face_networks.face_inception(75))


def test_a_branch_with_members_answers_by_the_mean_of_their_logits(tmp_path):
    faces = np.random.default_rng(0).uniform(0, 255, (2, 75, 75, 3)).astype("float32")
    members = [
        blocks.with_head(face_networks.one_image_cnn(input_size=75)),
        blocks.with_head(face_networks.mesoinception4(75)),
    ]
    for network, name in zip(members, ("face", "face_meso"), strict=True):
        storage.save_network(network, tmp_path / f"{name}.keras", "float32")
    first, second = (network.predict(faces, verbose=0) for network in members)
    both = storage.load_branch(tmp_path, "face").predict(faces, verbose=0)
    np.testing.assert_allclose(both["logit"], (first["logit"] + second["logit"]) / 2, atol=1e-5)
    np.testing.assert_allclose(both["side1"], first["side1"], atol=1e-5)
    (tmp_path / "face_meso.keras").unlink()
    alone = storage.load_branch(tmp_path, "face").predict(faces, verbose=0)
    np.testing.assert_allclose(alone["logit"], first["logit"], atol=1e-5)


def test_a_high_pass_network_sees_no_flat_colour():
    network = face_networks.face_inception(75, high_pass=True)
    flat = np.stack([np.full((75, 75, 3), level, "float32") for level in (0, 90, 255)])
    inner = network.get_layer("residual")(flat)[:, 3:-3, 3:-3]
    np.testing.assert_allclose(inner, 0, atol=1e-3)
    assert not network.get_layer("residual").trainable


def test_face_inception(inception):
    assert shapes(inception) == {**widths(blocks.FACE_OUTPUTS), "logit": (1,)}
    for size in (60, 75, 101):  # any size of crop
        assert run(inception, pixels(1, size))["logit"].shape == (1, 1)


def test_inception_weights_of_another_network_are_refused(inception, tmp_path):
    np.savez(
        tmp_path / "few.npz", **{"conv2d_1/kernel": 1, "conv2d_1/kernel:scale": 1, "conv2d_1/kernel:min": 0}
    )
    with pytest.raises(ValueError, match="found 1 layers conv2d, the network has 94"):
        face_networks.load_inception_weights(inception, tmp_path / "few.npz")


def test_inception_weights():
    """In each layer on the way, the means over a real picture must resemble the stored moving means."""
    data = research_data("dfdc_clips")
    if data is None:
        pytest.skip(
            "DEEPFAKE_DATA does not name the folder of research data with the InceptionV3 weights beside it"
        )
    from skimage.data import astronaut

    inception = face_networks.face_inception()  # the weights know objects of the size they have at 224 pixels
    face_networks.load_inception_weights(
        inception, data.parent.parent / "weights" / "inception_v3_notop_uint8.npz"
    )
    norms = [x for x in inception.layers if isinstance(x, keras.layers.BatchNormalization)]
    before = keras.Model(inception.input, [x.input for x in norms])
    crops = np.stack([np.roll(astronaut()[:, ::flip], 100 * i, 1) for i in range(4) for flip in (1, -1)])
    agreement = [
        np.corrcoef(np.mean(x, axis=(0, 1, 2)), norm.moving_mean)[0, 1]
        for x, norm in zip(before.predict_on_batch(crops.astype("float32")), norms, strict=True)
    ]
    assert np.median(agreement) > 0.8, agreement


def test_voice_inception():
    model = blocks.with_head(voice_networks.voice_inception())
    assert model.count_params() < 2_000_000
    assert shapes(model) == {**widths(blocks.VOICE_OUTPUTS), "logit": (1,)}
    silence = run(model, np.zeros((1, 64600), "float32"))
    assert all(np.isfinite(x).all() for x in silence.values())


# --- spectrograms ------------------------------------------------------------------------------------------


def chirp():
    time = np.arange(16000) / 16000
    noise = np.random.default_rng(0).normal(0, 1e-3, 16000)
    return (0.5 * np.sin(2 * np.pi * (200 + 3000 * time) * time) + noise).astype("float32")


def test_mel_filter_bank():
    librosa = pytest.importorskip("librosa")
    theirs = librosa.filters.mel(sr=16000, n_fft=512, n_mels=80, htk=True, norm=None)
    np.testing.assert_allclose(voice_layers.filter_bank("mel", 80, 16000, 512).T, theirs, atol=1e-5)


def test_linear_filter_bank_sums_to_one_between_the_outer_centres():
    bank = voice_layers.filter_bank("lfcc", 40, 16000, 512)
    np.testing.assert_allclose(bank[7:-7].sum(axis=1), 1, atol=1e-5)


def test_log_spectrograms():
    """Against librosa's STFT and scipy's DCT."""
    librosa, fft = pytest.importorskip("librosa"), pytest.importorskip("scipy.fft")
    power = np.abs(librosa.stft(chirp(), n_fft=512, hop_length=160, pad_mode="reflect").T) ** 2
    mel = power @ voice_layers.filter_bank("mel", 80, 16000, 512)
    linear = power @ voice_layers.filter_bank("lfcc", 40, 16000, 512)
    expected = {
        "linear": np.log(power + 1e-6),
        "mel": np.log(mel + 1e-6),
        "lfcc": fft.dct(np.log(linear + 1e-6), norm="ortho"),
    }
    for kind, values in expected.items():
        layer = voice_layers.LogSpectrogram(kind, bands=values.shape[1], standardize="none")
        found = np.asarray(layer(chirp()[None]))
        assert found.shape == layer.compute_output_shape((1, 16000)) == (1, *values.shape, 1)
        assert np.abs(found[0, ..., 0] - values).max() < 0.01


def test_standardized_spectrogram_ignores_the_level():
    loud, soft = (
        np.asarray(voice_layers.LogSpectrogram(floor=1e-12)(chirp()[None] * x)) for x in (1.0, 0.5)
    )
    np.testing.assert_allclose(loud, soft, atol=0.01)
    np.testing.assert_allclose(loud.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(loud.std(axis=1), 1, atol=1e-2)


def test_spec_augment_hides_in_training_alone():
    layer, x = voice_layers.SpecAugment(0.2, 0.2, seed=1), np.ones((8, 100, 50, 1), "float32")
    assert np.asarray(layer(x, training=False)).all()
    hidden = 1 - np.asarray(layer(x, training=True)).mean(axis=(1, 2, 3))
    assert (hidden <= 1 - 0.6 * 0.6 + 0.1).all() and len(set(hidden)) > 4


# --- files -------------------------------------------------------------------------------------------------


def stirred(model, seed=0):
    """Small random weights everywhere, BatchNorm statistics too: fresh ones would hide an error."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        value = np.asarray(variable) + random.normal(0, 0.02, variable.shape)
        variable.assign(np.maximum(value, 0.5) if "variance" in variable.name else value)
    return model


MAKERS = {
    "face": lambda: (face_networks.one_image_cnn(64, attention="bam"), pixels()),
    "group": lambda: (face_networks.one_image_cnn(64, "group", "time_series"), pixels()),
    "meso": lambda: (face_networks.mesoinception4(64), pixels()),
    "voice": lambda: (voice_networks.voice_inception(samples=8000, width=8), chirp()[None, :8000]),
    "reference_voice": lambda: (
        voice_networks.voice_cnn(as_run=True),
        chirp()[None, :15000].repeat(2, 1)[..., None],
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_files_keep_the_scores(name, tmp_path):
    branch, x = MAKERS[name]()
    model = stirred(blocks.with_head(branch))
    storage.save_network(model, tmp_path / "model.keras")
    again = storage.load_network(tmp_path / "model.keras")
    assert {str(v.dtype) for v in again.weights} == {"float32"}
    assert {layer.dtype_policy.name for layer in again.layers} == {"float32"}
    before, after = run(model, x), run(again, x)
    assert list(before) == list(after)
    for key in before:
        np.testing.assert_allclose(before[key], after[key], atol=4e-3 * (1 + np.abs(before[key]).max()))
    for ours, theirs in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(
            np.asarray(ours).astype("float16").astype("float32"), np.asarray(theirs)
        )


def test_a_file_holds_two_bytes_a_weight(tmp_path):
    model = fusion_networks.last_cnn()
    storage.save_network(model, tmp_path / "last.keras")
    assert (tmp_path / "last.keras").stat().st_size < 2.3 * model.count_params()
    with zipfile.ZipFile(tmp_path / "last.keras") as file:
        assert "float16" in json.dumps(json.loads(file.read("config.json")))


def test_settings_that_kaggle_s_keras_does_not_know_are_left_out(tmp_path):
    storage.save_network(fusion_networks.last_cnn(), tmp_path / "last.keras")
    with zipfile.ZipFile(tmp_path / "last.keras") as file:
        config = json.dumps(storage._with_policy(json.loads(file.read("config.json")), "float32"))
    assert "BatchNormalization" in config and "GlorotUniform" in config
    assert not any(f'"{name}"' in config for name in storage.NEWER_DEFAULTS)


def test_a_weight_too_large_is_named(tmp_path):
    model = blocks.with_head(face_networks.mesoinception4(64))
    model.get_layer("logit").bias.assign([7e4])
    with pytest.raises(ValueError, match="logit/bias holds 70000"):
        storage.save_network(model, tmp_path / "model.keras")
    assert not (tmp_path / "model.keras").exists()


def test_what_is_no_network_is_refused(tmp_path):
    (tmp_path / "text.keras").write_text("not weights")
    with pytest.raises(ValueError, match="text.keras: found 11 bytes"):
        storage.load_network(tmp_path / "text.keras")
    with pytest.raises(FileNotFoundError, match="none.keras"):
        storage.load_network(tmp_path / "none.keras")


def test_a_lambda_in_a_file_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Lambda(lambda x: x)])
    model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="Lambda|lambda"):
        storage.load_network(tmp_path / "lambda.keras")


def test_a_function_of_another_module_in_a_file_is_not_called(tmp_path):
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, activation="relu")])
    storage.save_network(network, tmp_path / "plain.keras")
    ran = tmp_path / "ran"
    call = {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"}
    with (
        zipfile.ZipFile(tmp_path / "plain.keras") as plain,
        zipfile.ZipFile(tmp_path / "evil.keras", "w") as evil,
    ):
        config = json.loads(plain.read("config.json"))
        config["config"]["layers"].append(
            {
                "module": "keras.layers",
                "class_name": "Activation",
                "registered_name": None,
                "config": {"name": f"touch {ran}", "activation": call},
            }
        )
        evil.writestr("config.json", json.dumps(config))
    with pytest.raises((TypeError, ValueError), match="system"):
        storage.load_network(tmp_path / "evil.keras")
    assert not ran.exists()


def test_import_needs_no_heavy_package():
    code = (
        "import sys; sys.modules['tensorflow'] = None; "  # keras itself must not need it either
        "import kaggle_utils.metrics; "
        "assert not {'mtcnn', 'moviepy', 'librosa', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_compiled_network_is_stored_without_its_optimizer(tmp_path):
    model = fusion_networks.last_cnn()
    storage.save_network(model, tmp_path / "bare.keras")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    storage.save_network(model, tmp_path / "compiled.keras")
    assert (tmp_path / "compiled.keras").stat().st_size < 1.1 * (tmp_path / "bare.keras").stat().st_size
