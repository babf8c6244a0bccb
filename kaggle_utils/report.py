"""A one-page report on a clip: verdict, scores over time, and maps of where the networks respond.

:func:`study` examines a clip more closely than the verdict needs; :func:`page` renders the result as one
self-contained HTML file that works offline: no scripts, fonts or links. The verdict equals
:meth:`Detector.predict`, from the same ten frames and people. The curves follow these people over three times
as many frames.
"""

import copy
import hashlib
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np

from . import __version__, disk, explain, pictures
from .detector import Detector, Verdict
from .extraction import FRAMES, Extract, listen, look, upright
from .face import framing
from .face.quality import quality_line
from .media import children, files, sound, video
from .voice import layers as voice_layers
from .voice import signal as voice_signal

SAMPLED = 3 * FRAMES  # frames of a curve: an odd multiple includes those of the verdict
SHOWN = 3  # number of most suspicious and of least suspicious frames per person
RARE = 0.05  # a second prior: one fake in twenty clips
HEAT_TOP = 5.0  # Grad-CAM value, in logits, at the top of the scale; raised to the page's maximum
BANDS = 60  # mel bands of a voice picture; each spans at least one spectral bin
MOST_TICKS = 60  # a header may claim years
CHANGED = "the file changed while it was analysed"
COLUMNS = 1200  # of a voice picture, at most
STAGES = ("reading", "faces", "face network", "voice", "page")


@dataclass(frozen=True)
class Zone:
    """A named range of P(fake), from ``low`` up."""

    low: float
    name: str
    sign: str
    style: str


ZONES = (Zone(0.8, "Likely fake", "▲", "fake"), Zone(0.2, "Uncertain", "◆", "unsure"),
         Zone(0.0, "No sign found", "●", "none"))
UNKNOWN = Zone(math.nan, "Cannot tell: no face, no voice", "?", "unknown")


def zone_of(probability: float) -> Zone:
    """The zone of a P(fake); ``UNKNOWN`` for NaN."""
    return UNKNOWN if math.isnan(probability) else next(zone for zone in ZONES if probability >= zone.low)


@dataclass(eq=False)
class Person:
    """One tracked person over the sampled frames.

    ``crops`` uint8 RGB (n, 256, 256, 3), cut at ``boxes`` (n, 4); ``scores``: P(fake) of each crop, NaN
    without a face; ``sources`` as in :class:`framing.FaceCrops`; ``heat``: Grad-CAM maps (h, w) of the frames
    ``most`` and ``least``, by frame.
    """

    name: str
    probability: float
    decides: bool
    crops: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    sources: list[str]
    most: list[int]
    least: list[int]
    heat: dict[int, np.ndarray]


@dataclass(eq=False)
class Voice:
    """The canonical voice, from ``start_s`` to ``end_s`` in the clip.

    ``mel`` in dB and ``saliency`` in 0..1, (bands, frames), lowest band first; ``frequencies`` (bands,) and
    ``rate`` in Hz; ``windows``: start and end in s, P(fake).
    """

    rate: int
    frequencies: np.ndarray
    mel: np.ndarray
    saliency: np.ndarray
    start_s: float
    end_s: float
    windows: list[tuple[float, float, float]]

    @property
    def times_s(self) -> np.ndarray:
        """Times in the clip of the columns of ``mel`` and ``saliency``."""
        return np.linspace(self.start_s, self.end_s, self.mel.shape[1])


@dataclass(eq=False)
class Study:
    """The content of a clip's page.

    ``kept``: the sampled frames that the verdict is based on; ``quality``: how the picture of the face that
    decides limits the answer, in a sentence, or empty without a face.
    """

    path: Path
    verdict: Verdict
    rare: float  # P(fake) at the prior RARE
    prior: float
    clip: video.Frames | None
    people: list[Person]
    kept: np.ndarray
    voice: Voice | None
    digests: dict[str, str]
    quality: str = ""
    identity: tuple[int, ...] = ()  # of the file that was judged

    @property
    def name(self) -> str:
        """The file's name as text to show."""
        return disk.printable(self.path.name)

    @property
    def duration_s(self) -> float:
        """Duration of the picture, or of the voice if it ends later."""
        return max(self.clip.info.duration_s if self.clip else 0.0, self.voice.end_s if self.voice else 0.0,
                   1e-3)

    @property
    def hottest(self) -> float:
        """The upper end of the heat scale, shared by all pictures of the page."""
        return max([HEAT_TOP,
                    *(float(heat.max()) for person in self.people for heat in person.heat.values())])

    @property
    def zone(self) -> Zone:
        known = not (math.isnan(self.verdict.face) and math.isnan(self.verdict.voice))
        return zone_of(self.verdict.probability if known else math.nan)


