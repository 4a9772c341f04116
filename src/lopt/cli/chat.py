"""`lopt chat`: talk to a model in the terminal, beside the one that it was made from if asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lopt.cli.folder import folder_first
from lopt.cli.parsing import parse
from lopt.cli.report_flags import ChatArguments
from lopt.models.names import DTYPES, resolve_model
from lopt.validation import check_choice, check_number

HELP = """\
/reset   forget what was said
/exit    leave (or Ctrl-D)
Ctrl-C   end an answer"""


def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked cheaply, then load and talk."""
    (args,) = parse("chat", folder_first(arguments))
    _check(args)

    from lopt.cli.display.screen import bars_on_a_terminal
    from lopt.cli.run_folder import base_of, template_of  # after the checks: these imports take seconds
    from lopt.evaluation.chat import TEMPLATES, Conversation, Sampling
    from lopt.evaluation.load import Loading

    if args.template is not None:
        check_choice("template", args.template, TEMPLATES)
    name = str(args.model_name_or_path)
    names = {"": name}
    if args.base is not None:
        names = {"base": base_of(name) if args.base == "auto" else args.base, "tuned": name}
    loading = Loading(args.param_dtype, args.model_revision, args.attn_implementation, args.trust_remote_code)
    tokenizer = loading.tokenizer(resolve_model(name))
    template = args.template or template_of(name, tokenizer)
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            f"`template` chat: {name} has no chat template: use one of {', '.join(TEMPLATES[1:])}"
        )
    if args.system and template == "pair":
        raise ValueError("`system` has no place in the `template` pair: leave it out")
    # Of both models the tuned one's tokenizer, so that both read the same text.
    with bars_on_a_terminal():
        talks = {
            label: Conversation(loading.model(resolve_model(path)), tokenizer, template, args.system)
            for label, path in names.items()
        }
    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed
    )
    if args.prompt is not None:
        _answer(talks, args.prompt, sampling)
        return
    _talk(talks, names, template, sampling)


def _check(args: ChatArguments) -> None:
    if args.model_name_or_path is None:
        raise ValueError("no model is named: give the folder of a run, as in lopt chat outputs/sft")
    check_choice("param_dtype", args.param_dtype, DTYPES)
    check_number("max_new_tokens", args.max_new_tokens, minimum=1)
    check_number("temperature", args.temperature, minimum=0)
    check_number("top_p", args.top_p, above=0, maximum=1)
    check_number("top_k", args.top_k, minimum=1)
    check_number("repetition_penalty", args.repetition_penalty, above=0)
    check_number("seed", args.seed, minimum=0, maximum=2**32 - 1)
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None):
        raise ValueError("`temperature` 0 takes the likeliest token: leave `top_p` and `top_k` out")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("`prompt` is empty: ask something, or leave it out to talk")


def _talk(talks: dict[str, Any], names: dict[str, str], template: str, sampling: Any) -> None:
    """Read questions from the terminal until /exit or its end."""
    from lopt.evaluation.chat import PLAIN

    asks = sys.stdin.isatty()
    if asks:
        _edit_lines()
        for label, name in names.items():
            device = next(talks[label].model.parameters()).device.type
            print(f"{label + ': ' if label else ''}{name} on {device}")
        print(
            "Template: " + (f"{template} ({PLAIN[template]})" if template in PLAIN else "the chat template")
        )
        if not next(iter(talks.values())).remembers:
            print("Each question is asked on its own, as in training.")
        print(HELP)
    while True:
        try:
            question = input("\n> " if asks else "").strip()
        except EOFError:
            if asks:
                print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves")
            continue
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            for talk in talks.values():
                talk.reset()
            print("Forgotten.")
        elif question == "/help":
            print(HELP)
        elif question.startswith("/") and question[1:].isalpha():
            print(f"There is no {question}:\n{HELP}")
        elif question:
            try:
                _answer(talks, question, sampling)
            except ValueError as error:  # of this question: the conversation goes on
                print(f"lopt chat: {error}", file=sys.stderr)


def _answer(talks: dict[str, Any], question: str, sampling: Any) -> None:
    """Print what each model says, word by word."""
    terminal = sys.stdout.isatty()
    for label, talk in talks.items():
        if label:
            print(f"\x1b[1m{label}:\x1b[0m " if terminal else f"{label}: ", end="")
        answer = talk.ask(question, sampling, _show)
        print()
        if terminal:
            ended = "" if answer.whole else ", not to its end"
            rate = answer.tokens / answer.seconds
            print(f"\x1b[90m({answer.tokens} tokens, {rate:.1f} a second{ended})\x1b[0m")


def _show(text: str) -> None:
    """Print a part of an answer; what could give commands to a terminal is escaped."""
    shown = "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


def _edit_lines() -> None:
    """Let `input` edit lines and go back to earlier ones, where this Python can."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
