"""The command line: ``python -m kaggle_utils COMMAND``; ``--help`` lists the commands."""

import argparse
import sys
from pathlib import Path

from . import __version__
from .kaggle import paths
from .kaggle import push as kaggle_push

SHEET_ROWS = 24  # clips on the contact sheet
TRUTH = {0.0: "REAL", 1.0: "FAKE"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a clip's name may not be valid UTF-8
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("stopped; run predict or extract again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {where}", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: not enough memory", file=sys.stderr)
        return 1
    except (ValueError, kaggle_push.KaggleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
    extract.add_argument("--jobs", type=int, default=1, help="local processes; -1: one per processor")
    extract.add_argument("--backend", choices=["loky", "dask", "ray"], default="loky",
                         help="dask, ray: a cluster that shares both folders")
    extract.add_argument("--scheduler", help="the cluster's scheduler, such as tcp://10.0.0.5:8786")
    extract.add_argument("--frames", type=int, default=10, help="frames to read per clip (default 10)")
    extract.set_defaults(run=run_extract)

    predict = commands.add_parser("predict", help="score one clip, or every clip of a folder")
    predict.add_argument("source", type=Path, nargs="?", help="a clip, a folder of clips or a DFDC root "
                         "(default: the data set found, else the miniature)")
    predict.add_argument("-o", "--output", type=Path, help="the CSV to write (default: work/submission.csv)")
    predict.add_argument("--prior", type=float, default=0.5, help="share of fakes expected (default 0.5)")
    predict.add_argument("--hours", type=float, help="time budget; if it runs short, fewer frames are read")
    predict.add_argument("--models", type=Path, help="weights folder; models/reference: the study's networks")
    predict.set_defaults(run=run_predict)

    report = commands.add_parser("report", help="report on a clip: verdict, faces, heat maps, voice")
    report.add_argument("clip", type=Path, help="a video file")
    report.add_argument("-o", "--output", type=Path, help="the page to write (default: work/CLIP.html)")
    report.add_argument("--prior", type=float, default=0.5, help="share of fakes expected (default 0.5)")
    report.add_argument("--models", type=Path, help="weights folder")
    report.set_defaults(run=run_report)

    check = commands.add_parser("check", help="check whether Kaggle would accept a submission")
    check.add_argument("submission", type=Path, help="the CSV to check")
    check.add_argument("--data", type=Path, help="folder of clips or DFDC root that it must match")
    check.set_defaults(run=run_check)

    train = commands.add_parser("train", help="train a network, as notebooks 04 and 05 do")
    train.add_argument("branch", choices=["face", "voice"])
    train.add_argument("name", help="run name, from face.training.RUNS or voice.training.RUNS")
    train.add_argument("--data", type=Path, help="the folder of research data (default: $DEEPFAKE_DATA)")
    train.add_argument("--minutes", type=float, help="wall-clock limit; the schedule ends within it")
    train.add_argument("-o", "--output", type=Path, help="for weights and scores (default: work/training)")
    train.set_defaults(run=run_train)

    prepare = commands.add_parser("prepare", help="cut faces for training, with landmarks")
    prepare.add_argument("what", choices=["dfdc", "stills", "web"], help="part folders, portraits or clips of the web")
    prepare.add_argument("folder", type=Path, help="DFDC's part folders with their metadata.json, or the research data")
    prepare.add_argument("-o", "--output", type=Path, help="where the table and crops go (default: work/WHAT_faces)")
    prepare.set_defaults(run=run_prepare)

    corpus = commands.add_parser("corpus", help="build the corpus of voices from git clones of public demos")
    corpus.add_argument("clones", type=Path, help="folder of clones, OWNER/NAME as in voice/recordings.csv")
    corpus.add_argument("-o", "--output", type=Path, help="for files and index (default: work/voice/systems)")
    corpus.set_defaults(run=run_corpus)

    evaluate = commands.add_parser("evaluate", help="test the face network on unseen or degraded crops, the "
                                   "voice networks on unheard pages, or compare saved scores of runs")
    evaluate.add_argument("what", choices=["face", "quality", "voice", "runs"])
    evaluate.add_argument("-o", "--output", type=Path, help="for voice: folds and scores; what the folder "
                          "holds is not made again (default: work/folds)")
    evaluate.add_argument("--data", type=Path, help="the folder of research data (default: $DEEPFAKE_DATA)")
    evaluate.add_argument("--split", choices=["validation", "test"], default="validation")
    evaluate.add_argument("--scores", type=Path, help="for runs: a folder of scores or one table "
                          "(default: models/face_validation.csv)")
    evaluate.add_argument("--models", type=Path, help="weights folder (default: models/)")
    evaluate.set_defaults(run=run_evaluate)

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


def make_miniature(options: argparse.Namespace) -> None:
    """Make the miniature data set and print its folder."""
    from .datasets.miniature import make_miniature

    print(make_miniature(options.folder or paths.working_folder() / "miniature", seed=options.seed))


def run_extract(options: argparse.Namespace) -> None:
    """Cache the face crops and the voice of every clip, and print how many were extracted."""
    paths.prepare()
    from .extraction import extract_folder

    cache = options.cache or paths.working_folder() / "extracts"
    table = extract_folder(options.folder, cache, options.jobs, options.backend, options.scheduler,
                           options.frames)
    print(f"{len(table)} clips, {table['made'].sum()} newly extracted: {cache}")


def run_predict(options: argparse.Namespace) -> None:
    """Score one clip and print JSON, or score a folder into submission.csv with two figures."""
    paths.prepare()
    import json

    from .datasets.dfdc import data_folder
    from .detector import Detector

    source = options.source or data_folder()
    if not source.exists():
        raise FileNotFoundError(f"{source}: expected a clip or a folder")
    detector = Detector.load(options.models, prior=options.prior)
    if source.is_file():
        print(json.dumps(detector.predict(source).to_dict(), indent=1))
        return
    output = options.output or paths.working_folder() / "submission.csv"
    table = detector.predict_folder(source, output, hours=options.hours)
    print(summary(table))
    print(f"\nsubmission: {output}")
    for name, path in draw(table, output).items():
        print(f"{name}: {path}")


def summary(table) -> str:
    """The verdicts as text: one line per clip, then warnings, and log loss and AUC on the labelled clips."""
    from . import metrics

    shown = table[["filename", "truth", "label", "face", "voice"]]
    shown = shown.assign(truth=shown["truth"].map(TRUTH)).rename(columns={"label": "P(fake)"})
    lines = [shown.to_string(index=False, float_format="{:.3f}".format, na_rep="–")]
    lines += [f"warning: {warning}" for warnings in table["warnings"] for warning in warnings]
    known = table.dropna(subset="truth")
    if known["truth"].nunique() == 2:
        lines.append(f"log loss {metrics.log_loss(known['truth'], known['label']):.3f}, "
                     f"AUC {metrics.auc(known['truth'], known['label']):.3f} on {len(known)} labelled clips")
    return "\n".join(lines)


def draw(table, output: Path) -> dict[str, Path]:
    """Save the contact sheet of faces and the score histogram beside ``output``; returns their paths."""
    import cv2

    from . import plots

    figures = {"scores": plots.score_distribution(table["label"], table["truth"], "P(fake) of each clip")}
    strips = output.with_name(output.name + ".faces")
    seen = [row for row in table.itertuples() if (strips / f"{row.filename}.jpg").is_file()]
    if shown := seen[:SHEET_ROWS]:
        images = [cv2.imread(str(strips / f"{row.filename}.jpg"))[..., ::-1] for row in shown]
        title = "The ten crops behind each answer"
        title += f", first {len(shown)} of {len(seen)} clips" if len(seen) > len(shown) else ""
        figures["faces"] = plots.contact_sheet(images, [_caption(row) for row in shown], columns=1,
                                               title=title, cell=9)
    paths = {name: output.with_name(f"{name}.png") for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=110, bbox_inches="tight")
    return paths


def _caption(row) -> str:
    """A clip's name, score, label if known, and a note if no face was found."""
    parts = [row.filename, f"P(fake) {row.label:.2f}", TRUTH.get(row.truth, "")]
    parts.append("" if any(frame["source"] != "fallback" for frame in row.frames) else "no face found")
    return "   ".join(filter(None, parts))


def run_report(options: argparse.Namespace) -> None:
    """Write the report page of one clip, and print the verdict and the page's path."""
    paths.prepare()
    from .detector import Detector
    from .report import percent, write_report

    if not options.clip.is_file():
        raise FileNotFoundError(f"{options.clip}: expected a clip")
    output = options.output or paths.working_folder() / f"{options.clip.stem}.html"
    found = write_report(options.clip, output, Detector.load(options.models, prior=options.prior))
    print(f"{options.clip.name}: {found.zone.name}, P(fake) {percent(found.verdict.probability)}\n{output}")


def run_check(options: argparse.Namespace) -> None:
    """Print that a submission is valid, or raise an error that lists its faults."""
    from .datasets.dfdc import clips_to_score
    from .submission import problems_of

    expected = clips_to_score(options.data)["filename"] if options.data else None
    if problems := problems_of(options.submission, expected):
        raise ValueError("\n  ".join([f"{options.submission} is not a valid submission:", *problems]))
    compared = f"one row per clip of {options.data}" if options.data else "names not checked (no --data)"
    print(f"{options.submission}: valid, {compared}")


def run_train(options: argparse.Namespace) -> None:
    """Train one network as notebooks 04 and 05 do."""
    paths.prepare()
    output = options.output or paths.working_folder() / "training"
    if options.branch == "face" and options.name == "correction":
        from .face.correction import run_correction as run
    elif options.branch == "face":
        from .face.training import run_face as run
    else:
        from .voice.training import run_voice as run
    run(options.name, _research_data(options), output, options.minutes)


def run_prepare(options: argparse.Namespace) -> None:
    """Cut faces for training."""
    from .face import preparation

    output = options.output or paths.working_folder() / f"{options.what}_faces"
    table = getattr(preparation, f"prepare_{options.what}")(options.folder, output)
    print(f"{output}: {len(table)} faces, {table['label'].isin(['REAL', 0]).sum()} of them REAL")


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the tables of the model cards."""
    paths.prepare()
    import pandas as pd

    from .face import evaluation as face_evaluation

    if options.what == "voice":
        tables = _voice_tables(options)
    elif options.what == "runs":
        kept = options.scores or paths.models_folder() / "face_validation.csv"
        tables = {"validation parts 45–47": face_evaluation.compare(kept)}
    else:
        from .detector import Detector
        from .face import outside

        detector, models = Detector.load(options.models), options.models or paths.models_folder()
        line, data = detector.calibration.lines["crop"], _research_data(options)
        if options.what == "quality":
            tables = {"validation crops made worse": face_evaluation.by_quality(detector.face, data, line=line)}
        else:
            folds = models / outside.FOLDS
            tables = {f"DFDC, {options.split}": outside.evaluate_dfdc(outside.read_members(models), data, options.split, line),
                      "clips of generators and people never met (web_faces)": outside.evaluate_folds(folds, line),
                      "real clips of the same, by kind": outside.false_alarms(folds, line),
                      "whole clips": outside.evaluate_clips(detector, data),
                      "still portraits": outside.evaluate_portraits(detector, data)}
    with pd.option_context("display.width", 250, "display.max_columns", None, "display.max_rows", None):
        for name, table in tables.items():
            print(f"{name}\n{table.round(3).to_string()}\n")


def _voice_tables(options: argparse.Namespace) -> dict:
    """Tables of the voice networks on unheard pages; the figures go to ``models/results.json``."""
    import json

    from .results import save_results
    from .voice import evaluation as voice_evaluation

    line = json.loads((paths.models_folder() / "detector.json").read_text())["calibration"]["voice"]
    output = options.output or paths.working_folder() / "folds"
    scores = voice_evaluation.judge_folds(_research_data(options) / "voice", output)
    save_results(voice_evaluation.figures(scores, line))
    return voice_evaluation.tables(scores, line)


def run_corpus(options: argparse.Namespace) -> None:
    """Build the corpus of voices and print what is missing."""
    from .voice.corpus import build

    output = options.output or paths.working_folder() / "voice" / "systems"
    missing = build(options.clones, output)
    for reason in missing["reason"]:
        print(reason)
    print(f"{output / 'index.csv'}: {len(missing)} recordings are missing")


def run_results(options: argparse.Namespace) -> None:
    """Fill the marked places of README and model cards and print the files that changed."""
    from .results import fill

    for path in (paths.project_root() / "README.md", *sorted(paths.models_folder().glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            path.write_text(filled, encoding="utf-8")
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


def _research_data(options: argparse.Namespace) -> Path:
    folder = options.data or paths.research_data()
    if folder is None:
        raise FileNotFoundError("expected --data, or DEEPFAKE_DATA to name the folder of research data")
    return folder


if __name__ == "__main__":
    sys.exit(main())