def write_report(path: str | Path, output: str | Path, detector: Detector,
                 progress: Callable[[str], None] | None = None) -> Study:
    """Write the page of one clip to ``output``; ``progress`` as in :func:`study`.

    Raises:
        FileNotFoundError: ``path`` is not a file.
    """
    found = study(path, detector, progress)
    disk.replace(output, page(found))
    return found


# --- looking and listening ----------------------------------------------------------------------------------
def study(path: str | Path, detector: Detector, progress: Callable[[str], None] | None = None) -> Study:
    """Analyse one clip for its page. Unreadable parts are left out, with a warning in the verdict.

    Args:
        progress: is called with the name of each of the ``STAGES`` when it begins, but for the page; what it
            raises ends the analysis.

    Raises:
        FileNotFoundError: ``path`` is not a file.
    """
    path, rate, tell = Path(path), detector.voice_rate, progress or (lambda stage: None)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a clip")
    identity = files.identity(path)
    tell("reading")
    children.release_memory()  # the reader needs it
    clip, warnings = look(path, SAMPLED)
    samples, unheard = listen(path, rate)
    tell("faces")
    kept, people, curves = [], [], []
    if clip:
        many = clip.info.frame_count > SAMPLED
        kept = video.evenly_spread(SAMPLED, FRAMES) if many else video.spread(clip.times_s, FRAMES)
        people, curves = framing.follow_faces(clip.images, detector.finder, kept)
        if people[0].track < 0 and (turned := upright(path, clip, detector.finder)):
            clip, warnings = turned, turned.warnings
            people, curves = framing.follow_faces(clip.images, detector.finder, kept)
    warnings = warnings + unheard
    tell("face network")
    seen = [detector.face_outputs(person.images) for person in people]
    shown = {number: person for number, curve in enumerate(curves)
             if (person := _person(detector, number, curve))}
    tell("voice")
    heard = detector.voice_outputs(path, samples, rate, warnings)
    voice = _voice(detector, samples, heard, path if clip else None)
    read = Extract(people, clip.times_s[kept] if clip else np.zeros(0), samples, rate, warnings)
    parts = path, read, people, seen, heard
    rarer = copy.copy(detector)
    rarer.prior = RARE
    rare = rarer.combine(*parts, []).probability
    verdict = detector.combine(*parts, warnings)
    if files.identity(path) != identity:
        verdict.warnings.append(f"{path.name}: {CHANGED}")
    shares = [track["probability"] for track in verdict.tracks]
    main = None if math.isnan(verdict.face) else int(np.nanargmax(shares))
    for number, person in shown.items():
        person.probability, person.decides = shares[number], number == main
    return Study(path, verdict, rare, detector.prior, clip, list(shown.values()), np.array(kept, int), voice,
                 detector.digests, "" if main is None else quality_line(people[main]), identity)


def _person(detector: Detector, number: int, found: framing.FaceCrops) -> Person | None:
    """The scores and heat maps of a tracked person, whose probability is set later; None without a face."""
    known = np.array([source != "fallback" for source in found.sources])
    if not known.any():
        return None
    logits = detector.face_outputs(found.images)["logit"][:, 0]
    scores = np.where(known, detector.calibration.probability(logits, "crop", detector.prior), np.nan)
    order = [int(frame) for frame in np.argsort(-scores) if known[frame]]
    most, least = order[:SHOWN], order[::-1][: min(SHOWN, max(len(order) - SHOWN, 0))]
    maps = explain.grad_cam(detector.face, detector.resized(found.images[most + least]))
    return Person(f"Person {'ABCD'[number]}", math.nan, False, found.images, found.boxes, scores,
                  found.sources, most, least, dict(zip(most + least, maps, strict=True)))


