"""Words of a command line, and lines of a YAML file, become values of the right type: for every flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt.cli.config_file import flags_in
from lopt.cli.flag_values import kinds_of
from lopt.cli.flags import flags_of
from lopt.cli.parsing import _Parser, parse

MAPPING = {"min": 1e-6, "deep": {"list": [1e5, "1e5"], "open": True}}


def samples(hint: Any) -> list[tuple[list[str], Any, Any]]:
    """Words, a value of YAML, and what both mean, for a flag of this type."""
    kinds, found = kinds_of(hint), []
    if bool in kinds:
        found += [([], True, True), (["false"], False, False), (["True"], True, True)]
    if list in kinds:
        word = "3" if "int" in str(hint) else "0.5" if "float" in str(hint) else "inputs"
        value = type(yaml.safe_load(word))(word)
        found.append(([word, word], [value, value], [value, value]))
    if set(kinds) <= {str, list} and (str in kinds or "list[str]" in str(hint)):
        found.append((["1e5"], "1e5", "1e5" if str in kinds else ["1e5"]))
    if int in kinds:
        found.append((["12"], 12, 12))
    if kinds == (float,):
        found.append((["1e-6"], 1e-6, 1e-6))
    return found


@pytest.mark.parametrize("command", ["sft", "grpo", "plan"])
def test_every_flag_takes_the_values_of_its_type(command: str, tmp_path: Path) -> None:
    parser, path = _Parser(flags_of(command)), tmp_path / "x.yaml"
    closed = {action.dest for action in parser._actions if action.choices}
    for name, hint in parser.types.items():
        if name in closed:
            continue
        for words, value, expected in samples(hint):
            found = getattr(parser.parse_args([f"--{name}", *words]), name)
            assert found == expected and type(found) is type(expected), (name, words, found)
            path.write_text(yaml.safe_dump({name: value}).replace("1.0e-06", "1e-6").replace("'1e5'", "1e5"))
            of_file, _ = flags_in(path, parser.types, str)
            assert getattr(parser.parse_args(of_file), name) == expected, (name, of_file)
        if dict in kinds_of(hint):
            path.write_text(f"{name}:\n  min: 1e-6\n  deep: {{list: [1e5, '1e5'], open: yes}}\n")
            of_file, _ = flags_in(path, parser.types, str)
            found = getattr(parser.parse_args(of_file), name)
            assert (json.loads(found) if isinstance(found, str) else found) == MAPPING, name


def test_what_is_neither_one_word_nor_one_type(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("lr_scheduler_kwargs: {min_lr: 1e-6}\nfsdp: false\nresume: yes\n")
    (_, _, run, *_, args) = parse(
        "sft",
        [
            "--config",
            str(tmp_path / "x.yaml"),
            *["--report_to", "a", "b", "--bf16", "--use_cpu", "--output_dir", "x"],
        ],
    )
    assert args.report_to == ["a", "b"] and args.bf16 is True and not args.fsdp and run.resume == "auto"
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    *_, args = parse(
        "sft", ["--report_to", "all", "--pad_to_multiple_of", "8", "--debug", "underflow_overflow"]
    )
    assert args.report_to and args.pad_to_multiple_of == 8 and args.debug == ["underflow_overflow"]
    *_, args = parse("sft", ["--include_num_input_tokens_seen", "non_padding", "--report_to", "none"])
    assert args.include_num_input_tokens_seen == "non_padding" and args.report_to == []


def test_text_of_a_file_is_taken_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "run_name: 0012\nmodel_revision: 12e4567\nsave_strategy: no\nmax_time: 1:30\ntrain_file: [1.0, 2e3]\n"
        "learning_rate: 1e-6\n"
    )
    types = _Parser(flags_of("sft")).types
    words, _ = flags_in(tmp_path / "x.yaml", types, str)
    assert words == ["--run_name=0012", "--model_revision=12e4567", "--save_strategy=no", "--max_time=1:30",
                     "--train_file", "1.0", "2e3", "--learning_rate=1e-06"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_block", "2"], "--num_block is no flag of lopt sft: did you mean --num_blocks?"),
        (["--per_device", "2"], "did you mean --per_device_train_batch_size or --per_device_eval_batch_size"),
        (["--lr_scheduler_kwargs", "min_lr=1"], "'min_lr=1' is not a mapping such as"),
        (["--lr_scheduler_kwargs", "[1]"], "is not a mapping such as"),
        (["--fsdp_config", "{1"], "is not a JSON file, or a mapping such as"),
    ],
)
def test_no_abbreviations_and_no_half_mappings(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse("sft", flags)
    assert message in str(error.value)
