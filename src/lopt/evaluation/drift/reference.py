"""Drift: how far a tuned model's hidden states and weights are from its base's.

    reference = Reference.of(base, tokenizer, texts)
    reference.drift(tuned).layers[-1].cka

B and T (N, H) are hidden states of base and tuned model on the same N tokens. Per layer:

- mean: over tokens and channels; variance: over tokens, mean of the channels; norm: mean over tokens of the
  Euclidean norm;
- relative L2 distance: ‖T − B‖ / ‖B‖ (Frobenius), over all tokens together;
- cosine: mean over tokens of cos(b, t);
- linear CKA (Kornblith et al., arXiv 1905.00414): ‖T'ᵀB'‖² / (‖B'ᵀB'‖ ‖T'ᵀT'‖), where B' and T' are centred
  over tokens. It is 1 for rotated or rescaled states.

All in float64. The special token that starts a window is left out: it is no part of the text, and in many
models its hidden state is so large that it would hide all others.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.architectures import base_model, compute_device
from lopt.core.blocks import Blocks
from lopt.core.config import LoPTConfig
from lopt.evaluation.drift.states import (
    END_TO_END,
    effective_weights,
    record_states,
    record_weights,
    windows,
)
from lopt.files import finite

CHUNK = 4096  # tokens in float64 at a time
CANNOT = "these models cannot be compared"


@dataclass(frozen=True)
class LayerDrift:
    """One place in the model: the input of the first layer ("embedding") or the output of a layer (from 0).

    A number that is not defined (the cosine with a zero vector, say) is NaN.
    """

    name: str
    mean_base: float
    mean_tuned: float
    variance_base: float
    variance_tuned: float
    norm_base: float
    norm_tuned: float
    relative_l2: float
    cosine: float
    cka: float


@dataclass(frozen=True)
class Drift:
    """What moved between a base model and a tuned one.

    Attributes:
        layers: hidden states, from the embedding's to the last layer's, before the final norm.
        weights: ‖w_t − w_b‖ / ‖w_b‖ over the matrices of "embedding", "layer i" (from 0), "head", "block b"
            (from 1) and "all"; over the vectors of "final norm" and of all "norms and biases", apart since
            in some models these few numbers are larger than all matrices together. A head tied to the
            embedding is that matrix, and counts once, in block 1; a head that the tuned model untied is
            compared with the base's shared matrix.
        boundaries: the layers (from 0) at which blocks 2..k start.
        tokens: N.
    """

    layers: list[LayerDrift]
    weights: dict[str, float]
    boundaries: list[int]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what is not defined is None."""
        return finite(asdict(self))


