"""Save and load networks as ``.keras`` files: float16 on disk, float32 in memory; loading runs no code."""

import json
import math
import zipfile
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from . import disk
from .voice import layers as _  # noqa: F401  registers the layers of saved networks


# --- files --------------------------------------------------------------------------------------------------
def save_network(model: keras.Model, path: Path | str, policy: str = "float16") -> None:
    """Write ``model`` as a .keras file without optimizer, its weights in float16 (half the size) or float32.

    Raises:
        ValueError: a weight is not finite in that type (above 65,504 in float16, or NaN); names the layer.
    """
    weights = [np.asarray(ops.convert_to_numpy(x), "float32") for x in model.weights]
    with np.errstate(over="ignore"):
        stored = [x.astype(policy) for x in weights]
    for variable, weight, kept in zip(model.weights, weights, stored, strict=True):
        if not np.isfinite(kept).all():
            worst = np.abs(weight).max()
            raise ValueError(f"{path}: layer {variable.path} holds {worst:.6g}, which {policy} "
                             f"(up to {np.finfo(policy).max:.6g}) cannot store")
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)  # it would store an optimizer
    twin = _rebuilt(config, policy)
    twin.set_weights(stored)
    with disk.temporary() as folder:
        twin.save(folder / "network.keras")
        disk.replace(path, (folder / "network.keras").read_bytes())


def load_network(path: Path | str, policy: str = "float32") -> keras.Model:
    """Load a .keras file under the dtype policy ``policy``, whatever the file's own; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a .keras file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected weights in a .keras file")
    if not zipfile.is_zipfile(path) or "config.json" not in zipfile.ZipFile(path).namelist():
        raise ValueError(f"{path}: found {path.stat().st_size} bytes, not an archive; expected a .keras file")
    with zipfile.ZipFile(path) as file, disk.temporary() as folder:
        model = _rebuilt(json.loads(file.read("config.json")), policy)
        model.load_weights(file.extract("model.weights.h5", folder))  # seeking in an archive is slow
    return model


def load_branch(folder: Path | str, name: str) -> keras.Model:
    """The network NAME.keras of a folder, ``averaged`` with its ensemble members NAME_*.keras."""
    first = load_network(Path(folder) / f"{name}.keras")
    others = [load_network(path) for path in sorted(Path(folder).glob(f"{name}_*.keras"))]
    return averaged(first, *others) if others else first


def averaged(first: keras.Model, *others: keras.Model) -> keras.Model:
    """The network ``first`` with its logit replaced by the mean of the logits of ``first`` and ``others``.

    The layers of ``first`` are unchanged: its "logit" layer still holds its own logit.
    """
    logits = [first.output["logit"], *(other(first.input)["logit"] for other in others)]
    return keras.Model(first.input, {**first.output, "logit": layers.Average(name="mean_logit")(logits)},
                       name=first.name)


def run(network: keras.Model, inputs: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Outputs of ``network``, by name; it sees exactly ``batch`` rows at a time, the last ones zeros."""
    count = len(inputs)
    padded = np.zeros((math.ceil(count / batch) * batch, *inputs.shape[1:]), np.float32)
    padded[:count] = inputs
    parts = [network.predict_on_batch(padded[start:start + batch]) for start in range(0, len(padded), batch)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts])[:count]
            for name in network.output}


def _rebuilt(config: dict, policy: str) -> keras.Model:
    """A fresh model from a serialised one, every layer under the dtype policy ``policy``."""
    return keras.saving.deserialize_keras_object(_with_policy(config, policy), safe_mode=True)

# Written by newer Keras releases and unknown to Kaggle's 3.13; no effect at these values.
NEWER_DEFAULTS = {
    "input_axes": None, "output_axes": None, "renorm": False, "renorm_clipping": None,
    "renorm_momentum": 0.99,
}  # fmt: skip


def _with_policy(config, policy: str):
    if isinstance(config, list):
        return [_with_policy(x, policy) for x in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {"name": policy}}
    return {key: _with_policy(x, policy) for key, x in config.items()
            if not (key in NEWER_DEFAULTS and x == NEWER_DEFAULTS[key])}
