"""The clips of all open pages in one line, and the thread that analyses one after the other."""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import disk, explain, report
from ..datasets import miniature
from ..detector import VOICE_BATCH, Detector
from ..face import framing
from ..media import files, isolation
from ..media.children import release_memory
from .session import safe_name

DRAWING = "drawing the sample"
FIRST_GUESS_S = {DRAWING: 3.0, "reading": 2.0, "faces": 1.5, "face network": 3.0, "voice": 1.5, "page": 0.5}
IDLE_S = 60.0  # without a clip, before the memory of the reader is given back
MOST_WAITING = 100  # clips in the line
SAMPLES = {  # clips of the miniature: label, and place among its test clips
    "person": ("One person", 0), "fake": ("Altered face and voice", 1), "two": ("Two people, one altered", 6),
    "empty": ("No face", 4)}
FIRST_TEST = 8  # place of the first test clip in miniature.plan


class Removed(Exception):
    """The clip was removed, or its page closed, while it was analysed."""


@dataclass(eq=False)
class Clip:
    """One clip on its way. ``tab``: the open page that it belongs to; ``folder``: its own, for all its files.

    ``state``: uploading, waiting, running, done or failed; then ``trouble`` says why. ``result`` holds word,
    style, sign and probability of a finished clip.
    """

    id: str
    tab: str
    name: str
    folder: Path
    sample: str = ""
    state: str = "uploading"
    stage: str = ""
    since: float = 0.0
    trouble: str = ""
    result: dict | None = None

    @property
    def path(self) -> Path:
        return disk.fitting(self.folder / self.name)

    @property
    def page(self) -> Path:
        return self.folder / "page" / "report.html"

    @property
    def verdict(self) -> Path:
        return self.folder / "page" / "verdict.json"


