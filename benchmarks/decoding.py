"""Contestants that only decode the ten frames: ``python decoding.py {grab,read,seek,ffmpeg,pyav}``."""

import subprocess
import sys

import contest


def grab(path: str, _: contest.Stopwatch) -> None:
    """OpenCV grabs every frame and keeps none: the floor."""
    import cv2

    capture = cv2.VideoCapture(path)
    while capture.grab():
        pass


def read(path: str, _: contest.Stopwatch) -> list:
    """OpenCV grabs up to the last wanted frame; the wanted ones as BGR pictures."""
    import cv2

    capture = cv2.VideoCapture(path)
    wanted, pictures = contest.middles(int(capture.get(cv2.CAP_PROP_FRAME_COUNT))), []
    for index in range(wanted[-1] + 1):
        capture.grab()
        if index in wanted:
            pictures.append(capture.retrieve()[1])
    return pictures


def seek(path: str, _: contest.Stopwatch) -> list:
    """OpenCV seeks each wanted frame."""
    import cv2

    capture, pictures = cv2.VideoCapture(path), []
    for index in contest.middles(int(capture.get(cv2.CAP_PROP_FRAME_COUNT))):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        pictures.append(capture.read()[1])
    return pictures


def ffmpeg(path: str, _: contest.Stopwatch) -> bytes:
    """The program ffmpeg of imageio-ffmpeg decodes up to the last wanted frame and writes those into a pipe.
    """
    import cv2
    from imageio_ffmpeg import get_ffmpeg_exe

    wanted = contest.middles(int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT)))
    chosen = "+".join(f"eq(n,{index})" for index in wanted)
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-nostdin",
        "-i",
        path,
        "-an",
        "-vf",
        f"select='{chosen}'",
        "-fps_mode",
        "passthrough",
        "-frames:v",
        str(len(wanted)),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "bgr24",
        "-",
    ]
    return subprocess.run(command, check=True, capture_output=True).stdout


def pyav(path: str, _: contest.Stopwatch) -> list:
    """PyAV with threads over frames and slices, up to the last wanted frame."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted, pictures = set(contest.middles(stream.frames)), []
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                pictures.append(frame.to_ndarray(format="bgr24"))
            if index == max(wanted):
                break
    return pictures


if __name__ == "__main__":
    function = {"grab": grab, "read": read, "seek": seek, "ffmpeg": ffmpeg, "pyav": pyav}[sys.argv[1]]

    def work(path: str, stopwatch: contest.Stopwatch) -> None:
        function(path, stopwatch)

    contest.serve(work)
