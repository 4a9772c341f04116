"""How much of the task's gradient could an early block have? Rules for the gradient at its end.

For every block but the last of a model in k blocks, a rule gives a gradient at the block's output, and that
gives one to the block's parameters. It is compared with the task's own, on GSM8K rows that nothing was
fitted to: their cosine, and what an update by the sign of the rule's gradient (Adam's first) would take off
the task loss, as a share of what the sign of the task's own would. Nothing is trained.

    label                 ridge regression from the label's row of the LM head
    label+hidden          and from the block's output: `--aux_loss predicted_gradient`
    label+hidden+lens     and from the row of the LM head that a lens on the output expects
    short cut n           the loss of the output, put straight into the model's own last n layers
    identity              the exact gradient at the last boundary, handed down unchanged
    bridge                a ridge regression from that

    python benchmarks/boundary_gradients.py --model smollm2-135m --rows gsm8k/train.jsonl
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cold_start import encode, task_loss
from lopt import LoPTConfig
from lopt.cli.rows import retention_rows
from lopt.core.blocks import split
from lopt.losses.rows import channel_rms
from lopt.models.load import load_model, load_tokenizer, resolve_model
from small_model import flags, keep

SHORT_CUTS = (0, 1, 2, 4)
KNOWN = ("label", "label+hidden", "label+hidden+lens")
LENS_RIDGE = 1e-3


def ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Return (F, H) that maps features (N, F) to targets (N, H).

    Args:
        strength: in units of the mean square of a feature over all positions.
    """
    gram = features.T @ features
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, features.T @ targets)


@dataclass
class Exact:
    """What the task gives on one batch.

    Attributes:
        states: (B, T, H) at each boundary, by the number of the layer behind it, with their graph; and what
            the final norm is given, by the number of layers.
        gradients: (B, T, H) of the task loss by them.
        weights: by layer, of its parameters.
    """

    batch: dict[str, Tensor]
    states: dict[int, Tensor]
    gradients: dict[int, Tensor]
    weights: dict[int, list[Tensor]]

    @property
    def real(self) -> Tensor:
        """(B, T), where there is a token."""
        return self.batch["attention_mask"].bool()

    @property
    def labels(self) -> Tensor:
        """(B, T), the label of the next token, -100 where there is none."""
        return torch.cat([self.batch["labels"][:, 1:], torch.full_like(self.batch["labels"][:, :1], -100)], 1)


class Gauge:
    """Rules for the gradient at the boundaries of one model.

    Args:
        starts: first layer of every block.
        strength: of ridge regressions.
    """

    def __init__(self, model: Any, starts: Sequence[int], strength: float) -> None:
        self.model, self.starts, self.strength = model, starts, strength
        self.layers: nn.ModuleList = model.model.layers
        self.head: Tensor = model.lm_head.weight.detach()
        self.fits: list[Exact] = []

    def exact(self, batch: dict[str, Tensor], with_weights: bool) -> Exact:
        """Run the whole model, and its backward to the first boundary, or through all layers."""
        states: dict[int, Tensor] = {}
        number = len(self.layers)
        places = {start: self.layers[start - 1] for start in self.starts[1:]} | {number: self.layers[-1]}
        with ExitStack() as stack:
            for place, layer in places.items():
                hook = layer.register_forward_hook(functools.partial(_note, states, place))
                stack.callback(hook.remove)
            loss = task_loss(self.model, batch)
        own = {i: list(self.layers[i].parameters()) for i in range(self.starts[-1] * with_weights)}
        wanted = [*states.values(), *(p for parameters in own.values() for p in parameters)]
        found = iter(torch.autograd.grad(loss, wanted, retain_graph=with_weights))
        gradients = {place: next(found) for place in states}
        weights = {i: [next(found) for _ in parameters] for i, parameters in own.items()}
        if not with_weights:
            states = {place: state.detach() for place, state in states.items()}
        return Exact(batch, states, gradients, weights)

    def rules(self, there: Exact, place: int) -> Iterator[tuple[str, Tensor]]:
        """Yield rules and the gradient (B, T, H) that each gives at a boundary."""
        for name in KNOWN:
            yield name, self._predicted(there, place, name)
        for last in SHORT_CUTS:
            if place <= len(self.layers) - last:
                yield f"short cut {last}", self._short_cut(there, place, last)
        if place != self.starts[-1]:
            exact = there.gradients[self.starts[-1]]
            yield "identity", exact
            yield "bridge", exact @ self._bridge(place)

    def compare(self, there: Exact, block: int, gradient: Tensor) -> dict[str, float]:
        """Return how much of the task's gradient `gradient` (B, T, H) at the end of a block gives."""
        start, end = self.starts[block : block + 2]
        own = [p for i in range(start, end) for p in self.layers[i].parameters()]
        given = torch.autograd.grad(there.states[end], own, gradient, retain_graph=True)
        ours = torch.cat([g.flatten() for g in given])
        task = torch.cat([g.flatten() for i in range(start, end) for g in there.weights[i]])
        states = (gradient[there.real].flatten(), there.gradients[end][there.real].flatten())
        return {
            "boundary": round(cosine_similarity(*states, 0).item(), 4),
            "cosine": round(cosine_similarity(ours, task, 0).item(), 4),
            "share": round((task @ ours.sign() / task.abs().sum()).item(), 4),
        }

    def _predicted(self, there: Exact, place: int, name: str) -> Tensor:
        units, weight = self._fit(place, name)
        gradient, where = torch.zeros_like(there.states[place]), there.labels >= 0
        gradient[where] = _scaled(self._known(there, place, name), units) @ weight / where.sum()
        return gradient

    @functools.cache  # noqa: B019 - a gauge lives as long as its fits
    def _fit(self, place: int, name: str) -> tuple[list[Tensor], Tensor]:
        """Return the units of the features, and (F, H) from those to the gradient of the summed loss."""
        raw = [self._known(exact, place, name) for exact in self.fits]
        units = [channel_rms(torch.cat(columns)[None], None) for columns in zip(*raw, strict=True)]
        features = torch.cat([_scaled(columns, units) for columns in raw])
        targets = [e.gradients[place][e.labels >= 0] * (e.labels >= 0).sum() for e in self.fits]
        return units, ridge(features, torch.cat(targets), self.strength)

    @torch.no_grad()
    def _known(self, exact: Exact, place: int, name: str) -> list[Tensor]:
        """Return each kind of feature, (N, H), at the N positions with a label."""
        where = exact.labels >= 0
        hidden = exact.states[place].detach()[where]
        found = {"label": self.head[exact.labels[where]], "hidden": hidden}
        if "lens" in name:
            at_end = self.model.model.norm(_with_one(hidden) @ self._lens(place))
            found["lens"] = (at_end @ self.head.T).softmax(-1) @ self.head
        return [found[part] for part in name.split("+")]

    @functools.cache  # noqa: B019
    @torch.no_grad()
    def _lens(self, place: int) -> Tensor:
        """Return (H + 1, H), which maps a boundary's state to what the final norm is given."""
        states = torch.cat([_with_one(e.states[place][e.real]) for e in self.fits])
        last = torch.cat([e.states[len(self.layers)][e.real] for e in self.fits])
        return ridge(states, last, LENS_RIDGE)

    @functools.cache  # noqa: B019
    def _bridge(self, place: int) -> Tensor:
        """Return (H, H), from the exact gradient at the last boundary to that at another."""
        last = self.starts[-1]
        features = torch.cat([e.gradients[last][e.real] for e in self.fits])
        targets = torch.cat([e.gradients[place][e.real] for e in self.fits])
        return ridge(features, targets, self.strength)

    def _short_cut(self, there: Exact, place: int, last: int) -> Tensor:
        hidden = there.states[place].detach().requires_grad_()
        with _passed_by(self.layers[: len(self.layers) - last], hidden):
            loss = task_loss(self.model, there.batch)
        return torch.autograd.grad(loss, hidden)[0]


