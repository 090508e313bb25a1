"""Parquet files as blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_tools.pieces import Block, Rows
from data_tools.sources import Source
from megatron_llmjp.errors import UserError, suggest

ROWS_PER_BLOCK = 256


def read_parquet(source: Source, start: int, keys: list[str]) -> Iterator[Block]:
    """Yield blocks of rows from row ``start`` on.

    Raises:
        UserError: pyarrow is not installed, the file is damaged or lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{source.name}: reading Parquet needs pyarrow: pip install pyarrow"
        ) from error
    if not source.seekable:
        raise UserError(f"{source.name}: Parquet cannot be read from a pipe; give a file")
    try:
        with pq.ParquetFile(source.name, memory_map=True) as table:
            _check_columns(source, table.schema_arrow.names, keys)
            yield from _rows(source, table, start, keys)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{source.name}: not a readable Parquet file ({error})") from error


def _check_columns(source: Source, names: list[str], keys: list[str]) -> None:
    for key in keys:
        if key not in names:
            raise UserError(
                f"{source.name}: no column '{key}'{suggest(key, names)} The file has "
                f"{', '.join(names)}; choose with --json-keys."
            )


def _rows(source: Source, table: Any, start: int, keys: list[str]) -> Iterator[Block]:
    row, total = 0, table.metadata.num_rows
    for group in range(table.num_row_groups):
        rows_of_group = table.metadata.row_group(group).num_rows
        if row + rows_of_group <= start:
            row += rows_of_group
            continue
        batches = table.iter_batches(
            batch_size=ROWS_PER_BLOCK, row_groups=[group], columns=keys, use_threads=False
        )
        for batch in batches:
            batch = batch.slice(max(0, start - row)) if row < start else batch
            row = max(row, start) + batch.num_rows if batch.num_rows else row + ROWS_PER_BLOCK
            if batch.num_rows:
                columns = {key: batch.column(key).to_pylist() for key in keys}
                disk = source.size * row // total
                yield Block(Rows(columns, batch.num_rows), row, batch.nbytes, disk)
