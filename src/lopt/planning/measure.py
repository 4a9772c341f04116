"""Measure what the parts of one micro-batch cost, on fake tensors: no weights, no GPU, no data.

Layers of a model are alike, so a model of a few layers of the real width, cut into three blocks, has every
part that any depth and any k has. Its forward and backward are cut at the layers into segments; of each
segment the rise of live bytes within it, their change at its end, and its FLOPs are kept.
`lopt.planning.plan` strings segments together for the depth, blocks and schedule asked about.

Shapes: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from lopt import compat
from lopt.architectures import check_positions
from lopt.core.attach import attach
from lopt.core.blocks import Block
from lopt.core.config import LoPTConfig
from lopt.instruments.flops import FlopCounter
from lopt.instruments.memory import MemoryTracker
from lopt.losses import next_token
from lopt.losses.lm_head import lean_fused_head
from lopt.losses.next_token import NextToken
from lopt.models.load import empty_model
from lopt.planning.adapters import adapted
from lopt.planning.run import Run
from lopt.planning.sizes import Method

# Layers that are measured in each place. A middle block's second layer stands for all but a block's first.
MEASURED: dict[Method, dict[str, int]] = {
    "e2e": {"whole": 2},
    "lopt": {"first": 1, "middle": 2, "last": 2},
    "frozen": {"first": 1, "last": 2},
    "lora": {"whole": 2},
}

MOST_TOKENS = 2**18
"""Of a micro-batch. The fused LM head runs tile by tile, which takes time in proportion to them."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a micro-batch: by how many bytes live tensors rise and change, and its FLOPs."""

    rise: int  # activations at the peak, above those at the start
    rise_gradients: int  # gradients at that moment, likewise
    activations: int
    gradients: int
    flops: float


@dataclass
class Parts:
    """Segments of one micro-batch by (place, what).

    `place` is that of a block, as in `lopt.planning.sizes.BlockSizes`. `what` is "start" (embedding, masks),
    "forward0" (of the block's first layer), "forward" (of any other), "head" (its loss, and a local loss's
    backward down to the last layer), "loss" (the same of the task loss), "backward", "backward0",
    "embedding" (its backward), "end" (after a local backward).

    Attributes:
        fresh: of a micro-batch that finds no gradients.
        again: of one that adds to gradients.
        boundary: bytes of a hidden state (B, T, H).
        casts: bytes of the copies that autocast makes of one layer's weights.
        layers: how many layers were measured, by place.
    """

    fresh: dict[tuple[str, str], Segment] = field(default_factory=dict)
    again: dict[tuple[str, str], Segment] = field(default_factory=dict)
    boundary: int = 0
    casts: int = 0
    layers: dict[str, int] = field(default_factory=dict)


def measure(run: Run, method: Method, checkpointing: bool, adapters: Any = None) -> Parts:
    """Run two micro-batches of a small model of the real width.

    Args:
        run: its model, batch, number formats, device, and for lopt `frozen_blocks` and `aux_loss`.
        method: how the small model is cut.
        checkpointing: non-reentrant activation checkpointing of every layer.
        adapters: the `peft.LoraConfig` of what alone is trained, where the method does.

    Raises:
        ValueError: the model does not run on fake tensors, for example because it asks for values; a
            micro-batch of more than `MOST_TOKENS`.
    """
    if (tokens := run.batch * run.tokens) > MOST_TOKENS:
        raise ValueError(
            f"`per_device_train_batch_size` x `max_length` must be <= {MOST_TOKENS:,} tokens, above which "
            f"planning takes minutes (got {tokens:,}): plan a smaller micro-batch with more "
            "`gradient_accumulation_steps`"
        )
    parts = Parts(layers=MEASURED[method])
    *starts, depth = accumulate(parts.layers.values())
    cut = LoPTConfig(method=method, block_boundaries=starts or None, tied_embeddings=run.tied_embeddings)
    if method == "lopt":
        cut = cut.replace(aux_loss=run.aux_loss, frozen_blocks=min(run.frozen_blocks, 1))
    try:
        with _fake_run(run):
            model = short_model(run, depth, checkpointing)
            # PEFT moves adapters to where the model is, which fake tensors already are, and not all can move.
            with compat.replaced(nn.Module, to=lambda module, *_, **__: module):
                whole = model if adapters is None else adapted(model, adapters, checkpointing)
            recorder = _Recorder(whole, cut, run)
            for segments in (parts.fresh, parts.again):
                recorder.micro_batch(segments)
                _complete(segments, cut)
            parts.boundary, parts.casts = recorder.boundary, recorder.casts()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"a {run.config.model_type} model cannot be planned, it does not run on fake tensors: {reason}"
        ) from error
    return parts


def short_model(run: Run, layers: int, checkpointing: bool) -> Any:
    """Return the run's model with so many layers, as a trainer would have it."""
    config = _shortened(run.config, layers)
    model = empty_model(config, dtype=run.dtype, attn_implementation="sdpa").train()
    check_positions(model, run.tokens, "set `max_length` to {limit} or less")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's SFTTrainer
    if checkpointing:
        compat.checkpoint_activations(model)
    return model


def _complete(segments: dict[tuple[str, str], Segment], cut: LoPTConfig) -> None:
    """Give every place the segments that were measured in another."""
    if cut.method == "frozen" or cut.frozen_blocks:  # such blocks keep nothing
        for key in (("first", "forward"), ("resting", "forward0"), ("resting", "forward")):
            segments[key] = segments["first", "forward0"]
    elif cut.method == "lopt":
        for what in ("forward", "backward"):
            segments["first", what] = segments["middle", what]


