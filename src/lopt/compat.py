"""Every private or version-dependent name of the libraries underneath that lopt uses.

`NAMES` lists them: what each is used for and what breaks without it. All were read in torch 2.13,
transformers 5.23, trl 1.16, accelerate 1.15, datasets 5.2 and lm-eval 0.4.13; tests/test_compat.py looks each
of them up in the installed versions, and finds private names used anywhere else in the package. The functions
below are the only code that touches them, except for methods that lopt's trainers override (`OVERRIDES`).

Importing this module imports none of these libraries: the imports stand inside the functions, so that `core`
and `engine` can use it without TRL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from traceback import walk_tb
from typing import Any

NAMES: dict[str, str] = {
    # -- transformers ----------------------------------------------------------------------------------------
    "transformers.utils.output_capturing:_active_collector": (
        "Where a running forward keeps the router logits it has captured so far. Without it a mixture of "
        "experts has no load balancing in its earlier blocks, and a recomputed layer is captured twice."
    ),
    "transformers.modeling_layers:GradientCheckpointingLayer.gradient_checkpointing": (
        "With `_gradient_checkpointing_func`, which `gradient_checkpointing_enable` sets on every layer: "
        "how the layer is recomputed. Without it reentrant checkpointing is not refused and gives no "
        "gradient behind a boundary."
    ),
    "transformers.masking_utils:find_packed_sequence_indices": (
        "Looks into position ids for packed rows. It cannot run on fake tensors, so nothing can be planned."
    ),
    "transformers.masking_utils:_ignore_causal_mask_sdpa": (
        "Looks into the mask to see whether it can be left out. It cannot run on fake tensors, so nothing "
        "can be planned."
    ),
    "transformers:PreTrainedConfig._attn_implementation": (
        "The attention kernel that a config names. Without it a model could make transformers run code "
        "from the hub."
    ),
    "transformers:PreTrainedConfig._experts_implementation": (
        "The same for the kernel of a mixture of experts."
    ),
    "transformers:Trainer._maybe_log_save_evaluate": (
        "Evaluates, saves and keeps the best metric after a step. Without it a run that was stopped "
        "during an evaluation cannot make up for it when it is resumed."
    ),
    "transformers:Trainer._tr_loss": "The sum of losses that it averages into the next log.",
    # -- trl -------------------------------------------------------------------------------------------------
    "trl.trainer.utils:_use_triton": (
        "Decides whether the fused LM head scores labelled positions only. Without it a CPU scores every "
        "position: 10.3 s instead of 3.6 s for 480 tokens of the packaged model, of which 220 have a "
        "label."
    ),
    "trl.kernels.chunked_logprob:_forward_tile": (
        "The fused LM head in plain torch, see `fused_head_as_on_a_gpu`."
    ),
    "trl.kernels.chunked_logprob:_backward_tile": "The same for its backward.",
    "trl.kernels.chunked_logprob:_addmm_fp32": "The same for its sum of products.",
    # -- torch -----------------------------------------------------------------------------------------------
    "torch.utils._python_dispatch:TorchDispatchMode": (
        "Sees every operator. Without it neither live bytes nor FLOPs can be counted."
    ),
    "torch._subclasses.fake_tensor:FakeTensorMode": (
        "Tensors with shapes and no memory. Without them nothing can be planned."
    ),
    "torch:Tensor._post_accumulate_grad_hooks": (
        "The order of these hooks. Without it a gradient that an optimizer uses up in one of them counts as "
        "an activation."
    ),
    "torch:UntypedStorage.resize_": (
        "Public, but replaced while live bytes are counted: FSDP frees weights by it, and no operator shows "
        "it. Without that, what FSDP has freed counts until its tensor is used again."
    ),
    "torch:Tensor._indices": "With `_values`, the parts of a sparse gradient. It counts by them.",
    "torch:Tensor._values": "See `_indices`.",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu": (
        "Attention on a CPU. Without its name it counts no FLOPs."
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "The same for its backward.",
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "Keeps earlier blocks out of DDP, whose reducer starts to listen after their backward is over. "
        "Without it DDP waits for gradients that never come."
    ),
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._try_get_data": (
        "The method in which the training process waits for a worker. Without it a worker that dies while "
        "it hands over a batch is reported as a lost connection."
    ),
    # -- datasets --------------------------------------------------------------------------------------------
    "datasets:Dataset._fingerprint": (
        "Hash of a data set's rows. Without it results made from other rows of the same number are not "
        "told apart."
    ),
    # -- lm-eval ---------------------------------------------------------------------------------------------
    "lm_eval.tasks._factory:TaskFactory": (
        "Lays options over every task of a group; the public `TaskManager.load` does so for single tasks "
        "only. Without it MMLU cannot be read from local files."
    ),
}
"""Place of a name -> what it is for, and what breaks without it."""

OVERRIDES: dict[str, str] = {
    # -- transformers ----------------------------------------------------------------------------------------
    "transformers:Trainer._get_output_dir": "Checkpoints are written in a folder beside their place first.",
    "transformers:Trainer._load_optimizer_and_scheduler": (
        "Heads and rollouts are resumed as well; optimizer state never passes through the GPU as a whole."
    ),
    "transformers:Trainer._load_rng_state": "A resumed run first evaluates, if that was left to do.",
    "transformers:Trainer._finalize_training": (
        "The same after the last step; offloaded weights are written back."
    ),
    "transformers:Trainer._move_model_to_device": "Offloaded weights stay in host memory.",
    "transformers:Trainer._prepare_inputs": (
        "The scale of the local losses; block-major prepares inputs once."
    ),
    "transformers:Trainer._push_from_checkpoint": "A checkpoint is pushed when it is known to be whole.",
    "transformers:Trainer._run_epoch": "Where stops begin to be noted instead of raised.",
    "transformers:Trainer._save": (
        "The output folder never holds half a model; arguments are JSON, not a pickle."
    ),
    "transformers:Trainer._save_checkpoint": "A checkpoint is whole or absent.",
    "transformers:Trainer._save_optimizer_and_scheduler": "Heads and rollouts are saved as well.",
    # -- trl -------------------------------------------------------------------------------------------------
    "trl:SFTTrainer._prepare_dataset": "Rows without a trainable token are counted, reported and left out.",
    "trl:GRPOTrainer._generate_and_score_completions": (
        "Offloaded weights come in; stops are obeyed around rollouts."
    ),
    "trl:GRPOTrainer._tokenize_prompts": "Prompts for the head warm-up, tokenized as for rollouts (called).",
    "trl:GRPOTrainer._step": "Number of the micro-batch, by which it finds its rollouts (read and written).",
    "trl:GRPOTrainer._buffered_inputs": "The rollouts, which belong to a checkpoint (read and written).",
}
"""Private methods that lopt's trainers override, and private members of TRL's that they use."""


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of `owner`, a module or class, inside; an error puts the former values back too."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


# -- transformers ----------------------------------------------------------------------------------------


def captured_outputs() -> dict[str, list[Any]]:
    """Return what the running forward has captured so far, by name; changes to the lists take effect."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector.get() or {}


