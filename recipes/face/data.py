"""Training faces: DFDC crops with landmarks and splits, real web frames, and crops of any labelled clips."""

import tarfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.face.framing import FaceCrops

from .landmarks import mean_landmarks

VALIDATION_PARTS = range(45, 48)
TEST_PARTS = range(48, 50)
UNALTERED_P99 = 9.0  # grey levels; below it, the first frame of a fake shows its original's unaltered face
CROP_SIZE = 224


def read_face_table(folder: str | Path) -> pd.DataFrame:
    """Read the table of DFDC training faces (``faces_*.csv``), one row per crop.

    Returns:
        Columns ``videoname``, ``stem``, ``label`` (0 REAL, 1 FAKE), ``original``, ``group`` (stem of the
        original, or of the clip itself), ``part``, ``source_px`` (side of the square in the source frame),
        ``archive``, and ``p99`` (99th percentile of the grey-level difference from the original's crop; NaN
        where unknown).
    """
    folder = Path(folder)
    tables = [
        pd.read_csv(file, dtype={"original": str}).assign(archive=file.with_suffix("").name + ".tar.xz")
        for file in sorted(folder.glob("faces_*.csv"))
    ]
    if not tables:
        raise FileNotFoundError(f"{folder}: expected files faces_*.csv, found none")
    table = pd.concat(tables, ignore_index=True)
    differences = pd.read_csv(folder / "pair_difference.csv").set_index("videoname")["p99"]
    stem = table["videoname"].str.removesuffix(".mp4")
    return table.assign(
        stem=stem,
        label=(table["label"] == "FAKE").astype(int),
        group=table["original"].str.removesuffix(".mp4").fillna(stem),
        p99=table["videoname"].map(differences),
    )


def is_unaltered(table: pd.DataFrame) -> pd.Series:
    """True for rows labelled FAKE whose face shows no visible change (bool, one per row)."""
    return (table["label"] == FAKE) & (table["p99"] < UNALTERED_P99)


