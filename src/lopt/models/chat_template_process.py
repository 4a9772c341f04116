"""The script of the child process in `lopt.models.chat_template`: render a template."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import FunctionLoader, TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

_MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]


def answer(question: dict[str, Any]) -> int | str:
    """Return how many characters the template makes, 0 if it raises an error.

    Returns "memory" if there is not enough of it, and the sandbox's message if that stops the template.
    """
    try:
        return len(_render(question["template"], question["variables"]))
    except MemoryError:
        return "memory"
    except SecurityError as error:
        return str(error)
    except Exception:  # a template may raise anything, and has come to an end then
        return 0


def _render(template: str, variables: dict[str, str]) -> str:
    """Render as `transformers.utils.chat_template_utils` does, whose import takes seconds."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, ext.loopcontrols],
        loader=FunctionLoader(_refuse_file),
    )
    sandbox.filters["tojson"] = _as_json
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form}
    conversation = {"messages": _MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    return sandbox.from_string(template).render(**variables, **conversation)


class _Generation(ext.Extension):
    """The tag around what a model generates."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _refuse_file(name: str) -> str:
    raise SecurityError("it includes another file")


def _as_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})