def _voice(detector: Detector, recorded: np.ndarray, heard: dict | None, path: Path | None) -> Voice | None:
    """The input of the voice network and its saliency, on the time axis of the frames of ``path``."""
    if heard is None:
        return None
    rate = detector.voice_rate
    speech = voice_signal.hear(recorded, rate, reference=rate == sound.REFERENCE_RATE)
    samples, start_s = speech.samples, speech.start_s + (video.survey(path).sound_start_s if path else 0.0)
    windows = speech.windows.reshape(-1, *detector.voice.input_shape[1:])
    levels = voice_signal.log_power(samples, rate, explain.FFT_LENGTH, explain.HOP)[0]
    bands = voice_layers.filter_bank("mel", BANDS, rate, explain.FFT_LENGTH).T
    bands /= bands.sum(axis=1, keepdims=True)
    sensitive = np.zeros_like(levels)
    for start, found in zip(speech.starts, explain.saliency(detector.voice, windows), strict=True):
        place = sensitive[:, start // explain.HOP :][:, : found.shape[1]]
        np.maximum(place, np.abs(found[:, : place.shape[1]]), out=place)
    mel = 10 * np.log10(np.maximum(bands @ 10 ** (levels / 10), 1e-8))
    scores = detector.calibration.probability(heard["logit"][:, 0], "voice", detector.prior)
    length_s = min(windows.shape[1], len(samples)) / rate
    return Voice(
        rate=rate, frequencies=bands @ np.linspace(0, rate / 2, bands.shape[1]),
        mel=_fewer_columns(mel - mel.max()), saliency=_smooth(_fewer_columns(bands @ sensitive)),
        start_s=start_s, end_s=start_s + len(samples) / rate,
        windows=[(start_s + start / rate, start_s + start / rate + length_s, float(score))
                 for start, score in zip(speech.starts, scores, strict=True)],
    )


def _fewer_columns(picture: np.ndarray) -> np.ndarray:
    """(bands, frames) averaged over time to at most ``COLUMNS`` frames."""
    step = -(-picture.shape[1] // COLUMNS)
    padded = np.pad(picture, ((0, 0), (0, -picture.shape[1] % step)), mode="edge")
    return padded.reshape(len(picture), -1, step).mean(axis=2)


def _smooth(picture: np.ndarray) -> np.ndarray:
    """Blur the speckle out of a map and scale it to 0..1."""
    soft = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigmaX=6, sigmaY=3)
    return soft / max(float(soft.max()), 1e-12)


def timeline(found: Study) -> list[dict]:
    """Every sampled frame of each person, in the format of ``plots.frame_scores``."""
    return [{"time_s": float(time), "track": person.name, "source": source,
             "probability": None if math.isnan(score) else float(score)}
            for person in found.people
            for time, source, score in zip(found.clip.times_s, person.sources, person.scores, strict=True)]


def moments(found: Study, person: Person) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """A person's most and least suspicious crops, the same with heat maps, and a title for each pair."""
    frames = person.most + person.least
    titles = [f"{percent(person.scores[frame])} at {clock(found.clip.times_s[frame])}" for frame in frames]
    overlays = [_overlay(person, frame, found) for frame in frames]
    return [person.crops[frame] for frame in frames], overlays, titles


# --- the page -----------------------------------------------------------------------------------------------
def page(found: Study) -> str:
    """The page as HTML; the template escapes everything that comes from the clip."""
    return rendered(
        "report.html.jinja", study=found, rare=RARE, facts=facts(found), left_out=left_out(found),
        made_with=made_with(found), ticks=_ticks(found.duration_s), curve=_curve, overlay=_overlay,
        still=_still, grey=pictures.grey, warm=pictures.warm, isnan=math.isnan, reasons=reasons(found))


def rendered(template: str, **values) -> str:
    """A template of this folder as HTML, with everything escaped that does not say otherwise."""
    import jinja2

    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"percent": percent, "clock": clock, "zone": zone_of, "jpeg": pictures.jpeg,
                          "png": pictures.png, "thumb": pictures.thumb,
                          "link": lambda path: quote(os.fsencode(path))}
    templates.tests["isnan"] = math.isnan
    return templates.get_template(template).render(
        zones=ZONES, written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"), **values)


def record(found: Study) -> dict:
    """The verdict as JSON-ready values, with the clip's word and SHA-256, software and weights."""
    named = facts(found)
    return {"file": found.path.name, "sha256": named["SHA-256"], "word": found.zone.name,
            "prior": found.prior, "quality": found.quality,
            "duration_s": round(found.duration_s, 3) if found.clip or found.voice else None,
            **found.verdict.to_dict(), "warnings": notes(found), "made_with": made_with(found)}


def percent(probability: float) -> str:
    """A probability as text of at most five characters."""
    return "–" if math.isnan(probability) else f"{100 * probability:.0f} %"


def clock(seconds: float) -> str:
    """A time in a clip: 4.2 s, or 1:04 from one minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def facts(found: Study) -> dict[str, str]:
    """The file's properties: name, size, picture, sound and SHA-256."""
    named = {"File": found.name, "Size": f"{found.identity[2] / 1e6:.1f} MB"}
    if found.clip:
        info = found.clip.info
        turn = f", stored rotated by {info.rotation}°, shown upright" if info.rotation else ", not rotated"
        named |= {"Duration": clock(info.duration_s),
                  "Picture": f"{info.width} × {info.height} pixels{turn}, {info.fps:.4g} frames per second, "
                             f"{info.frame_count} frames, codec {info.codec}"}
    return named | {"Sound": _sound(found), "SHA-256": _digest(found)}


def _digest(found: Study) -> str:
    """The SHA-256 of the file that was judged; no digest of another one that has taken its place."""
    try:
        with open(found.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return f"unknown: {CHANGED}"
    return digest if files.identity(found.path) == found.identity else f"unknown: {CHANGED}"


def _sound(found: Study) -> str:
    try:
        listed = sound.sound_format(found.path) if found.clip or found.voice else "unknown"
    except video.UnreadableClip:
        listed = "unknown"
    return "unknown: the file cannot be read" if listed == "unknown" else listed or "no sound track"


def notes(found: Study) -> list[str]:
    """The verdict's warnings as sentences without the file's name, which the page has in its title."""
    lines = []
    for warning in found.verdict.warnings:
        for name in (f"{found.path}: ", f"{found.path.name}: "):
            warning = warning.removeprefix(name)
        warning = warning.replace(str(found.path), found.path.name)
        lines.append(f"{warning[:1].upper()}{warning[1:]}.")
    return [line for line in lines if line != "The score is the prior."]  # the page gives none then


def reasons(found: Study) -> dict[str, str]:
    """Why there is no score of the ``face`` or of the ``voice``: a sentence, empty where there is a score."""
    lines = notes(found)
    face = next((line for line in lines if "picture was not analysed" in line or "o face found" in line), "")
    voice = next((line for line in lines if "voice was not analysed" in line), "")
    return {"face": "" if found.people else face or "No face was found.",
            "voice": "" if found.voice else voice or "No voice was heard."}


def left_out(found: Study) -> list[str]:
    """The omissions of the analysis and their reasons: first for this clip, then in general."""
    lines = notes(found)
    if found.clip and (rest := found.clip.info.frame_count - len(set(found.clip.times_s))) > 0:
        lines.append(f"{rest} of the clip's {found.clip.info.frame_count} frames: "
                     f"{len(set(found.clip.times_s))} were sampled, evenly over its length.")
    if found.voice:
        heard = sum(end - start for start, end, _ in found.voice.windows)
        if heard < 0.95 * (found.voice.end_s - found.voice.start_s):
            lines.append(f"Sound outside {len(found.voice.windows)} four-second windows ({clock(heard)}).")
    return [*lines, "People beyond the four most prominent, and faces much smaller than the largest one.",
            "Frames without a face, scenery, text; lip sync; cuts, captions and context.",
            "The file's origin: history, metadata and earlier versions."]


def made_with(found: Study) -> dict[str, str]:
    """Versions of the software, and the SHA-256 of each weights file."""
    import keras

    backend = keras.backend.backend()
    packages = {"kaggle_utils": __version__, "Python": platform.python_version(), "Keras": keras.__version__,
                backend: version(backend), "mtcnn": version("mtcnn"), "OpenCV": cv2.__version__,
                "numpy": np.__version__}
    return {"Software": ", ".join(f"{name} {number}" for name, number in packages.items())} | found.digests


def _ticks(duration_s: float) -> list[tuple[float, str]]:
    """About five round times along a clip: position in percent, label."""
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 36000)
                if duration_s / step <= 6 or step == 36000)
    return [(100 * time / duration_s, clock(time).replace(".0", ""))
            for time in step * np.arange(min(MOST_TICKS, math.ceil(duration_s * 0.97 / step)))]


