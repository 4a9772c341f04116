"""Training data: from files, the Hub or a generator to what TRL's trainers take.

- `load`: `load_rows` reads rows or opens a stream of them, `split_held_out` sets some aside.
- `presets`: `PRESETS`, public data sets by name, with columns and licence.
- `formats`: `infer_format` finds the columns that count, `format_rows` makes the examples of SFT.
- `questions`: `question_rows` makes the examples of GRPO; `question_tasks` has the kinds of rows that it
knows.
- `procedural`: `make_task` and `train_and_held_out` make arithmetic problems, `is_correct` marks them.

The names are imported when they are asked for, so that those of presets and tasks need no `datasets`.
"""

import importlib
from typing import Any

_MODULES = {
    "formats": ("FORMATS", "Format", "format_rows", "infer_format"),
    "load": ("load_rows", "split_held_out"),
    "presets": ("PRESETS", "Preset"),
    "procedural": ("TASKS", "Problem", "is_correct", "make_task", "prompt", "train_and_held_out"),
    "question_tasks": ("QUESTION_TASKS", "QuestionTask"),
    "questions": ("procedural_rows", "question_rows"),
}

__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
