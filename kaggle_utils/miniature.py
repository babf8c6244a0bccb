"""A small data set in DFDC's layout, made in seconds with no download, so that a first run needs no data.

One portrait (Eileen Collins, NASA, public domain; it is part of scikit-image) becomes several talking people: mirrored,
reshaped, dyed, lit and moved before a painted room. The voice is a source-filter synthesis of vowels and hisses.
A FAKE has a self-blended face (as in Shiohara and Yamasaki, CVPR 2022: a shifted, recoloured copy blended through a
soft mask), a voice resynthesised from its mel spectrogram (Griffin and Lim, 1984), or both. The clips teach nothing
about real deepfakes: they exercise the code, the awkward cases included.

The same seed gives the same bytes on the same machine.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from tqdm.auto import tqdm

VERSION = 1
MARK = "miniature.json"
SOUND_RATE = 16000  # Hz, of the synthesis; the clips hold 44.1 kHz AAC as DFDC's do
SIZES = ((640, 360), (768, 432), (854, 480))
# In the portrait, 512 × 512 pixels: a rough outline of the person, and the face as an ellipse.
OUTLINE = np.array([
    (150, 60), (160, 35), (195, 12), (235, 8), (280, 30), (303, 60), (303, 95), (285, 135), (268, 160), (300, 200),
    (312, 240), (345, 265), (362, 320), (364, 352), (420, 340), (480, 370), (500, 440), (511, 511), (20, 511),
    (18, 430), (30, 330), (55, 270), (95, 230), (110, 195), (125, 165), (180, 148), (165, 115), (150, 90),
])
FACE = (223.5, 119.0, 41.0, 53.0)  # centre x, y, half width, half height
MOUTH = (223.0, 140.0)
# First three formants of adult vowels in Hz (Peterson and Barney, 1952).
VOWELS = (
    (730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410), (660, 1720, 2410),
)


@dataclass(frozen=True)
class Person:
    """How the portrait is changed to pass for someone else, and how that person sounds."""

    mirror: bool = False
    width: float = 1.0  # of the head, as a factor
    jaw: float = 0.0  # how much wider the lower face is than the upper one
    skin: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain of red, green, blue
    hair: tuple[float, float, float] = (1.0, 1.0, 1.0)
    clothes: int = 0  # turn of the suit's hue in degrees
    pitch: float = 180.0  # Hz
    tract: float = 1.0  # factor of the formants: above 1 for a shorter vocal tract


@dataclass(frozen=True)
class Clip:
    """One clip to make. Clips with the same ``scene`` share room, people, movement and words."""

    folder: str
    name: str
    scene: int
    size: tuple[int, int]
    fps: int
    seconds: float
    people: tuple[Person, ...]
    original: str | None = None
    fake_face: int | None = None  # which of the people has a self-blended face
    fake_voice: bool = False
    sound: bool = True
    turned: bool = False  # stored lying on its side, with a display matrix that puts it upright

    @property
    def fake(self) -> bool:
        return self.fake_face is not None or self.fake_voice


def make_miniature(folder: str | Path, seed: int = 0, progress: bool = True) -> Path:
    """Make the data set, or leave it as it is when ``folder`` already holds the one of this seed.

    Writes ``train_sample_videos/`` (4 originals, 4 fakes of them, ``metadata.json``), ``test_videos/`` (8 clips: two
    plain ones and those without sound, without a face, with two faces, stored on the side, 1 s long),
    ``sample_submission.csv`` and ``test_labels.csv`` (``filename,label``), and ``miniature.json``, which says of each
    clip what is fake and where the faces are.

    Returns:
        the folder.

    Raises:
        FileExistsError: ``folder`` holds something else; nothing is touched.
        RuntimeError: ffmpeg failed; the message is its own.
    """
    folder = Path(folder)
    if (folder / MARK).is_file():
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if (mark.get("version"), mark.get("seed")) == (VERSION, seed):
            return folder
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or empty folder, or a miniature; found other files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        made = Path(unfinished) / folder.name
        _make(made, seed, progress)
        _put_in_place(made, folder)
    return folder


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename the finished data set; another process may have finished the same one first."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / MARK).is_file():
            raise


def _make(folder: Path, seed: int, progress: bool) -> None:
    clips = plan(seed)
    for name in ("train_sample_videos", "test_videos"):
        (folder / name).mkdir(parents=True)
    _portrait()  # once, before the threads ask for it
    with ThreadPoolExecutor(2) as pool:
        made = list(tqdm(pool.map(lambda clip: _write_clip(clip, folder), clips), "miniature", len(clips),
                         unit="clip", disable=not progress))
    train = [clip for clip in clips if clip.folder == "train_sample_videos"]
    test = sorted((clip for clip in clips if clip.folder == "test_videos"), key=lambda clip: clip.name)
    _write_json(folder / "train_sample_videos" / "metadata.json", {
        clip.name: {"label": "FAKE" if clip.fake else "REAL", "split": "train", "original": clip.original}
        for clip in train
    })
    _write_table(folder / "test_labels.csv", {clip.name: int(clip.fake) for clip in test})
    _write_table(folder / "sample_submission.csv", {clip.name: 0.5 for clip in test})
    facts = {clip.name: entry for clip, entry in zip(clips, made, strict=True)}
    _write_json(folder / MARK, {"version": VERSION, "seed": seed, "clips": facts})


def plan(seed: int) -> list[Clip]:
    """The clips of a seed: names, sizes and lengths are drawn, the cases are always the same."""
    rng = np.random.default_rng(seed)
    names = iter(_names(rng, 16))
    people = [_draw_person(rng, index) for index in range(6)]

    def clip(folder: str, *who: int, **case) -> Clip:
        drawn = {"size": SIZES[rng.integers(len(SIZES))], "fps": int(rng.choice((15, 20, 24, 25))),
                 "seconds": float(rng.choice((2.0, 2.4, 3.0))), "scene": int(rng.integers(2**31))}
        return Clip(folder, next(names), people=tuple(people[index] for index in who), **(drawn | case))

    originals = [clip("train_sample_videos", index) for index in range(4)]
    parts = ({"fake_face": 0}, {"fake_face": 0}, {"fake_voice": True}, {"fake_face": 0, "fake_voice": True})
    fakes = [replace(original, name=next(names), original=original.name, **part)
             for original, part in zip(originals, parts, strict=True)]
    tests = [
        clip("test_videos", 4),
        clip("test_videos", 5, fake_face=0, fake_voice=True, seconds=4.0),
        clip("test_videos", 0, fake_voice=True),
        clip("test_videos", 1, fake_face=0, sound=False),
        clip("test_videos"),
        clip("test_videos", 2, size=(360, 640), turned=True),
        clip("test_videos", 4, 3, fake_face=1),
        clip("test_videos", 5, seconds=1.0),
    ]
    return originals + fakes + tests


def _names(rng: np.random.Generator, count: int) -> list[str]:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(rng.choice(letters, 10)) + ".mp4" for _ in range(count)]


def _draw_person(rng: np.random.Generator, index: int) -> Person:
    tone = rng.uniform(0.62, 1.05)
    return Person(
        mirror=bool(index % 2),
        width=float(rng.uniform(0.92, 1.1)),
        jaw=float(rng.uniform(-0.12, 0.12)),
        skin=tuple(float(gain) for gain in tone * rng.uniform((0.98, 0.94, 0.88), (1.03, 1.02, 1.05))),
        hair=tuple(float(gain) for gain in rng.uniform(0.25, 1.15) * rng.uniform(0.85, 1.1, 3)),
        clothes=int(rng.integers(0, 360)),
        pitch=float(rng.uniform(95, 230)),
        tract=float(rng.uniform(0.88, 1.15)),
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=None if path.name == MARK else 1) + "\n", encoding="utf-8")


def _write_table(path: Path, labels: dict[str, float]) -> None:
    rows = "".join(f"{name},{label}\n" for name, label in labels.items())
    path.write_text("filename,label\n" + rows, encoding="utf-8")


# --- what is known about a made clip ----------------------------------------------------------------------------------

def clip_facts(folder: str | Path, filename: str) -> dict:
    """What ``miniature.json`` says of a clip.

    Keys: ``label``, ``original``, ``fake_face`` (index of the altered face, or null), ``fake_voice``, ``sound``,
    ``turned``, ``width``, ``height``, ``fps``, and ``faces``: for each person a list over frames of ellipses
    [centre x, centre y, half width, half height in pixels, degrees clockwise], in the upright picture.
    """
    return json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))["clips"][filename]


def clip_mask(folder: str | Path, filename: str, frame_index: int) -> np.ndarray:
    """Where frame ``frame_index`` of a clip is altered: the blend mask, float32 (H, W) in 0..1; zeros when nowhere."""
    facts = clip_facts(folder, filename)
    if facts["fake_face"] is None:
        return np.zeros((facts["height"], facts["width"]), np.float32)
    return blend_mask(facts["height"], facts["width"], facts["faces"][facts["fake_face"]][frame_index])


def blend_mask(height: int, width: int, ellipse: tuple[float, float, float, float, float]) -> np.ndarray:
    """A soft elliptical mask, float32 (height, width): 1 inside, 0 outside, a smooth edge a quarter of the radius wide.

    ``ellipse``: centre x, y, half width, half height in pixels, degrees clockwise.
    """
    x, y, half_width, half_height, degrees = ellipse
    mask = np.zeros((height, width), np.float32)
    reach = int(np.ceil(1.15 * max(half_width, half_height)))
    left, right = max(0, int(x) - reach), min(width, int(x) + reach + 1)
    top, bottom = max(0, int(y) - reach), min(height, int(y) + reach + 1)
    if left >= right or top >= bottom:
        return mask
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    across = ((columns - x) * cosine + (rows - y) * sine) / half_width
    along = ((rows - y) * cosine - (columns - x) * sine) / half_height
    edge = np.clip((1.125 - np.hypot(across, along)) / 0.25, 0, 1)
    mask[top:bottom, left:right] = edge * edge * (3 - 2 * edge)
    return mask


def self_blend(image: np.ndarray, ellipse: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Blend a recoloured, rescaled, blurred and shifted copy of a face into its own place.

    Args:
        image: uint8 RGB (H, W, 3).
        ellipse: the face, as in :func:`blend_mask`, which is the mask used.
        rng: draws the change.

    Returns:
        uint8 RGB (H, W, 3).
    """
    x, y, half_width, half_height, _ = ellipse
    reach = int(1.6 * max(half_width, half_height))
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    around = image[top:int(y) + reach, left:int(x) + reach]
    centre = (x - left, y - top)
    matrix = cv2.getRotationMatrix2D(centre, rng.uniform(-2.5, 2.5), rng.choice((0.95, 1.06)))
    matrix[:, 2] += rng.uniform(-0.05, 0.05, 2) * half_width
    source = cv2.warpAffine(around, matrix, around.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    source = cv2.GaussianBlur(source, (0, 0), 0.012 * half_width + 0.4)
    source = source * rng.uniform(0.88, 1.1) + rng.uniform(8, 15) * np.array([1, -0.6, -1]) * rng.choice((-1, 1))
    mask = blend_mask(*around.shape[:2], (*centre, *ellipse[2:]))[..., None]
    blended = image.copy()
    blended[top:int(y) + reach, left:int(x) + reach] = np.clip(around + mask * (source - around), 0, 255).round()
    return blended


# --- picture ----------------------------------------------------------------------------------------------------------

@cache
def _portrait() -> np.ndarray:
    """The portrait, uint8 RGBA (512, 512, 4); alpha cuts the person out (GrabCut at half size, from ``OUTLINE``)."""
    from skimage.data import astronaut

    image = astronaut()
    inside = cv2.fillPoly(np.zeros((256, 256), np.uint8), [OUTLINE // 2], 1)
    known = np.full((256, 256), cv2.GC_PR_BGD, np.uint8)
    known[cv2.dilate(inside, np.ones((6, 6))) == 0] = cv2.GC_BGD
    known[inside == 1] = cv2.GC_PR_FGD
    known[cv2.erode(inside, np.ones((12, 12))) == 1] = cv2.GC_FGD
    cv2.setRNGSeed(0)
    half = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
    cv2.grabCut(half, known, None, np.zeros((1, 65)), np.zeros((1, 65)), 1, cv2.GC_INIT_WITH_MASK)
    person = np.isin(known, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    soft = cv2.GaussianBlur(cv2.resize(person, (512, 512), interpolation=cv2.INTER_LINEAR), (0, 0), 1.5)
    alpha = np.clip((soft - 0.4) / 0.5, 0, 1)
    return np.dstack([image, (255 * alpha).astype(np.uint8)])


def _dressed(person: Person) -> np.ndarray:
    """The portrait as ``person``: uint8 RGBA (512, 512, 4), not yet mirrored."""
    portrait = _portrait()
    rgb, alpha = portrait[..., :3], portrait[..., 3]
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    orange = ((hsv[..., 0] < 16) | (hsv[..., 0] > 172)) & (hsv[..., 1] > 120)
    orange[:190] = False
    suit = cv2.GaussianBlur(orange.astype(np.float32), (0, 0), 1)[..., None]
    hsv[..., 0] = (hsv[..., 0].astype(int) + person.clothes // 2) % 180
    dyed = rgb + suit * (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32) - rgb)
    face = blend_mask(512, 512, (*FACE[:2], FACE[2] * 1.05, FACE[3] * 1.1, 0))[..., None]
    head = blend_mask(512, 512, (227, 88, 80, 84, 0))[..., None]
    gain = 1 + face * (np.array(person.skin) - 1) + head * (1 - face) * (np.array(person.hair) - 1)
    rgba = np.dstack([np.clip(dyed * gain, 0, 255), alpha]).astype(np.float32)
    rows, columns = np.mgrid[0:512, 0:512].astype(np.float32)
    near = np.exp(-(((rows - FACE[1]) / 110) ** 4)) * np.exp(-(((columns - FACE[0]) / 120) ** 4))
    wider = 1 + near * (person.width - 1 + person.jaw * np.tanh((rows - FACE[1]) / 30))
    columns = FACE[0] + (columns - FACE[0]) / wider
    return cv2.remap(rgba, columns.astype(np.float32), rows, cv2.INTER_LINEAR).round().astype(np.uint8)


def _speaking(sprite: np.ndarray, opening: float) -> np.ndarray:
    """Lower the jaw by ``opening`` (0..1): the picture below the mouth is drawn down by up to six pixels."""
    top, bottom, left, right = 130, 215, 160, 290
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    below = np.clip((rows - MOUTH[1]) / 10, 0, 1) * np.clip((bottom - 10 - rows) / 40, 0, 1)
    drop = 6 * opening * below * np.exp(-(((columns - MOUTH[0]) / 32) ** 2))
    moved = sprite.copy()
    moved[top:bottom, left:right] = cv2.remap(sprite, columns, (rows - drop).astype(np.float32), cv2.INTER_LINEAR)
    return moved


def _room(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A painted room out of focus, uint8 RGB (height, width, 3)."""
    wall = rng.uniform(90, 200) + rng.normal(0, 15, 3)
    floor = rng.uniform(40, 130) + rng.normal(0, 15, 3)
    down = np.linspace(0, 1, height)[:, None, None]
    room = np.broadcast_to(wall + down**2 * (floor - wall), (height, width, 3)).astype(np.float32)
    for _ in range(9):  # windows, shelves, pictures
        x, y = rng.integers(0, width), rng.integers(0, int(height * 0.7))
        corner = (int(x + rng.uniform(0.05, 0.25) * width), int(y + rng.uniform(0.05, 0.4) * height))
        colour = np.clip(wall + rng.normal(0, 40) + rng.normal(0, 15, 3), 0, 255).tolist()
        room = cv2.rectangle(np.ascontiguousarray(room), (int(x), int(y)), corner, colour, -1)
    room = cv2.GaussianBlur(room, (0, 0), height / 80)
    plaster = cv2.resize(rng.normal(0, 4, (height // 8, width // 8)).astype(np.float32), (width, height),
                         interpolation=cv2.INTER_CUBIC)
    return np.clip(room + plaster[..., None], 0, 255).astype(np.uint8)


def _swing(rng: np.random.Generator, times: np.ndarray, reach: float) -> np.ndarray:
    """A slow, smooth movement within ±``reach``, one value for each time in seconds."""
    rates, phases = rng.uniform(0.15, 0.6, 3), rng.uniform(0, 2 * np.pi, 3)
    return reach * np.sin(2 * np.pi * times[:, None] * rates + phases).mean(axis=1)


def _poses(clip: Clip, rng: np.random.Generator, times: np.ndarray) -> list[np.ndarray]:
    """For each person the affine matrices (frames, 2, 3) from portrait to picture."""
    width, height = clip.size
    poses = []
    for index, person in enumerate(clip.people):
        size = min(height, width) / 360 * (0.8 if len(clip.people) > 1 else rng.uniform(1.0, 1.2))
        middle = width * ((index + 0.5) / len(clip.people) + 0.02 * rng.normal())
        level = height * 0.42 if height > width else height * rng.uniform(0.4, 0.46)
        angle = np.radians(_swing(rng, times, 6))
        scale = size * (1 + _swing(rng, times, 0.06))
        x, y = middle + _swing(rng, times, 0.05 * width), level + _swing(rng, times, 0.03 * height)
        flip = -1 if person.mirror else 1
        turn = np.stack([np.stack([flip * np.cos(angle), -np.sin(angle)], -1),
                         np.stack([flip * np.sin(angle), np.cos(angle)], -1)], 1) * scale[:, None, None]
        offset = np.stack([x, y], -1) - turn @ np.array(FACE[:2])
        poses.append(np.concatenate([turn, offset[..., None]], -1))
    return poses


def _ellipse(pose: np.ndarray, person: Person) -> tuple[float, ...]:
    """The face under a pose, as :func:`blend_mask` takes it."""
    x, y = pose @ (*FACE[:2], 1)
    scale = np.hypot(pose[0, 1], pose[1, 1])
    degrees = np.degrees(np.arctan2(-pose[0, 1], pose[1, 1]))
    return tuple(round(float(value), 2) for value in (x, y, FACE[2] * person.width * scale, FACE[3] * scale, degrees))


def _frames(clip: Clip, opening: np.ndarray, poses: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures of a clip, upright, uint8 RGB (H, W, 3). ``opening`` (frames,) moves the mouths, 0..1."""
    rng = np.random.default_rng((clip.scene, 1))
    width, height = clip.size
    room, sprites = _room(rng, width, height), [_dressed(person) for person in clip.people]
    side = 1 + np.linspace(-1, 1, width) * rng.uniform(-0.25, 0.25)  # a lamp to the left or to the right
    light = np.broadcast_to(side[:, None], (height, width, 3)).astype(np.float32)
    brightness = rng.uniform(0.85, 1.05) * (1 + _swing(rng, np.arange(len(opening)) / clip.fps, 0.05))
    for index, level in enumerate(brightness):
        picture = room if sprites else _ball(room, index / clip.fps)
        for sprite, pose in zip(sprites, poses, strict=True):
            layer = cv2.warpAffine(_speaking(sprite, opening[index]), pose[index], (width, height))
            alpha = layer[..., 3] / np.float32(255)
            picture = cv2.blendLinear(np.ascontiguousarray(layer[..., :3]), picture, alpha, 1 - alpha)
        picture = cv2.multiply(picture, light, scale=level, dtype=cv2.CV_8U)
        if clip.fake_face is not None:
            change = np.random.default_rng((clip.scene, 2))  # the same change in every frame
            ellipse = _ellipse(poses[clip.fake_face][index], clip.people[clip.fake_face])
            picture = self_blend(picture, ellipse, change)
        yield picture


def _ball(room: np.ndarray, time_s: float) -> np.ndarray:
    """The empty room with a ball that swings across it."""
    height, width = room.shape[:2]
    centre = (int(width * (0.5 + 0.3 * np.sin(2 * time_s))), int(height * (0.75 - 0.2 * abs(np.sin(4 * time_s)))))
    return cv2.circle(room.copy(), centre, height // 12, (200, 60, 40), -1, cv2.LINE_AA)


# --- sound ------------------------------------------------------------------------------------------------------------

def speak(person: Person, seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Babble: a glottal pulse train through the formants of vowels, with hisses between them.

    Returns:
        samples, float64 (T,) at 16 kHz with a peak of 0.6; and how far the mouth is open at each, 0..1.
    """
    count = round(seconds * SOUND_RATE)
    glottis = _glottis(person.pitch, count, rng)
    samples, opening = rng.normal(0, 0.002, count), np.zeros(count)
    start = int(rng.uniform(0.05, 0.15) * SOUND_RATE)
    while (length := int(rng.uniform(0.14, 0.28) * SOUND_RATE)) < count - start:
        window = np.hanning(length) ** 0.5
        vowel = np.array(VOWELS[rng.integers(len(VOWELS))]) * person.tract
        voiced = _formants(glottis[start:start + length], vowel) * window
        now = slice(start, start + length)
        samples[now] += voiced / np.abs(voiced).max() * rng.uniform(0.5, 1)
        opening[now] = np.maximum(opening[now], window * vowel[0] / (730 * person.tract))
        if rng.random() < 0.4:
            hiss = _formants(rng.normal(size=length // 3), (rng.uniform(3000, 5500),)) * np.hanning(length // 3)
            samples[start:start + length // 3] += 0.15 * hiss / np.abs(hiss).max()
        start += int(0.85 * length) + int((rng.random() < 0.2) * rng.uniform(0.08, 0.2) * SOUND_RATE)
    return 0.6 * samples / np.abs(samples).max(), opening


def _glottis(pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """The derivative of the air flow at the glottis: raised-cosine pulses whose pitch falls, sways and jitters."""
    times = np.arange(count) / SOUND_RATE
    sway = 1 + 0.08 * np.sin(2 * np.pi * rng.uniform(0.5, 1) * times + rng.uniform(0, 6)) + 0.01 * np.sin(33 * times)
    jitter = np.repeat(rng.normal(1, 0.01, count // 100 + 1), 100)[:count]
    phase = np.cumsum(pitch * (1.08 - 0.16 * times / times[-1]) * sway * jitter) / SOUND_RATE % 1
    flow = np.where(phase < 0.6, 0.5 - 0.5 * np.cos(2 * np.pi * phase / 0.6), 0)
    return np.diff(flow, prepend=0) + rng.normal(0, 0.002, count)


def _formants(source: np.ndarray, frequencies: tuple[float, ...]) -> np.ndarray:
    """A cascade of two-pole resonators at ``frequencies`` in Hz (Klatt, 1980), applied to the spectrum."""
    length = 2 * len(source)  # room for the ringing
    delay = np.exp(-2j * np.pi * np.fft.rfftfreq(length))
    response = np.ones_like(delay)
    for index, frequency in enumerate(frequencies):
        radius = np.exp(-np.pi * (60 + 40 * index) / SOUND_RATE)
        poles = [1, -2 * radius * np.cos(2 * np.pi * frequency / SOUND_RATE), radius**2]
        response *= sum(poles) / (poles[0] + poles[1] * delay + poles[2] * delay**2)
    return np.fft.irfft(np.fft.rfft(source, length) * response, length)[:len(source)]


def resynthesize(samples: np.ndarray, seed: int = 0) -> np.ndarray:
    """A crude vocoder: 48 mel bands kept, phases lost and guessed again (Griffin and Lim, 1984).

    Args:
        samples: (T,) at 16 kHz.

    Returns:
        float (T,) with the peak of ``samples``.
    """
    from .vocoders import griffin_lim

    voice = griffin_lim(samples, SOUND_RATE, seed, bands=48, iterations=12, fft_length=512, hop=128)
    return voice / np.abs(voice).max() * np.abs(samples).max()


# --- files ------------------------------------------------------------------------------------------------------------

def _write_clip(clip: Clip, folder: Path) -> dict:
    """Render and encode a clip; what ``miniature.json`` says of it."""
    count = round(clip.seconds * clip.fps)
    rng = np.random.default_rng((clip.scene, 0))
    speaker = clip.people[0] if clip.people else Person()
    samples, opening = speak(speaker, clip.seconds, rng)
    if clip.fake_voice:
        samples = resynthesize(samples, clip.scene)
    poses = _poses(clip, rng, np.arange(count) / clip.fps)
    opening = opening[np.arange(count) * SOUND_RATE // clip.fps]
    frames = _frames(clip, opening, poses)
    _encode(folder / clip.folder / clip.name, clip, frames, samples if clip.sound else None)
    faces = [[_ellipse(pose, person) for pose in track] for track, person in zip(poses, clip.people, strict=True)]
    return {
        "label": "FAKE" if clip.fake else "REAL", "original": clip.original,
        "fake_face": clip.fake_face, "fake_voice": clip.fake_voice and clip.sound, "sound": clip.sound,
        "turned": clip.turned, "width": clip.size[0], "height": clip.size[1], "fps": clip.fps, "faces": faces,
    }


def _encode(path: Path, clip: Clip, frames: Iterator[np.ndarray], samples: np.ndarray | None) -> None:
    """H.264 and AAC in an MP4 file, without a date or a version in it, so that the bytes can be compared."""
    width, height = clip.size[::-1] if clip.turned else clip.size
    pixels = b"".join((np.rot90(frame, -1) if clip.turned else frame).tobytes() for frame in frames)
    exact = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-map_metadata", "-1"]
    picture = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(clip.fps), "-i", "pipe:0"]
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "21", "-pix_fmt", "yuv420p", "-threads", "1"]
    aac = ["-c:a", "aac", "-b:a", "96k", "-ar", "44100"]
    with tempfile.TemporaryDirectory() as scratch:
        sound = []
        if samples is not None:
            (32767 * samples).round().astype("<i2").tofile(f"{scratch}/sound")
            sound = ["-f", "s16le", "-ar", str(SOUND_RATE), "-ac", "1", "-i", f"{scratch}/sound"]
        encoded = Path(scratch) / "sideways.mp4" if clip.turned else path
        _ffmpeg(path, [*picture, *sound, *h264, *aac, *exact, str(encoded)], pixels)
        if clip.turned:
            _ffmpeg(path, ["-display_rotation", "90", "-i", str(encoded), "-c", "copy", *exact, str(path)])


def _ffmpeg(path: Path, arguments: list[str], stdin: bytes = b"") -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    done = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *arguments], input=stdin, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{path}: ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