def _shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with so many layers: of different kinds each rare one once, then the most common one."""
    short = copy.deepcopy(config.get_text_config())
    depth = short.num_hidden_layers
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == depth:
            kinds = sorted(dict.fromkeys(value), key=value.count)
            setattr(short, name, (kinds + kinds[-1:] * layers)[:layers])
    short.num_hidden_layers = layers
    return short


@contextmanager
def _fake_run(run: Run) -> Iterator[None]:
    """Within, tensors are fake, and what would look at their values is replaced."""
    with ExitStack() as stack:
        stack.enter_context(compat.fake_tensors())
        stack.enter_context(compat.masks_by_shape(run.batch))
        stack.enter_context(
            compat.replaced(next_token, predicted_positions=lambda rows: torch.arange(rows.ids.numel()))
        )
        stack.enter_context(compat.replaced(NextToken, softmax_tokens=_columns_of_many))
        if run.device == "cuda":
            stack.enter_context(compat.fused_head_as_on_a_gpu(_product_in_place))
        stack.enter_context(lean_fused_head(torch.device("cpu")))
        yield


def _columns_of_many(loss: Any, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Stand in for `NextToken.softmax_tokens`, for a micro-batch whose tokens are all different."""
    weight = loss._lm_head.weight
    own = min(ids.numel(), len(weight))
    columns = own + (len(weight) - own) // max(1, len(weight) // loss.sample)
    matrix = weight[torch.zeros(columns, dtype=torch.long)]
    return ids.flatten()[:own], matrix, matrix.new_zeros(columns, dtype=torch.float32)


def _product_in_place(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Allocate what CUDA does to add a product to a float32 sum: no temporary."""
    torch.mm(a, b, out=total if total.dtype == a.dtype else total.view(a.dtype)[:, ::2])


class _Recorder:
    """Hooks on a model's layers, between which live bytes and FLOPs are read."""

    def __init__(self, model: Any, config: LoPTConfig, run: Run) -> None:
        self.model, self.run = model, run
        self.lopt = attach(model, config)
        self.blocks = self.lopt.blocks
        for block in self.blocks:
            for index in range(block.start, block.stop):
                layer = self.blocks.layers[index]
                enter, leave = partial(self._enter, block, index), partial(self._leave, block, index)
                layer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                layer.register_forward_hook(leave, prepend=True)  # ahead of the handle's, which it measures
        self.lopt.after_local_backward = lambda index: self._mark(self._place(index), "end")
        self._segments: dict[tuple[str, str], Segment] = {}
        self.boundary = 0

    def casts(self) -> int:
        """Return the bytes of the bfloat16 copies that autocast makes of a layer's float32 weights."""
        if not self.run.autocast or self.run.dtype != torch.float32:
            return 0
        linear = [m for m in self.blocks.layers[-1].modules() if isinstance(m, (nn.Linear, Conv1D))]
        # A weight that is not trained is copied anew each time.
        return 2 * sum(p.numel() for m in linear for p in m.parameters() if p.requires_grad)

    def micro_batch(self, segments: dict[tuple[str, str], Segment]) -> None:
        """Run forward and backward, and fill `segments`."""
        run, self._segments = self.run, segments
        ids, mask, labels = (torch.ones(run.batch, run.tokens, dtype=torch.long) for _ in range(3))
        self._flops = FlopCounter()
        with MemoryTracker(self.model, self.lopt.heads) as self._tracker, self._flops:
            self._name = (self._place(0), "start")
            self._before, self._flops_before = self._tracker.current, 0
            amp = torch.autocast("cpu", torch.bfloat16) if run.autocast else nullcontext()
            with amp:
                out = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            self._mark(self._place(len(self.blocks) - 1), "loss")
            loss = out.loss
            del out
            loss.backward()
            del loss
            self._mark("after", "")

    def _place(self, block: int) -> str:
        if len(self.blocks) == 1:
            return "whole"
        return "first" if block == 0 else "last" if block == len(self.blocks) - 1 else "middle"

    def _mark(self, place: str, what: str, *_: Any) -> None:
        """End the present segment, and begin that of `what` in `place`."""
        peak, now = self._tracker.peak, self._tracker.current
        flops, before = self._flops.total, self._before
        segment = Segment(
            rise=peak.activations - before.activations,
            rise_gradients=peak.gradients - before.gradients,
            activations=now.activations - before.activations,
            gradients=now.gradients - before.gradients,
            flops=flops - self._flops_before,
        )
        self._segments.setdefault(self._name, segment)
        self._name, self._before, self._flops_before = (place, what), now, flops
        self._tracker.reset_peak()

    def _enter(self, block: Block, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        place = self._place(block.index)
        self._mark(place, "forward0" if index == block.start else "forward")
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and hidden.requires_grad:
            hidden.register_hook(partial(self._mark, place, "embedding"))
        self.boundary = hidden.numel() * hidden.element_size()

    def _leave(self, block: Block, index: int, layer: nn.Module, args: tuple, output: Any) -> None:
        place = self._place(block.index)
        hidden = output[0] if isinstance(output, tuple | list) else output
        if hidden.requires_grad:
            what = "backward0" if index == block.start else "backward"
            hidden.register_hook(partial(self._mark, place, what))
        if index == block.stop - 1:
            self._mark(place, "head")