def _curve(person: Person, found: Study) -> tuple[list[str], list[dict]]:
    """The lines of a curve, with gaps where no face is known, and its points; x in 0..1000, y in 0..100."""
    points = [{"x": round(1000 * time / found.duration_s, 1), "y": round(100 * (1 - score), 1),
               "time_s": time, "score": score, "seen": source == "detected"}
              for time, score, source in zip(found.clip.times_s, person.scores, person.sources, strict=True)]
    lines: list[list[str]] = [[]]
    for point in points:
        if math.isnan(point["score"]):
            lines.append([])
        else:
            lines[-1].append(f"{point['x']},{point['y']}")
    known = [point for point in points if not math.isnan(point["score"])]
    return [" ".join(line) for line in lines if line], known


def _still(found: Study) -> tuple[int, np.ndarray]:
    """The middle one of the frames with the most people; its picture with a lettered box around each face."""
    seen = np.zeros(len(found.clip.images), int) + sum(~np.isnan(person.scores) for person in found.people)
    best = np.flatnonzero(seen == seen.max())
    frame = int(best[len(best) // 2])
    boxes = [(person.name[-1], person.boxes[frame]) for person in found.people
             if not math.isnan(person.scores[frame])]
    return frame, pictures.boxed(found.clip.images[frame], boxes)


def _overlay(person: Person, frame: int, found: Study) -> np.ndarray:
    return explain.overlay(person.crops[frame], person.heat[frame] / found.hottest)
