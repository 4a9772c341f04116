"""Every private or version-dependent name of the libraries underneath, each with what breaks without it.

Imports of those libraries are inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage, nn
    from torch.utils.hooks import RemovableHandle


# -- torch: what the instruments and the engine need -------------------------------------------------


def operator_hook(handle: Callable[[Any, Any, Any, dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """Return a context manager in which every operator runs as `handle(operator, types, args, kwargs)`.

    torch.utils._python_dispatch.TorchDispatchMode, seen in torch 2.13. Without it neither live bytes nor
    FLOPs can be counted (`lopt.instruments`).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperatorHook(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, types, args, kwargs or {})

    return OperatorHook()


def hook_gradient_first(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a post-accumulate-grad hook that runs before those that are there already.

    Tensor._post_accumulate_grad_hooks, seen in torch 2.13. Without it a gradient that an optimizer consumes
    in such a hook counts as an activation.
    """
    hooks: dict[Any, Any] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    others = dict(hooks)
    hooks.clear()  # move_to_end would not do: PyTorch reads the plain dict below the OrderedDict
    handle = parameter.register_post_accumulate_grad_hook(hook)
    parameter._post_accumulate_grad_hooks.update(others)  # type: ignore[attr-defined]
    return handle


def watch_storage_resize(notify: Callable[[UntypedStorage], None]) -> Callable[[], None]:
    """Call `notify` after every `UntypedStorage.resize_`, process-wide, until the returned undo is called.

    FSDP frees gathered weights by that method, which is no operator, so no mode sees it. Seen in torch 2.13.
    Without it bytes that FSDP has freed stay in the count until their tensor is used again.
    """
    import torch

    original = torch.UntypedStorage.resize_

    def resize_(storage: UntypedStorage, size: int) -> object:
        result = original(storage, size)
        notify(storage)
        return result

    setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010
    return lambda: setattr(torch.UntypedStorage, "resize_", original)


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices and values of a COO tensor that may be uncoalesced.

    Tensor._indices and Tensor._values, seen in torch 2.13. Without them sparse gradients are not counted.
    """
    return tensor._indices(), tensor._values()


def cpu_attention_operators() -> tuple[Any, Any]:
    """Return the operators of attention on a CPU, forward and backward, as packets.

    Names in torch.ops.aten, seen in torch 2.13. Without them attention on a CPU counts no FLOPs.
    """
    import torch

    name = "_scaled_dot_product_flash_attention_for_cpu"
    return getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_backward")


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context manager in which new tensors have shapes and no memory.

    torch._subclasses.fake_tensor.FakeTensorMode, seen in torch 2.13. Without it nothing can be planned.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def exclude_from_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Keep the named parameters out of a DistributedDataParallel that will wrap `model`.

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model, seen in torch 2.13. Without it DDP
    waits for gradients of earlier blocks that it never sees.
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


# -- transformers and TRL: what the planner needs ----------------------------------------------------


def add_fused_lm_head(model: nn.Module) -> None:
    """Give `model` the LM head that TRL's SFTTrainer gives it, whose loss never holds all logits.

    trl.trainer.utils.add_fused_lm_head, seen in TRL 1.16. Without it the planner counts full logits.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


@contextmanager
def without_values(needs_no_mask: Callable[..., bool], device: str) -> Iterator[None]:
    """Replace, within, what looks into tensors that hold no values, and kernels that take no fake tensors.

    transformers.masking_utils (find_packed_sequence_indices, _ignore_causal_mask_sdpa), seen in
    transformers 5.23, and trl.kernels.chunked_logprob (_forward_tile, _backward_tile, _addmm_fp32), seen in
    TRL 1.16. Without them no model can be planned.

    Args:
        needs_no_mask: in place of `_ignore_causal_mask_sdpa`; rows are taken to be unpacked.
        device: "cuda" replaces the kernels of TRL's LM head as well, which work in place.
    """
    import torch
    from transformers import masking_utils
    from trl.kernels import chunked_logprob

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        # Counts as the product that CUDA adds to a float32 sum without a temporary.
        torch.mm(a, b, out=total if total.dtype == a.dtype else total.view(a.dtype)[:, ::2])

    with ExitStack() as stack:
        replace = lambda *target: stack.enter_context(replaced(*target))  # noqa: E731
        replace(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        replace(masking_utils, "_ignore_causal_mask_sdpa", needs_no_mask)
        if device == "cuda":
            replace(chunked_logprob, "_forward_tile", lambda *_, **__: None)
            replace(chunked_logprob, "_backward_tile", lambda *_, **__: None)
            replace(chunked_logprob, "_addmm_fp32", add_product)
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or class within, for the whole process."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
