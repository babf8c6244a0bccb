"""Picture quality of the faces of a clip: too small, too blurred or too dark to rely on the score?"""

import cv2
import numpy as np

from .framing import FaceCrops

SMALL_PX = 80.0  # side of the tight square in the source; a smaller face lacks the detail the networks need
BLURRED = 18.0  # variance of the Laplacian of the crop at 128 px
DARK = 30.0  # mean grey level
MARK = "too low to rely on"


def face_quality(person: FaceCrops) -> dict[str, float]:
    """Medians over a person's detected crops.

    Returns:
        ``side_px``: side of the tight square in the source. ``sharpness``: variance of the Laplacian of the
        grey crop at 128 px. ``light``: mean grey level, 0–255.
    """
    rows = np.flatnonzero(np.array(person.sources) == "detected")
    grey = [cv2.cvtColor(person.images[row], cv2.COLOR_RGB2GRAY) for row in rows]
    small = [cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) for image in grey]
    return {"side_px": float(np.median(person.boxes[rows, 2])),
            "sharpness": float(np.median([cv2.Laplacian(image, cv2.CV_32F).var() for image in small])),
            "light": float(np.median([image.mean() for image in small]))}


def quality_note(person: FaceCrops) -> str | None:
    """The reasons why the score of a person's face is unreliable; None if the picture is good enough."""
    if "detected" not in person.sources:
        return None
    found, reasons = face_quality(person), []
    if found["side_px"] < SMALL_PX:
        reasons.append(f"the face is {int(found['side_px'])} px wide, under {SMALL_PX:.0f}")
    if found["sharpness"] < BLURRED:
        reasons.append("it is blurred or heavily compressed")
    if found["light"] < DARK:
        reasons.append("it is very dark")
    return f"the picture's quality is {MARK}: {', '.join(reasons)}" if reasons else None


def quality_line(person: FaceCrops) -> str:
    """How the picture's quality limits what the score of a person's face can say; empty without a face."""
    if "detected" not in person.sources:
        return ""
    if note := quality_note(person):
        return f"{note[0].upper()}{note[1:]}. A low score does not clear the clip; a high one may be wrong."
    return (f"The face is about {face_quality(person)['side_px']:.0f} px wide, sharp and light enough for "
            "the networks. Compression can still hide traces.")
