"""What the parts of one micro-batch cost, measured on fake tensors: no weights, no GPU, no data.

Layers of a model are alike, so a model of a few layers of the real width, cut into three blocks, has every
part that any depth and any k has. Its forward and backward are cut at the layers into segments. Each
segment is by how much the live bytes rise within it, by how much they have changed at its end, and its
FLOPs. `lopt.planning.plan` strings segments together for the depth, blocks and schedule asked about.

Shapes: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

import lopt.losses.next_token as next_token
from lopt.core.attach import attach
from lopt.core.blocks import Block, Blocks
from lopt.core.config import LoPTConfig
from lopt.instruments.flops import FlopCounter
from lopt.instruments.memory import MemoryTracker
from lopt.losses.next_token import NextToken
from lopt.models.load import empty_model

Method = Literal["lopt", "frozen", "e2e"]
# Layers that are measured in each place. A middle block's second layer stands for all but a block's first.
MEASURED: dict[Method, dict[str, int]] = {
    "e2e": {"whole": 2},
    "lopt": {"first": 1, "middle": 2, "last": 2},
    "frozen": {"first": 1, "last": 2},
}


@dataclass(frozen=True)
class Work:
    """What runs in one micro-batch.

    Attributes:
        batch, tokens: B rows of T tokens; of several, one is padded, which attention pays for.
        dtype: of the weights.
        autocast: whether forwards run under bfloat16 autocast.
        checkpointing: non-reentrant activation checkpointing of every layer.
        device: "cuda" or "cpu", whose LM heads differ.
        resting: whether the first block does not learn, as `--frozen_blocks` has it.
        aux_loss: what earlier blocks learn.
    """

    batch: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    checkpointing: bool = False
    device: str = "cuda"
    resting: bool = False
    aux_loss: Literal["recon", "next_token"] = "recon"


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
    """Segments of one micro-batch by (where, what).

    `where` is the place of a block: "first", "middle", "last", of one that does not learn and is not the
    first "resting" or, end to end, "whole". `what` is
    "start" (embedding, masks), "forward0" (of the block's first layer), "forward" (of any other),
    "head" (its loss, and a local loss's backward down to the last layer), "loss" (the same of the task
    loss), "backward", "backward0", "embedding" (its backward), "end" (after a local backward).

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


def measure(config: PreTrainedConfig, work: Work, method: Method) -> Parts:
    """Run two micro-batches of a small model of the real width ("lopt", "frozen" or "e2e").

    Raises:
        ValueError: the model does not run on fake tensors, for example because it asks for values.
    """
    parts = Parts(layers=MEASURED[method])
    *starts, depth = accumulate(parts.layers.values())
    try:
        with fake_run(work):
            model = build(shortened(config, depth), work)
            cut = LoPTConfig(method=method, block_boundaries=starts or None, aux_loss=work.aux_loss)
            run = _Recorder(model, cut.replace(frozen_blocks=int(work.resting)), work)
            for segments in (parts.fresh, parts.again):
                run.micro_batch(segments)
                _complete(segments, method, work.resting)
            parts.boundary, parts.casts = run.boundary, run.casts()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"a {config.model_type} model cannot be planned, it does not run on fake tensors: {reason}"
        ) from error
    return parts


def _complete(segments: dict[tuple[str, str], Segment], method: Method, resting: bool) -> None:
    """Give every place the segments that were measured in another."""
    if method == "frozen" or resting:  # such blocks keep nothing
        for key in (("first", "forward"), ("resting", "forward0"), ("resting", "forward")):
            segments[key] = segments["first", "forward0"]
    elif method == "lopt":
        for what in ("forward", "backward"):
            segments["first", what] = segments["middle", what]