@contextmanager
def capture_paused() -> Iterator[None]:
    """Capture no outputs inside: a backward that recomputes layers must not add to them a second time."""
    from transformers.utils.output_capturing import _active_collector

    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def uses_reentrant_checkpointing(layer: Any) -> bool:
    """Return whether a training forward of `layer` is recomputed by reentrant gradient checkpointing."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if not getattr(layer, "gradient_checkpointing", False) or not layer.training:
        return False
    return isinstance(function, functools.partial) and bool(function.keywords.get("use_reentrant"))


def kernel_names(config: Any) -> dict[str, Any]:
    """Return the implementations that a model's config names, by the argument that chooses them."""
    return {
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "experts_implementation": getattr(config, "_experts_implementation", None),
    }


@contextmanager
def masks_by_shape(batch: int) -> Iterator[None]:
    """Let transformers decide on attention masks without looking at values, which fake tensors do not have.

    Args:
        batch: rows of a micro-batch. They count as padded and not packed; a single row is never padded, but
            it needs a mask where it is longer than the layer's window.
    """
    from transformers import masking_utils

    def needs_no_mask(
        mask: Any, rows: int, columns: int, *_: Any, local_attention_size: int | None = None, **__: Any
    ) -> bool:
        return batch == 1 and (local_attention_size is None or columns < local_attention_size)

    with replaced(
        masking_utils,
        find_packed_sequence_indices=lambda position_ids: None,
        _ignore_causal_mask_sdpa=needs_no_mask,
    ):
        yield


