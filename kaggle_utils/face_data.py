"""Faces to learn from: DFDC's training crops with landmarks and splits, real frames of web video, crops of any clips."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .augment import mean_landmarks
from .dataset import CROP_SIZE, FAKE, REAL, is_unaltered, load_face_crops, read_face_table, sample_balanced, split_by_part

MORE = "faces_more.tar"
LANDMARK_PRESENCE = 0.5  # below it, the mean landmarks serve
FRAME_WIDTH = 1.3  # of the real frames of web video, in sides of the tight framing


@dataclass
class Faces:
    """A table of crops (columns ``stem``, ``label``, ``group``, ``split`` …), pixels and landmarks, row by row.

    ``crops`` uint8 RGB (N, S, S, 3); ``points`` float32 (N, 81, 2), pixels; ``widths`` float32 (N,), sides of the crops
    as multiples of the tight framing's (1 unless given).
    """

    table: pd.DataFrame
    crops: np.ndarray
    points: np.ndarray
    widths: np.ndarray | None = None

    def __post_init__(self):
        if self.widths is None:
            self.widths = np.ones(len(self.table), np.float32)

    def __add__(self, other: "Faces") -> "Faces":
        return joined([self, other])

    @property
    def sources(self) -> np.ndarray:
        """Where each crop is from: ``dfdc`` unless the table says another."""
        table = self.table
        return (table["source"].fillna("dfdc") if "source" in table else pd.Series("dfdc", table.index)).to_numpy(str)

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.table["split"] == split)


def joined(parts: Sequence[Faces]) -> Faces:
    """One table of several, in their order."""
    return Faces(pd.concat([part.table for part in parts], ignore_index=True),
                 *(np.concatenate([getattr(part, name) for part in parts]) for name in ("crops", "points", "widths")))


def read_faces(folder: str | Path, cache: str | Path | None = None, more: bool = False) -> Faces:
    """The DFDC training faces with their splits and landmarks; the mean landmarks where no face was present.

    Args:
        folder: holds ``faces_*.csv``, ``faces_*.tar.xz``, ``landmarks.npz`` and ``pair_difference.csv``.
        cache: a ``.npy`` file for the decoded crops (5.7 GB), made at the first call.
        more: also the fakes of ``more_faces.csv`` that ``faces_more.tar`` holds, of the training parts.
    """
    table = split_by_part(read_face_table(folder))
    if more:
        table = pd.concat([table, _more_fakes(Path(folder), table)], ignore_index=True)
    check_kept_aside(table)
    with np.load(Path(folder) / "landmarks.npz", allow_pickle=False) as file:
        stems = [Path(str(name)).stem for name in file["name"]]
        points, presence = file["points"].astype(np.float32), file["presence"]
    points[presence < LANDMARK_PRESENCE] = mean_landmarks(CROP_SIZE)
    row = pd.Series(range(len(stems)), index=stems).reindex(table["stem"])
    if (missing := row.isna() & (table["archive"] != MORE).to_numpy()).any():
        raise ValueError(f"{folder}/landmarks.npz: expected landmarks of every crop, {missing.sum()} have none")
    points = np.concatenate([points, mean_landmarks(CROP_SIZE)[None]])[row.fillna(-1).to_numpy(int)]
    return Faces(table, load_face_crops(folder, table, cache), points)


def _more_fakes(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``more_faces.csv`` in the training parts whose crops are there, in the columns of ``table``."""
    more = pd.read_csv(folder / "more_faces.csv", dtype={"original": str})
    more["stem"] = more["videoname"].str.removesuffix(".mp4")
    with tarfile.open(folder / MORE) as archive:
        held = {Path(name).stem for name in archive.getnames()}
    more = more[more["stem"].isin(held) & ~more["stem"].isin(table["stem"])]
    more = split_by_part(more.assign(label=FAKE, group=more["original"].str.removesuffix(".mp4"), p99=np.nan, archive=MORE))
    return more[more["split"] == "train"]


def check_kept_aside(table: pd.DataFrame) -> None:
    """Raises ValueError where a row is of DFDC's parts 0–8, which are kept for checks from outside."""
    if (inside := table["part"].between(0, 8)).any():
        raise ValueError(f"expected no crop of DFDC's parts 0 to 8, found {table['videoname'][inside].tolist()[:3]}")


def read_set(folder: str | Path) -> Faces:
    """Tight crops of another source than DFDC, as :func:`write_set` stores them.

    ``faces_0.csv`` has the columns ``stem``, ``label`` (0, 1), ``source``, ``generator``, ``person``, ``clip`` (of
    video), ``fold``, ``split``, ``source_px``, ``width``; ``faces_0.tar`` the JPEGs; ``landmarks.npz`` the 81 points.
    """
    folder = Path(folder)
    table = pd.read_csv(folder / "faces_0.csv", dtype={"clip": str})
    table = table.assign(videoname=table["stem"], group=table["person"], part=-1, p99=np.nan, archive="faces_0.tar")
    with np.load(folder / "landmarks.npz", allow_pickle=False) as file:
        points, presence = file["points"].astype(np.float32), file["presence"]
    points[presence < LANDMARK_PRESENCE] = mean_landmarks(CROP_SIZE)
    return Faces(table, load_face_crops(folder, table), points, table["width"].to_numpy(np.float32))


