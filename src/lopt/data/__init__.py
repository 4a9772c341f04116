"""Training data: from files, the Hub or a generator to what TRL's `SFTTrainer` takes.

- `files`: `load_rows` reads rows or opens a stream of them, `split_held_out` sets some aside.
- `presets`: `PRESETS`, public data sets by name, with columns and licence.
- `formats`: `infer_format` finds the columns that count, `format_rows` makes the examples.
- `tasks`: `make_task` and `train_and_held_out` make arithmetic problems, `is_correct` marks them.
"""

from lopt.data.files import load_rows, split_held_out
from lopt.data.formats import FORMATS, Format, format_rows, infer_format
from lopt.data.presets import PRESETS, Preset
from lopt.data.tasks import (
    TASKS,
    Problem,
    extract_answer,
    is_correct,
    make_task,
    prompt,
    train_and_held_out,
)

__all__ = [
    "FORMATS",
    "PRESETS",
    "TASKS",
    "Format",
    "Preset",
    "Problem",
    "extract_answer",
    "format_rows",
    "infer_format",
    "is_correct",
    "load_rows",
    "make_task",
    "prompt",
    "split_held_out",
    "train_and_held_out",
]
