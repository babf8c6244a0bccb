"""Pairs of a real and a fake face from several sources, degraded alike; numpy and OpenCV alone, for a CPU.

A fake is a labelled one, a self-blended real (Shiohara and Yamasaki 2022) or a reconstruction twin
(``twins``). The last two stand beside their original. Zoom, light, size, blur, noise and JPEG are drawn alike
for every source and class; a labelled fake of another source than DFDC is first made as small as a random
real of its source.
"""

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from kaggle_utils.datasets.dfdc import FAKE, REAL
from recipes.face.data import Faces
from recipes.face.landmarks import face_mask

from .twins import TWIN_SHAPES, put_back

REALS = {"dfdc": 0.42, "web": 0.24, "stills": 0.17, "frames": 0.17}  # shares of the sources
FAKES = {"dfdc": 0.55, "web": 0.30, "stills": 0.15}
BLENDED, TWINS = 0.165, 0.11  # shares of the fakes
WITHOUT_FAKES = 3.2 / 0.75  # a source without fakes is blended so much more often, or it would be a clue
BLEND_SHAPES = ("hull", "hull", "hull_without_forehead", "components", "mouth")


class FacePairs:
    """Batches of pairs; a batch depends on the seed and its number alone.

    Args:
        sources: faces by name (``dfdc``, ``web``, ``stills``, ``frames``); rows of the split ``train`` are
            used, each clip (or else each generator) of a source as often as the others.
        reals, fakes: shares of the sources.
        rebuild: an autoencoder: uint8 (S, S, 3) -> its reconstruction, uint8; None: no twins.
    """

    def __init__(
        self,
        sources: Mapping[str, Faces],
        seed: int = 0,
        reals: Mapping[str, float] = REALS,
        fakes: Mapping[str, float] = FAKES,
        rebuild: Sequence[Callable[[np.ndarray], np.ndarray]] = (),
    ):
        self.sources, self.seed, self.rebuild = dict(sources), seed, list(rebuild)
        self.groups = {
            (name, label): _groups(faces, label)
            for name, faces in self.sources.items()
            for label in (REAL, FAKE)
        }
        self.shares = {
            label: {name: share for name, share in shares.items() if self.groups.get((name, label))}
            for label, shares in ((REAL, reals), (FAKE, fakes))
        }

    def batch(self, number: int, pairs: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """Crops uint8 (2 · pairs, S, S, 3) and labels float32 (2 · pairs,), a real and a fake in turn."""
        random, crops = np.random.default_rng([self.seed, number]), []
        for _ in range(pairs):
            source, row = self._draw(REAL, random)
            faces, kind = self.sources[source], random.random()
            real, width = np.array(faces.crops[row]), float(faces.widths[row])
            first, second = delivery(random), delivery(random)
            blended = BLENDED * (1.0 if self.groups[source, FAKE] else WITHOUT_FAKES)
            fake, fake_width = None, width
            if kind < blended:
                fake = self_blended(real, faces.points[row], random)
                second = first if random.random() < 0.5 else second
            elif kind < blended + TWINS and self.rebuild:
                fake, second = self._twin(real, faces.points[row], random), first
            else:
                fake, fake_width = self._labelled(random)
            crops += [deliver(real, width, first, random), deliver(fake, fake_width, second, random)]
        return np.stack(crops), np.tile(np.array([REAL, FAKE], np.float32), pairs)

    def _draw(self, label: int, random: np.random.Generator) -> tuple[str, int]:
        shares = self.shares[label]
        names, weights = list(shares), np.array(list(shares.values()))
        name = names[random.choice(len(names), p=weights / weights.sum())]
        return name, self._row(name, label, random)

    def _row(self, name: str, label: int, random: np.random.Generator) -> int:
        group = self.groups[name, label][random.integers(len(self.groups[name, label]))]
        return int(group[random.integers(len(group))])

    def _labelled(self, random: np.random.Generator) -> tuple[np.ndarray, float]:
        name, row = self._draw(FAKE, random)
        faces = self.sources[name]
        crop, width = np.array(faces.crops[row]), float(faces.widths[row])
        if name != "dfdc" and self.groups[name, REAL]:
            like = faces.table["source_px"].iloc[self._row(name, REAL, random)]
            side = int(min(like * width * random.uniform(0.8, 1.1), crop.shape[0]))
            if side < min(faces.table["source_px"].iloc[row] * width, 0.98 * crop.shape[0]):
                small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
                crop = cv2.resize(small, crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        return crop, width

    def _twin(self, crop: np.ndarray, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
        twin = self.rebuild[random.integers(len(self.rebuild))](crop)
        return put_back(crop, twin, points, TWIN_SHAPES[random.integers(len(TWIN_SHAPES))], random)


def _groups(faces: Faces, label: int) -> list[np.ndarray]:
    table = faces.table
    rows = np.flatnonzero((table["split"] == "train") & (table["label"] == label))
    by = next((name for name in ("clip", "generator") if name in table and table[name].any()), None)
    if by is None:
        return [rows] if len(rows) else []
    return list(table.iloc[rows].assign(row=rows).groupby(by)["row"].apply(np.array))


def self_blended(crop: np.ndarray, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The face over itself, shaded, sharpened or blurred, moved, inside a deformed soft mask; uint8."""
    size, source, target = crop.shape[0], crop.astype(np.float32), crop.astype(np.float32)
    shaded = _shaded(source, random)
    source, target = (shaded, target) if random.random() < 0.5 else (source, shaded)
    if random.random() < 0.5:
        source = cv2.GaussianBlur(source, (0, 0), random.uniform(0.4, 1.3))
    else:
        details = source - cv2.GaussianBlur(source, (0, 0), 1.2)
        source = np.clip(source + details * random.uniform(0.1, 0.6), 0, 255)
    zoom, shift = random.uniform(0.96, 1.04), random.uniform(-0.025, 0.025, 2) * size
    source = _warped(
        source,
        np.array([[zoom, 0, (1 - zoom) * size / 2], [0, zoom, (1 - zoom) * size / 2]])
        + np.array([[0, 0, shift[0]], [0, 0, shift[1]]]),
    )
    mask = face_mask(points, BLEND_SHAPES[random.integers(len(BLEND_SHAPES))], size)
    noise = random.normal(0, 1, (2, size, size)).astype(np.float32)
    moved = [cv2.GaussianBlur(x, (0, 0), size / 25) * random.uniform(20, 70) for x in noise]
    y, x = np.mgrid[:size, :size].astype(np.float32)
    mask = cv2.remap(mask, x + moved[0], y + moved[1], cv2.INTER_LINEAR).astype(np.float32) / 255
    mask = cv2.GaussianBlur(mask, (0, 0), random.uniform(1.5, 6))
    mask = cv2.GaussianBlur((mask > 0.5) * mask, (0, 0), random.uniform(1, 5))[..., None]
    mask *= np.float32(random.choice([0.5, 0.75, 1, 1, 1]))
    return (mask * source + (1 - mask) * target).astype(np.uint8)


def _shaded(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    offset = random.uniform(-14, 14) + random.uniform(-7, 7, 3)
    return np.clip(image * random.uniform(0.9, 1.1) + offset, 0, 255).astype(np.float32)


def _warped(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)


def delivery(random: np.random.Generator) -> dict:
    """One draw of what happens to a face on its way: framing, light, size, blur, noise, JPEG."""

    def sometimes(share: float, value: float, otherwise: float = 0) -> float:
        return value if random.random() < share else otherwise

    return {
        "mirrored": random.random() < 0.5,
        "angle": random.uniform(-8, 8),
        "zoom": float(np.exp(random.uniform(-0.12, 0.17))),
        "shift": random.uniform(-0.05, 0.05, 2),
        "gain": random.uniform(0.86, 1.14),
        "offset": random.uniform(-15, 15) + random.uniform(-6, 6, 3),
        "size": sometimes(0.55, np.exp(random.uniform(np.log(0.32), 0)), 1),
        "enlarge": int(random.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])),
        "blur": sometimes(0.2, random.uniform(0.3, 1.4)),
        "noise": sometimes(0.2, random.uniform(1, 5)),
        "jpeg": int(sometimes(0.75, random.integers(35, 97))),
    }


def deliver(crop: np.ndarray, width: float, way: dict, random: np.random.Generator) -> np.ndarray:
    """The crop, ``width`` times as wide as the tight framing, in the tight framing and degraded; uint8."""
    size = crop.shape[0]
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), way["angle"], width * way["zoom"])
    matrix[:, 2] += way["shift"] * size
    image = _warped(np.ascontiguousarray(crop[:, ::-1]) if way["mirrored"] else crop, matrix)
    image = image.astype(np.float32) * way["gain"] + way["offset"]
    if way["blur"]:
        image = cv2.GaussianBlur(image, (0, 0), way["blur"])
    side = round(size * way["size"])
    if side < size:
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    if way["noise"]:
        image = image + random.normal(0, way["noise"], image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if way["jpeg"]:
        image = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, way["jpeg"]])[1], 1)
    return cv2.resize(image, (size, size), interpolation=way["enlarge"]) if side < size else image
