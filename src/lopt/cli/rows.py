"""From flags to the rows that a run trains on, and to the rewards of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from lopt.cli.flag_names import renamed
from lopt.cli.flags import DataArguments, ModelArguments, TaskArguments
from lopt.data.chat import Chat, common_start
from lopt.data.columns import infer_format, needed_columns
from lopt.data.files import Choose
from lopt.data.formats import format_rows
from lopt.data.load import check_held_out, load_rows, split_held_out
from lopt.data.mix import Part, examples_of, load_mix, parse_mix, summary
from lopt.data.preferences import preference_columns, preference_rows
from lopt.data.procedural import TASKS
from lopt.data.question_tasks import QUESTION_TASKS
from lopt.data.questions import procedural_rows, question_rows
from lopt.data.rendering import template_options
from lopt.data.rows import column_names
from lopt.evaluation.names import text_names
from lopt.models.load import load_chat_template, load_tokenizer
from lopt.rewards import REWARDS, checked, load_reward
from lopt.trainers.turns import check_turns
from lopt.validation import check_choice, check_number

PROBLEMS = 5_000
"""How many problems of a procedural task are generated, unless --max_samples says otherwise."""


class SFTRows(NamedTuple):
    """Formatted rows, or pairs of DPO, not yet tokenized.

    `read` is the number of rows that were read before empty ones were dropped; None for a stream. `template`
    is the kind of the plain template, with which `lopt chat` asks; None with a chat template.
    """

    train: Any
    held_out: Any
    tokenizer: Any
    read: int | None
    template: str | None


class GRPORows(NamedTuple):
    """Prompts, with the columns that the rewards need."""

    train: Any
    held_out: Any
    tokenizer: Any
    rewards: list[Callable[..., Any]]


def sft_rows(model_args: ModelArguments, data_args: DataArguments, args: Any) -> SFTRows:
    """Return rows and tokenizer of an SFT run; rows are read first, since they fail first."""
    field, choose = args.dataset_text_field, _choose(args.dataset_text_field)
    parts = _read_parts(data_args, args, choose)
    if field != "text":
        # Rows of the hub still have their other columns, which may be those of another format.
        parts = [
            replace(
                part,
                rows=part.rows.select_columns(choose(column_names(part.rows))).rename_column(field, "text"),
            )
            for part in parts
        ]
        args.dataset_text_field = "text"
    tokenizer = _tokenizer(model_args, args)
    kind = None if tokenizer.chat_template else infer_format(column_names(parts[0].rows)).kind
    only, mixed = args.assistant_only_loss, data_args.data_mix is not None
    make = partial(format_rows, tokenizer=tokenizer, assistant_only=only, every_column=mixed)
    rows, read = _examples(parts, make, data_args, args)
    if args.assistant_only_loss:
        check_turns(tokenizer)
    if args.completion_only_loss and "completion" not in column_names(rows):
        raise ValueError(
            "`completion_only_loss` needs prompts with a completion, and these rows have none: leave it out"
        )
    train, held_out = split_held_out(rows, data_args.held_out, args.seed)
    return SFTRows(train, held_out, tokenizer, read, kind)


def retention_rows(
    paths: Sequence[str], tokenizer: Any, limit: int | None
) -> dict[str, list[tuple[str, str]]]:
    """Return the first `limit` prompts of every file with their answers, as text, by short names.

    Raises:
        ValueError: a file is given twice, cannot be read or formatted, or has rows without an answer.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for path, name in zip(paths, text_names(paths), strict=True):
        if name in found:
            raise ValueError(f"`retention_rows` {path} is given twice: leave it out")
        with renamed(train_file="retention_rows"):
            rows = load_rows(path, choose=needed_columns)
            rows = format_rows(rows.select(range(min(len(rows), limit or len(rows)))), tokenizer)
        if "completion" not in column_names(rows):
            raise ValueError(f"`retention_rows` {path} has rows without an answer: give prompts with answers")
        found[name] = [_as_text(row, tokenizer) for row in rows]
    return found


