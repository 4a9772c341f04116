"""`--help` of every command: quick, silent, and true."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from lopt.cli import help as help_module
from lopt.cli.flags import OWN
from lopt.cli.help import COMMON
from lopt.cli.main import COMMANDS, main
from lopt.cli.parsing import settings

HELPS = [["--help"], ["--version"], *([*name.split(), "--help"] for name in (*COMMANDS, *OWN))]


def test_no_help_imports_what_takes_seconds() -> None:
    """Nothing but the page is printed, and torch, transformers and TRL stay where they are."""
    code = (
        "import sys\nfrom lopt.cli.main import main\n"
        f"for words in {HELPS!r}:\n    assert main(words) == 0, words\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    for flag in ("--num_blocks 2", "--tasks", "--fit", "--calibrate False", "--held_out 64"):
        assert flag in run.stdout


def test_common_flags_fit_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, sections in COMMON.items():
        assert main([*command.split(), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        flags = [line for line in lines if line.startswith("  --")]
        assert len(flags) == sum(map(len, sections.values())) <= 50
        assert not any(line.startswith("   ") for line in lines), command  # no flag takes two lines


@pytest.mark.parametrize("command", COMMON)
def test_common_flags_are_the_real_ones(command: str) -> None:
    defaults, _ = settings(command, [])
    for line in (line for lines in COMMON[command].values() for line in lines):
        value = defaults[line.name]
        shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        assert line.default.replace("COMMAND", command.split()[0]) == shown, line.name


@pytest.mark.parametrize("command", ["sft", "dpo", "grpo", "eval"])
def test_every_flag_is_shown_once(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--help-all"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert sorted(shown) == sorted(f"--{name}" for name in settings(command, [])[0])


def test_titles_begin_at_flags_that_exist() -> None:
    for group in {group for groups in OWN.values() for group in groups}:
        names = [field.name for field in fields(group)]
        starts = list(getattr(group, "groups", {names[0]: names[0]}).values())
        assert starts[0] == names[0] and starts == sorted(starts, key=names.index)


def test_the_documentation_of_trl_names_its_sections() -> None:
    from lopt.trainers.config import LoPTGRPOConfig

    places = help_module._documented(LoPTGRPOConfig)
    assert places["beta"] == "trl: the training" and places["seed"] == "transformers: Reproducibility"


def test_names_in_the_help_are_those_of_the_library() -> None:
    """`flags` writes them out, because importing the library's would take seconds."""
    from lopt.cli import report_flags as flags
    from lopt.data.procedural import TASKS
    from lopt.models.packaged import PACKAGED_MODEL
    from lopt.models.shapes import SHAPES
    from lopt.planning.devices import DEVICES, HOST_GBPS, REACHED
    from lopt.planning.optimizer_step import OPTIMIZERS

    assert ", ".join(OPTIMIZERS) == flags.OPTIMIZERS
    plan, demo = flags.PlanArguments(), flags.DemoArguments()
    assert ", ".join(DEVICES) == flags.DEVICES
    assert demo.model == PACKAGED_MODEL and demo.task in TASKS
    texts = {field.name: field.metadata["help"] for field in fields(plan)}
    assert ", ".join(SHAPES) in texts["model_name_or_path"]
    assert f"Default: {REACHED} of" in texts["tflops"] and f"Default: {HOST_GBPS:g}." in texts["host_gbps"]
