"""Train and evaluate the shipped weights: ``python -m recipes COMMAND``; ``--help`` lists the commands."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import pandas as pd

from kaggle_utils import Detector
from kaggle_utils.detector import checked_digests
from kaggle_utils.kaggle import paths
from kaggle_utils.results import save_results


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m recipes", description="Prepare data, train, and measure.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    corpus = commands.add_parser("corpus", help="build the corpus of voices from git clones of public demos")
    corpus.add_argument("clones", type=Path, help="folder of clones, OWNER/NAME as in voice/recordings.csv")
    corpus.add_argument("-o", "--output", type=Path, help="for files and index (default: work/voice/systems)")
    corpus.set_defaults(run=build_corpus)

    prepare = commands.add_parser("prepare", help="cut faces for training, with landmarks")
    prepare.add_argument(
        "what", choices=["dfdc", "stills", "web"], help="DFDC part folders, still portraits or web clips"
    )
    prepare.add_argument(
        "folder", type=Path, help="for dfdc: the part folders with metadata.json; otherwise the research data"
    )
    prepare.add_argument("-o", "--output", type=Path, help="for table and crops (default: work/WHAT_faces)")
    prepare.set_defaults(run=prepare_faces)

    train = commands.add_parser("train", help="train a network")
    train.add_argument("branch", choices=["face", "voice"])
    train.add_argument("name", help="run name, from RUNS in recipes/face or recipes/voice/training.py")
    train.add_argument("--data", type=Path, help="the folder of research data (default: $DEEPFAKE_DATA)")
    train.add_argument("--minutes", type=float, help="wall-clock limit; the schedule ends within it")
    train.add_argument("-o", "--output", type=Path, help="for weights and scores (default: work/training)")
    train.set_defaults(run=train_network)

    evaluate = commands.add_parser(
        "evaluate",
        help="test the face networks on unseen people and generators "
        "or the voice networks on unseen pages, or compare saved scores of runs",
    )
    evaluate.add_argument("what", choices=["face", "quality", "voice", "fusion", "runs"])
    evaluate.add_argument("--data", type=Path, help="the folder of research data (default: $DEEPFAKE_DATA)")
    evaluate.add_argument("--models", type=Path, help="folder of weights (default: models/)")
    evaluate.add_argument("--split", choices=["validation", "test"], default="validation")
    evaluate.add_argument(
        "--count",
        type=int,
        help="for face, a quick look on a CPU: so many DFDC crops and portraits of each kind, nothing saved",
    )
    evaluate.add_argument(
        "--scores",
        type=Path,
        help="for runs: a folder of scores or one table (default: models/face_validation.csv)",
    )
    evaluate.add_argument(
        "-o",
        "--output",
        type=Path,
        help="for voice and face: scores; existing ones are kept (default: work/folds, work/face)",
    )
    evaluate.set_defaults(run=evaluate_networks)
    return parser


def build_corpus(options: argparse.Namespace) -> None:
    """Build the corpus of voices and print the missing recordings."""
    from .voice.corpus import build

    output = options.output or paths.working_folder() / "voice" / "systems"
    missing = build(options.clones, output)
    for reason in missing["reason"]:
        print(reason)
    print(f"{output / 'index.csv'}: {len(missing)} recordings are missing")


def prepare_faces(options: argparse.Namespace) -> None:
    """Cut faces for training."""
    from .face import preparation

    output = options.output or paths.working_folder() / f"{options.what}_faces"
    table = getattr(preparation, f"prepare_{options.what}")(options.folder, output)
    print(f"{output}: {len(table)} faces, {table['label'].isin(['REAL', 0]).sum()} of them REAL")


def train_network(options: argparse.Namespace) -> None:
    """Train one of the named runs."""
    if options.branch == "face" and options.name == "correction":
        from .face.correction import run_correction as run
    elif options.branch == "face":
        from .face.training import run_face as run
    else:
        from .voice.training import run_voice as run
    output = options.output or paths.working_folder() / "training"
    run(options.name, _research_data(options), output, options.minutes)


def evaluate_networks(options: argparse.Namespace) -> None:
    """Print the tables of the model cards."""
    tables = {
        "voice": _voice_tables,
        "fusion": _fusion_tables,
        "runs": _compared_runs,
        "quality": _quality,
        "face": _face_tables,
    }
    with pd.option_context("display.width", 250, "display.max_columns", None, "display.max_rows", None):
        for name, table in tables[options.what](options).items():
            print(f"{name}\n{table.round(3).to_string()}\n")


def _voice_tables(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Evaluate the voice networks on unseen pages and save the results in ``models/results.json``."""
    from .voice import evaluation

    line = json.loads((paths.models_folder() / "detector.json").read_text())["calibration"]["voice"]
    output = options.output or paths.working_folder() / "folds"
    scores = evaluation.judge_folds(_research_data(options) / "voice", output)
    save_results(evaluation.figures(scores, line))
    return evaluation.tables(scores, line)