def keep_aside(faces: Faces, folds: Sequence[int]) -> Faces:
    """Give the rows of these folds of ``web_faces`` the split ``web``; who is in them is in no other training row.

    A row whose person (``a+b`` names two) also stands in a held fold gets the split ``left_out``.
    """
    table = faces.table.copy()
    if "fold" in table and len(folds):
        held = table["fold"].isin(folds) & (table["split"] == "train")
        people = table["person"].fillna("").str.split("+", regex=False).map(set)
        met = set().union(*people[held]) - {""}
        table.loc[~held & (table["split"] == "train") & people.map(lambda names: bool(names & met)), "split"] = "left_out"
        table.loc[held, "split"] = "web"
    return Faces(table, faces.crops, faces.points, faces.widths)


def read_split(data: str | Path, split: str, count: int | None = None, altered: bool = False) -> Faces:
    """The DFDC training faces of one split, for judging, with the mean landmarks.

    Args:
        data: the folder of research data, which holds ``dfdc_faces``.
        split: ``validation`` (parts 45–47) or ``test`` (48–49); no network learnt from either.
        count: a sample of so many, as many REAL as FAKE; None: all.
        altered: leave out the fakes whose face is unaltered.
    """
    folder = Path(data) / "dfdc_faces"
    table = split_by_part(read_face_table(folder))
    table = table[(table["split"] == split) & ~(altered & is_unaltered(table))]
    if count is not None:
        table = table.iloc[sample_balanced(table["label"], count)]
    table = table.reset_index(drop=True)
    crops = load_face_crops(folder, table)
    return Faces(table, crops, np.repeat(mean_landmarks(crops.shape[1])[None], len(table), axis=0))


def read_real_frames(folder: str | Path, size: int = CROP_SIZE, width: float = FRAME_WIDTH) -> Faces:
    """Real faces of web video for training, cut wider than the tight framing, so that a blend has room around the face.

    The square is that of the mean landmarks, fitted to the face's 68 points, ``width`` times as wide; what lies outside
    the picture repeats its border. The forehead's points are those of the fit.

    Args:
        folder: holds ``frames.tar.xz`` and ``landmarks.npz`` (68 points a frame); file names start with the person.
    """
    with np.load(Path(folder) / "landmarks.npz", allow_pickle=False) as file:
        known = {str(name): points for name, points in zip(file["name"], file["points"].astype(np.float32), strict=True)}
    mean, rows, crops, placed = mean_landmarks(size), [], [], []
    with tarfile.open(Path(folder) / "frames.tar.xz") as archive:
        for member in archive:
            stem = Path(member.name).stem
            if not member.isfile() or stem not in known:
                continue
            picture = cv2.imdecode(np.frombuffer(archive.extractfile(member).read(), np.uint8), cv2.IMREAD_COLOR)
            points = known[stem]
            scale = np.std(points, axis=0).mean() / np.std(mean[:68], axis=0).mean()
            corner = points.mean(0) - scale * mean[:68].mean(0) - scale * size * (width - 1) / 2
            zoom = 1 / (scale * width)
            matrix = np.array([[zoom, 0, -corner[0] * zoom], [0, zoom, -corner[1] * zoom]])
            crop = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            whole = np.concatenate([points, mean[68:] * scale + points.mean(0) - scale * mean[:68].mean(0)])
            crops.append(crop[..., ::-1])
            placed.append((whole - corner) * zoom)
            rows.append({"stem": stem, "label": REAL, "group": stem.rsplit("_", 1)[0], "part": -1,
                         "source_px": round(float(scale * size)), "p99": np.nan, "split": "train", "source": "frames"})
    return Faces(pd.DataFrame(rows), np.stack(crops), np.stack(placed).astype(np.float32),
                 np.full(len(rows), width, np.float32))


def faces_of_clips(clips: pd.DataFrame, crops_per_clip: int = 4, size: int = CROP_SIZE) -> Faces:
    """Crops of the main person of labelled clips, in the tight framing, with the mean landmarks.

    Args:
        clips: rows of ``dataset.read_dfdc``; every fourth original, with its fakes, is for validation.
        crops_per_clip: evenly spread over the clip; crops without a detected face are left out.
        size: side of the crops in pixels.
    """
    from .faces import FaceFinder, extract_faces
    from .video import read_frames

    finder, rows, crops = FaceFinder(), [], []
    held_out = set(sorted(clips["group"].unique())[3::4])
    for clip in tqdm(clips.to_dict("records"), unit="clip"):
        person = extract_faces(read_frames(clip["path"], crops_per_clip).images, finder, rows=crops_per_clip)[0]
        for number, (image, source) in enumerate(zip(person.images, person.sources, strict=True)):
            if source == "detected":
                rows.append({
                    "stem": f"{Path(clip['filename']).stem}_{number}", "label": int(clip["label"] == "FAKE"),
                    "group": clip["group"], "part": clip["part"],
                    "source_px": int(person.boxes[number][2]), "p99": np.nan,
                    "split": "validation" if clip["group"] in held_out else "train",
                })
                crops.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    if not rows:
        raise ValueError(f"expected a face in some of {len(clips)} clips, found none")
    return Faces(pd.DataFrame(rows), np.stack(crops), np.repeat(mean_landmarks(size)[None], len(rows), axis=0))
