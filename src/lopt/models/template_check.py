"""Does a chat template come to an end? Tried once, on a short conversation, in a process that can be killed.

A template comes with a model and is a program in Jinja's sandbox: it reaches no file and no Python object,
but it may loop for ever or fill the memory. Here it gets more time and memory than an honest one needs. What
it makes of other conversations is not known by that (SECURITY.md).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

SECONDS = 10  # of processor time
WALL_SECONDS = 120  # on a machine that is busy with other things
BYTES = 2 * 2**30
CHARACTERS = 1_000_000
_MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]


def check_template(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer whose chat template does not come to an end, or reaches for what it may not have.

    Templates that raise another error are left to those who use them: many want other messages than these.

    Raises:
        UntrustedError: it needs more time, memory or room than a template should; the sandbox stopped it.
    """
    from lopt.models.trust import UntrustedError  # not needed in the process below

    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else [found]:
        if not template:
            continue
        words = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        trouble = _tried(str(template), json.dumps(words, sort_keys=True))
        if trouble is not None:
            raise UntrustedError(
                f"the chat template of {name} {trouble} for a conversation of two words: use another model, "
                "or put a template that you trust into its chat_template.jinja"
            )


@functools.lru_cache(maxsize=16)  # a command loads its tokenizer more than once
def _tried(template: str, words: str) -> str | None:
    """What is wrong, None if it ended well or with an error of its own."""
    # -P: the folder of this file holds names such as `memory` that must not hide other modules.
    command = [sys.executable, "-P", __file__]
    question = json.dumps({"template": template, "words": json.loads(words), "seconds": SECONDS})
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, text=True, encoding="ascii", timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"does not come to an end within {WALL_SECONDS} s"
    if done.returncode < 0:
        return f"does not come to an end within {SECONDS} s"
    if done.returncode > 0:
        return "fails in a way that no template should"
    said = done.stdout.strip()
    if said == "memory":
        return f"needs more than {BYTES // 2**30} GiB of memory"
    if not said.isdigit():
        return f"is stopped by the sandbox ({said[:200]})"
    return f"makes {int(said):,} characters" if int(said) > CHARACTERS else None


def _limit_this_process(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits, only the wall clock
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def _render(question: dict[str, Any]) -> str:
    """As `transformers.utils.chat_template_utils` renders, whose import takes seconds."""
    from jinja2 import Environment, FunctionLoader, TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def elsewhere(name: str) -> str:
        raise SecurityError("it includes another file")

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    sandbox: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
        loader=FunctionLoader(elsewhere),
    )
    sandbox.filters["tojson"] = as_json
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    given = {"messages": _MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    return sandbox.from_string(question["template"]).render(**question["words"], **given)


def _answer() -> None:
    """The process: prints how many characters came out, 0 where the template raised an error."""
    from jinja2.sandbox import SecurityError

    question = json.load(sys.stdin)
    _limit_this_process(question["seconds"])
    try:
        print(len(_render(question)))
    except MemoryError:
        print("memory")
    except SecurityError as error:
        print(ascii(str(error)).strip("'\""))
    except Exception:  # whatever a template may raise, it has come to an end
        print(0)


if __name__ == "__main__":
    _answer()
