"""Two real optimizer steps with random weights on random tokens, to hold a plan against."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from lopt.core.config import LoPTConfig
from lopt.instruments.memory import MemoryPeak, MemoryTracker, free_host_memory
from lopt.models.load import empty_model
from lopt.planning.plan import Run, Setting
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig


def calibrate(run: Run, setting: Setting) -> MemoryPeak | int:
    """The peak of the second optimizer step in `LoPTSFTTrainer` on the device that is there.

    Returns:
        On a CPU live tensor bytes by category, on a GPU what its allocator had given out.
    """
    torch.manual_seed(0)
    model = empty_model(run.config, dtype=run.dtype, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoPTSFTTrainer(
            model,
            args=_arguments(run, setting, folder),
            train_dataset=_rows(run, model.get_input_embeddings().num_embeddings),
            processing_class=_tokenizer(),
            lopt_config=LoPTConfig(
                method=setting.method,
                num_blocks=setting.num_blocks,
                frozen_blocks=run.frozen_blocks,
                aux_loss=run.aux_loss,
                schedule=setting.schedule,
                offload=setting.offload,
                prefetch_gib=run.prefetch / 2**30,
                head_warmup_steps=0,
            ),
        )
        watch = _SecondStep(trainer)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.peak


def machine_memory(device: str) -> int:
    """Bytes of memory that this machine's device has left."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return free_host_memory()


def _arguments(run: Run, setting: Setting, folder: str) -> LoPTSFTConfig:
    return LoPTSFTConfig(
        output_dir=folder,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_length=run.tokens,
        max_steps=2,
        gradient_checkpointing=setting.checkpointing,
        bf16=run.autocast,
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


def _rows(run: Run, vocabulary: int) -> Dataset:
    """Random rows of T tokens, in every micro-batch of several the last one a token shorter."""
    count = 2 * run.batch * run.accumulation
    ids = torch.randint(2, vocabulary, (count, run.tokens)).tolist()
    for row in ids[run.batch - 1 :: run.batch] if run.batch > 1 else ():
        row.pop()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainer asks for one; rows are tokens already."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


class _SecondStep(TrainerCallback):
    """Measures the peak of the second optimizer step: by then the optimizer's state exists."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.peak: MemoryPeak | int = 0
        self.tracker: MemoryTracker | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        modules: list[nn.Module] = [self.trainer.model, self.trainer.lopt.heads]
        self.tracker = MemoryTracker(*modules, optimizer=self.trainer.bare_optimizer())
        self.tracker.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.peak, self.tracker = self.tracker.peak, None
        elif args.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
