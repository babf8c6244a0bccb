"""From one clip to a calibrated P(fake): the product's room, where faces and voice meet.

:class:`Detector` reads a clip once, sends the crops of each tracked person through the face network and the voice
through the voice network, and lets the fusion decide. Every clip gets an answer: what cannot be read or found
becomes a warning and a defined score.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from . import extraction, storage
from .datasets.dfdc import clips_to_score
from .face import detection, framing
from .face.quality import quality_note
from .fusion import rules
from .kaggle.paths import models_folder
from .media import sound, video
from .submission import score_clips
from .voice import signal as voice_signal

FACE_BATCH, VOICE_BATCH = 10, 4  # rows of every network call: fixed, so that a score does not depend on what else is scored
SETTINGS = "detector.json"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Verdict:
    """What the detector says of one clip.

    Attributes:
        probability: calibrated P(fake) of the whole clip, in [0, 1].
        face: P(fake) of the most suspicious tracked face alone; NaN when no face was found.
        voice: P(fake) of the voice alone; NaN without a sound track or when it is silent.
        frames: one dict for each crop that was scored: ``time_s``, ``track``, ``box`` (x, y, width, height of the crop
            in source pixels), ``source`` (detected, interpolated or fallback), ``probability`` (None for a fallback).
        tracks: one dict for each person: ``id``, ``probability``, ``frames`` (how many were detected).
        warnings: what went wrong or was not analysed, each naming the file.
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
    """The trained networks with their calibration; make one with :meth:`load` and use it for many clips."""

    def __init__(self, face, voice, fuse: rules.Fusion, calibration: rules.Calibration, flip: bool = False,
                 prior: float = 0.5, digests: dict[str, str] | None = None):
        """
        Args:
            face, voice: branch networks as :mod:`kaggle_utils.networks` builds them, with their ``logit``.
            fuse: how the branches are joined.
            calibration: from logits to probabilities.
            flip: average each crop's outputs with those of its mirror image.
            prior: share of fakes expected among the clips, in (0, 1).
            digests: SHA-256 of each file of the weights, by name.
        """
        if not 0 < prior < 1:
            raise ValueError(f"prior: expected a share between 0 and 1, found {prior}")
        self.face, self.voice, self.fuse, self.calibration = face, voice, fuse, calibration
        self.flip, self.prior, self.digests = flip, prior, digests or {}
        self.finder = detection.FaceFinder()

    @classmethod
    def load(cls, folder: str | Path | None = None, prior: float = 0.5, join: str | None = None) -> "Detector":
        """Load ``face.keras``, ``voice.keras``, their members (``face_*.keras``) and the fusion that ``detector.json`` names.

        Args:
            folder: the folder of weights; the project's ``models/`` unless given. ``models/reference`` holds the
                study's own networks.
            prior: share of fakes expected: DFDC's test set was balanced (0.5), a newsroom's clips are not.
            join: the fusion, ``noisy_or`` or ``last_network`` (the study's last CNN), in place of the folder's own.

        Raises:
            FileNotFoundError: a file is missing from ``folder``.
            ValueError: a file is not the one that the folder's ``SHA256SUMS`` names.
        """
        folder = Path(folder) if folder else models_folder()
        digests = checked_digests(folder)
        settings = json.loads((folder / SETTINGS).read_text())
        settings["fusion"] = join or settings["fusion"]
        face, hears = (storage.load_branch(folder, name) for name in ("face", "voice"))
        calibration = rules.Calibration(settings["calibration"], settings["range"], settings.get("pooling", "mean"))
        fuse = rules.load(folder, settings, calibration)
        return cls(face, hears, fuse, calibration, settings["flip"], prior, digests)

    @property
    def fingerprint(self) -> str:
        """Names the weights, so that a journal of other weights is not continued."""
        return hashlib.sha256("".join(self.digests.values()).encode()).hexdigest()[:16]

    # -- one branch at a time ---------------------------------------------------------------------------------

    def score_faces(self, crops: np.ndarray, framed: bool = False) -> np.ndarray:
        """P(fake) of each face crop by itself.

        Args:
            crops: uint8 RGB (N, H, W, 3).
            framed: True when the crops have the tight framing of the training faces. Otherwise the face is found
                again in each crop and cut to that framing, the central part where none is found.

        Returns:
            float32 (N,).
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
        """P(fake) of a voice.

        Args:
            samples: (T,) or (T, channels), int16 or float in [-1, 1].
            sample_rate: in Hz, any.

        Returns:
            a float; NaN when there is no voice (nothing over −60 dBFS).
        """
        outputs = self._run_voice(samples, sample_rate)
        if outputs is None:
            return math.nan
        return float(self._probability(outputs["logit"].mean(), "voice"))

    # -- a whole clip -----------------------------------------------------------------------------------------

    def predict(self, path: str | Path, frames: int = extraction.FRAMES) -> Verdict:
        """Score one clip.

        Args:
            path: a video file.
            frames: how many frames to read, evenly spread; fewer than ten are repeated to ten rows.

        Returns:
            a :class:`Verdict`. Where the picture cannot be read the voice alone decides, and where neither can, the
            prior stands; a warning names the file and says why.
        """
        return self.examine(path, frames)[0]

    def examine(self, path: str | Path, frames: int = extraction.FRAMES) -> tuple[Verdict, list[framing.FaceCrops]]:
        """As :meth:`predict`, with the crops of each tracked person that the verdict rests on."""
        return self.examine_extract(path, extraction.extract(path, self.finder, frames, self.voice_rate))

    def examine_extract(self, path: str | Path, extracted: extraction.Extract) -> tuple[Verdict, list[framing.FaceCrops]]:
        """As :meth:`examine`, of what was extracted of the clip before, now or by ``python -m kaggle_utils extract``."""
        path, warnings = Path(path), list(extracted.warnings)
        seen = [self.face_outputs(person.images) for person in extracted.people]
        heard = self.voice_outputs(path, extracted.samples, extracted.sample_rate, warnings)
        return self.combine(path, extracted, extracted.people, seen, heard, warnings), extracted.people

    def predict_folder(self, folder: str | Path, output_csv: str | Path, hours: float | None = None,
                       progress: bool = True) -> pd.DataFrame:
        """Score every clip of a folder into ``filename,label``, one row for each clip whatever happens.

        Each row stands there from the start with the prior and is replaced when its clip is finished. A journal beside
        the CSV (``<output_csv>.journal``) keeps the verdicts; called again, the run goes on where it was stopped.
        Beside it, ``<output_csv>.faces/`` keeps the ten crops that each answer rests on, as a small picture.

        Args:
            folder: a DFDC root (``test_videos`` in the order of ``sample_submission.csv``) or a flat folder of clips,
                with or without ``metadata.json``.
            output_csv: the file to write.
            hours: time budget; fewer frames are read when it gets short, and the prior stands at last.
            progress: show a progress bar.

        Returns:
            one row for each clip: ``filename``, ``path``, ``truth`` (NaN where unknown), ``label`` as written to the
            CSV, and the verdict's fields.
        """
        output_csv = Path(output_csv)
        strips = output_csv.with_name(output_csv.name + ".faces")
        strips.mkdir(parents=True, exist_ok=True)

        def verdict_of(name: str, path: Path | None, frames: int, following: Path | None) -> dict:
            if path is None:
                return Verdict(self.prior, warnings=[f"{name}: expected a plain file name"]).to_dict()
            verdict, people = self.examine_extract(path, ahead(path, frames, following))
            try:
                _save_strip(strips / f"{name}.jpg", verdict, people)
            except OSError as error:
                verdict.warnings.append(f"{name}: the picture of its crops was not saved: {error.strerror}")
            return verdict.to_dict()

        def unscored(name: str, reason: str) -> dict:
            return Verdict(self.prior, warnings=[f"{name}: {reason}, the prior stands"]).to_dict()

        clips = clips_to_score(folder)
        fingerprint = f"{self.fingerprint} {type(self.fuse).__name__} prior {self.prior}"
        with extraction.Ahead(lambda path, frames: extraction.extract(path, self.finder, frames, self.voice_rate)) as ahead:
            return score_clips(clips, verdict_of, output_csv, unscored, fingerprint, hours, progress)

    def voice_outputs(self, path: Path, samples: np.ndarray | None, sample_rate: int, warnings: list[str]) -> dict | None:
        """The voice network's outputs for the sound of a clip, or None, with a warning where it is silent.

        Args:
            samples: as :func:`extraction.listen` returns them; None where there is no sound. sample_rate: in Hz.
        """
        outputs = None if samples is None else self._run_voice(samples, sample_rate)
        if samples is not None and outputs is None:
            warnings.append(f"{path.name}: the sound track is silent, the voice was not analysed")
        return outputs

    def combine(self, path: Path, clip: video.Frames | extraction.Extract | None, people: list[framing.FaceCrops],
              seen: list[dict], heard: dict | None, warnings: list[str]) -> Verdict:
        """Join what was seen and heard: one curve for each person, and the most suspicious person's score.

        Args:
            path, clip: the clip, and its frames as :func:`extraction.look` returns them, or its extract.
            people, seen: the ten crops of each person, and what :meth:`face_outputs` says of them.
            heard: what :meth:`voice_outputs` returns.
            warnings: of the steps before; the verdict's are added to them.
        """
        masks = [np.array([source != "fallback" for source in person.sources]) for person in people]
        logits = [rules.pooled(outputs["logit"][:, 0], mask, self.calibration.pooling)
                  for outputs, mask in zip(seen, masks, strict=True)]
        main = max((index for index, logit in enumerate(logits) if not math.isnan(logit)), key=lambda index: logits[index],
                   default=None)
        if main is None:
            searched = f"no face found in {len(clip.times_s)} frames, " if clip and len(clip.times_s) else ""
            outcome = "the prior stands" if heard is None else "the voice alone decides"
            warnings.append(f"{path.name}: {searched}{outcome}")
        elif note := quality_note(people[main]):
            warnings.append(f"{path.name}: {note}")
        face, mask = self._no_face() if main is None else (seen[main], masks[main])
        known = main is not None or heard is not None
        fused = np.clip(self.fuse(face, mask, heard, self.prior), *self.calibration.limits) if known else self.prior
        return Verdict(
            probability=float(fused),
            face=math.nan if main is None else float(self._probability(logits[main], "face")),
            voice=math.nan if heard is None else float(self._probability(heard["logit"].mean(), "voice")),
            frames=[row for rows in map(self._frame_rows, [clip] * len(people), people, seen) for row in rows],
            tracks=[
                {"id": person.track, "probability": float(self._probability(logit, "face")),
                 "frames": person.sources.count("detected")}
                for person, logit in zip(people, logits, strict=True)
            ],
            warnings=warnings,
        )

    def _no_face(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What the fusion takes for a clip that shows no face: zeros, and a mask that leaves them out."""
        outputs = {name: np.zeros((framing.ROWS, *tensor.shape[1:]), np.float32) for name, tensor in self.face.output.items()}
        return outputs, np.zeros(framing.ROWS, bool)

    def _frame_rows(self, clip, person, outputs) -> list[dict]:
        probabilities = self._probability(outputs["logit"][:, 0], "crop")
        return [
            {"time_s": float(clip.times_s[index]), "track": person.track, "box": [float(side) for side in box],
             "source": source, "probability": None if source == "fallback" else float(probability)}
            for index, box, source, probability in zip(
                person.frame_indices, person.boxes, person.sources, probabilities, strict=True)
        ]

    # -- the networks -----------------------------------------------------------------------------------------

    @property
    def voice_rate(self) -> int:
        """Sampling rate that the voice network takes, in Hz: 8 kHz for the study's, 16 kHz for the others."""
        return sound.REFERENCE_RATE if self._hears_reference else sound.SAMPLE_RATE

    @property
    def _hears_reference(self) -> bool:
        return self.voice.input_shape[1] == sound.REFERENCE_SAMPLES

    def face_outputs(self, crops: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of the face network for uint8 crops (N, H, W, 3)."""
        crops = self.resized(crops)
        outputs = _run(self.face, crops, FACE_BATCH)
        if not self.flip:
            return outputs
        mirrored = _run(self.face, crops[:, :, ::-1], FACE_BATCH)
        return {name: (outputs[name] + mirrored[name]) / 2 for name in outputs}

    def resized(self, crops: np.ndarray) -> np.ndarray:
        """Crops (N, H, W, 3) in the size that the face network takes."""
        side = self.face.input_shape[1] or crops.shape[1]  # None: the network resizes by itself
        return crops if crops.shape[1:3] == (side, side) else np.stack([_resize(crop, side) for crop in crops])

    def _run_voice(self, samples: np.ndarray, sample_rate: int) -> dict[str, np.ndarray] | None:
        """All outputs of the voice network, one row for each window; None when there is nothing to hear."""
        windows = voice_signal.network_windows(samples, sample_rate, self._hears_reference)
        return None if windows is None else _run(self.voice, windows, VOICE_BATCH)

    def _probability(self, logit, kind: str):
        return self.calibration.probability(logit, kind, self.prior)


def checked_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights and of the settings in ``folder``, by name, in hexadecimal digits.

    They are compared with ``SHA256SUMS``, the list that ``make checksums`` writes, where the folder holds one.

    Raises:
        ValueError: a file differs from the list or is not on it.
    """
    digests = {}
    for path in sorted([*folder.glob("*.keras"), folder / SETTINGS]):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if (sums := folder / SUMS).is_file():
        listed = {name: digest for digest, name in map(str.split, sums.read_text().splitlines())}
        for name, digest in digests.items():
            if listed.get(name) != digest:
                raise ValueError(f"{folder / name}: expected SHA-256 {listed.get(name)} by {sums}, found {digest}; "
                                 "if you replaced it yourself, run make checksums")
    return digests


def _save_strip(path: Path, verdict: Verdict, people: list[framing.FaceCrops]) -> None:
    """Write the crops of the most suspicious person side by side, 128 pixels each; no picture where nothing was seen."""
    if os.path.exists(path):  # False for a name that is too long
        path.unlink()
    if people:
        suspicion = [-1.0 if math.isnan(track["probability"]) else track["probability"] for track in verdict.tracks]
        crops = people[int(np.argmax(suspicion))].images
        strip = np.concatenate([cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA) for crop in crops], axis=1)
        path.write_bytes(cv2.imencode(".jpg", strip[..., ::-1])[1])  # imwrite would say nothing of a full disk


def _resize(crop: np.ndarray, side: int) -> np.ndarray:
    method = cv2.INTER_AREA if crop.shape[0] > side else cv2.INTER_LINEAR
    return cv2.resize(crop, (side, side), interpolation=method)


def _run(network, inputs: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Run ``network`` on batches of exactly ``batch`` rows, the last one padded with zeros."""
    count = len(inputs)
    padded = np.zeros((math.ceil(count / batch) * batch, *inputs.shape[1:]), np.float32)
    padded[:count] = inputs
    parts = [network.predict_on_batch(padded[start:start + batch]) for start in range(0, len(padded), batch)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts])[:count] for name in network.output}