def evaluate_and_save(
    trainer: Any, *, trial: Any, epoch: float, ignore_keys_for_eval: list[str] | None, start_time: float
) -> None:
    """Evaluate and save as `trainer.control` says, as transformers does at the end of a step or an epoch."""
    trainer._maybe_log_save_evaluate(
        tr_loss=trainer._tr_loss,
        grad_norm=None,
        model=trainer.model_wrapped,
        trial=trial,
        epoch=epoch,
        ignore_keys_for_eval=ignore_keys_for_eval,
        start_time=start_time,
    )


# -- trl -------------------------------------------------------------------------------------------------

_labelled_only: ContextVar[bool] = ContextVar("labelled_only", default=False)


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """Let TRL's fused LM head score only the positions that have a label, on any device.

    TRL does so where Triton is; elsewhere it scores every position for the sake of devices that compile for
    fixed shapes, which a CPU does not. TRL's function is replaced once, by one that returns the same
    as before in every thread that is not inside this context.
    """
    from trl.trainer import utils

    original = utils._use_triton
    if not getattr(original, "by_lopt", False):

        def use_triton(device: Any) -> bool:
            return _labelled_only.get() or original(device)

        use_triton.by_lopt = True  # type: ignore[attr-defined]
        utils._use_triton = use_triton
    token = _labelled_only.set(True)
    try:
        yield
    finally:
        _labelled_only.reset(token)


@contextmanager
def fused_head_as_on_a_gpu(product: Callable[..., None]) -> Iterator[None]:
    """Let TRL's fused LM head, run on the CPU, allocate what its Triton kernels do: they work in place.

    Args:
        product: stands in for `_addmm_fp32(total, a, b)`, which adds the product a b to a float32 sum.
    """
    from trl.kernels import chunked_logprob

    def nothing(*_: Any, **__: Any) -> None:
        return None

    with replaced(chunked_logprob, _forward_tile=nothing, _backward_tile=nothing, _addmm_fp32=product):
        yield


# -- torch -----------------------------------------------------------------------------------------------


def operator_hook(handle: Callable[[Any, Any, Any, dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """Return a context in which every operator runs as `handle(operator, types, args, kwargs)`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperatorHook(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, types, args, kwargs or {})

    return OperatorHook()


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which new tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def hook_gradient_first(parameter: Any, hook: Callable[[Any], None]) -> Any:
    """Register a post-accumulate-grad hook that runs before those that are there; returns its handle."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    others = dict(hooks)
    hooks.clear()  # move_to_end would not do: PyTorch reads the plain dict below the OrderedDict
    handle = parameter.register_post_accumulate_grad_hook(hook)
    parameter._post_accumulate_grad_hooks.update(others)
    return handle


def watch_storage_resize(notify: Callable[[Any], None]) -> Callable[[], None]:
    """Call `notify(storage)` after every `UntypedStorage.resize_` of the process, until the undo is called.

    Returns:
        The undo.
    """
    import torch

    original = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = original(storage, size)
        notify(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
    return lambda: setattr(torch.UntypedStorage, "resize_", original)


def sparse_parts(tensor: Any) -> tuple[Any, Any]:
    """Return the indices and values of a COO tensor, which may be uncoalesced."""
    return tensor._indices(), tensor._values()


def cpu_attention_operators() -> tuple[Any, Any]:
    """Return the operators of attention on a CPU, forward and backward."""
    import torch

    name = "_scaled_dot_product_flash_attention_for_cpu"
    return getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_backward")


def leave_out_of_ddp(model: Any, names: list[str]) -> None:
    """Keep parameters out of the `DistributedDataParallel` that will wrap `model`.

    Args:
        names: of the parameters, as in `model.named_parameters()`.
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def while_waiting_for_a_worker(error: BaseException) -> bool:
    """Return whether `error` was raised while the training process waited for a data-loader worker."""
    return any(frame.f_code.co_name == "_try_get_data" for frame, _ in walk_tb(error.__traceback__))


# -- datasets and lm-eval --------------------------------------------------------------------------------


def rows_fingerprint(rows: Any) -> str:
    """Return the hash of a data set's rows, or their number where there is none."""
    return str(getattr(rows, "_fingerprint", len(rows)))


def build_tasks(manager: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Return one task, tag or group of lm-eval with `options` laid over each task's definition.

    Args:
        manager: an `lm_eval.tasks.TaskManager`.
    """
    from lm_eval.tasks._factory import TaskFactory

    index = manager.task_index
    return TaskFactory().build(index[name], overrides=dict(options), registry=index)