@dataclass(frozen=True, eq=False)
class Reference:
    """Hidden states of a base model on some text and its weights, to compare tuned models with.

    Both are copied into a temporary folder (`TMPDIR`) that is removed with this object: 4 (S N H + weights)
    bytes in float32. So two models are never in memory together, a base that is trained afterwards is still
    the base, and parameter names that differ between a checkpoint and the live model do not matter.

    Attributes:
        texts, tokens, window, batch_size: the input, see `of`.
        rows: its token ids, each after `skip` special tokens.
        states: (S, N, H), see `lopt.evaluation.drift.states`.
        weights: by name.
        folder: holds states and weights.
    """

    texts: list[str]
    tokens: int
    window: int
    batch_size: int
    rows: list[list[int]]
    skip: int
    states: Tensor
    weights: dict[str, Tensor]
    folder: tempfile.TemporaryDirectory
    _similarity: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        tokens: int = 2048,
        window: int = 128,
        batch_size: int = 16,
    ) -> Reference:
        """Run `model` on the first `tokens` tokens of every text, in windows of `window` tokens.

        Raises:
            ValueError: no text, too long a window, an unknown architecture.
        """
        rows = windows(tokenizer, texts, tokens, window)
        skip = int(tokenizer.bos_token_id is not None)
        folder = tempfile.TemporaryDirectory(prefix="lopt-", ignore_cleanup_errors=True)
        path = Path(folder.name)
        states = record_states(model, rows, skip, batch_size, path / "base")
        weights = record_weights(model, path / "weights")
        return cls(list(texts), tokens, window, batch_size, rows, skip, states, weights, folder)

    def drift(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        boundaries: Sequence[int] | None = None,
    ) -> Drift:
        """Compare a tuned model with the base; it may have boundaries or adapters.

        Args:
            tokenizer: the tuned model's, to check that it is the base's.
            boundaries: layers (from 0) at which blocks 2..k start. Default: those of an attached model.

        Raises:
            ValueError: shapes or tokenizer differ; boundaries that the model cannot have.
        """
        if tokenizer is not None and windows(tokenizer, self.texts, self.tokens, self.window) != self.rows:
            raise ValueError(f"{CANNOT}: their tokenizers read the text as different tokens")
        blocks = _blocks(model, boundaries)
        self._check_shapes(model)
        weights = _weight_drift(model, blocks, self.weights)
        device = compute_device(model)
        device = device if device.type == "cuda" else torch.device("cpu")
        with tempfile.TemporaryDirectory(prefix="lopt-", ignore_cleanup_errors=True) as folder:
            states = record_states(model, self.rows, self.skip, self.batch_size, Path(folder) / "tuned")
            layers = []
            for index, (base, tuned) in enumerate(zip(self.states, states, strict=True)):
                name = f"layer {index - 1}" if index else "embedding"
                layer, own = _compare(name, base, tuned, device, self._similarity.get(index))
                self._similarity[index] = own
                layers.append(layer)
        return Drift(layers, weights, [block.start for block in blocks][1:], self.states.shape[1])

    def _check_shapes(self, model: nn.Module) -> None:
        config: Any = base_model(model).config.get_text_config()
        here = [config.num_hidden_layers, config.hidden_size]
        there = [self.states.shape[0] - 1, self.states.shape[2]]
        if there != here:
            sizes = " and ".join(f"{layers} layers of {size} channels" for layers, size in (there, here))
            raise ValueError(f"{CANNOT}: they have {sizes}")
        shapes = {name: value.shape for name, _, value in effective_weights(model)}
        for name in sorted(shapes.keys() ^ self.weights.keys()):
            raise ValueError(f"{CANNOT}: only one of them has a weight {name}")
        for name, shape in shapes.items():
            if self.weights[name].shape != shape:
                sizes = " and ".join(str(list(s)) for s in (self.weights[name].shape, shape))
                raise ValueError(f"{CANNOT}: {name} has the shapes {sizes}")


