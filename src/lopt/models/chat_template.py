"""Check that a chat template comes to an end: render a short conversation in a process that can be killed.

A template comes with a model and is a program in Jinja's sandbox: it reaches no file and no Python object,
but it may loop for ever or fill the memory. The limits here are far above what an ordinary one needs. The
check says nothing about other conversations (SECURITY.md).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from lopt.models.pickles import UntrustedError
from lopt.subprocesses import ChildEndedError, ChildProcess

CPU_SECONDS = 10
WALL_SECONDS = 120  # on a machine that is busy with other things
MEMORY_BYTES = 2 * 2**30
MAX_CHARACTERS = 1_000_000


def check_chat_template(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer whose chat template does not come to an end, or reaches for what it may not have.

    Templates that raise another error are left to those who use them: many expect other messages than these.

    Raises:
        UntrustedError: a template needs more time or memory or makes more text than it should, or was stopped
            by the sandbox; or the process that checks it does not start.
    """
    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else [found]:
        if not template:
            continue
        variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        problem = _problem(str(template), json.dumps(variables, sort_keys=True))
        if problem is not None:
            raise UntrustedError(
                f"the chat template of {name} {problem} for a conversation of two words: use another model, "
                "or put a template that you trust into its chat_template.jinja"
            )


@functools.lru_cache(maxsize=16)  # a command loads its tokenizer more than once
def _problem(template: str, variables: str) -> str | None:
    """Return what is wrong with a template; None if it ended well or with an error of its own.

    Args:
        variables: The template's variables besides the conversation, as JSON.
    """
    child = ChildProcess(
        Path(__file__).with_name("chat_template_process.py"),
        memory_bytes=MEMORY_BYTES,
        cpu_seconds=CPU_SECONDS,
        orphan_seconds=WALL_SECONDS,
        quiet=True,  # a template that fails is reported in one line
    )
    try:
        reply = child.ask({"template": template, "variables": json.loads(variables)}, WALL_SECONDS)
    except TimeoutError:
        return f"does not come to an end within {WALL_SECONDS} s"
    except ChildEndedError as error:
        if error.returncode < 0:
            return f"does not come to an end within {CPU_SECONDS} s"
        return "fails in a way that no template should"
    except (RuntimeError, OSError) as error:
        return f"cannot be checked ({error})"
    finally:
        child.stop()
    if reply == "memory":
        return f"needs more than {MEMORY_BYTES // 2**30} GiB of memory"
    if isinstance(reply, str):
        return f"is stopped by the sandbox ({reply[:200]})"
    return f"makes {reply:,} characters" if reply > MAX_CHARACTERS else None
