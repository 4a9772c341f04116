"""Keep tokens and keys out of what is printed and written."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

HIDDEN = "<hidden>"
_SECRET_NAME = re.compile(r"(^|[_.-])(token|api_?key|access_?key|secret|password|passwd)$", re.IGNORECASE)
_OF_TOKENIZERS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "image_token")
# Of Hugging Face, GitHub, OpenAI and the like: recognisable wherever they stand.
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
_SECRET_ENTRY = re.compile(
    r"""(?:token|api_?key|secret|password)["']\s*:\s*["']([^"']+)["']""", re.IGNORECASE
)
_SHORTEST = 6  # hiding a shorter value would hide ordinary words


def is_secret_name(name: str) -> bool:
    """Return whether a flag, variable or key of this name holds a secret: `hub_token`, `WANDB_API_KEY`."""
    return bool(_SECRET_NAME.search(name)) and not name.lower().endswith(_OF_TOKENIZERS)


def known_secrets(arguments: Sequence[str] = ()) -> set[str]:
    """Return the values of the environment and of a command line that must not be shown."""
    found = {value for name, value in os.environ.items() if is_secret_name(name)}
    for flag, following in pairwise([*arguments, ""]):
        name, equals, value = flag.partition("=")
        if flag.startswith("--") and _almost_secret(name):
            found.add(value if equals else following)
        found |= set(_SECRET_ENTRY.findall(flag))  # such as --model_init_kwargs '{"token": ...}'
    return {value for value in found if len(value) >= _SHORTEST and not value.startswith("--")}


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """Return `text` without `secrets`, entries such as `"token": "..."`, and whatever looks like a token."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _SECRET_ENTRY.sub(lambda entry: entry[0].replace(entry[1], HIDDEN), text)
    return _SECRET.sub(HIDDEN, text)


def redacted_words(arguments: Sequence[str], secrets: Collection[str] = ()) -> list[str]:
    """Return a command line without `secrets` and the values of flags for secrets, however short."""
    kept, hide = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and is_secret_name(name)
        kept.append(HIDDEN if hide else f"{name}={HIDDEN}" if secret and equals else redact(word, secrets))
        hide = secret and not equals
    return kept


def redacted(value: Any, secrets: Collection[str] = ()) -> Any:
    """Return a tree of plain values in which secrets are hidden, found by their names or their form."""
    if isinstance(value, Mapping):
        return {key: _entry(str(key), part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(part, secrets) for part in value]
    return redact(value, secrets) if isinstance(value, str) else value


def _entry(name: str, value: Any, secrets: Collection[str]) -> Any:
    hide = isinstance(value, str) and value and is_secret_name(name)
    return HIDDEN if hide else redacted(value, secrets)


def _almost_secret(flag: str) -> bool:
    """Return whether a flag is, or was meant to be, for a secret: argparse repeats a mistyped one's value."""
    last = re.split("[_.-]", flag.lower())[-1]
    words = ("token", "key", "secret", "password")
    close = last != "tokens" and get_close_matches(last, words, 1, cutoff=0.75)
    return is_secret_name(flag) or (bool(close) and not flag.lower().endswith(_OF_TOKENIZERS))
