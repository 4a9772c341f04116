"""From a trainer's settings to the optimizer of its blocks."""

from __future__ import annotations

import ast
import gc
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import BlockOptimizer, Precision, state_bytes
from lopt.engine.plain_loop import staged_optimizer
from lopt.instruments.memory import HOST, format_bytes, free_memory, unwrap_optimizer
from lopt.reliability.ranks import processes_here

Groups = list[dict[str, Any]]
Make = Callable[[Groups], Optimizer]


def block_optimizer(trainer: Any) -> Optimizer:
    """Return the optimizer that `optim` names; it steps part by part, and its state may be offloaded.

    Raises:
        ValueError: it cannot serve blocks, or host memory is too small for its state.
    """
    make, groups = _factory(trainer), _groups(trainer)
    args, offload = trainer.args, trainer.offload
    if trainer.is_fsdp_enabled:  # replaces the parameters it knows, so the heads join later (`add_heads`)
        return make([group for group in groups if not group["heads"]])
    precision = Precision(
        # TRL's own configs have neither field.
        masters=trainer.lopt.config.keeps_masters(getattr(args, "master_weights", None)),
        state_dtype=getattr(torch, getattr(args, "state_dtype", "float32")),
        seed=args.seed,
    )
    steps = trainer.block_major
    if steps is None:
        return BlockOptimizer(groups, make, precision=precision)
    if offload is not None:
        _check_host_memory([p for group in groups for p in group["params"]], make, precision)
    workers = args.dataloader_num_workers
    return staged_optimizer(trainer.lopt, groups, make, steps.stages, offload, precision, workers)


def bare_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper: the one that steps by blocks, if there is one."""
    return unwrap_optimizer(optimizer, keep=BlockOptimizer)


def add_heads(trainer: Any) -> None:
    """Add the heads to an optimizer whose other parameters FSDP2 has replaced."""
    optimizer = trainer.bare_optimizer()
    if not any(group.get("heads") for group in optimizer.param_groups):
        for group in _groups(trainer):
            if group["heads"]:
                optimizer.add_param_group(group)


def clip(trainer: Any, max_norm: float) -> Tensor:
    """Clip the accumulated gradients, all together or by block, and return their norm before clipping.

    Raises:
        NonFiniteError: the norm of a block is not finite.
    """
    lopt, steps = trainer.lopt, trainer.block_major
    trainer.accelerator.unscale_gradients()
    norms = clip_gradients(lopt, max_norm) if steps is None else steps.finish()
    trainer.guard.check_norms(norms)
    total = torch.linalg.vector_norm(norms)
    if trainer.reports is not None:
        trainer.reports.add_norms(norms.tolist())
        return total
    if len(norms) > 1:
        shares = (norms / total.clamp(min=1e-30)).square().tolist()
        for block, share in enumerate(shares, start=1):
            trainer.average(f"grad_share/block_{block}", share)
    return total


def _groups(trainer: Any) -> Groups:
    return trainer.lopt.parameter_groups(trainer.args.learning_rate, weight_decay=trainer.args.weight_decay)


def _factory(trainer: Any) -> Make:
    """Return what makes the optimizer that `optim` names out of parameter groups.

    Raises:
        ValueError: it makes groups of its own, as layer-wise optimizers do.
    """
    args = trainer.args
    if is_torch_optimizer(args.optim):
        options = torch_options(args)
        return lambda groups: getattr(torch.optim, args.optim)(groups, **options)
    factory, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if {"params", "model", "optimizer_dict"} & options.keys() or not isinstance(factory, type):
        raise ValueError(
            f"`optim` {args.optim} makes its own parameter groups and cannot serve blocks: "
            "use one such as adamw_torch_fused"
        )
    return lambda groups: factory(groups, **options)


def is_torch_optimizer(name: Any) -> bool:
    """Return whether `name` is that of a class of torch.optim."""
    found = getattr(torch.optim, str(name), None)
    return isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer


def torch_options(args: Any) -> dict[str, Any]:
    """Return the arguments of a torch.optim class: those of `args` that it knows, then `optim_args`.

    Raises:
        ValueError: `optim_args` is not a list of name=value, or has a name that the class does not know.
    """
    known = inspect.signature(getattr(torch.optim, args.optim)).parameters
    given = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": True if "fused" in known else None,
    }
    options = {name: value for name, value in given.items() if name in known and value is not None}
    for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"`optim_args` {pair}: torch.optim.{args.optim} takes {', '.join(known)}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"`optim_args` {pair}: write name=value, for example momentum=0.9") from error
    return options


def _check_host_memory(parameters: list[Tensor], make: Make, precision: Precision) -> None:
    counts: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        counts[parameter.dtype] += parameter.numel()
    each = int(sum(state_bytes(make, precision, dtype) * count for dtype, count in counts.items()))
    processes = processes_here()
    if processes * each > free_memory(HOST):
        gc.collect()  # a trainer that nobody uses any more holds its state until then
    have = free_memory(HOST)
    if processes * each > have:
        shares = f" ({processes} processes keep {format_bytes(each)} each)" if processes > 1 else ""
        fewer = "fewer processes on this machine, " if processes > 1 else ""
        raise ValueError(
            f"`offload` keeps {format_bytes(processes * each)} of optimizer state in host memory{shares}, of "
            f"which {format_bytes(have)} are free: use `state_dtype` bfloat16, `optim` adamw_torch_8bit, "
            f"{fewer}or a machine with more memory"
        )
