"""Draw the people and rooms of the miniature data set from one public portrait, altered, lit and moved."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

# In the 512 × 512 portrait: a rough outline of the person, and the face as an ellipse.
OUTLINE = np.array([
    (150, 60), (160, 35), (195, 12), (235, 8), (280, 30), (303, 60), (303, 95), (285, 135), (268, 160),
    (300, 200), (312, 240), (345, 265), (362, 320), (364, 352), (420, 340), (480, 370), (500, 440),
    (511, 511), (20, 511), (18, 430), (30, 330), (55, 270), (95, 230), (110, 195), (125, 165), (180, 148),
    (165, 115), (150, 90),
])
FACE = (223.5, 119.0, 41.0, 53.0)  # centre x, y, half width, half height
MOUTH = (223.0, 140.0)


@dataclass(frozen=True)
class Person:
    """How the portrait is altered into another person, and how that person sounds."""

    mirror: bool = False
    width: float = 1.0  # of the head, as a factor
    jaw: float = 0.0  # widening of the lower face relative to the upper one
    skin: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain of red, green, blue
    hair: tuple[float, float, float] = (1.0, 1.0, 1.0)
    clothes: int = 0  # hue shift of the suit in degrees
    pitch: float = 180.0  # Hz
    tract: float = 1.0  # factor of the formants: above 1 for a shorter vocal tract


@dataclass(frozen=True)
class Clip:
    """The plan of one clip. Clips with the same ``scene`` share room, people, movement and words."""

    folder: str
    name: str
    scene: int
    size: tuple[int, int]
    fps: int
    seconds: float
    people: tuple[Person, ...]
    original: str | None = None
    fake_face: int | None = None  # index of the person with a self-blended face
    fake_voice: bool = False
    sound: bool = True
    turned: bool = False  # stored sideways, with a display matrix that rotates it upright

    @property
    def fake(self) -> bool:
        return self.fake_face is not None or self.fake_voice


def blend_mask(height: int, width: int, ellipse: tuple[float, float, float, float, float]) -> np.ndarray:
    """A soft elliptical mask, float32 (height, width): 1 inside, 0 outside, edge 1/4 of the radius wide.

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
    gain, shift, sign = rng.uniform(0.88, 1.1), rng.uniform(8, 15), rng.choice((-1, 1))
    source = source * gain + shift * np.array([1, -0.6, -1]) * sign
    mask = blend_mask(*around.shape[:2], (*centre, *ellipse[2:]))[..., None]
    blended = image.copy()
    mixed = np.clip(around + mask * (source - around), 0, 255).round()
    blended[top:int(y) + reach, left:int(x) + reach] = mixed
    return blended


def random_person(rng: np.random.Generator, index: int) -> Person:
    """A person at random; those of odd ``index`` face the other way."""
    tone = rng.uniform(0.62, 1.05)
    return Person(
        mirror=bool(index % 2), width=float(rng.uniform(0.92, 1.1)), jaw=float(rng.uniform(-0.12, 0.12)),
        skin=tuple(float(gain) for gain in tone * rng.uniform((0.98, 0.94, 0.88), (1.03, 1.02, 1.05))),
        hair=tuple(float(gain) for gain in rng.uniform(0.25, 1.15) * rng.uniform(0.85, 1.1, 3)),
        clothes=int(rng.integers(0, 360)), pitch=float(rng.uniform(95, 230)),
        tract=float(rng.uniform(0.88, 1.15)))


# --- picture ------------------------------------------------------------------------------------------------
@cache
def portrait() -> np.ndarray:
    """The portrait, uint8 RGBA (512, 512, 4), cut out by alpha (GrabCut at half size from ``OUTLINE``)."""
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


def dressed(person: Person) -> np.ndarray:
    """The portrait as ``person``: uint8 RGBA (512, 512, 4), not yet mirrored."""
    picture = portrait()
    rgb, alpha = picture[..., :3], picture[..., 3]
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
    """Lower the jaw by ``opening`` (0..1): the picture below the mouth is pulled down by up to six pixels."""
    top, bottom, left, right = 130, 215, 160, 290
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    below = np.clip((rows - MOUTH[1]) / 10, 0, 1) * np.clip((bottom - 10 - rows) / 40, 0, 1)
    drop = 6 * opening * below * np.exp(-(((columns - MOUTH[0]) / 32) ** 2))
    moved = sprite.copy()
    moved[top:bottom, left:right] = cv2.remap(sprite, columns, (rows - drop).astype(np.float32),
                                              cv2.INTER_LINEAR)
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


def poses(clip: Clip, rng: np.random.Generator, times: np.ndarray) -> list[np.ndarray]:
    """For each person, the affine matrices (frames, 2, 3) from portrait to picture."""
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


def face_ellipse(pose: np.ndarray, person: Person) -> tuple[float, ...]:
    """The face under a pose, as an ellipse for :func:`blend_mask`."""
    x, y = pose @ (*FACE[:2], 1)
    scale = np.hypot(pose[0, 1], pose[1, 1])
    degrees = np.degrees(np.arctan2(-pose[0, 1], pose[1, 1]))
    return tuple(round(float(value), 2)
                 for value in (x, y, FACE[2] * person.width * scale, FACE[3] * scale, degrees))


def clip_frames(clip: Clip, opening: np.ndarray, poses: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The upright pictures of a clip, uint8 RGB (H, W, 3). ``opening`` (frames,) moves the mouths, 0..1."""
    rng = np.random.default_rng((clip.scene, 1))
    width, height = clip.size
    room, sprites = _room(rng, width, height), [dressed(person) for person in clip.people]
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
            ellipse = face_ellipse(poses[clip.fake_face][index], clip.people[clip.fake_face])
            picture = self_blend(picture, ellipse, change)
        yield picture


def _ball(room: np.ndarray, time_s: float) -> np.ndarray:
    """The empty room with a ball swinging across it."""
    height, width = room.shape[:2]
    centre = (int(width * (0.5 + 0.3 * np.sin(2 * time_s))),
              int(height * (0.75 - 0.2 * abs(np.sin(4 * time_s)))))
    return cv2.circle(room.copy(), centre, height // 12, (200, 60, 40), -1, cv2.LINE_AA)


def face_pair(person: Person, scene: int, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """A real face and its self-blended fake, in the same picture: uint8 RGB (size, size, 3) each.

    The crop is about the tight square that :mod:`kaggle_utils.face.framing` cuts, with some jitter.
    """
    plan = Clip("", "", scene, (640, 360), fps=25, seconds=0.04, people=(person,))
    rng = np.random.default_rng((scene, 0))
    track = poses(plan, rng, rng.uniform(0, 3, 1))
    ellipse = face_ellipse(track[0][0], person)
    x, y, _, half_height, _ = ellipse
    side = half_height * rng.uniform(1.5, 1.75)
    corner = np.array([x, y + 0.17 * half_height]) + rng.uniform(-0.05, 0.05, 2) * half_height - side / 2
    cut = np.array([[size / side, 0, -corner[0] * size / side], [0, size / side, -corner[1] * size / side]])
    real = next(clip_frames(plan, rng.uniform(0, 1, 1), track))
    fake = self_blend(real, ellipse, rng)
    return tuple(cv2.warpAffine(image, cut, (size, size), flags=cv2.INTER_AREA) for image in (real, fake))