def _fusion_tables(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Ways to join faces of DFDC with voices of unheard pages; the figures go to ``models/results.json``."""
    from .face import outside
    from .face.data import is_unaltered
    from .fusion.training import compare_scores, save_comparison
    from .voice import evaluation

    data, members = _research_data(options), outside.read_members(options.models or paths.models_folder())
    tables = {}
    for split in ("validation", "test"):
        scores = outside.score_dfdc(members, data, split, _scores_file(options.models, split))
        tables[split] = scores[~is_unaltered(scores)].rename(columns={"mean": "logit"})
    voices = evaluation.averaged(
        evaluation.judge_folds(data / "voice", options.output or paths.working_folder() / "folds")
    )
    lines = json.loads((paths.models_folder() / "detector.json").read_text())["calibration"]
    table, words = compare_scores(
        tables["validation"], tables["test"], voices[voices["channel"] == "as recorded"], lines
    )
    save_comparison(table, words, "python -m recipes evaluate fusion")
    return {"ways to join": table, "words of the report": words}


def _compared_runs(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    from .face import evaluation

    return {
        "validation parts 45–47": evaluation.compare(
            options.scores or paths.models_folder() / "face_validation.csv"
        )
    }


def _quality(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    from .face import evaluation

    detector = Detector.load(options.models)
    table = evaluation.by_quality(
        detector.face, _research_data(options), line=detector.calibration.lines["crop"]
    )
    return {"degraded validation crops": table}


def _face_tables(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Evaluate the face networks; the figures of each table go to ``models/results.json`` when it is done.

    With ``--count`` nothing is written there: that many DFDC crops and portraits of each kind do not make a
    card.
    """
    from .face import outside

    detector, data = Detector.load(options.models), _research_data(options)
    models = options.models or paths.models_folder()
    lines, count = detector.calibration.lines, options.count
    folds = outside.read_folds(models / outside.FOLDS)
    videos = folds.dropna(subset="logit_video").assign(logit=lambda clips: clips["logit_video"])
    file = _scores_file(options.models, f"{options.split}{count or ''}", options.output)
    dfdc = outside.score_dfdc(outside.read_members(models), data, options.split, file, count)
    tables = {}
    for name, kind, table in (
        ("web folds", "folds", lambda: outside.evaluate_folds(folds, lines["face"])),
        ("web folds, whole clips", "folds", lambda: outside.evaluate_folds(videos, lines["face"])),
        ("real clips of web_faces, by kind", None, lambda: outside.false_alarms(folds, lines["face"])),
        (
            "words on web folds",
            "words",
            lambda: outside.words(folds["label"], folds["logit"], lines["face"]),
        ),
        (
            "words on web folds, whole clips",
            "words",
            lambda: outside.words(videos["label"], videos["logit"], lines["face"]),
        ),
        (
            f"words on DFDC {options.split}",
            "words",
            lambda: outside.words(dfdc["label"], dfdc["mean"], lines["face"]),
        ),
        (f"DFDC, {options.split}", "dfdc", lambda: outside.evaluate_dfdc(dfdc, lines["crop"])),
        ("clips, face alone and with the voice", None, lambda: outside.evaluate_clips(detector, data)),
        ("still portraits", "portraits", lambda: outside.evaluate_portraits(detector, data, count or 200)),
    ):
        tables[name] = table()
        if kind and options.models is None and count is None:
            save_results(outside.figures(tables[name], kind, options.split, name))
    return tables


def _scores_file(models: Path | None, name: str, folder: Path | None = None) -> Path:
    """Where the scores of the face networks in ``models`` are kept: other weights have another file."""
    digests = checked_digests(models or paths.models_folder())
    faces = "".join(digest for file, digest in sorted(digests.items()) if file.startswith("face"))
    key = hashlib.sha256(faces.encode()).hexdigest()[:8]
    return (folder or paths.working_folder() / "face") / f"{name}-{key}.csv"


def _research_data(options: argparse.Namespace) -> Path:
    folder = options.data or paths.research_data()
    if folder is None:
        raise FileNotFoundError("expected --data, or DEEPFAKE_DATA to name the folder of research data")
    return folder


if __name__ == "__main__":
    sys.exit(main())