def drift(
    base: nn.Module,
    tuned: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> Drift:
    """Return how far `tuned` is from `base` on `texts`; see `Reference` for many tuned models of one base."""
    reference = Reference.of(base, tokenizer, texts, tokens=tokens, window=window, batch_size=batch_size)
    return reference.drift(tuned)


def compare_states(name: str, base: Tensor, tuned: Tensor) -> LayerDrift:
    """Compare hidden states (N, H) of base and tuned model on the same tokens."""
    return _compare(name, base, tuned, base.device, None)[0]


def _compare(
    name: str, base: Tensor, tuned: Tensor, device: torch.device, known: Tensor | None
) -> tuple[LayerDrift, Tensor]:
    """Also return ‖B'ᵀB'‖, which is `known` from the second tuned model on."""
    count, size = base.shape
    sums = torch.zeros(2, size, dtype=torch.float64, device=device)
    for b, t in _chunks(base, tuned, device):
        sums += torch.stack([b.sum(0), t.sum(0)])
    mean_b, mean_t = sums / count
    cross, own_b, own_t = (
        torch.zeros(size, size, dtype=torch.float64, device=device) if wanted else None
        for wanted in (True, known is None, True)
    )
    # Squared deviations of b and t; norms of b and t; squares of t − b and of b; cosine, and how many.
    totals = torch.zeros(8, dtype=torch.float64, device=device)
    for b, t in _chunks(base, tuned, device):
        norm_b, norm_t = b.norm(dim=1), t.norm(dim=1)
        product = norm_b * norm_t
        cosine = ((b * t).sum(1) / product)[product != 0]
        totals[2:] += torch.stack(
            [norm_b.sum(), norm_t.sum(), (t - b).square().sum(), b.square().sum(), cosine.sum(),
             torch.tensor(len(cosine), dtype=torch.float64, device=device)]
        )  # fmt: skip
        b, t = b - mean_b, t - mean_t
        totals[:2] += torch.stack([b.square().sum(), t.square().sum()])
        for matrix, left, right in ((cross, t, b), (own_b, b, b), (own_t, t, t)):
            if matrix is not None:
                matrix.addmm_(left.T, right)
    assert cross is not None and own_t is not None
    known = own_b.norm() if own_b is not None else known
    assert known is not None
    variance_b, variance_t, norm_b, norm_t, apart, whole, cosine, defined = totals.tolist()
    layer = LayerDrift(
        name,
        mean_b.mean().item(),
        mean_t.mean().item(),
        variance_b / (count * size),
        variance_t / (count * size),
        norm_b / count,
        norm_t / count,
        _ratio(apart, whole),
        cosine / defined if defined else math.nan,
        (cross.norm().square() / (known * own_t.norm())).item(),
    )
    return layer, known


def _chunks(base: Tensor, tuned: Tensor, device: torch.device) -> Iterator[list[Tensor]]:
    for at in range(0, len(base), CHUNK):
        yield [x[at : at + CHUNK].to(device, torch.float64) for x in (base, tuned)]


def _ratio(apart: float, whole: float) -> float:
    """Return the square root of a ratio of squares."""
    return math.sqrt(apart / whole) if whole else 0.0 if apart == 0 else math.inf


def _blocks(model: nn.Module, boundaries: Sequence[int] | None) -> Blocks:
    base: Any = base_model(model)
    handle = getattr(base, "_lopt", None)
    if boundaries is None and handle is not None:
        return handle.blocks
    return Blocks(base, LoPTConfig(block_boundaries=list(boundaries or [])))


def _weight_drift(model: nn.Module, blocks: Blocks, base: Mapping[str, Tensor]) -> dict[str, float]:
    """Return relative changes by group; a tied head, which has two names, counts once in sums over groups."""
    place = _places(base_model(model))
    last = len(blocks)
    layers = {f"layer {i}": b.index + 1 for b in blocks for i in range(b.start, b.stop)}
    block_of = {"embedding": 1, **layers, "final norm": last, "head": last}
    groups = [*block_of, *(f"block {b.index + 1}" for b in blocks), "all", "norms and biases"]
    squares: dict[str, list[tuple[float, float]]] = {group: [] for group in groups}
    known: dict[tuple[int, int], tuple[float, float]] = {}
    for name, key, tuned in effective_weights(model):
        where, pair = place(name), (id(base[name]), key)
        if tuned.ndim > 1:
            members = [where] if pair in known else [where, f"block {block_of[where]}", "all"]
        else:
            members = ["norms and biases", *(["final norm"] if where == "final norm" else [])]
        if pair not in known:
            known[pair] = _squares(base[name], tuned)
        apart, whole = known[pair]
        for group in members:
            squares[group].append((apart, whole))
    sums = {group: map(sum, zip(*found, strict=True)) for group, found in squares.items() if found}
    return {group: _ratio(*values) for group, values in sums.items()}


def _squares(base: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Return Σ (t − b)² and Σ b², a piece at a time: a large vocabulary's matrix may not fit in float64."""
    total = torch.zeros(2, dtype=torch.float64, device=tuned.device)
    pieces = (x.flatten().split(2**22) for x in (base, tuned))
    for b, t in zip(*pieces, strict=True):
        b = b.to(t.device, torch.float64)
        total += torch.stack([(t - b).square().sum(), b.square().sum()])
    apart, whole = total.tolist()
    return apart, whole


def _places(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function from a weight's name to "embedding", "layer i", "final norm" or "head"."""
    blocks = Blocks(model, END_TO_END)
    modules = [(m, f"layer {i}") for i, m in enumerate(blocks.layers)]
    modules += [(m, "final norm") for m in blocks.tail] + [(model.get_output_embeddings(), "head")]
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [(names[id(m)].replace(".base_layer", "") + ".", where) for m, where in modules]

    def place(name: str) -> str:
        return next((where for prefix, where in prefixes if name.startswith(prefix)), "embedding")

    return place
