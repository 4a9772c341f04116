"""Measure real optimizer steps with random weights on random tokens, to compare a plan with."""

from __future__ import annotations

import copy
import gc
import inspect
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from lopt.core.config import LoPTConfig
from lopt.instruments.memory import MemoryPeak, MemoryTracker, unwrap_optimizer
from lopt.models.load import empty_model
from lopt.planning.devices import Machine
from lopt.planning.rates import Rates
from lopt.planning.run import Run, Setting


@dataclass
class Measured:
    """What the steps of one setting have taken.

    Attributes:
        peak: of a step in which the optimizer's state exists from the start. On a CPU live tensor bytes by
            category, on a GPU what its allocator had given out.
        host: bytes of host memory at its own peak in that step; 0 on a GPU.
        logged: bytes that the trainer itself reports as the peak of all steps; 0 on a GPU.
        seconds: of each timed step after it.
        machines: this machine before each of them and after the last.
        product: TFLOP/s of a plain matrix product.
    """

    peak: MemoryPeak | int
    host: int
    logged: int
    seconds: list[float]
    machines: list[Machine]
    product: float = 0.0


def measured(
    run: Run,
    setting: Setting,
    trainer_type: Callable[..., Any],
    settings_type: Callable[..., Any],
    timed: int = 0,
) -> Measured:
    """Run real optimizer steps on the device of this machine.

    The state exists from the second one on, or, where host memory steps beside the device, from the third one
    on; that one's memory is measured. As many more as are `timed` come after it.

    Args:
        run, setting: what was planned.
        trainer_type: `lopt.LoPTSFTTrainer`.
        settings_type: makes that trainer's `args`, as `LoPTSFTConfig` does.
    """
    beside = int(setting.optimizer_device == "cpu")
    measured_at = 1 + beside
    steps = 1 + measured_at + timed * (1 + beside)
    torch.manual_seed(0)
    model = empty_model(run.config, dtype=run.dtype, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_type(
            model,
            args=settings_type(output_dir=folder, max_steps=steps, **_settings(run, setting)),
            train_dataset=_rows(run, steps, model.get_input_embeddings().num_embeddings),
            processing_class=_tokenizer(),
            peft_config=copy.deepcopy(run.adapters) if setting.method == "lora" else None,
            lopt_config=LoPTConfig(
                method=setting.method,
                num_blocks=setting.num_blocks,
                block_boundaries=None if setting.block_boundaries is None else [*setting.block_boundaries],
                pipeline_size=setting.pipeline_size,
                pipeline_depth=setting.pipeline_depth,
                frozen_blocks=run.frozen_blocks,
                tied_embeddings=run.tied_embeddings,
                aux_loss=run.aux_loss,
                schedule=setting.schedule,
                stages=setting.stages,
                stage_layers=setting.stage_layers,
                offload=setting.offload,
                optimizer_device=setting.optimizer_device,
                clip=run.clip,
                prefetch_gib=run.prefetch / 2**30,
                head_warmup_steps=0,
            ),
        )
        memory, clock = _Memory(trainer, measured_at), _Clock(trainer, run, setting, measured_at + 1)
        trainer.add_callback(memory)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    product = 0.0 if clock.rates is None else clock.rates.product()
    logged = trainer.throughput.peak
    total = 0 if logged is None else logged.total
    return Measured(memory.peak, memory.host, total, clock.seconds, clock.machines, product)


def _settings(run: Run, setting: Setting) -> dict[str, Any]:
    return dict(
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_length=run.tokens,
        gradient_checkpointing=setting.checkpointing,
        bf16=run.autocast,
        max_grad_norm=1.0 if run.clips else 0.0,
        optim=run.optimizer,
        state_dtype=str(run.state_dtype).removeprefix("torch."),
        master_weights=run.masters,
        use_cpu=run.device == "cpu",
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _rows(run: Run, steps: int, vocabulary: int) -> Dataset:
    """Random rows of T tokens; the last of every micro-batch of several rows is a token shorter."""
    count = steps * run.batch * run.accumulation
    ids = torch.randint(2, vocabulary, (count, run.tokens)).tolist()
    for row in ids[run.batch - 1 :: run.batch] if run.batch > 1 else ():
        row.pop()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer, which the trainer asks for although rows are tokens already."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


class _Memory(TrainerCallback):
    """Measures the peak of optimizer step `number` (from 0)."""

    def __init__(self, trainer: Any, number: int) -> None:
        self.peak: MemoryPeak | int = 0
        self.host = 0
        self._tracker: MemoryTracker | None = None
        self._trainer, self._number = trainer, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._number:
            return
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        trainer = self._trainer
        gc.collect()  # host memory of runs before this one
        modules = (trainer.model, trainer.lopt.heads)  # in a pipeline what others have is on the meta device
        self._tracker = MemoryTracker(*modules, optimizer=trainer.optimizer, device=args.device.type)
        self._tracker.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self.peak, self.host, self._tracker = self._tracker.peak, self._tracker.host_peak, None
        elif args.device.type == "cuda" and state.global_step == self._number + 1:
            self.peak = torch.cuda.max_memory_allocated()


class _Clock(TrainerCallback):
    """Times steps after the first `untimed`, and measures the machine before each of them and after the last.

    While rates are measured, steps in host memory end; so a step that nobody times comes first, after which
    they are on their way again.
    """

    def __init__(self, trainer: Any, run: Run, setting: Setting, untimed: int) -> None:
        self.seconds: list[float] = []
        self.machines: list[Machine] = []
        self.rates: Rates | None = None
        self._trainer, self._run, self._setting = trainer, run, setting
        self._first, self._between = untimed, int(setting.optimizer_device == "cpu")
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = (state.global_step - self._first) % (1 + self._between)
        if state.global_step > self._first and number == 0:
            _synchronize(args.device)
            self.seconds.append(time.perf_counter() - self._began)
        if state.global_step >= self._first and number == 0 and state.max_steps > self._first:
            self._trainer.synchronize_weights()
            if self.rates is None:
                inner = unwrap_optimizer(self._trainer.optimizer)
                kind: Any = type(inner)
                known = inspect.signature(kind).parameters
                settings = {name: value for name, value in inner.defaults.items() if name in known}
                make = partial(kind, **settings)
                masters = self._trainer.lopt.config.keeps_masters(self._run.masters)
                run = replace(self._run, masters=masters)
                on_host = self._setting.optimizer_device == "cpu"
                self.rates = Rates(run, self._setting.checkpointing, make, args.device, on_host)
            self.machines.append(self.rates.sample())
        _synchronize(args.device)
        self._began = time.perf_counter()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
