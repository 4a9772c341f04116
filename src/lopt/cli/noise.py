"""What a command logs: lines of other libraries that are kept away, and the level that `--log_level` asks."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DROPPED = {
    # transformers imports torchao wherever it is installed, and torchao reports each of its kernels that was
    # built for another GPU or Python; none of them is called here.
    "torchao": "Failed to load ",
    # torchao registers enums in a way that torch has deprecated.
    "torch.utils._pytree": "<enum ",
    # The model that is saved has its tokenizer's special tokens, as it should.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # A table of weights that are missing, of another size or not used: `lopt.models.load` says it in a line.
    "transformers.modeling_utils": ".*LOAD REPORT",
    # TRL says that they are ignored, of the policy; the reference model is loaded by them.
    **dict.fromkeys(
        ("trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer"),
        r"(\[RANK \d+\] )?You passed `model_init_kwargs`",
    ),
}
"""Logger -> a pattern that the messages which are dropped begin with."""
# TRL and peft call what transformers has renamed.
DROPPED_WARNINGS = ("`is_gradient_checkpointing` is deprecated",)
_HUB = "huggingface_hub.utils._http"
_RETRY = re.compile("thrown while requesting|^Retrying in ")


class _Dropped(logging.Filter):
    """Drops the messages of a logger that begin with a pattern."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.beginning.match(record.getMessage()) is None


class _SaidOnce(logging.Filter):
    """Says once, in one line, that the hub does not answer, instead of two lines for each of six requests."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not _RETRY.search(record.getMessage()):
            return True
        first, self.said = not self.said, True
        record.msg, record.args = "The hub does not answer, trying again.", ()
        return first


def quiet() -> None:
    """Keep these lines, and no others, off the terminal; a second call changes nothing."""
    for name, beginning in DROPPED.items():
        _filter(name, _Dropped(beginning))
    _filter(_HUB, _SaidOnce())
    for beginning in DROPPED_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(beginning), category=FutureWarning)


@contextmanager
def brief_bars() -> Iterator[None]:
    """Let progress bars appear after a second and go when they are full, if tqdm is imported within."""
    bars = {"TQDM_DELAY": "1", "TQDM_LEAVE": "", "TQDM_DYNAMIC_NCOLS": "1"}  # "" is tqdm's false
    added = {name: value for name, value in bars.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def counted_warnings() -> Iterator[Counter[str]]:
    """Within, count the warnings and errors that are logged, by their text."""
    counted: Counter[str] = Counter()
    make_record = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        beginning = DROPPED.get(record.name)
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not (beginning and re.match(beginning, message)):
            counted[message] += 1
        return record

    logging.setLogRecordFactory(make)
    try:
        yield counted
    finally:
        logging.setLogRecordFactory(make_record)


@contextmanager
def at_log_level(args: Any) -> Iterator[None]:
    """Log at the level of `args`, TrainingArguments, inside; other libraries are set by transformers."""
    logger = logging.getLogger("lopt")
    before = logger.level
    if args.log_level != "passive":
        logger.setLevel(args.get_process_log_level())
    try:
        yield
    finally:
        logger.setLevel(before)


def _filter(name: str, added: logging.Filter) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(present, type(added)) for present in logger.filters):
        logger.addFilter(added)
