"""`lopt sft`: supervised fine-tuning by LoPT, end to end, with frozen early blocks or with LoRA."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopt.blocks import Blocks
from lopt.cli.arguments import DataArguments, ModelArguments, RunArguments, parse
from lopt.cli.output import prepare_output
from lopt.cli.rows import check_rows, sft_rows
from lopt.config import LoPTConfig
from lopt.models import load_model
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTSFTConfig


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then load, train, evaluate and save."""
    model_args, data_args, run_args, config, args = parse(
        "sft", (ModelArguments, DataArguments, RunArguments, LoPTConfig, LoPTSFTConfig), arguments
    )
    check(model_args, data_args, args)
    check_settings(args, config)
    if config.method == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError('--method lora needs peft: pip install "lopt[peft]"')
    checkpoint = prepare_output(
        args.output_dir, resume=run_args.resume, overwrite=run_args.overwrite_output_dir
    )
    rows = sft_rows(model_args, data_args, args)
    model = load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{model_args.model_name_or_path}: " + ", ".join(str(b) for b in Blocks(model, config)))
    trainer = LoPTSFTTrainer(
        model,
        args=args,
        lopt_config=config,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=rows.tokenizer,
        peft_config=_lora(model_args) if config.method == "lora" else None,
    )
    _train_and_save(trainer, checkpoint)


def check(model_args: ModelArguments, data_args: DataArguments, args: LoPTSFTConfig) -> None:
    """Check what model and data flags say together, and carry it over into `args`.

    Raises:
        ValueError: no model, a sequence length that leaves nothing to predict, an impossible stream.
    """
    if model_args.model_name_or_path is None:
        raise ValueError(
            "--model_name_or_path is missing: give a folder, a hub id or gemma3-270m (the packaged model)"
        )
    if data_args.max_seq_length is not None:
        args.max_length = data_args.max_seq_length
    if args.max_length is not None and args.max_length < 2:
        raise ValueError(f"--max_length {args.max_length} leaves nothing to predict: use 2 or more")
    check_rows(data_args, args.max_steps)
    if data_args.held_out and args.eval_strategy == "no":
        args.eval_strategy = "epoch"


def _lora(model_args: ModelArguments) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _train_and_save(trainer: LoPTSFTTrainer, checkpoint: str | None) -> None:
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    (folder / "lopt_config.json").write_text(json.dumps(asdict(trainer.lopt.config), indent=2) + "\n")
    print(f"The model is in {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")
