"""vLLM beside a GRPO trainer: what it needs, the number format that it computes in, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistNetworkError

from lopt.compat import end_vllm_engine


def check_vllm(args: Any) -> None:
    """Refuse `use_vllm` where it cannot work, before a model is loaded.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: its server is asked for on a machine without CUDA.
    """
    if not getattr(args, "use_vllm", False):
        return
    if find_spec("vllm") is None:
        raise ImportError('`use_vllm` needs vLLM: pip install "lopt[vllm]"')
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise ValueError(
            "`vllm_mode` server receives weights over NCCL, which needs a CUDA device for the trainer "
            f"(this is {args.device.type}): use `vllm_mode` colocate"
        )


def engine_with_dtype(trainer: Any) -> Callable[..., Any]:
    """Return what makes vLLM's engine for `trainer`, in the number format that the trainer computes in.

    vLLM alone would hold a float32 checkpoint in bfloat16, and sample from a model that is not the trainer's.
    """

    def make(engine: Callable[..., Any], **options: Any) -> Any:
        args = trainer.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
        try:
            return engine(**{"dtype": dtype, **options})
        except DistNetworkError as error:
            raise ValueError(
                f"`use_vllm`: no port for vLLM's processes, set MASTER_PORT to a free one: {error}"
            ) from error

    return make


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of a PEFT model under the plain model's name, the adapters' part added to a copy.

    TRL adds that part to the frozen weights themselves and subtracts it again, which leaves its rounding
    behind in them, at every step.
    """
    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        owner, _, below = name.partition(".base_layer.")
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        with _merged(model.get_submodule(owner)) if below else nullcontext():
            yield plain.replace("modules_to_save.default.", ""), parameter.data


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """Put copies with the active adapters added in the place of a layer's base weights, inside."""
    kept = [(parameter, parameter.data) for parameter in layer.base_layer.parameters()]
    for parameter, data in kept:
        parameter.data = data.clone()
    try:
        layer.merge()
        yield
    finally:
        layer.unmerge()
        for parameter, data in kept:
            parameter.data = data


def end_training(trainer: Any) -> None:
    """End trackers and process groups, vLLM's engine first, which takes down process groups of its own."""
    end_vllm_engine(trainer)
    trainer.accelerator.end_training()
