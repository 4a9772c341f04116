"""Training data: from files, the Hub or a generator to what TRL's trainers take.

- `files`: `load_rows` reads rows or opens a stream of them, `split_held_out` sets some aside.
- `presets`: `PRESETS`, public data sets by name, with columns and licence.
- `formats`: `infer_format` finds the columns that count, `format_rows` makes the examples.
- `questions`: `question_rows` makes the examples of GRPO, `QUESTION_TASKS` the kinds of rows it knows.
- `answers`: `final_number` and `last_boxed` find the final answer in a text.
- `tasks`: `make_task` and `train_and_held_out` make arithmetic problems, `is_correct` marks them.
"""

from lopt.data.files import load_rows, split_held_out
from lopt.data.formats import FORMATS, Format, format_rows, infer_format
from lopt.data.presets import PRESETS, Preset
from lopt.data.questions import QUESTION_TASKS, Task, procedural_rows, question_rows
from lopt.data.tasks import (
    TASKS,
    Problem,
    extract_answer,
    is_correct,
    make_task,
    prompt,
    train_and_held_out,
)
from lopt.rewards.answers import final_number, last_boxed

__all__ = [
    "FORMATS",
    "PRESETS",
    "QUESTION_TASKS",
    "TASKS",
    "Format",
    "Preset",
    "Problem",
    "Task",
    "extract_answer",
    "final_number",
    "format_rows",
    "infer_format",
    "is_correct",
    "last_boxed",
    "load_rows",
    "make_task",
    "procedural_rows",
    "prompt",
    "question_rows",
    "split_held_out",
    "train_and_held_out",
]
