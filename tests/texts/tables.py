"""Rows written into files of every container."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import feather, ipc, parquet

Row = dict[str, Any]


class Log:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def as_table(rows: Sequence[Row]) -> pa.Table:
    if not any(rows):
        raise TypeError("a table without columns has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_object(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"version": "1.0", "data": rows}))


def write_parquet(path: Path, table: pa.Table) -> None:
    parquet.write_table(table, path)


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as out, ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


def write_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as out, ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path, table: pa.Table) -> None:
    feather.write_feather(table, str(path))


JSON: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "object.json": write_object,
}
ARROW: dict[str, Callable[[Path, pa.Table], None]] = {
    "parquet": write_parquet,
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "feather": write_feather,
}
CONTAINERS = (*JSON, *ARROW)
"""Every container, as what a file's name ends with."""


def write(directory: Path, container: str, rows: Sequence[Row]) -> Path:
    """Write rows into a file of a container."""
    path = directory / f"rows.{container}"
    if container in JSON:
        JSON[container](path, rows)
    else:
        ARROW[container](path, as_table(rows))
    return path