def split_by_part(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``split``: parts 45–47 ``validation``, 48–49 ``test``, the others ``train``.

    Raises:
        ValueError: an original and one of its fakes are in different splits.
    """
    split = pd.Series("train", index=table.index)
    split[table["part"].isin(VALIDATION_PARTS)] = "validation"
    split[table["part"].isin(TEST_PARTS)] = "test"
    sides = split.groupby(table["group"]).nunique()
    if (torn := sides.index[sides > 1]).size:
        raise ValueError(f"expected each original and its fakes in one split, found {list(torn[:3])} in two")
    return table.assign(split=split)


def load_face_crops(
    folder: str | Path, table: pd.DataFrame, cache: str | Path | None = None, size: int = CROP_SIZE
) -> np.ndarray:
    """Read the crops that ``table`` names from their archives, in the table's order.

    Args:
        folder: holds ``faces_*.tar.xz``.
        table: rows of :func:`read_face_table`.
        cache: a ``.npy`` file. The first call writes it; later calls map it into memory.
        size: side in pixels; crops of another side are resized.

    Returns:
        uint8 RGB (N, size, size, 3).

    Raises:
        FileNotFoundError: crops that the table names are missing from the archives.
        ValueError: the cache was made for another table.
    """
    shape = (len(table), size, size, 3)
    if cache is not None and Path(cache).is_file():
        crops = np.load(cache, mmap_mode="r", allow_pickle=False)
        if crops.shape != shape:
            raise ValueError(f"{cache}: expected crops of shape {shape}, found {crops.shape}; "
                             "delete the file")
        return crops
    crops = np.empty(shape, np.uint8)
    rows = {stem: row for row, stem in enumerate(table["stem"])}
    archives = [Path(folder) / name for name in sorted(table["archive"].unique())]
    with ThreadPoolExecutor(max_workers=len(archives)) as pool:
        found = set().union(*pool.map(lambda archive: _unpack(archive, rows, crops), archives))
    if missing := rows.keys() - found:
        some = sorted(missing)[:3]
        raise FileNotFoundError(f"{folder}: {len(missing)} crops are missing from the archives: {some}")
    if cache is not None:
        partial = Path(cache).with_suffix(".partial.npy")
        np.save(partial, crops)
        partial.replace(cache)
    return crops


def _unpack(archive: Path, rows: dict[str, int], crops: np.ndarray) -> set[str]:
    """Decode the JPEGs of one archive into their rows of ``crops``; returns the stems that were found."""
    found = set()
    with tarfile.open(archive) as members:
        for member in members:
            stem = Path(member.name).stem
            if member.isfile() and stem in rows:
                encoded = np.frombuffer(members.extractfile(member).read(), np.uint8)
                crop = cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                crops[rows[stem]] = crop if crop.shape == crops.shape[1:] else _resized(crop, crops.shape[1])
                found.add(stem)
    return found


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    """As ``framing.cut`` resizes: cubic to enlarge, areas to shrink."""
    method = cv2.INTER_CUBIC if crop.shape[0] < size else cv2.INTER_AREA
    return cv2.resize(crop, (size, size), interpolation=method)


def sample_balanced(labels: Iterable[int], count: int, seed: int = 0) -> np.ndarray:
    """Row numbers (int64, sorted) of a random sample of ``count`` rows, half REAL and half FAKE."""
    labels = np.asarray(list(labels))
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(np.flatnonzero(labels == value))[: count // 2] for value in (REAL, FAKE)]
    return np.sort(np.concatenate(halves))


WEB_FOLDS = (  # of web_faces: the generators of the fakes and the people of the real clips in each fold
    ("OmniHuman-1", "OmniHuman-1.5", "mead_M030", "st_nice", "st_sad_emotion", "st_sadfather", "st_sadgirl",
     "st_spata"),
    ("HunyuanVideo-Avatar", "feifei", "mead_W009", "pcavs_00098", "pcavs_00473", "st_happyenglish",
     "st_surprisegirl"),
    ("Loopy", "roop", "grid_bbaf2n", "grid_sbwe5n", "hdtf_RD_Radio10", "mead_W011", "pcavs_517600055",
     "pcavs_681100216", "roop_target"),
    ("CyberHost", "InfiniteTalk", "aoc", "fom_08", "kristi_noem", "pcavs_741400163", "reagan", "st_furious",
     "trump"),
    ("Sonic", "DreamTalk", "StyleTalk", "andrew", "ani_poseref", "fom_10", "grid_lbax4n", "grid_pwij3p",
     "obama", "pcavs_00015", "st_vscodehappy"),
)
MORE = "faces_more.tar"
LANDMARK_PRESENCE = 0.5  # below it, use the mean landmarks
FRAME_WIDTH = 1.3  # side of the crops of real web frames, in multiples of the tight framing


@dataclass
class Faces:
    """Crops with their table (columns ``stem``, ``label``, ``group``, ``split`` …) and landmarks, row by row.

    ``crops``: uint8 RGB (N, S, S, 3). ``points``: float32 (N, 81, 2), pixels. ``widths``: float32 (N,), sides
    of the crops in multiples of the tight framing (1 unless given).
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

    def take(self, rows: np.ndarray) -> "Faces":
        table = self.table.iloc[rows].reset_index(drop=True)
        return Faces(table, self.crops[rows], self.points[rows], self.widths[rows])

    @property
    def sources(self) -> np.ndarray:
        """The source of each crop: ``dfdc`` unless the table names another."""
        table = self.table
        known = table["source"].fillna("dfdc") if "source" in table else pd.Series("dfdc", table.index)
        return known.to_numpy(str)

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.table["split"] == split)


def joined(parts: Sequence[Faces]) -> Faces:
    """Join several sets of faces, in their order."""
    arrays = [np.concatenate([getattr(part, name) for part in parts])
              for name in ("crops", "points", "widths")]
    return Faces(pd.concat([part.table for part in parts], ignore_index=True), *arrays)


