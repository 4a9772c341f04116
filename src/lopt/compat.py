"""Work with private and version-dependent names of the libraries underneath.

The functions here are the only code that touches them, except for methods that lopt's trainers override.
`lopt.private_names` lists them all.

Importing this module imports none of these libraries: the imports stand inside the functions, so that `core`
and `engine` can use it without TRL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from traceback import walk_tb
from typing import Any


def register_plain_format(name: str) -> None:
    """Give the format of plain Python values, which has none, a name."""
    from datasets.formatting import PythonFormatter, _register_formatter

    _register_formatter(PythonFormatter, name)


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


def recompute_forward_only(modules: Iterable[Any]) -> None:
    """Let activation checkpointing recompute the modules' `forward` alone, without their hooks.

    transformers does so since 5.23. Before, and in models that checkpoint in their decoder's loop, a layer's
    call is recomputed: a boundary would learn a second time in the backward. Repeated calls change nothing.

    Args:
        modules: the decoder and its layers, with or without checkpointing.

    Raises:
        ValueError: a training forward would be recomputed by reentrant checkpointing.
    """
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False) or not module.training:
            continue
        if isinstance(function, functools.partial) and function.func is _checkpointed:
            continue
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing silently gives no gradient behind a boundary: "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        module._gradient_checkpointing_func = functools.partial(_checkpointed, function)


def _checkpointed(checkpoint: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call(*args)` under `checkpoint`; of a module's own call, only the forward inside it."""
    method = call.func if isinstance(call, functools.partial) else call
    layer: Any = getattr(method, "__self__", None)
    if not hasattr(layer, "forward") or method.__name__ == "forward":
        return checkpoint(call, *args, **kwargs)
    own, forward = vars(layer).get("forward"), layer.forward

    def checkpointed_forward(*inputs: Any, **named: Any) -> Any:
        return checkpoint(functools.partial(forward, **named), *inputs)

    layer.forward = checkpointed_forward
    try:
        return call(*args, **kwargs)
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def checkpoint_activations(model: Any) -> None:
    """Recompute the model's layers in the backward, without reentrance and without their hooks."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    recompute_forward_only(model.modules())


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
def fused_head_by(function: Any, forward_tile: Callable[..., None] | None) -> Iterator[None]:
    """Let TRL's fused LM head run as another autograd function, in forwards inside.

    Args:
        function: Stands in for `trl.kernels.ChunkedLogProbFunction`, with the same results.
        forward_tile: Called in place of TRL's plain tile, with that one ahead of its arguments.
    """
    from trl.kernels import chunked_logprob as kernels
    from trl.trainer import utils

    tile = kernels._forward_tile
    if forward_tile is not None:
        tile = functools.partial(forward_tile, tile)
    with replaced(utils, _ChunkedLogProbFunction=function), replaced(kernels, _forward_tile=tile):
        yield


def fused_head_has_kernels(device: Any) -> bool:
    """Return whether TRL's fused LM head has Triton kernels for `device`."""
    from trl.kernels import chunked_logprob

    return bool(chunked_logprob._use_triton(device))


def logits_gradient(tile: Any, values: Any, start: int, options: Mapping[str, Any]) -> None:
    """Turn a tile (n, C) of the fused LM head's output into its gradient, in place, as TRL does.

    Args:
        tile: Columns `start` to `start + C` of the vocabulary.
        values: Targets, log Z, entropy, gradients of log-probabilities and entropy, (n,) each; the last two
            may be None.
        options: How logits follow from the output.
    """
    from trl.kernels import chunked_logprob as kernels

    targets, log_z, entropy, *outer = values
    (rows, columns), size = tile.shape, kernels._BLOCK_SIZE
    fold: Any = kernels._backward_tile
    if kernels._use_triton(tile.device):
        fold = kernels._backward_kernel[rows, -(-columns // size)]
    flags = {f"HAS_{name}_GRAD": g is not None for name, g in zip(("LOGPROB", "ENTROPY"), outer, strict=True)}
    outer = [log_z if gradient is None else gradient for gradient in outer]  # a place that is not read
    sides = (start, columns)
    fold(tile, tile.stride(0), targets, log_z, entropy, *outer, *sides, **flags, BLOCK_SIZE=size, **options)


def add_product(total: Any, a: Any, b: Any) -> None:
    """Add a b to a float32 sum, without rounding the product to the format of a and b, as TRL does."""
    from trl.kernels import chunked_logprob

    chunked_logprob._addmm_fp32(total, a, b)


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


@contextmanager
def vllm_engine_made_by(make: Callable[..., Any]) -> Iterator[None]:
    """Let TRL make vLLM's engine in this process by `make(LLM, **options)` instead of `LLM(**options)`."""
    from trl.generation import vllm_generation

    engine = getattr(vllm_generation, "LLM", None)  # absent if vLLM is not installed
    if engine is None:
        yield
        return
    with replaced(vllm_generation, LLM=functools.partial(make, engine)):
        yield


def send_weights_to_vllm(vllm: Any, weights: Callable[[], Any], known: list[Any] | None = None) -> None:
    """Let TRL's `VLLMGeneration` send what `weights()` yields, of which names, dtypes, shapes are `known`."""
    vllm._iter_named_params, vllm._weight_metadata = weights, known


def end_vllm_engine(trainer: Any) -> None:
    """Shut down the engine of vLLM in this process, if TRL's GRPO trainer has one."""
    engine = getattr(getattr(trainer, "vllm_generation", None), "llm", None)
    if engine is not None:
        engine.llm_engine.engine_core.shutdown()


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


def process_store() -> Any:
    """Return the store of the default process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def leave_out_of_ddp(model: Any, names: list[str]) -> None:
    """Keep parameters out of the `DistributedDataParallel` that will wrap `model`.

    Args:
        names: of the parameters, as in `model.named_parameters()`.
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def keep_fsdp_root(model: Any) -> None:
    """Let the running forward of `model` go on after a backward inside it, if FSDP2 shards the model."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        state = model._get_fsdp_state()
        state._state_ctx.iter_forward_root = state


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
