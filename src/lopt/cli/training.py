"""What the training commands do before and after their trainer's run."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lopt.architectures import base_model
from lopt.cli.checks import check_cut
from lopt.cli.display.closing import show_end
from lopt.cli.display.progress import show
from lopt.cli.display.screen import Screen
from lopt.cli.flags import ModelArguments, RunArguments, checkpoint_named
from lopt.cli.output import check_output, spare_model, start_anew
from lopt.cli.retention import MakeCallback
from lopt.core.config import LoPTConfig
from lopt.engine import grid
from lopt.engine.stages import dealt
from lopt.files import write_text
from lopt.models.load import load_model, resolve_model
from lopt.models.part import load_part
from lopt.models.processor import copy_processor
from lopt.models.shapes import model_config
from lopt.reliability.advice import Attempt
from lopt.reliability.finite import NonFiniteError
from lopt.reliability.machine_errors import memory_errors_explained
from lopt.reliability.ranks import on_first_rank, together
from lopt.reliability.record import Record, data_facts
from lopt.reliability.stop import Stopped
from lopt.reports.retention import write_curves
from lopt.reports.run_callback import RunReport
from lopt.trainers.card import DataSource
from lopt.trainers.checks import check_batches
from lopt.trainers.lora import lora_config
from lopt.trainers.vllm import end_training


def prepare(model_args: ModelArguments, run_args: RunArguments, config: LoPTConfig, args: Any) -> str | None:
    """Check the output folder and the model's config, the first process before all others.

    Returns:
        The checkpoint to resume from, if any.
    """
    resume = run_args.resume or checkpoint_named(args.resume_from_checkpoint)
    if args.resume_from_checkpoint is not None and resume != checkpoint_named(args.resume_from_checkpoint):
        raise ValueError("--resume and --resume_from_checkpoint name different checkpoints: give one of them")
    checkpoint = on_first_rank(  # a large checkpoint is read once
        args,
        lambda: check_output(
            str(args.output_dir),
            resume=resume,
            overwrite=run_args.overwrite_output_dir,
            verify=args.checkpoint_verify,
        ),
    )
    with args.main_process_first(desc="model"):
        name = str(model_args.model_name_or_path)
        check_cut(
            name, [config], revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
        model_args.model_name_or_path = resolve_model(name)
    spare_model(str(args.output_dir), model_args.model_name_or_path)
    return checkpoint


def load(model_args: ModelArguments, args: Any) -> PreTrainedModel:
    """Load the model that the flags name, as they say."""
    return load_model(
        str(model_args.model_name_or_path),
        dtype=model_args.param_dtype,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def load_reference_alike(args: Any, model_args: ModelArguments) -> None:
    """Have TRL load the reference model, if there is one, as the policy was loaded."""
    found: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": args.trust_remote_code}
    if model_args.model_revision is not None:
        found["revision"] = model_args.model_revision
    given: Any = args.model_init_kwargs or {}  # a dict by now: TRL's config has parsed it
    args.model_init_kwargs = {**given, **found}


def _load(model_args: ModelArguments, config: LoPTConfig, args: Any) -> PreTrainedModel:
    """Load the model, in a pipeline the blocks of this process."""
    place = grid.current()
    if place is None:
        return load(model_args, args)
    return load_part(
        str(model_args.model_name_or_path),
        config,
        dealt(config.block_count, place.position, place.size),
        dtype=model_args.param_dtype,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def _attempt(model_args: ModelArguments, config: LoPTConfig, args: Any) -> Attempt:
    """Return what the planner is asked about when the model does not fit."""
    where = model_args.model_revision, args.trust_remote_code
    shape = model_config(str(model_args.model_name_or_path), *where)
    named: Any = {"auto": shape.dtype or "float32"}.get(model_args.param_dtype, model_args.param_dtype)
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, named)
    return Attempt(shape, args, config, getattr(args, "max_length", None), dtype, args.device)


def run(
    trainer_class: Any,
    rows: Any,
    model_args: ModelArguments,
    config: LoPTConfig,
    args: Any,
    checkpoint: str | None,
    record: Record,
    screen: Screen,
    retention: MakeCallback | None = None,
    **more: Any,
) -> None:
    """Load the model, train it on `rows`, evaluate on what was held out, save it.

    Args:
        rows: `train`, `held_out` and `tokenizer`, from `lopt.cli.rows`.
        checkpoint: the one to resume from, if any.
        record: of the command, for the output folder.
        screen: where the run is shown.
        retention: makes the callback that measures retention during training.
        more: arguments of this trainer class.
    """
    began = time.monotonic()
    if not screen.live:  # a terminal has bars for what takes long
        screen.print(f"Loading {record.settings['model_name_or_path']} and preparing its rows")
    trainer = _trainer(trainer_class, rows, model_args, config, args, more)
    trainer.data_source = DataSource.of(record.settings)
    check_batches(args, trainer.train_dataset, trainer.eval_dataset)
    callback = retention(trainer) if retention is not None else None
    if callback is not None:
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        data = data_facts({"train": rows.train, "held_out": rows.held_out})
        record.write(Path(str(args.output_dir)), data, checkpoint, getattr(rows, "template", None))
    progress = show(trainer, screen, record.command)
    known = (record.command, record.changed, screen.warnings)
    report = RunReport(trainer, *known, facts=lambda: progress.facts)
    trainer.add_callback(report)
    try:
        _train_and_save(trainer, checkpoint, model_args)
        progress.close()
        if callback is not None and callback.stopped:
            screen.warnings[callback.stopped] += 1
        report.write(ended=True)
        if trainer.is_world_process_zero():
            if callback is not None:
                print(write_curves(trainer.state.log_history, Path(str(args.output_dir)), callback.stopped))
            show_end(trainer, screen, record, time.monotonic() - began)
        if args.push_to_hub:
            _push(trainer)
        end_training(trainer)
    except Stopped:
        end_training(trainer)
        grid.leave()
        raise
    finally:
        progress.close()
        report.write()
    grid.leave()


def _trainer(
    trainer_class: Any,
    rows: Any,
    model_args: ModelArguments,
    config: LoPTConfig,
    args: Any,
    more: dict[str, Any],
) -> Any:
    """Load the model and return its trainer."""
    name = str(model_args.model_name_or_path)
    if not getattr(args, "packing", False):  # which may make several sequences of a row
        check_batches(args, rows.train, rows.held_out)
    adapters = None
    if config.method == "lora":
        adapters = lora_config(model_args.lora_r, model_args.lora_alpha, model_args.lora_target_modules)
    with memory_errors_explained(f"loading {name}", args.device, lambda: _attempt(model_args, config, args)):
        return trainer_class(
            _load(model_args, config, args),
            args=args,
            lopt_config=config,
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            processing_class=rows.tokenizer,
            peft_config=adapters,
            **more,
        )


def _train_and_save(trainer: Any, checkpoint: str | None, model_args: ModelArguments) -> None:
    if checkpoint is not None:
        trainer.checkpoints.proven.add(checkpoint)  # every byte of it was read when it was chosen
    elif trainer.is_world_process_zero():
        start_anew(str(trainer.args.output_dir))
    trainer.accelerator.wait_for_everyone()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("train", result.metrics)
    pushes, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # not yet, see `_push`
    together(trainer.save_model)
    trainer.args.push_to_hub = pushes
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        write_text(folder / "lopt_config.json", json.dumps(asdict(trainer.lopt.config), indent=2) + "\n")
        config = base_model(trainer.lopt.model).config
        copy_processor(str(model_args.model_name_or_path), config, folder, model_args.model_revision)
    if trainer.eval_dataset is not None:
        try:
            metrics = _metrics_of_the_end(trainer) or trainer.evaluate()
        except Stopped as stop:
            raise Stopped(stop.reason, "in the last evaluation: the model is saved") from None
        trainer.save_metrics("eval", metrics)
        if not math.isfinite(loss := metrics.get("eval_loss", 0.0)):
            raise NonFiniteError(
                f"the held-out loss of the trained model is {loss}: it has diverged and is of no use. Lower "
                "`learning_rate`, or clip with a smaller `max_grad_norm`"
            )
    trainer.create_model_card()  # again, with what was measured
    trainer.save_state()


def _push(trainer: Any) -> None:
    """Push the folder when all is in it: the last evaluation is in the card, and the pages are written."""
    pushed = trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"The model is on the hub: {getattr(pushed, 'repo_url', pushed)}")


def _metrics_of_the_end(trainer: Any) -> dict[str, Any] | None:
    """Return the metrics of the model as it is, if the last step was followed by an evaluation."""
    args, state = trainer.args, trainer.state
    if args.load_best_model_at_end or args.bf16_full_eval or args.fp16_full_eval:
        return None  # another model than was evaluated, or in another precision
    for entry in reversed(state.log_history):
        if "eval_runtime" in entry and entry["step"] == state.global_step:
            return {name: value for name, value in entry.items() if name != "step"}
    return None
