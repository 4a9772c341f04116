"""Rows of a file as a trainer prepares them, by the chat templates that TRL ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trl

from conftest import tiny
from lopt import LoPTConfig
from lopt.data.columns import needed_columns
from lopt.data.formats import format_rows
from lopt.data.load import load_rows
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig
from small_model import byte_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template and (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def model() -> Any:
    return tiny("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=64)


def prepared(folder: Path, rows: list[dict], template: Any, **settings: Any) -> LoPTSFTTrainer:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(template) if isinstance(template, str | None) else template
    streaming = settings.pop("streaming", False)
    only = settings.get("assistant_only_loss", False)
    read = load_rows(path, choose=needed_columns, streaming=streaming, shuffle_buffer=1)
    return LoPTSFTTrainer(
        model(),
        args=LoPTSFTConfig(output_dir=str(folder), max_length=None, **settings),
        lopt_config=LoPTConfig(method="e2e"),
        train_dataset=format_rows(read, tokenizer, assistant_only=only),
        processing_class=tokenizer,
    )


def learned(trainer: Any) -> list[str]:
    """The text that each row's labels make."""
    decode = trainer.processing_class.decode
    return [decode([t for t in row["labels"] if t != -100]) for row in trainer.train_dataset]