def build(config: PreTrainedConfig, work: Work) -> Any:
    """A model from its config, as a trainer would hand it to the method."""
    model = empty_model(config, dtype=work.dtype, attn_implementation="sdpa").train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's SFTTrainer
    if work.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
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
def fake_run(work: Work) -> Iterator[None]:
    """Fake tensors, and stand-ins for what would look at values."""
    patches: list[Any] = [
        # Both look into tensors, for packed rows and for padding: rows are padded and not packed.
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        mock.patch("transformers.masking_utils._ignore_causal_mask_sdpa", partial(_no_mask, work.batch)),
        mock.patch.object(next_token, "predicted_positions", lambda rows: torch.arange(rows.ids.numel())),
        mock.patch.object(NextToken, "softmax_tokens", _columns_of_many),
    ]
    if work.device == "cuda":  # kernels there work in place
        patches += [
            mock.patch.object(chunked_logprob, "_forward_tile", lambda *_, **__: None),
            mock.patch.object(chunked_logprob, "_backward_tile", lambda *_, **__: None),
            mock.patch.object(chunked_logprob, "_addmm_fp32", _product_in_place),
        ]
    with FakeTensorMode():
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _no_mask(
    batch: int, mask: Any, rows: int, columns: int, *_: Any, local_attention_size: int | None = None
) -> bool:
    """Whether attention needs no mask: a row alone is never padded, but it may be longer than a window."""
    return batch == 1 and (local_attention_size is None or columns < local_attention_size)


def _columns_of_many(loss: Any, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`NextToken.softmax_tokens` of a micro-batch whose tokens are all different."""
    weight = loss._lm_head.weight
    own = min(ids.numel(), len(weight))
    columns = own + (len(weight) - own) // max(1, len(weight) // loss.sample)
    matrix = weight[torch.zeros(columns, dtype=torch.long)]
    return ids.flatten()[:own], matrix, matrix.new_zeros(columns, dtype=torch.float32)


def _product_in_place(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Counts as the product that CUDA adds to a float32 sum without a temporary."""
    torch.mm(a, b, out=total if total.dtype == a.dtype else total.view(a.dtype)[:, ::2])


class _Recorder:
    """Marks on a model's layers, between which live bytes and FLOPs are read."""

    def __init__(self, model: Any, config: LoPTConfig, work: Work) -> None:
        self.model, self.work = model, work
        self.blocks = Blocks(model, config)
        for block in self.blocks:
            for index in range(block.start, block.stop):
                layer = self.blocks.layers[index]
                layer.register_forward_pre_hook(partial(self._enter, block, index), with_kwargs=True)
                layer.register_forward_hook(partial(self._leave, block, index))
        self.lopt = attach(model, config)
        self.lopt.after_local_backward = lambda index: self._mark(self._place(index), "end")
        self._segments: dict[tuple[str, str], Segment] = {}
        self.boundary = 0

    def casts(self) -> int:
        """Bytes of the bfloat16 copies that autocast makes of a layer's float32 weights."""
        if not self.work.autocast or self.work.dtype != torch.float32:
            return 0
        linear = [m for m in self.blocks.layers[-1].modules() if isinstance(m, (nn.Linear, Conv1D))]
        return 2 * sum(p.numel() for m in linear for p in m.parameters())

    def micro_batch(self, segments: dict[tuple[str, str], Segment]) -> None:
        """Forward and backward; fills `segments`."""
        work, self._segments = self.work, segments
        ids, mask, labels = (torch.ones(work.batch, work.tokens, dtype=torch.long) for _ in range(3))
        self._flops = FlopCounter()
        with MemoryTracker(self.model, self.lopt.heads) as self._tracker, self._flops:
            self._name = (self._place(0), "start")
            self._before, self._flops_before = self._tracker.current, 0
            amp = torch.autocast("cpu", torch.bfloat16) if work.autocast else nullcontext()
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

    def _mark(self, where: str, what: str, *_: Any) -> None:
        """The segment ends here and another begins."""
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
        self._name, self._before, self._flops_before = (where, what), now, flops
        self._tracker.reset_peak()

    def _enter(self, block: Block, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        where = self._place(block.index)
        self._mark(where, "forward0" if index == block.start else "forward")
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and hidden.requires_grad:
            hidden.register_hook(partial(self._mark, where, "embedding"))
        self.boundary = hidden.numel() * hidden.element_size()

    def _leave(self, block: Block, index: int, layer: nn.Module, args: tuple, output: Any) -> None:
        where = self._place(block.index)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            what = "backward0" if index == block.start else "backward"
            hidden.register_hook(partial(self._mark, where, what))
        if index == block.stop - 1:
            self._mark(where, "head")
