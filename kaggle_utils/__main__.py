"""The command line: ``python -m kaggle_utils COMMAND``; ``--help`` lists the commands."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from . import __version__, disk
from .kaggle import paths
from .kaggle import push as kaggle_push

SHEET_ROWS = 24  # clips on the contact sheet
TRUTH = {0.0: "REAL", 1.0: "FAKE"}
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins so


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(source := getattr(options, "source", None), list):
        if len(source) > 1:
            print("error: expected one clip or one folder: put the clips into a folder", file=sys.stderr)
            return 2
        options.source = source[0] if source else None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    sys.stdout.reconfigure(errors="backslashreplace")  # a clip's name may not be valid UTF-8
    try:
        options.run(options)
        return 0
    except KeyboardInterrupt:
        print("stopped; run predict or extract again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except MemoryError:
        reason = "not enough memory"
    except (ValueError, kaggle_push.KaggleError) as error:
        reason = str(error)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        reason = "the system's limit of processes and threads is reached (ulimit -u)"
    print(f"error: {disk.printable(reason)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kaggle_utils", description="Detect deepfake videos.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    miniature = commands.add_parser("miniature", help="make a small data set in DFDC's layout")
    miniature.add_argument("folder", type=Path, nargs="?", help="folder to create (default: work/miniature)")
    miniature.add_argument("--seed", type=int, default=0)
    miniature.set_defaults(run=make_miniature)

    extract = commands.add_parser("extract", help="cache the crops and the voice of every clip in a folder")
    extract.add_argument("folder", type=Path, help="a folder of clips or a DFDC root")
    extract.add_argument("--cache", type=Path, help="one file per clip goes here (default: work/extracts)")
    _add_spreading(extract)
    extract.add_argument("--frames", type=int, default=10, help="frames to read per clip (default 10)")
    extract.set_defaults(run=run_extract)

    predict = commands.add_parser("predict", help="score one clip, or every clip of a folder")
    predict.add_argument("source", type=Path, nargs="*", help="a clip, a folder of clips or a DFDC root "
                         "(default: the data set found, else the miniature)")
    predict.add_argument("-o", "--output", type=Path, help="the CSV to write (default: work/submission.csv)")
    predict.add_argument("--prior", type=float, default=0.5, help="share of fakes expected (default 0.5)")
    predict.add_argument("--hours", type=float, help="time budget; if it runs short, fewer frames are read")
    predict.add_argument("--models", type=Path, help="weights folder; models/reference: the study's networks")
    predict.add_argument("--cache", type=Path, help="folder of extracts: read, and added if missing")
    predict.add_argument("--table", type=Path, help="also write SCORES.parquet, one row a clip, and "
                         "SCORES.crops.parquet, one row a crop")
    _add_spreading(predict)
    predict.set_defaults(run=run_predict)

    report = commands.add_parser("report", help="report on a clip, or on a folder sorted by suspicion")
    report.add_argument("source", type=Path, nargs="+", help="a video file, or a folder of clips")
    report.add_argument("-o", "--output", type=Path,
                        help="the page to write, or the folder (default: work/CLIP.html, work/FOLDER-report)")
    report.add_argument("--prior", type=float, default=0.5, help="share of fakes expected (default 0.5)")
    report.add_argument("--models", type=Path, help="weights folder")
    report.add_argument("--jobs", type=int, default=1, help="local processes; -1: one per processor")
    report.add_argument("--backend", choices=["loky", "dask", "ray"], default="loky",
                        help="dask, ray: a cluster that shares both folders")
    report.add_argument("--scheduler", help="the cluster's scheduler, such as tcp://10.0.0.5:8786")
    report.set_defaults(run=run_report)

    app = commands.add_parser("app", help="a page on this computer: drop a clip, see its report")
    app.add_argument("--port", type=int, default=0, help="of the address (default: a free one)")
    app.add_argument("--megabytes", type=float, default=2000, help="largest clip (default 2000)")
    app.add_argument("--minutes", type=float, default=20, help="longest clip (default 20)")
    app.add_argument("--open", action="store_true", help="open the address in the default browser")
    app.add_argument("--prior", type=float, default=0.5, help="share of fakes expected (default 0.5)")
    app.add_argument("--models", type=Path, help="weights folder")
    app.set_defaults(run=run_app)

    check = commands.add_parser("check", help="check whether Kaggle would accept a submission")
    check.add_argument("submission", type=Path, help="the CSV to check")
    check.add_argument("--data", type=Path, help="folder of clips or DFDC root that it must match")
    check.set_defaults(run=run_check)

    train = commands.add_parser("train", help="train a network (python -m recipes train)", add_help=False)
    train.add_argument("arguments", nargs=argparse.REMAINDER)
    train.set_defaults(run=run_train)

    quoted = commands.add_parser("results", help="write models/results.json into README and cards")
    quoted.set_defaults(run=run_results)

    push = commands.add_parser("push", help="upload code, weights and wheels, and run notebooks on Kaggle")
    push.add_argument("names", nargs="*", metavar="NAME",
                      help=f"notebooks, by name or number (default: {kaggle_push.SUBMISSION})")
    push.add_argument("--all", action="store_true", help="every notebook, in order of dependency")
    push.add_argument("--dry-run", action="store_true", help="stage and check in build/, but send nothing")
    push.add_argument("--owner", help="the Kaggle account (default: from your credentials)")
    push.add_argument("--no-data", action="store_true", help="skip the data set: it is up to date on Kaggle")
    push.add_argument("--output", type=Path, metavar="FOLDER", help="download the kernels' output here")
    push.add_argument("--build", type=Path, metavar="FOLDER", help="where to stage (default: build/)")
    push.add_argument("--every", type=float, default=30, metavar="SECONDS", help="between polls (default 30)")
    push.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="per call (default 120)")
    push.set_defaults(run=run_push)

    owner = commands.add_parser("owner", help="write your Kaggle account into the metadata and README links")
    owner.add_argument("name", metavar="NAME", help="as in https://www.kaggle.com/NAME")
    owner.set_defaults(run=run_owner)
    return parser


def _add_spreading(command: argparse.ArgumentParser) -> None:
    """The options of ``spread.Team``."""
    command.add_argument("--jobs", type=int, default=1, help="local processes; -1: one per processor")
    command.add_argument("--backend", choices=["loky", "dask", "ray"], default="loky",
                         help="dask, ray: a cluster that shares all folders")
    command.add_argument("--scheduler", help="the cluster's scheduler, such as tcp://10.0.0.5:8786")


def make_miniature(options: argparse.Namespace) -> None:
    """Make the miniature data set and print its folder."""
    from .datasets.miniature import make_miniature

    print(make_miniature(options.folder or paths.working_folder() / "miniature", seed=options.seed))


def run_extract(options: argparse.Namespace) -> None:
    """Cache the face crops and the voice of every clip, and print how many were extracted."""
    paths.prepare()
    from .extracts import extract_folder

    cache = options.cache or paths.working_folder() / "extracts"
    table = extract_folder(options.folder, cache, options.jobs, options.backend, options.scheduler,
                           options.frames)
    print(f"{len(table)} clips, {table['made'].sum()} newly extracted: {cache}")
    for row in table.dropna(subset="failed").itertuples():
        print(f"warning: {row.filename}: {row.failed}")


def run_predict(options: argparse.Namespace) -> None:
    """Score one clip and print JSON, or score a folder into submission.csv with two figures."""
    paths.prepare()
    import json

    from . import tables
    from .datasets.dfdc import data_folder
    from .detector import Detector

    source = options.source or data_folder()
    if not source.exists():
        raise FileNotFoundError(f"{source}: expected a clip or a folder")
    if options.table and options.table.suffix != ".parquet":
        raise ValueError(f"{options.table}: expected a name that ends in .parquet")
    spread = options.jobs != 1 or options.backend != "loky"
    if source.is_file() and (options.cache or options.table or spread):
        raise ValueError(f"{source}: --cache, --table, --jobs and --backend are for a folder of clips")
    detector = Detector.load(options.models, prior=options.prior)
    if source.is_file():
        print(json.dumps(_rounded(detector.predict(source).to_dict()), indent=1))
        return
    output = options.output or paths.working_folder() / "submission.csv"
    table = detector.predict_folder(source, output, hours=options.hours, cache=options.cache,
                                    jobs=options.jobs, backend=options.backend, scheduler=options.scheduler)
    print(summary(table))
    print(f"\nsubmission: {output}")
    if options.table:
        clips, crops = tables.write_tables(table, options.table, detector.fingerprint, detector.prior)
        print(f"tables: {clips}, {crops}")
    for name, path in draw(table, output).items():
        print(f"{name}: {path}")


def _rounded(value):
    """The same JSON value with at most four decimals in every number."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def summary(table) -> str:
    """The verdicts as text: one line per clip, then warnings, and log loss and AUC on the labelled clips."""
    from . import metrics

    shown = table[["filename", "truth", "label", "face", "voice"]]
    shown = shown.assign(filename=shown["filename"].map(disk.printable), truth=shown["truth"].map(TRUTH))
    shown = shown.rename(columns={"label": "P(fake)"})
    lines = [shown.to_string(index=False, float_format="{:.3f}".format, na_rep="–")]
    lines += [f"warning: {disk.printable(warning)}" for warnings in table["warnings"] for warning in warnings]
    if any(name.startswith(FORMULAS) for name in table["filename"]):
        lines.append("warning: some names begin like formulas; the CSV keeps them as they are, as Kaggle "
                     "compares them: do not open it in a spreadsheet")
    known = table.dropna(subset="truth")
    if known["truth"].nunique() == 2:
        lines.append(f"log loss {metrics.log_loss(known['truth'], known['label']):.3f}, "
                     f"AUC {metrics.auc(known['truth'], known['label']):.3f} on {len(known)} labelled clips")
    return "\n".join(lines)


