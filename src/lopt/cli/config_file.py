"""`--config file.yaml`: flags from a file, as words of a command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from yaml.constructor import ConstructorError

from lopt.cli.flag_values import kinds_of, takes_text, words_of
from lopt.messages import error_text


class _Loader(yaml.SafeLoader):
    """Reads 1e-6 as a number, which YAML 1.1 takes for text, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def flags_in(path: Path, types: Mapping[str, Any], hint: Callable[[str], str]) -> tuple[list[str], dict]:
    """Return the flags of a YAML file as words of a command line, so that their values are checked alike.

    Args:
        path: The file.
        types: The type of every flag by its name.
        hint: What to say of an unknown one.

    Returns:
        The words, and the values that no word means: None and empty lists.

    Raises:
        ValueError: The file is missing or broken, has an unknown key, or several values for one.
    """
    where = f"--config {path}"
    words: list[str] = []
    defaults: dict[str, Any] = {}
    for key, node, value in _read(path):
        if key not in types:
            raise ValueError(f"{where}: {key!r} is no flag: {hint(str(key))}")
        if value is None and NoneType not in get_args(types[key]):
            raise ValueError(f"{where}: {key} has no value: give it one, or leave the line out")
        if isinstance(value, list) and list not in kinds_of(types[key]):
            raise ValueError(f"{where}: {key} takes one value, not a list")
        if takes_text(types[key]):  # 0012, 1e6 and no are text there
            value = _as_written(node, value)
        if value is None or value == []:
            defaults[key] = value
        elif isinstance(value, list) and len(value) > 1:
            words += [f"--{key}", *words_of(value)]
        else:
            words.append(f"--{key}={words_of(value)[0]}")
    return words, defaults


def _read(path: Path) -> list[tuple[Any, yaml.Node | None, Any]]:
    """Return key, node and value of every line of the file's mapping."""
    if not path.is_file():
        raise ValueError(f"--config {path} is not a file")
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    # PyYAML itself raises the last three: for deep nesting, and for values that do not fit their tags.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else error_text(error)
        raise ValueError(f"--config {path} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold flags, one 'name: value' per line")
    assert isinstance(node, yaml.MappingNode)
    nodes = {key.value: value for key, value in node.value}
    return [(key, nodes.get(str(key)), value) for key, value in content.items()]


def _as_written(node: yaml.Node | None, value: Any) -> Any:
    """Return a value, or those of a list, as the text that the file has; None and mappings as they are."""
    if isinstance(value, list) and isinstance(node, yaml.SequenceNode):
        return [_as_written(*pair) for pair in zip(node.value, value, strict=True)]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value
