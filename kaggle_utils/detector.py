"""The inference API: a calibrated P(fake) for a clip, from its faces and its voice.

:class:`Detector` reads a clip once, runs the face network on each tracked person's crops and the voice
network on the sound, and fuses the results. Every clip gets a score: anything that cannot be read or found
becomes a warning, and the score is still defined.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from . import extraction, storage
from .face import detection, framing
from .face.quality import quality_note
from .fusion import rules
from .kaggle.paths import models_folder
from .media import sound, video
from .voice import signal as voice_signal

FACE_BATCH, VOICE_BATCH = 10, 4  # rows per network call, fixed: scores do not depend on the batch
SETTINGS = "detector.json"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Verdict:
    """The detector's result for one clip.

    Attributes:
        probability: calibrated P(fake) of the whole clip, in [0, 1].
        face: P(fake) of the faces alone, that is, of at least one person; NaN if no face was found.
        voice: P(fake) of the voice alone; NaN without speech.
        frames: one dict per scored crop: ``time_s``, ``track``, ``box`` (x, y, width, height in source
            pixels), ``source`` (detected, interpolated or fallback), ``probability`` (None for a fallback).
        tracks: one dict per person: ``id``, ``probability`` as if alone, ``frames`` (with a detection).
        warnings: failures and omissions; each names the file.
    """

    probability: float
    face: float = math.nan
    voice: float = math.nan
    frames: list[dict] = field(default_factory=list)
    tracks: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """All fields as JSON-ready values; NaN becomes None."""
        return _json_ready(asdict(self))


def _json_ready(value):
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


class Detector:
    """The trained networks and their calibration; load them once with :meth:`load` for many clips."""

    def __init__(self, face, voice, fuse: rules.Fusion, calibration: rules.Calibration, flip: bool = False,
                 prior: float = 0.5, digests: dict[str, str] | None = None):
        """
        Args:
            face, voice: networks with a ``logit``.
            flip: average each crop's outputs with those of its mirror image.
            prior: share of fakes expected among the clips, in (0, 1).
            digests: SHA-256 of each weights file, by name.
        """
        if not 0 < prior < 1:
            raise ValueError(f"prior: expected a share between 0 and 1, found {prior}")
        self.face, self.voice, self.fuse, self.calibration = face, voice, fuse, calibration
        self.flip, self.prior, self.digests = flip, prior, digests or {}
        self.finder = detection.FaceFinder()
        self.source: tuple[str, tuple] | None = None  # module:function and arguments that load the same

    @classmethod
    def load(cls, folder: str | Path | None = None, prior: float = 0.5,
             join: str | None = None) -> "Detector":
        """Load the networks, ensemble members (``face_*.keras``) and the fusion set in ``detector.json``.

        Args:
            folder: the weights folder; default: ``models/``. ``models/reference``: the study's networks.
            prior: share of fakes expected. DFDC's test set was balanced (0.5); clips in a newsroom are not.
            join: overrides the folder's fusion: ``noisy_or`` or ``last_network`` (the study's last CNN).

        Raises:
            FileNotFoundError: a file is missing from ``folder``.
            ValueError: a file does not match the folder's ``SHA256SUMS``.
        """
        folder = Path(folder) if folder else models_folder()
        digests = checked_digests(folder)
        settings = json.loads((folder / SETTINGS).read_text())
        if missing := {"fusion", "calibration", "range", "flip"} - set(settings):
            raise ValueError(f"{folder / SETTINGS}: expected {', '.join(sorted(missing))}")
        settings["fusion"] = join or settings["fusion"]
        face, hears = (storage.load_branch(folder, name) for name in ("face", "voice"))
        calibration = rules.Calibration(settings["calibration"], settings["range"],
                                        settings.get("pooling", "mean"))
        fuse = rules.load(folder, settings, calibration)
        detector = cls(face, hears, fuse, calibration, settings["flip"], prior, digests)
        detector.source = f"{__name__}:{cls.__name__}.load", (str(folder.resolve()), prior, join)
        return detector

    @property
    def fingerprint(self) -> str:
        """Identifies the weights: a journal written with other weights is not resumed."""
        return hashlib.sha256("".join(self.digests.values()).encode()).hexdigest()[:16]

    # -- one branch at a time --------------------------------------------------------------------------------

    def score_faces(self, crops: np.ndarray, framed: bool = False) -> np.ndarray:
        """P(fake) of each face crop by itself, float32 (N,).

        Args:
            crops: uint8 RGB (N, H, W, 3).
            framed: True if the crops have the tight framing of the training faces. Otherwise the face is
                found in each crop and cut to that framing; without a face, the central part is used.
        """
        crops = np.asarray(crops)
        if len(crops) == 0:
            return np.zeros(0, np.float32)
        if crops.ndim != 4 or crops.shape[-1] != 3 or crops.dtype != np.uint8:
            raise ValueError(f"crops: expected uint8 RGB (N, H, W, 3), found {crops.dtype} {crops.shape}")
        if not framed:
            crops = framing.tight_from_crops(crops, self.finder)
        logits = self.face_outputs(crops)["logit"][:, 0]
        return self._probability(logits, "crop").astype(np.float32)

    def score_voice(self, samples: np.ndarray, sample_rate: int) -> float:
        """P(fake) of a voice; NaN with less than a second of speech (``voice.speech``).

        Args:
            samples: (T,) or (T, channels), int16 or float in [-1, 1].
            sample_rate: any rate, in Hz.
        """
        outputs = self._run_voice(samples, sample_rate)
        if outputs is None:
            return math.nan
        return float(self._probability(outputs["logit"].mean(), "voice"))

    # -- a whole clip ----------------------------------------------------------------------------------------

    def predict(self, path: str | Path, frames: int = extraction.FRAMES) -> Verdict:
        """Score one clip.

        Args:
            frames: number of evenly spread frames to read; fewer than ten are repeated to fill ten rows.

        Returns:
            A :class:`Verdict`. If the picture cannot be read, only the voice is scored. If neither can be
            read, the prior is returned. A warning names the file and the reason.
        """
        return self.examine(path, frames)[0]

    def examine(self, path: str | Path,
                frames: int = extraction.FRAMES) -> tuple[Verdict, list[framing.FaceCrops]]:
        """As :meth:`predict`, and also return the crops of each tracked person behind the verdict."""
        return self.examine_extract(path, extraction.extract(path, self.finder, frames, self.voice_rate))

    def examine_extract(self, path: str | Path,
                        extracted: extraction.Extract) -> tuple[Verdict, list[framing.FaceCrops]]:
        """As :meth:`examine`, on an extract, such as one from ``python -m kaggle_utils extract``."""
        path, warnings = Path(path), list(extracted.warnings)
        seen = [self.face_outputs(person.images) for person in extracted.people]
        heard = self.voice_outputs(path, extracted.samples, extracted.sample_rate, warnings)
        return self.combine(path, extracted, extracted.people, seen, heard, warnings), extracted.people

    def predict_folder(self, folder: str | Path, output_csv: str | Path, hours: float | None = None,
                       progress: bool = True, cache: str | Path | None = None, jobs: int = 1,
                       backend: str = "loky", scheduler: str | None = None) -> pd.DataFrame:
        """Score every clip of a folder into a ``filename,label`` CSV that always has one row per clip.

        Every row starts at the prior and is replaced when its clip is finished. The verdicts are kept in a
        journal, ``<output_csv>.journal``. After an interruption, call again: the run resumes. The ten crops
        behind each verdict are saved as a small picture in ``<output_csv>.faces/``.

        Args:
            folder: a DFDC root (``test_videos`` in the order of ``sample_submission.csv``) or a flat folder
                of clips, with or without ``metadata.json``.
            hours: time budget; if it is short, fewer frames are read, and the last clips keep the prior.
            cache: folder of extracts, as ``python -m kaggle_utils extract`` makes them. Clips are scored from
                it, and what is missing is added; if it cannot be written, it is only read. With other
                weights, only the networks run again. The labels are those of a run without it.
            jobs, backend, scheduler: spread the clips over processes or a cluster (:class:`spread.Team`);
                each process loads the networks once. A worker that dies costs the clip it was at.

        Returns:
            One row per clip: ``filename``, ``path``, ``truth`` (NaN if unknown), ``label``, and the verdict's
            fields; ``seconds`` of work if the clip was scored.

        Raises:
            ValueError: the cache was made with other settings or versions, or the backend is unknown.
            BlockingIOError: another run writes to ``output_csv``.
        """
        from .scoring import score_folder  # with pandas' and joblib's rooms: a single clip needs none
        from .spread import Team

        team = Team(jobs, backend, scheduler)
        return score_folder(self, folder, output_csv, hours, progress, cache, team)

    def prior_verdict(self, warning: str) -> Verdict:
        """The verdict on a clip that was not scored: the prior, and the reason."""
        return Verdict(self.prior, warnings=[warning])

    def voice_outputs(self, path: Path, samples: np.ndarray | None, sample_rate: int,
                      warnings: list[str]) -> dict | None:
        """Run the voice network on a clip's sound; None without sound or, with a warning, without speech.

        Args:
            samples: as :func:`extraction.listen` returns them, at ``sample_rate`` Hz; None without sound.
        """
        outputs = None if samples is None else self._run_voice(samples, sample_rate)
        if samples is not None and outputs is None:
            warnings.append(f"{path.name}: no speech heard, the voice was not analysed")
        return outputs

    def combine(self, path: Path, clip: video.Frames | extraction.Extract | None,
                people: list[framing.FaceCrops], seen: list[dict], heard: dict | None,
                warnings: list[str]) -> Verdict:
        """Fuse the outputs of both branches into scores of each frame, each person, the voice and the clip.

        Args:
            clip: its frames as :func:`extraction.look` returns them, or its extract.
            seen: the outputs of :meth:`face_outputs` for each person.
            heard: the result of :meth:`voice_outputs`.
            warnings: from earlier steps; this step's warnings are added.
        """
        masks = [np.array([source != "fallback" for source in person.sources]) for person in people]
        logits = [rules.pooled(outputs["logit"][:, 0], mask, self.calibration.pooling)
                  for outputs, mask in zip(seen, masks, strict=True)]
        main = max((index for index, logit in enumerate(logits) if not math.isnan(logit)),
                   key=lambda index: logits[index], default=None)
        if main is None:
            searched = f"no face found in {len(clip.times_s)} frames, " if clip and len(clip.times_s) else ""
            outcome = "the score is the prior" if heard is None else "the voice alone decides"
            warnings.append(f"{path.name}: {searched}{outcome}")
        elif note := quality_note(people[main]):
            warnings.append(f"{path.name}: {note}")
        face, mask = self._no_face() if main is None else (seen[main], masks[main])
        calibrated = {index: float(self.calibration.logit(logit, "face"))
                      for index, logit in enumerate(logits) if not math.isnan(logit)}
        fused, faces = self.prior, math.nan
        if main is not None or heard is not None:
            others = [logit for index, logit in calibrated.items() if index != main]
            fused = self.fuse(face, mask, heard, self.prior, others)
            fused = self.calibration.within_limits(fused, self.prior)
        if main is not None:
            faces = rules.any_fake(list(calibrated.values()), self.prior)
            faces = self.calibration.within_limits(faces, self.prior)
        return Verdict(
            probability=float(fused),
            face=faces,
            voice=math.nan if heard is None else float(self._probability(heard["logit"].mean(), "voice")),
            frames=[row for person, outputs in zip(people, seen, strict=True)
                    for row in self._frame_rows(clip, person, outputs)],
            tracks=[{"id": person.track, "probability": float(self._probability(logit, "face")),
                     "frames": person.sources.count("detected")}
                    for person, logit in zip(people, logits, strict=True)],
            warnings=warnings)

    def _no_face(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The fusion's input for a clip without a face: zeros, masked out."""
        outputs = {name: np.zeros((framing.ROWS, *tensor.shape[1:]), np.float32)
                   for name, tensor in self.face.output.items()}
        return outputs, np.zeros(framing.ROWS, bool)

    def _frame_rows(self, clip, person, outputs) -> list[dict]:
        probabilities = self._probability(outputs["logit"][:, 0], "crop")
        return [
            {"time_s": float(clip.times_s[index]), "track": person.track,
             "box": [float(side) for side in box], "source": source,
             "probability": None if source == "fallback" else float(probability)}
            for index, box, source, probability in zip(
                person.frame_indices, person.boxes, person.sources, probabilities, strict=True)
        ]

    # -- the networks ----------------------------------------------------------------------------------------

    @property
    def voice_rate(self) -> int:
        """The voice network's sampling rate in Hz: 8 kHz for the study's, 16 kHz for the others."""
        return sound.REFERENCE_RATE if self._hears_reference else sound.SAMPLE_RATE

    @property
    def _hears_reference(self) -> bool:
        return self.voice.input_shape[1] == sound.REFERENCE_SAMPLES

    def face_outputs(self, crops: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of the face network for uint8 crops (N, H, W, 3)."""
        crops = self.resized(crops)
        outputs = storage.run(self.face, crops, FACE_BATCH)
        if not self.flip:
            return outputs
        mirrored = storage.run(self.face, crops[:, :, ::-1], FACE_BATCH)
        return {name: (outputs[name] + mirrored[name]) / 2 for name in outputs}

    def resized(self, crops: np.ndarray) -> np.ndarray:
        """Crops (N, H, W, 3) resized for the face network."""
        side = self.face.input_shape[1] or crops.shape[1]  # None: the network resizes internally
        same = crops.shape[1:3] == (side, side)
        return crops if same else np.stack([_resize(crop, side) for crop in crops])

    def _run_voice(self, samples: np.ndarray, sample_rate: int) -> dict[str, np.ndarray] | None:
        """All outputs of the voice network, one row per window; None without enough speech."""
        heard = voice_signal.hear(samples, sample_rate, self._hears_reference)
        if heard is None:
            return None
        return storage.run(self.voice, heard.windows.reshape(-1, *self.voice.input_shape[1:]), VOICE_BATCH)

    def _probability(self, logit, kind: str):
        return self.calibration.probability(logit, kind, self.prior)


def checked_digests(folder: Path) -> dict[str, str]:
    """Hexadecimal SHA-256 of the settings and of each weights file in ``folder``, by name.

    If the folder has a ``SHA256SUMS`` (written by ``make checksums``), the digests are checked against it.

    Raises:
        ValueError: a file differs from the list or is not on it.
    """
    digests = {}
    for path in sorted([*folder.glob("*.keras"), folder / SETTINGS]):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if (sums := folder / SUMS).is_file():
        listed = dict(line.split()[::-1] for line in sums.read_text().splitlines() if len(line.split()) == 2)
        for name, digest in digests.items():
            if listed.get(name) != digest:
                raise ValueError(f"{folder / name}: expected SHA-256 {listed.get(name)} by {sums}, "
                                 f"found {digest}; if you replaced it yourself, run make checksums")
    return digests


def _resize(crop: np.ndarray, side: int) -> np.ndarray:
    method = cv2.INTER_AREA if crop.shape[0] > side else cv2.INTER_LINEAR
    return cv2.resize(crop, (side, side), interpolation=method)
