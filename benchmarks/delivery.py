"""What the detector says of a clip as it arrives: re-encoded, smaller, with black bars, as a collage, dark,
as VP9.

    python benchmarks/delivery.py [--data FOLDER] [--output work/delivery.csv]

Nine clips of the research data (five REAL, four FAKE), each in every delivery. Prints P(fake) of the face
and, of the real clips, the largest rise; writes one row for each delivery with the face's side and sharpness,
from which the thresholds of ``face.quality`` were read.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pandas as pd

from kaggle_utils import Detector
from kaggle_utils.face import quality
from kaggle_utils.kaggle.paths import research_data
from kaggle_utils.results import result, save_results

CLIPS = {
    "dfdc_clips/hsbwhlolsn.mp4": "REAL",
    "dfdc_clips/rtpbawlmxr.mp4": "FAKE",
    "ffpp_clips/183.mp4": "REAL",
    "ffpp_clips/Deepfakes_183_253.mp4": "FAKE",
    "web_clips/pose_reference_1.mp4": "REAL",
    "web_clips/lipnet_1.mpg": "REAL",
    "web_clips/roop_target_1.mp4": "REAL",
    "web_clips/hunyuan_1.mp4": "FAKE",
    "web_clips/loopy_1.mp4": "FAKE",
}
H264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")
EVEN = "scale=trunc(iw/2)*2:trunc(ih/2)*2"
DELIVERIES = {
    "as it is": None,
    "CRF 35": (EVEN, *H264, "-crf", "35"),
    "480p": ("scale=-2:'trunc(min(480,ih)/2)*2'", *H264, "-crf", "26"),
    "240p": ("scale=-2:'trunc(min(240,ih)/2)*2'", *H264, "-crf", "26"),
    "black bars": (f"{EVEN},pad=iw*1.5:ih:(ow-iw)/2:0", *H264, "-crf", "23"),
    "2 x 2 collage": (
        f"{EVEN},split=4[a][b][c][d];[a][b]hstack[e];[c][d]hstack[f];[e][f]vstack,scale=-2:'trunc(min(1080,ih)/2)*2'",
        *H264,
        "-crf",
        "23",
    ),
    "a third of the light": (f"{EVEN},lutrgb=r=val/3:g=val/3:b=val/3", *H264, "-crf", "23"),
    "VP9": (EVEN, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "6", "-crf", "36", "-b:v", "0"),
}


def deliver(source: Path, delivery: str, folder: Path) -> Path:
    """The clip's first eight seconds as ``delivery`` leaves them, without sound."""
    if DELIVERIES[delivery] is None:
        return source
    graph, *options = DELIVERIES[delivery]
    target = folder / ("clip.webm" if "libvpx-vp9" in options else "clip.mp4")
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-y",
            "-t",
            "8",
            "-i",
            str(source),
            "-an",
            "-filter_complex",
            graph,
            *options,
            str(target),
        ],
        check=True,
    )
    return target


def measure(detector: Detector, source: Path, label: str) -> list[dict]:
    """One row for each delivery of a clip."""
    rows = []
    for delivery in DELIVERIES:
        with tempfile.TemporaryDirectory() as folder:
            verdict, people = detector.examine(deliver(source, delivery, Path(folder)))
        detected = [person for person in people if "detected" in person.sources]
        measured = quality.face_quality(detected[0]) if detected else {}
        notes = [note for note in verdict.warnings if quality.MARK in note]
        rows.append(
            {
                "clip": source.name,
                "label": label,
                "delivery": delivery,
                "face": verdict.face,
                "people": len(detected),
                **measured,
                "note": "; ".join(notes),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=research_data())
    parser.add_argument("--models", type=Path)
    parser.add_argument("--output", type=Path, default=Path("work/delivery.csv"))
    options = parser.parse_args()
    detector = Detector.load(options.models)
    rows = pd.DataFrame(
        [row for name, label in CLIPS.items() for row in measure(detector, options.data / name, label)]
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.output, index=False)
    table = rows.pivot(index="clip", columns="delivery", values="face")[list(DELIVERIES)]
    table.insert(0, "label", rows.drop_duplicates("clip").set_index("clip")["label"])
    print(table.round(2).to_string())
    real = table[table["label"] == "REAL"].drop(columns="label")
    rise = real.sub(real["as it is"], axis=0).max()
    print("\nlargest rise of a real clip\n" + rise.round(2).to_string())
    if options.models is None:
        source = {
            "data": "nine clips",
            "split": "training met most web clips",
            "command": "python benchmarks/delivery.py",
        }
        found = {f"{row['clip']}/{row['delivery']}": row["face"] for row in rows.to_dict("records")}
        found |= {f"largest rise of a real clip/{delivery}": value for delivery, value in rise.items()}
        save_results(
            result(f"face/delivery/{name}", value, **source)
            for name, value in found.items()
            if value == value
        )
    noted = rows[rows["note"].fillna("") != ""].groupby("delivery").size()
    print("\nclips with a note on quality\n" + (noted.to_string() if len(noted) else str(np.int64(0))))


if __name__ == "__main__":
    main()
