"""Batches to train a face network: half reals, half fakes (labelled, self-blended, reconstruction twins)."""

import cv2
import keras
import numpy as np

from kaggle_utils.datasets.dfdc import FAKE, REAL
from recipes.face.data import Faces
from recipes.face.landmarks import face_mask

from .twins import TWIN_SHAPES, as_delivered, put_back

LABELLED, BLENDED, TWIN = range(3)  # kinds of fakes
DFDC, ELSEWHERE = "dfdc", 2.5  # a real of another source is turned into a fake 2.5 times as often


def aligned_original(faces: Faces, fake: int, real: int) -> np.ndarray:
    """The crop of row ``real``, aligned with the face of row ``fake`` by a similarity transform; uint8."""
    matrix, _ = cv2.estimateAffinePartial2D(faces.points[real], faces.points[fake])
    crop = faces.crops[real]
    if matrix is None:
        return crop
    return cv2.warpAffine(crop, matrix, crop.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


class FaceBatches(keras.utils.PyDataset):
    """Balanced batches for :class:`augment.FaceAugment`: half REAL, half fakes, with a new draw each epoch.

    A batch depends only on the seed, the epoch and its number; a resumed run therefore sees the same batches.
    ``settings`` are ``training.FaceSettings``. Set ``epoch`` before the epoch begins (``PlanEpochs`` does).
    """

    def __init__(self, faces: Faces, rows: np.ndarray, settings, workers: int = 4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        labels = faces.table["label"].to_numpy()
        self.faces, self.settings, self.twins = faces, settings, {}
        self.reals, self.fakes = rows[labels[rows] == REAL], rows[labels[rows] == FAKE]
        if len(self.reals) < settings.batch_size // 2 or not len(self.fakes):
            raise ValueError(
                f"expected half a batch ({settings.batch_size // 2}) of REAL crops or more "
                f"and some FAKE, found {len(self.reals)} and {len(self.fakes)}"
            )
        place = {stem: row for row, stem in enumerate(faces.table["stem"])}
        original = np.array([place.get(group, -1) for group in faces.table["group"]])
        self.original = np.where(np.isin(original, rows), original, -1)  # none from another split
        self.sources, sides = faces.sources, faces.table["source_px"].to_numpy()
        self.sides = sides
        names = np.unique(self.sources)
        self.real_sides = {name: sides[self.reals[self.sources[self.reals] == name]] for name in names}
        self.dfdc = self.sources == DFDC
        self.taught = np.isin(self.sources, settings.taught_sources or names).astype(np.float32)
        # How often a real is turned into a fake: always in a source without fakes, else the source is a clue.
        often = np.where(self.sources == DFDC, 1.0, ELSEWHERE)
        has_fakes = np.isin(self.sources, self.sources[self.fakes])
        self.often = np.where(has_fakes & (faces.widths < 1.25), often, 1e9)
        self.epoch = 0

    @property
    def num_batches(self) -> int:
        return 2 * (self.settings.pairs or len(self.reals)) // self.settings.batch_size

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, number: int):
        self._epoch, settings = number, self.settings
        random = np.random.default_rng([settings.seed, number])
        count = settings.pairs or len(self.reals)
        reals = self._drawn(self.reals, settings.reals_of, count, random)
        blended, twins = (round(count * share) for share in (settings.self_blended, settings.twins))
        order = np.argsort(random.exponential(size=count) / self.often[reals], kind="stable")
        order = random.permutation(order[: blended + twins])
        kinds = np.full(count, LABELLED)
        kinds[order[:blended]], kinds[order[blended:]] = BLENDED, TWIN
        if self.twins:
            kinds[(kinds == TWIN) & ~np.isin(reals, list(self.twins))] = BLENDED
        fakes = reals.copy()  # self-blended fakes and twins are paired with their originals
        fakes[kinds == LABELLED] = self._drawn(self.fakes, settings.fakes_of, count - blended - twins, random)
        self._rows = np.stack([reals, fakes], axis=1).ravel()
        self._kinds = np.stack([np.full(count, LABELLED), kinds], axis=1).ravel()

    def _drawn(
        self, rows: np.ndarray, shares: dict | None, count: int, random: np.random.Generator
    ) -> np.ndarray:
        """Draw ``count`` of ``rows`` in random order, each as often as the others of its source."""
        shares = shares or {None: 1.0}
        parts = {source: rows if source is None else rows[self.sources[rows] == source] for source in shares}
        parts = {source: part for source, part in parts.items() if len(part)}
        whole, drawn = sum(shares[source] for source in parts), []
        for source, part in parts.items():
            wanted = max(round(count * shares[source] / whole), 1)
            drawn += [random.permutation(part) for _ in range(wanted // len(part))]
            drawn.append(random.permutation(part)[: wanted % len(part)])
        drawn = np.concatenate(drawn)
        filled = np.concatenate([drawn, random.choice(rows, max(count - len(drawn), 0))])
        return random.permutation(filled)[:count]

    def __getitem__(self, index: int) -> tuple[dict, np.ndarray]:
        """Inputs of ``FaceAugment`` and soft labels float32 (batch_size, 1): 0 REAL, 1 FAKE."""
        settings = self.settings
        batch = slice(index * settings.batch_size, (index + 1) * settings.batch_size)
        rows, kinds = self._rows[batch], self._kinds[batch]
        random = np.random.default_rng([settings.seed, self._epoch, index])
        crops, points = self.faces.crops[rows], self.faces.points[rows]
        labels = self.faces.table["label"].to_numpy(np.float32)[rows]
        masks = np.zeros((*crops.shape[:3], 1), np.uint8)
        for i in np.flatnonzero(kinds == BLENDED):
            shape = settings.mask_shapes[random.integers(len(settings.mask_shapes))]
            masks[i, ..., 0] = face_mask(points[i], shape, crops.shape[1])
        for i in np.flatnonzero(kinds == TWIN):
            twins, shape = self.twins[rows[i]], TWIN_SHAPES[random.integers(len(TWIN_SHAPES))]
            fake = put_back(crops[i], twins[random.integers(len(twins))], points[i], shape, random)
            crops[i - 1], crops[i] = as_delivered((crops[i - 1], fake), random)
        for i in np.flatnonzero((labels == FAKE) & ~self.dfdc[rows]):
            crops[i] = self._as_small_as_a_real(crops[i], rows[i], random)
        for i in np.flatnonzero((labels == FAKE) & (random.random(len(rows)) < settings.mixed)):
            if (original := self.original[rows[i]]) >= 0:
                labels[i] = random.beta(0.5, 0.5)
                real = aligned_original(self.faces, rows[i], original)
                crops[i] = cv2.addWeighted(crops[i], float(labels[i]), real, 1 - float(labels[i]), 0)
        labels[kinds != LABELLED] = FAKE
        inputs = {
            "crop": crops,
            "mask": masks,
            "points": points,
            "label": labels[:, None],
            "width": self.faces.widths[rows][:, None],
            "taught": (self.taught[rows] * (kinds == LABELLED)).astype(np.float32)[:, None],
        }
        return inputs, labels[:, None]

    def _as_small_as_a_real(self, crop: np.ndarray, row: int, random: np.random.Generator) -> np.ndarray:
        """Shrink a fake to the size of a random real of its source, to make resolution no clue."""
        like = self.real_sides[self.sources[row]]
        side = crop.shape[0]
        if len(like):
            side = int(like[random.integers(len(like))] * random.uniform(0.8, 1.1))
        if side >= min(self.sides[row], crop.shape[0]):
            return crop
        small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
        if random.random() < 0.6:
            small = as_delivered((small,), random)[0]
        return cv2.resize(small, crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
