"""Several sources of rows, mixed by weight.

Weights are shares of the rows. No row is taken twice, so the source that has the fewest rows for its share
decides how many there are in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from lopt.data.files import Choose
from lopt.data.load import load_rows
from lopt.data.places import file_name, kind_of, place_of
from lopt.data.presets import PRESETS, SHUFFLE_BUFFER
from lopt.data.rows import column_names


@dataclass(frozen=True)
class Part:
    """One source of a mix.

    Attributes:
        name: A file, a preset or a data set on the Hub.
        weight: Its share of all rows, up to a factor; None where every row is taken.
        rows: Its rows; those that are taken, once `load_mix` has drawn them.
        of: How many rows it has; None for a stream.
    """

    name: str
    weight: float | None
    rows: Any = None
    of: int | None = None

    @property
    def source(self) -> dict[str, Any]:
        """The argument of `load_rows` that names it."""
        if self.name in PRESETS:
            return {"dataset_preset": self.name}
        place = place_of(self.name)
        is_file = isinstance(place, str) or kind_of(place) is not None or place.exists()
        return {"train_file" if is_file else "dataset_name": self.name}

    @property
    def label(self) -> str:
        """Its name; of a file the last part."""
        return file_name(place_of(self.name)) if "train_file" in self.source else self.name


def parse_mix(words: Sequence[str]) -> list[Part]:
    """Return the sources that `data_mix` names, as `a.jsonl:0.7`.

    Raises:
        ValueError: a weight is no number above 0, or only some have one; a source is named twice.
    """
    parts = []
    for word in words:
        named = re.fullmatch(r"(.+):([^:/\\]*)", word)
        if named is None:
            parts.append(Part(word, None))
            continue
        try:
            weight = float(named[2])
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):  # NaN fails it too
            raise ValueError(f"`data_mix` {word}: the weight behind the colon must be a number above 0")
        parts.append(Part(named[1], weight))
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`data_mix` names {name} twice: give it once, with the sum of the weights")
    if len({part.weight is None for part in parts}) > 1:
        without = ", ".join(part.name for part in parts if part.weight is None)
        raise ValueError(f"`data_mix` has no weight for {without}: give one to each source, or to none")
    return parts


def load_mix(
    words: Sequence[str],
    *,
    max_samples: int | None = None,
    seed: int = 42,
    streaming: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    choose: Choose | None = None,
) -> list[Part]:
    """Return the sources with the rows that are taken of each, drawn at random with the seed.

    Args:
        words: The sources with their weights, as for `parse_mix`.
        max_samples, streaming, shuffle_buffer, choose: As of `load_rows`; the first counts the rows of all.

    Raises:
        ValueError: of `parse_mix` and `load_rows`; a weight that leaves no row of its source; a stream
            without weights.
    """
    parts = parse_mix(words)
    if streaming and parts[0].weight is None:
        raise ValueError(
            "`data_mix` needs weights with `streaming`, whose rows are not counted: give each one"
        )
    options: dict[str, Any] = {"streaming": streaming, "shuffle_buffer": shuffle_buffer, "seed": seed}
    loaded = []
    for part in parts:
        try:
            loaded.append(replace(part, rows=load_rows(**part.source, **options, choose=choose)))
        except ValueError as error:
            raise _of(part, error) from error
    if streaming:
        return loaded
    lengths = [len(part.rows) for part in loaded]
    counts = shares(loaded, lengths, max_samples)
    return [
        replace(part, rows=part.rows.shuffle(seed=seed).select(range(count)), of=length)
        for part, count, length in zip(loaded, counts, lengths, strict=True)
    ]


def shares(parts: Sequence[Part], lengths: Sequence[int], max_samples: int | None) -> list[int]:
    """Return how many rows are taken of each source.

    Args:
        lengths: How many rows each has.
        max_samples: How many rows are taken of all at most.

    Raises:
        ValueError: a source would have none.
    """
    weights = [
        length if part.weight is None else part.weight for part, length in zip(parts, lengths, strict=True)
    ]
    total = sum(weights)
    most = min(length * total / weight for weight, length in zip(weights, lengths, strict=True))
    exact = [min(most, max_samples or math.inf) * weight / total for weight in weights]
    counts = [math.floor(count + 1e-9) for count in exact]
    # The rows that rounding down has left out go to those that it took most from.
    left = math.floor(sum(exact) + 1e-9) - sum(counts)
    for place in sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])[:left]:
        counts[place] += 1
    for part, count in zip(parts, counts, strict=True):
        if not count:
            raise ValueError(
                f"`data_mix`: the weight of {part.name} leaves none of its rows, of {sum(counts)} in all: "
                "raise it, or give more rows"
            )
    return counts


def examples_of(
    parts: Sequence[Part], make: Callable[[Any], Any], seed: int, max_samples: int | None
) -> Dataset | IterableDataset:
    """Return the examples that `make` makes of the rows of each source, as one data set or stream.

    Raises:
        ValueError: from `make`, with the source; examples of two kinds.
    """
    made = []
    for part in parts:
        try:
            made.append(make(part.rows))
        except ValueError as error:
            raise _of(part, error) from error
    for part, rows in zip(parts, made, strict=True):
        if rows.features != made[0].features:
            this, first = ("+".join(column_names(rows)) for rows in (rows, made[0]))
            kinds = "text and messages" if this == first else f"{this} and {first}"
            raise ValueError(
                f"`data_mix`: the rows of {part.name} and of {parts[0].name} become examples of two kinds, "
                f"{kinds}: make them alike"
            )
    if isinstance(made[0], Dataset):
        return concatenate_datasets(made).shuffle(seed=seed)
    weights = [float(part.weight or 0) for part in parts]
    probabilities = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(made, probabilities, seed=seed, stopping_strategy="first_exhausted")
    return mixed if max_samples is None else mixed.take(max_samples)


def summary(parts: Sequence[Part]) -> str:
    """Return how many rows are taken of each source, one line for each."""
    if any(part.of is None for part in parts):
        total = sum(float(part.weight or 0) for part in parts)
        return "\n".join(
            f"{part.label}: {float(part.weight or 0) / total:.1%} of the rows, drawn from a stream"
            for part in parts
        )
    total = sum(len(part.rows) for part in parts)
    return "\n".join(
        f"{part.label}: {len(part.rows):,} of {part.of:,} rows, {len(part.rows) / total:.1%} of the mix"
        for part in parts
    )


def _of(part: Part, error: ValueError) -> ValueError:
    return ValueError(f"`data_mix` {part.name}: {error}")
