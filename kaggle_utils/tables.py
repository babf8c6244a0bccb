"""Scores of a folder as two Parquet tables, for pandas, DuckDB, R or Spark: one of clips and one of crops."""

from pathlib import Path

import pandas as pd

from . import disk


def write_tables(table: pd.DataFrame, path: Path, weights: str, prior: float) -> list[Path]:
    """Write the result of :meth:`detector.Detector.predict_folder` as Parquet; returns both paths.

    The table of crops goes to ``scores.crops.parquet`` beside ``scores.parquet``.

    Args:
        path: of the table of clips, one row each: ``filename``, ``probability``, ``face``, ``voice`` (null
            where there is none), ``truth`` (1 fake, 0 real, null unknown), ``people``, ``crops`` (how many
            were scored), ``tracks`` (list of id, probability, frames), ``warnings`` (list of text),
            ``frames_read``, ``seconds`` of work, ``prior``, and ``weights``, their fingerprint. The table of
            crops has one row a crop: ``filename``, ``track``, ``time_s``, ``x``, ``y``, ``width``,
            ``height`` in source pixels, ``source``, ``probability`` (null for a fallback), ``weights``.
        weights: :attr:`detector.Detector.fingerprint`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = table.to_dict("records")
    numbers = ("probability", "face", "voice", "truth", "seconds")
    clips = [{**{name: _known(row.get(name)) for name in numbers},
              "filename": _text(row["filename"]), "people": len(row["tracks"]),
              "crops": sum(frame["probability"] is not None for frame in row["frames"]),
              "tracks": row["tracks"], "warnings": [_text(warning) for warning in row["warnings"]],
              "frames_read": _known(row.get("read")), "prior": prior, "weights": weights} for row in rows]
    crops = [{**frame, **dict(zip(("x", "y", "width", "height"), frame["box"], strict=True)),
              "filename": _text(row["filename"]), "weights": weights}
             for row in rows for frame in row["frames"]]
    number, text = pa.float64(), pa.string()
    track = pa.struct([("id", pa.int64()), ("probability", number), ("frames", pa.int64())])
    schemas = {
        path: (clips, pa.schema([
            ("filename", text), ("probability", number), ("face", number), ("voice", number),
            ("truth", number), ("people", pa.int64()), ("crops", pa.int64()), ("tracks", pa.list_(track)),
            ("warnings", pa.list_(text)), ("frames_read", pa.int64()), ("seconds", number),
            ("prior", number), ("weights", text)])),
        path.with_suffix(".crops.parquet"): (crops, pa.schema([
            ("filename", text), ("track", pa.int64()), ("time_s", number), ("x", number), ("y", number),
            ("width", number), ("height", number), ("source", text), ("probability", number),
            ("weights", text)])),
    }
    for target, (found, schema) in schemas.items():
        with disk.writing(target) as file:
            parquet.write_table(pa.Table.from_pylist(found, schema), file)
    return list(schemas)


def _known(value: float | None) -> float | None:
    """The value, None where it is missing."""
    return None if value is None or pd.isna(value) else value


def _text(name: str) -> str:
    """A name as Parquet can hold it: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