def read_faces(
    folder: str | Path, cache: str | Path | None = None, more: bool = False, size: int = CROP_SIZE
) -> Faces:
    """Read the DFDC training faces with their splits and landmarks.

    A crop in which no landmarks were found gets the mean landmarks.

    Args:
        folder: holds ``faces_*.csv``, ``faces_*.tar.xz``, ``landmarks.npz`` and ``pair_difference.csv``.
        cache: a ``.npy`` file for the decoded crops (5.7 GB), written by the first call.
        more: also read the fakes of ``more_faces.csv`` from the training parts whose crops are in
            ``faces_more.tar``.
        size: side of the crops in pixels.
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
        raise ValueError(f"{folder}/landmarks.npz: expected landmarks of every crop, "
                         f"found none for {missing.sum()}")
    points = np.concatenate([points, mean_landmarks(CROP_SIZE)[None]])[row.fillna(-1).to_numpy(int)]
    return Faces(table, load_face_crops(folder, table, cache, size), points * np.float32(size / CROP_SIZE))


def _more_fakes(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``more_faces.csv`` of the training parts whose crops exist, with the columns of ``table``."""
    more = pd.read_csv(folder / "more_faces.csv", dtype={"original": str})
    more["stem"] = more["videoname"].str.removesuffix(".mp4")
    with tarfile.open(folder / MORE) as archive:
        held = {Path(name).stem for name in archive.getnames()}
    more = more[more["stem"].isin(held) & ~more["stem"].isin(table["stem"])]
    group = more["original"].str.removesuffix(".mp4")
    more = split_by_part(more.assign(label=FAKE, group=group, p99=np.nan, archive=MORE))
    return more[more["split"] == "train"]


def check_kept_aside(table: pd.DataFrame) -> None:
    """Raise ``ValueError`` if a row is from DFDC's parts 0–8, which are reserved for independent tests."""
    if (inside := table["part"].between(0, 8)).any():
        some = table["videoname"][inside].tolist()[:3]
        raise ValueError(f"expected no crop of DFDC's parts 0 to 8, found {some}")


def read_set(folder: str | Path, size: int = CROP_SIZE) -> Faces:
    """Read tight crops from a source other than DFDC, as ``preparation.prepare_stills`` writes them.

    ``faces_0.csv`` has the columns ``stem``, ``label`` (0, 1), ``source``, ``generator``, ``person``,
    ``clip`` (for video), ``fold``, ``split``, ``source_px`` and ``width``. ``faces_0.tar`` holds the JPEGs
    and ``landmarks.npz`` the 81 points in a crop of ``CROP_SIZE``. The crops are resized to ``size``.
    """
    folder = Path(folder)
    table = pd.read_csv(folder / "faces_0.csv", dtype={"clip": str})
    table = table.assign(videoname=table["stem"], group=table["person"], part=-1, p99=np.nan,
                         archive="faces_0.tar")
    with np.load(folder / "landmarks.npz", allow_pickle=False) as file:
        points, presence = file["points"].astype(np.float32), file["presence"]
    points[presence < LANDMARK_PRESENCE] = mean_landmarks(CROP_SIZE)
    crops, points = load_face_crops(folder, table, size=size), points * np.float32(size / CROP_SIZE)
    return Faces(table, crops, points, table["width"].to_numpy(np.float32))


def keep_aside(faces: Faces, folds: Sequence[int]) -> Faces:
    """Hold out these folds of ``web_faces``: their rows get the split ``web``.

    No person of a held-out fold stays in training. Other rows that show such a person (``a+b`` names two) get
    the split ``left_out``.
    """
    table = faces.table.copy()
    if "fold" in table and len(folds):
        held = table["fold"].isin(folds) & (table["split"] == "train")
        people = table["person"].fillna("").str.split("+", regex=False).map(set)
        met = set().union(*people[held]) - {""}
        shared = people.map(lambda names: bool(names & met))
        table.loc[~held & (table["split"] == "train") & shared, "split"] = "left_out"
        table.loc[held, "split"] = "web"
    return Faces(table, faces.crops, faces.points, faces.widths)


def web_fold(generator: str, person: str) -> int:
    """The fold of a clip of ``web_faces``, by its generator or, for a real clip, its person; -1 if none."""
    name = generator if isinstance(generator, str) else person
    return next((number for number, names in enumerate(WEB_FOLDS) if name in names), -1)


def is_kept_portrait(name: str) -> bool:
    """Whether a real still is in the fifth that no network is trained on; its file name decides."""
    return zlib.crc32(name.split(".")[0].encode()) % 5 == 0