class Desk:
    """Receives clips and analyses them in the order of their arrival, in one thread with one detector."""

    def __init__(self, folder: Path, load: Callable[[], Detector], changed: Callable[[], None],
                 longest_s: float):
        """
        Args:
            folder: each clip gets a folder in it.
            load: makes the detector, once, in the thread.
            changed: is called in any thread after each step.
            longest_s: longer clips are refused, in s.
        """
        self.folder, self.longest_s = folder, longest_s
        self.clips: dict[str, Clip] = {}
        self.ready, self.trouble = False, ""
        self._load, self._changed = load, changed
        self._line: list[Clip] = []
        self._turn = threading.Condition()
        self._seconds = dict(FIRST_GUESS_S)
        threading.Thread(target=self._work, daemon=True).start()

    # -- from the server's thread ----------------------------------------------------------------------------
    def receive(self, tab: str, name: str, sample: str = "") -> Clip:
        """A new clip with a folder of its own; write its file to ``path``, then call :meth:`enter`."""
        folder = self.folder / secrets.token_hex(8)
        clip = Clip(secrets.token_urlsafe(16), tab, safe_name(name), folder, sample)
        clip.page.parent.mkdir(parents=True)
        self.clips[clip.id] = clip
        return clip

    def enter(self, clip: Clip) -> None:
        """Put a complete clip at the end of the line."""
        with self._turn:
            clip.state = "waiting"
            self._line.append(clip)
            self._turn.notify()
        self._changed()

    def remove(self, clip: Clip) -> None:
        """Forget a clip and delete its files; an analysis under way ends at its next stage."""
        with self._turn:
            self.clips.pop(clip.id, None)
            running = clip.state == "running"
            if clip in self._line and not running:
                self._line.remove(clip)
        shutil.rmtree(clip.folder, ignore_errors=True)
        if running and clip.stage == "reading":
            isolation.stop_reading()
        self._changed()

    @property
    def is_full(self) -> bool:
        return len(self._line) >= MOST_WAITING

    @property
    def is_busy(self) -> bool:
        return bool(self._line)

    def states(self, tab: str) -> list[dict]:
        """The clips of one page in the order of their arrival, JSON-ready."""
        line, before_s, shown = list(self._line), 0.0, {}
        for place, clip in enumerate(line):
            before_s += self._left_s(clip)
            shown[clip.id] = {"place": place, "left_s": round(before_s, 1)}
        return [{"id": clip.id, "name": clip.name, "state": clip.state, "stage": clip.stage,
                 "trouble": clip.trouble, **(clip.result or {}), **shown.get(clip.id, {})}
                for clip in list(self.clips.values()) if clip.tab == tab]

    def _left_s(self, clip: Clip) -> float:
        """Seconds that a clip still needs, by those that the stages of earlier clips took."""
        stages = [DRAWING, *report.STAGES] if clip.sample else list(report.STAGES)
        if clip.state != "running" or clip.stage not in stages:
            return sum(self._seconds[stage] for stage in stages)
        later = sum(self._seconds[stage] for stage in stages[stages.index(clip.stage) + 1:])
        return later + max(0.2, self._seconds[clip.stage] - (time.monotonic() - clip.since))

    # -- the thread ------------------------------------------------------------------------------------------
    def _work(self) -> None:
        try:
            detector = self._load()
            warm_up(detector)
        except Exception as error:
            self.trouble = f"The networks could not be loaded: {error}"
            self._changed()
            return
        self.ready = True
        self._changed()
        release_memory()
        while True:
            with self._turn:
                if clip := self._line[0] if self._turn.wait_for(lambda: self._line, IDLE_S) else None:
                    clip.state = "running"
            if clip is None:
                isolation.stop_reading()  # the next clip starts the reader again, in a second
                release_memory()
                continue
            try:
                self._analyse(clip, detector)
            except Removed:
                pass
            except Exception as error:  # the next clip must not suffer
                clip.state, clip.trouble = "failed", f"The analysis stopped: {type(error).__name__}: {error}"
            with self._turn:
                self._line.remove(clip)
            clip.path.unlink(missing_ok=True)
            self._changed()
            release_memory()

    def _analyse(self, clip: Clip, detector: Detector) -> None:
        def begin(stage: str) -> None:
            if clip.stage:
                self._learn(clip)
            if clip.id not in self.clips:
                raise Removed
            clip.stage, clip.since = stage, time.monotonic()
            self._changed()

        if clip.sample:
            begin(DRAWING)
            draw_sample(clip.sample, clip.path)
        begin("reading")
        if refused := self._too_long(clip.path):
            clip.state, clip.trouble = "failed", refused
            return
        found = report.study(clip.path, detector, begin)
        begin("page")
        if found.clip is None and found.voice is None:
            unread = report.reasons(found)["face"].split(":")[0].split(";")[0]
            clip.state, clip.trouble = "failed", f"This file cannot be read as a video ({unread})."
            return
        record = report.record(found)
        clip.page.write_bytes(report.page(found).encode("utf-8", "backslashreplace"))
        clip.verdict.write_text(json.dumps(record, indent=1), encoding="utf-8")
        zone = found.zone
        probability = None if zone == report.UNKNOWN else report.percent(found.verdict.probability)
        clip.result = {"word": zone.name, "sign": zone.sign, "style": zone.style, "probability": probability}
        self._learn(clip)
        clip.state = "done"

    def _learn(self, clip: Clip) -> None:
        """Adjust the expected time of the stage that ends."""
        taken = time.monotonic() - clip.since
        self._seconds[clip.stage] = (self._seconds[clip.stage] + taken) / 2

    def _too_long(self, path: Path) -> str:
        """Why a clip is not analysed, or an empty text."""
        try:
            found = files.survey(path)
        except files.UnreadableClip:
            return ""  # the analysis says why
        spans = [float(np.ptp(stamps)) for stamps in (found.stamps_s, found.sound_s) if len(stamps)]
        longest_s = max(spans, default=found.duration_s)
        if not longest_s > self.longest_s:
            return ""
        return (f"This clip is {report.clock(longest_s)} long; the limit is {report.clock(self.longest_s)}. "
                "Cut out the part in question and try that.")


def draw_sample(key: str, path: Path) -> None:
    """Draw one of the ``SAMPLES`` into ``path``."""
    drawn = miniature.plan(0)[FIRST_TEST + SAMPLES[key][1]]
    folder = path.parent / "drawn"
    (folder / drawn.folder).mkdir(parents=True)
    miniature.write_clip(drawn, folder)
    os.replace(folder / drawn.folder / drawn.name, path)


def warm_up(detector: Detector) -> None:
    """Run each network once, on nothing: the first clip then does not wait for TensorFlow's tracing."""
    windows = np.zeros((VOICE_BATCH, *detector.voice.input_shape[1:]), np.float32)
    detector.finder([np.zeros((360, 640, 3), np.uint8)])
    crops = np.zeros((2 * report.SHOWN, framing.SIZE, framing.SIZE, 3), np.uint8)
    detector.face_outputs(crops)
    explain.grad_cam(detector.face, detector.resized(crops))
    detector.score_voice(np.zeros(2 * windows.shape[1], np.float32), detector.voice_rate)  # no speech
    detector.voice.predict_on_batch(windows)
    explain.saliency(detector.voice, windows[:1])