def draw(table, output: Path) -> dict[str, Path]:
    """Save the contact sheet of faces and the score histogram beside ``output``; returns their paths."""
    from . import plots
    from .datasets.dfdc import is_inside

    figures = {"scores": plots.score_distribution(table["label"], table["truth"], "P(fake) of each clip")}
    strips = output.with_name(output.name + ".faces")
    pictures = {name: disk.fitting(strips / f"{name}.jpg") for name in table["filename"] if is_inside(name)}
    seen = [row for row in table.itertuples() if os.path.isfile(pictures.get(row.filename, ""))]
    if shown := seen[:SHEET_ROWS]:
        images = [_picture(pictures[row.filename]) for row in shown]
        title = "The ten crops behind each answer"
        title += f", first {len(shown)} of {len(seen)} clips" if len(seen) > len(shown) else ""
        figures["faces"] = plots.contact_sheet(images, [_caption(row) for row in shown], columns=1,
                                               title=title, cell=9)
    paths = {name: output.with_name(f"{name}.png") for name in figures}
    for name, figure in figures.items():
        with disk.writing(paths[name]) as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return paths


def _picture(path: Path):
    """A saved picture, uint8 RGB (H, W, 3); a grey one if it is damaged."""
    import cv2
    import numpy as np

    found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    return np.full((128, 1280, 3), 128, np.uint8) if found is None else found[..., ::-1]