def read_split(data: str | Path, split: str, count: int | None = None, altered: bool = False) -> Faces:
    """Read the DFDC training faces of one split for evaluation, with the mean landmarks.

    Args:
        data: the folder of research data, which holds ``dfdc_faces``.
        split: ``validation`` (parts 45–47) or ``test`` (48–49); no network was trained on either.
        count: size of a random sample, half REAL and half FAKE; None: all.
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
    """Read real faces of web video for training, cropped wide enough to leave room for blending.

    The mean landmarks are fitted to the 68 points of the face. The crop is the square of this fit, ``width``
    times as wide. Outside the frame, the border is repeated. The points of the forehead come from the fit.

    Args:
        folder: holds ``frames.tar.xz`` and ``landmarks.npz`` (68 points per frame). File names start with the
            person.
        size: side of the crops in pixels.
        width: side of the crops in multiples of the tight framing.
    """
    with np.load(Path(folder) / "landmarks.npz", allow_pickle=False) as file:
        known = dict(zip(map(str, file["name"]), file["points"].astype(np.float32), strict=True))
    mean, rows, crops, placed = mean_landmarks(size), [], [], []
    with tarfile.open(Path(folder) / "frames.tar.xz") as archive:
        for member in archive:
            stem = Path(member.name).stem
            if not member.isfile() or stem not in known:
                continue
            encoded = np.frombuffer(archive.extractfile(member).read(), np.uint8)
            picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
            points = known[stem]
            scale = np.std(points, axis=0).mean() / np.std(mean[:68], axis=0).mean()
            corner = points.mean(0) - scale * mean[:68].mean(0) - scale * size * (width - 1) / 2
            zoom = 1 / (scale * width)
            matrix = np.array([[zoom, 0, -corner[0] * zoom], [0, zoom, -corner[1] * zoom]])
            crop = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR,
                                  borderMode=cv2.BORDER_REPLICATE)
            whole = np.concatenate([points, mean[68:] * scale + points.mean(0) - scale * mean[:68].mean(0)])
            crops.append(crop[..., ::-1])
            placed.append((whole - corner) * zoom)
            rows.append({
                "stem": stem, "label": REAL, "group": stem.rsplit("_", 1)[0], "part": -1,
                "source_px": round(float(scale * size)), "p99": np.nan, "split": "train", "source": "frames"})
    return Faces(pd.DataFrame(rows), np.stack(crops), np.stack(placed).astype(np.float32),
                 np.full(len(rows), width, np.float32))


def faces_of_people(clips: pd.DataFrame, people: dict[str, FaceCrops], size: int = CROP_SIZE) -> Faces:
    """Collect the crops of the main person of labelled clips, in the tight framing, with the mean landmarks.

    Every fourth original, with its fakes, is for validation. ``p99`` is the grey-level difference between the
    crop of a fake and that of its original. From it, :func:`is_unaltered` finds the fakes that alter only the
    voice.

    Args:
        clips: rows of ``datasets.dfdc.read_dfdc``.
        people: the crops of the main person of each clip by file name, such as
            ``extracts.load_extract(path).people[0]``. Crops without a detected face are left out.
        size: side of the crops in pixels.
    """
    held_out = set(sorted(clips["group"].unique())[3::4])
    rows, crops = [], []
    for clip in clips.to_dict("records"):
        person, original = people[clip["filename"]], people.get(clip["original"])
        for number in np.flatnonzero(np.array(person.sources) == "detected"):
            image = cv2.resize(person.images[number], (size, size), interpolation=cv2.INTER_AREA)
            rows.append({
                "stem": f"{Path(clip['filename']).stem}_{number}", "label": int(clip["label"] == "FAKE"),
                "group": clip["group"], "part": clip["part"], "source_px": int(person.boxes[number][2]),
                "p99": _difference(person, original, number),
                "split": "validation" if clip["group"] in held_out else "train",
            })
            crops.append(image)
    if not rows:
        raise ValueError(f"expected a face in some of {len(clips)} clips, found none")
    points = np.repeat(mean_landmarks(size)[None], len(rows), axis=0)
    return Faces(pd.DataFrame(rows), np.stack(crops), points)


def _difference(person: FaceCrops, original: FaceCrops | None, number: int) -> float:
    """99th percentile of the difference between two blurred crops in grey levels; NaN without an original."""
    if original is None:
        return np.nan
    images = [crops.images[number].astype(np.float32) for crops in (person, original)]
    pair = [cv2.GaussianBlur(image, (0, 0), 2) for image in images]
    return float(np.percentile(np.abs(pair[0] - pair[1]), 99))