def _note(states: dict[int, Tensor], place: int, module: nn.Module, args: tuple, output: Any) -> None:
    states[place] = output[0] if isinstance(output, tuple) else output


def _with_one(states: Tensor) -> Tensor:
    return torch.cat([states, states.std().expand(len(states), 1)], 1)


def _scaled(columns: list[Tensor], units: list[Tensor]) -> Tensor:
    """Return features (N, F), each kind in its units, and a constant."""
    scaled = [values / unit for values, unit in zip(columns, units, strict=True)]
    return torch.cat([*scaled, torch.ones(len(scaled[0]), 1)], 1)


@contextmanager
def _passed_by(layers: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """Within, all of `layers` return `hidden` (B, T, H)."""
    for layer in layers:
        layer.forward = lambda *args, **options: hidden
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def gauge(model: Any, k: int, batches: list[dict[str, Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """Return figures by rule and block, means over the batches that nothing was fitted to."""
    spans = split(len(model.model.layers), LoPTConfig(num_blocks=k))
    measured = Gauge(model, [start for start, _ in spans], args.ridge)
    fits, tests = batches[: args.fit_batches], batches[args.fit_batches :]
    measured.fits = [measured.exact(batch, with_weights=False) for batch in fits]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for batch in tests:
        there = measured.exact(batch, with_weights=True)
        for block, (start, end) in enumerate(spans[:-1]):
            for rule, gradient in measured.rules(there, end):
                figures = measured.compare(there, block, gradient)
                found.setdefault(rule, {}).setdefault(f"layers {start}-{end - 1}", []).append(figures)
    means = {rule: {b: _mean(each) for b, each in blocks.items()} for rule, blocks in found.items()}
    for rule, blocks in means.items():
        cells = (f"{each['cosine']:+.2f}/{each['share']:+.2f}" for each in blocks.values())
        print(f"k={k} {rule:20}", *cells, flush=True)
    return means


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(sum(each[key] for each in figures) / len(figures), 4) for key in figures[0]}


def main() -> None:
    parser = flags(__doc__, "boundary_gradients.json")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", required=True, help="file of GSM8K's rows to train on")
    parser.add_argument("--num_blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--fit_batches", type=int, default=6, help="of 8 rows, which rules are fitted to")
    parser.add_argument("--test_batches", type=int, default=2, help="of 8 rows, on which they are compared")
    parser.add_argument("--max_tokens", type=int, default=224)
    parser.add_argument("--ridge", type=float, default=1.0)
    args = parser.parse_args()
    name, args.model = args.model, resolve_model(args.model)
    tokenizer = load_tokenizer(args.model)
    (pairs,) = retention_rows([args.rows], tokenizer, 1000).values()
    fits = [pair for pair in pairs if len(tokenizer("".join(pair))["input_ids"]) <= args.max_tokens]
    model: Any = load_model(args.model).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    wanted = 8 * (args.fit_batches + args.test_batches)
    if len(fits) < wanted:
        raise ValueError(
            f"--rows has {len(fits)} rows of at most {args.max_tokens} tokens, {wanted} are needed"
        )
    batches = encode(tokenizer, fits[:wanted])
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    found = {f"k={k}": gauge(model, k, batches, args) for k in args.num_blocks}
    settings = {key: vars(args)[key] for key in ("fit_batches", "test_batches", "max_tokens", "ridge")}
    keep(args.output, known | {name: {"settings": settings, "figures": found}})


if __name__ == "__main__":
    main()