def _caption(row) -> str:
    """A clip's name, score, label if known, and a note if no face was found."""
    parts = [disk.printable(row.filename), f"P(fake) {row.label:.2f}", TRUTH.get(row.truth, "")]
    parts.append("" if any(frame["source"] != "fallback" for frame in row.frames) else "no face found")
    return "   ".join(filter(None, parts))


def run_report(options: argparse.Namespace) -> None:
    """Write the report of a clip or of a folder; print the verdict, or the number of each, and the path."""
    paths.prepare()
    if options.source.is_dir():
        return run_overview(options)
    from .detector import Detector
    from .report import percent, write_report

    if not options.source.is_file():
        raise FileNotFoundError(f"{options.source}: expected a clip or a folder")
    output = options.output or disk.fitting(paths.working_folder() / f"{options.source.stem}.html")
    output.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    print("loading the networks", file=sys.stderr)
    detector = Detector.load(options.models, prior=options.prior)
    found = write_report(options.source, output, detector, lambda stage: print(stage, file=sys.stderr))
    print(f"{options.source.name}: {found.zone.name}, P(fake) {percent(found.verdict.probability)}\n{output}")


def run_overview(options: argparse.Namespace) -> None:
    """Write the report of a folder; print how many clips got each word, and the page's path."""
    from collections import Counter

    from .overview import write_overview

    folder = options.source.resolve()
    output = options.output or paths.working_folder() / f"{folder.name}-report"
    rows = write_overview(folder, output, options.models, options.prior, options.jobs, options.backend,
                          options.scheduler)
    counted = Counter(row["word"] for row in rows)
    print(", ".join(f"{word}: {count}" for word, count in counted.most_common()))
    print(output / "index.html")


def run_app(options: argparse.Namespace) -> None:
    """Serve the page into which clips are dropped, until Ctrl-C."""
    paths.prepare()
    from .app.server import serve

    serve(options.models, options.prior, options.port, options.megabytes, options.minutes, options.open)


def run_check(options: argparse.Namespace) -> None:
    """Print that a submission is valid, or raise an error that lists its faults."""
    from .check import problems_of

    expected = None
    if options.data:
        from .datasets.dfdc import clips_to_score

        expected = clips_to_score(options.data)["filename"]
    if problems := problems_of(options.submission, expected):
        raise ValueError("\n  ".join([f"{options.submission} is not a valid submission:", *problems]))
    compared = f"one row per clip of {options.data}" if options.data else "names not checked (no --data)"
    print(f"{options.submission}: valid, {compared}")


def run_train(options: argparse.Namespace) -> None:
    """Hand over to the recipes, which need the clone."""
    sys.path.insert(0, str(paths.project_root()))
    from recipes.__main__ import main as recipes

    sys.exit(recipes(["train", *options.arguments]))


def run_results(options: argparse.Namespace) -> None:
    """Fill the marked places of README, docs and model cards and print the files that changed."""
    from .results import fill

    root = paths.project_root()
    cards = sorted(paths.models_folder().glob("*.md"))
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md")), *cards):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            disk.replace(path, filled)
            print(path)


def run_push(options: argparse.Namespace) -> None:
    """Push notebooks to Kaggle."""
    names = list(kaggle_push.notebooks()) if options.all else options.names or [kaggle_push.SUBMISSION]
    kaggle_push.push(names, options.owner, dry_run=options.dry_run, with_data=not options.no_data,
                     output=options.output, build=options.build, every=options.every, seconds=options.timeout)


def run_owner(options: argparse.Namespace) -> None:
    """Write the account's name into the committed files."""
    for path in kaggle_push.set_owner(options.name):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
