"""Train the last network on the frozen branches, with clips that are assembled from faces and voices.

Labelled clips with sound are few, so a training clip is made of ten augmented views of one face crop, which stand for
ten frames, and a voice drawn at random; it is FAKE when the face or the voice is.
"""

from dataclasses import dataclass

import keras
import numpy as np
import pandas as pd

from .augment import FaceAugment
from .dataset import FAKE
from .fusion import SIDES
from .networks import FRAMES, last_cnn
from .training import Faces

MISSING = 0.15  # share of the clips without a face, and of those without a voice


@dataclass
class Embeddings:
    """Outputs of a branch for labelled faces or voices, row by row.

    ``outputs``: arrays by name (``embedding``, ``side1`` …, ``logit``), each (N, …); for faces (N, 10, …).
    ``labels``: int (N,), 0 REAL, 1 FAKE.
    """

    outputs: dict[str, np.ndarray]
    labels: np.ndarray

    def save(self, path) -> None:
        """Write one npz; the arrays in float16."""
        np.savez(path, labels=self.labels, **{name: x.astype(np.float16) for name, x in self.outputs.items()})

    @classmethod
    def load(cls, path) -> "Embeddings":
        """Read what :meth:`save` wrote, in float32."""
        with np.load(path, allow_pickle=False) as file:
            outputs = {name: file[name].astype(np.float32) for name in file.files if name != "labels"}
            return cls(outputs, file["labels"])


def embed_faces(network: keras.Model, faces: Faces, rows: np.ndarray, size: int, views: int = FRAMES,
                seed: int = 0) -> Embeddings:
    """Run ten augmented views of each crop through the face network.

    Args:
        network: a face branch with its head.
        faces: crops with landmarks; rows: which of them.
        size: side of the network's input in pixels.
    """
    augment = FaceAugment(size, cutout=0.0, seed=seed)
    parts = []
    for row in rows:
        batch = {
            "crop": np.repeat(faces.crops[row][None], views, axis=0),
            "mask": np.zeros((views, *faces.crops.shape[1:3], 1), np.uint8),
            "points": np.repeat(faces.points[row][None], views, axis=0),
            "label": np.ones((views, 1), np.float32),
            "width": np.ones((views, 1), np.float32),
        }
        parts.append(network.predict_on_batch(augment(batch, training=True)))
    outputs = {name: np.stack([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    return Embeddings(outputs, faces.table["label"].to_numpy()[rows])


def embed_voices(network: keras.Model, windows: np.ndarray, labels: np.ndarray, batch: int = 16) -> Embeddings:
    """Run one window of each voice, as the network takes it, through the voice network."""
    outputs = network.predict(windows, batch_size=batch, verbose=0)
    return Embeddings({name: np.asarray(x) for name, x in outputs.items()}, np.asarray(labels))


def assemble(faces: Embeddings, voices: Embeddings, count: int, seed: int = 0, missing: float = MISSING) -> tuple:
    """Pair faces and voices at random, both classes of each equally often.

    Returns:
        inputs of :func:`networks.last_cnn` for ``count`` clips, labels float32 (count, 1), and a table with ``face``
        and ``voice`` (0 real, 1 fake, −1 missing) of each clip.
    """
    random = np.random.default_rng(seed)
    face_rows, voice_rows = (_balanced(part.labels, count, random) for part in (faces, voices))
    draw = random.random(count)
    seen, heard = draw >= missing, draw < 1 - missing  # never both missing
    mask = (random.random((count, FRAMES)) >= random.choice([0.0, 0.0, 0.3], count)[:, None]) & seen[:, None]
    mask[seen & ~mask.any(axis=1), 0] = True
    inputs = {f"face_{name}": faces.outputs[name][face_rows] for name in SIDES}
    inputs |= {f"voice_{name}": voices.outputs[name][voice_rows] for name in SIDES}
    inputs |= {"face_mask": mask.astype(np.float32), "voice_mask": heard[:, None].astype(np.float32)}
    face, voice = faces.labels[face_rows], voices.labels[voice_rows]
    table = pd.DataFrame({"face": np.where(seen, face, -1), "voice": np.where(heard, voice, -1)})
    labels = ((table == FAKE).any(axis=1)).to_numpy(np.float32)[:, None]
    return inputs, labels, table


def _balanced(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """``count`` rows drawn with both classes equally likely."""
    chance = np.where(labels == FAKE, 0.5 / (labels == FAKE).sum(), 0.5 / (labels != FAKE).sum())
    return random.choice(len(labels), count, p=chance / chance.sum())


def train_last(faces: Embeddings, voices: Embeddings, clips: int = 6000, epochs: int = 15, seed: int = 0,
               normalization: str = "batch", as_run: bool = False, verbose: int = 0) -> keras.Model:
    """Fit the study's last CNN on assembled clips; binary cross-entropy, Adam with a cosine to 0.

    Returns:
        the network, inputs by name as :func:`networks.last_cnn` says -> logit (1).
    """
    keras.utils.set_random_seed(seed)
    inputs, labels, _ = assemble(faces, voices, clips, seed)
    network = last_cnn(as_run=as_run, normalization=normalization)
    steps = -(-clips // 64) * epochs
    network.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
                    keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.02))
    network.fit(inputs, labels, batch_size=64, epochs=epochs, verbose=verbose)
    return network