def _as_text(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str]:
    """Return prompt and answer as text, rendered by the chat template where they are messages."""
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return prompt, answer
    chat, options = Chat(tokenizer), template_options(row)
    whole = chat.render([*prompt, *answer], **options)
    # A template may end the prompt of a generation in what an answer does not have, such as <think>.
    opening = common_start(chat.render(prompt, add_generation_prompt=True, **options), whole)
    return opening, whole.removeprefix(opening)


def dpo_rows(model_args: ModelArguments, data_args: DataArguments, args: Any) -> SFTRows:
    """Return pairs and tokenizer of a DPO run."""
    parts = _read_parts(data_args, args, preference_columns)
    tokenizer = _tokenizer(model_args, args)
    make = partial(preference_rows, tokenizer=tokenizer, every_column=data_args.data_mix is not None)
    rows, read = _examples(parts, make, data_args, args)
    train, held_out = split_held_out(rows, data_args.held_out, args.seed)
    texts = isinstance(next(iter(parts[0].rows))["chosen"], str)
    kind = None if tokenizer.chat_template else "pair" if texts else "messages"
    return SFTRows(train, held_out, tokenizer, read, kind)


def grpo_rows(
    model_args: ModelArguments, data_args: DataArguments, task_args: TaskArguments, args: Any
) -> GRPORows:
    """Return prompts, tokenizer and rewards of a GRPO run."""
    task = task_args.task
    specs = task_args.reward_funcs or [QUESTION_TASKS[str(task)].reward]
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"--reward_funcs names {spec} twice: leave one out, and see --reward_weights")
    rewards = [checked(load_reward(spec)) for spec in specs]
    check_number("max_samples", data_args.max_samples, minimum=1)
    if task in TASKS and not _names_rows(data_args):
        rows = procedural_rows(str(task), data_args.max_samples or PROBLEMS, args.seed)
    else:
        rows = _read_rows(data_args, args.seed)
    tokenizer = _tokenizer(model_args, args)
    if args.chat_template_kwargs and not tokenizer.chat_template:
        raise ValueError("`chat_template_kwargs` has no effect without a chat template: leave it out")
    rows = question_rows(
        rows,
        tokenizer,
        task,
        instruction=task_args.instruction,
        max_prompt_length=task_args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    if any(spec in REWARDS for spec in specs) and "answer" not in rows.column_names:
        raise ValueError(f"--reward_funcs {' '.join(specs)} needs a column `answer` in the rows")
    train, held_out = split_held_out(rows, data_args.held_out, args.seed)
    return GRPORows(train, held_out, tokenizer, rewards)


def check_rows(data_args: DataArguments, max_steps: int) -> None:
    """Refuse, before any work, what a stream cannot do and what cannot be held out.

    Raises:
        ValueError: `--streaming` without `--max_steps`, or a `--held_out` that is impossible.
    """
    if not data_args.streaming and data_args.shuffle_buffer != DataArguments().shuffle_buffer:
        raise ValueError("--shuffle_buffer has no effect without --streaming: add it, or leave it out")
    if data_args.streaming and max_steps < 1:
        raise ValueError("--streaming needs --max_steps: the number of rows of a stream is unknown")
    check_held_out(data_args.held_out, data_args.streaming)
    if data_args.data_mix is not None:
        _check_mix(data_args)


def _check_mix(data_args: DataArguments) -> None:
    """Refuse a mix that is none, and flags of one source beside it."""
    parse_mix(data_args.data_mix or [])
    plain = DataArguments()
    for name in ("train_file", *(name for name in vars(plain) if name.startswith("dataset_"))):
        if getattr(data_args, name) != getattr(plain, name):
            raise ValueError(
                f"--{name} is for one source, and --data_mix names several: leave one of them out"
            )
    check_number("max_samples", data_args.max_samples, minimum=1)
    check_number("shuffle_buffer", data_args.shuffle_buffer, minimum=1)


def check_task(task_args: TaskArguments, data_args: DataArguments) -> None:
    """Settle the task of a GRPO run, also from the preset, and the preset from the task.

    Raises:
        ValueError: An unknown task, neither task nor reward, or no prompts for a reward.
    """
    preset = data_args.dataset_preset
    if task_args.task is None and preset in QUESTION_TASKS:
        task_args.task = preset
    task = task_args.task
    if task is not None:
        check_choice("task", task, QUESTION_TASKS)
    elif not task_args.reward_funcs:
        raise ValueError(
            f"nothing says what a right answer is: give --task ({', '.join(QUESTION_TASKS)}) or "
            "--reward_funcs module:function"
        )
    if data_args.data_mix is not None:
        raise ValueError("--data_mix is for lopt sft and lopt dpo: write the prompts to one file")
    if data_args.streaming:
        raise ValueError("--streaming is for lopt sft: GRPO's prompts are short, leave it out")
    if task in TASKS or _names_rows(data_args):
        return
    if task is None:
        raise ValueError("--reward_funcs needs prompts: give --train_file or --dataset_name")
    data_args.dataset_preset = task  # `--task gsm8k` names the rows as well


def _read_parts(data_args: DataArguments, args: Any, choose: Choose) -> list[Part]:
    """Return the sources that the flags name, one or those of a mix, with their rows."""
    if data_args.data_mix is None:
        return [Part("", None, _read_rows(data_args, args.seed, choose))]
    parts = load_mix(
        data_args.data_mix,
        max_samples=data_args.max_samples,
        seed=args.seed,
        streaming=data_args.streaming,
        shuffle_buffer=data_args.shuffle_buffer,
        choose=choose,
    )
    if args.is_main:
        print(summary(parts))
    return parts


def _examples(
    parts: list[Part], make: Callable[[Any], Any], data_args: DataArguments, args: Any
) -> tuple[Any, int | None]:
    """Return the examples made of the rows, and the number of rows; None for a stream."""
    read = None if data_args.streaming else sum(len(part.rows) for part in parts)
    if data_args.data_mix is None:
        return make(parts[0].rows), read
    return examples_of(parts, make, args.seed, data_args.max_samples), read


def _read_rows(data_args: DataArguments, seed: int, choose: Choose | None = None) -> Any:
    """Return the rows that the flags name, as they are in the source: a `Dataset` or a stream."""
    return load_rows(
        train_file=data_args.train_file,
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        dataset_split=data_args.dataset_split,
        dataset_revision=data_args.dataset_revision,
        max_samples=data_args.max_samples,
        seed=seed,
        dataset_preset=data_args.dataset_preset,
        streaming=data_args.streaming,
        shuffle_buffer=data_args.shuffle_buffer,
        choose=choose,
    )


def _choose(text_field: str) -> Choose:
    """Return which columns to read: those of a format, or the one that `dataset_text_field` names."""

    def choose(found: list[str]) -> list[str]:
        if text_field not in found:
            raise ValueError(
                f"`dataset_text_field` {text_field} is no column of the rows, which have "
                f"{', '.join(found) or 'none'}: name one of them"
            )
        return [text_field]

    return needed_columns if text_field == "text" else choose


def _tokenizer(model_args: ModelArguments, args: Any) -> Any:
    """Return the model's tokenizer, with the chat template that the run trains with.

    Raises:
        ValueError: there is no such tokenizer or template.
    """
    tokenizer = load_tokenizer(
        str(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    # TRL sets these as well, but when the rows are made already.
    source = getattr(args, "chat_template_path", None)
    if source is not None:
        tokenizer.chat_template = load_chat_template(source, tokenizer)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name, None)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"--{name} {token} is no token of the model's tokenizer: name one that is")
        setattr(tokenizer, name, token)
    return tokenizer


def _names_rows(data_args: DataArguments) -> bool:
    return any([data_args.train_file, data_args.dataset_name, data_args.dataset_preset])
