"""What the files of a model's weights say of themselves, checked before the weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# As safetensors names them; integers other than these (masks, positions) are no weights.
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_WEIGHTS = (".weight", "_proj")
"""How the names of matrices end; those of fused experts have no `.weight`."""


def check_weight_files(folder: Path, name: str, *, quantized: bool) -> None:
    """Refuse weights that are there twice, damaged, or integers that would be read as they are.

    Args:
        folder: of the model; one without weights in safetensors is left to others.
        name: of the model, for messages.
        quantized: whether its config.json says how its weights are quantized.

    Raises:
        ValueError: with the file, and what to do.
    """
    if (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        raise ValueError(
            f"`model_name_or_path` {name} holds its weights twice, in {WHOLE} and in the shards of "
            f"{INDEX}: remove those that are not meant"
        )
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`model_name_or_path` {name}: its weights are damaged ({path.name}: {error}): get them again"
            ) from error
        integers = [key for key, dtype in dtypes.items() if dtype in _INTEGERS and key.endswith(_WEIGHTS)]
        if integers and not quantized:
            raise ValueError(
                f"`model_name_or_path` {name}: {integers[0]} holds integers ({dtypes[integers[0]]}), as "
                "quantized weights do, and its config.json has no quantization_config to read them by: get "
                "both from one place, or the weights in floating point"
            )


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that a loader reads; shards that are missing are left to it."""
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        yield from (folder / shard for shard in sorted(set(shards)) if (folder / shard).is_file())
    elif (folder / WHOLE).is_file():
        yield folder / WHOLE


def dropped_layers(unexpected: Iterable[str], parameters: Collection[str], further: int) -> list[str]:
    """Return the tensors in `unexpected` that belong to layers like those of the model, but behind them.

    Args:
        unexpected: names of tensors in the files that the model does not use.
        parameters: names of the model's parameters.
        further: number of layers behind the model's that it does without, as it should.
    """
    last: dict[str, int] = {}
    for name in parameters:
        if found := _numbered(name):
            last[found[0]] = max(found[1], last.get(found[0], 0))
    numbered = [(name, _numbered(name)) for name in unexpected]
    return [name for name, found in numbered if found and found[1] > last.get(found[0], found[1]) + further]


def _numbered(name: str) -> tuple[str, int] | None:
    """Return a name with `*` for its first number, and that number: of the layer."""
    parts = re.split(r"\.(\d+)\.", name, maxsplit=1)
    return (f"{parts[0]}.*.{parts[2]}", int(parts[1])) if len(parts) == 3 else None
