"""Read rows from Parquet files: the types are the file's own.

`datasets` reads them at once. Its streams wait for 5 s at the end of a pass, for threads that read through a
Python file and abort the process if it ends before them; here Arrow reads a stream without either.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, concatenate_datasets, load_dataset

from lopt.data.places import BrokenFileError, Place, file_name, opened, stamp

READ = 1_000
"""Rows of a stream that are read at a time."""


def parquet_columns(paths: Sequence[Place]) -> list[str]:
    """Return the columns of all files, in the order of their appearance.

    Raises:
        BrokenFileError: no Parquet, or two columns of one name.
    """
    rows, found = 0, dict[str, None]()
    for path in paths:
        try:
            with opened(path) as handle:
                file = pq.ParquetFile(handle)
                rows += file.metadata.num_rows
                names = file.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise BrokenFileError(f"cannot load {path}: {error}: write it anew as Parquet") from error
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise BrokenFileError(f"{path} has two columns called {twice[0]!r}: rename one")
        found |= dict.fromkeys(names)
        if isinstance(path, Path) and "::" in str(path):
            raise BrokenFileError(f"{path} has :: in its path, a sign of its own for `datasets`: rename it")
    return list(found) if rows else []


def parquet_rows(paths: Sequence[Place], columns: Sequence[str], streaming: bool) -> Any:
    """Return the rows of the files in their order, with those of `columns` that there are.

    Raises:
        BrokenFileError: a column has other types in other files.
        DatasetsError, ValueError: from `datasets`.
    """
    # One without rows is an error to `datasets`.
    paths = [path for path in paths if _length(path)]
    schemas = [_features(path, columns) for path in paths]
    if all(schema == schemas[0] for schema in schemas):
        return _load(paths, schemas[0], streaming)
    types: dict[str, tuple[Any, Place]] = {}
    for path, schema in zip(paths, schemas, strict=True):
        for name, feature in schema.items():
            other, where = types.setdefault(name, (feature, path))
            if other != feature:
                raise BrokenFileError(
                    f"column `{name}` is {other.dtype} in {file_name(where)} and {feature.dtype} in "
                    f"{file_name(path)}: write it with one type"
                )
    parts = [_load([path], schema, streaming) for path, schema in zip(paths, schemas, strict=True)]
    return concatenate_datasets(parts)


def _length(path: Place) -> int:
    with opened(path) as handle:
        return pq.read_metadata(handle).num_rows


def _features(path: Place, columns: Sequence[str]) -> Features:
    with opened(path) as handle:
        found = Features.from_arrow_schema(pq.read_schema(handle))
    return Features({name: found[name] for name in found if name in columns})


def _load(paths: Sequence[Place], features: Features, streaming: bool) -> Any:
    kwargs: dict[str, Any] = {"paths": list(paths), "names": tuple(features)}
    if streaming:  # the list is that of the stream's shards
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=kwargs)
    if not all(isinstance(path, Path) for path in paths):
        kwargs["key"] = tuple(map(stamp, paths))
        return Dataset.from_generator(_rows, features=features, gen_kwargs=kwargs)
    # `datasets` takes each name for a pattern, in which [1] and * have a meaning.
    files = {"train": [glob.escape(str(path)) for path in paths]}
    return load_dataset("parquet", data_files=files, split="train", columns=list(features))


def _rows(paths: Sequence[Place], names: Sequence[str], key: Any = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of files; `key` says what else they depend on."""
    for path in paths:
        with _native(path) as handle:
            file = pq.ParquetFile(handle)
            for batch in file.iter_batches(batch_size=READ, columns=list(names), use_threads=False):
                yield from batch.to_pylist()


@contextmanager
def _native(path: Place) -> Iterator[Any]:
    if isinstance(path, Path):
        with pa.OSFile(str(path)) as handle:
            yield handle
        return
    with opened(path) as handle:
        yield handle
