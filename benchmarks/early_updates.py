"""Do the updates of earlier blocks ever beat frozen ones? SFT on GSM8K with one local loss after another.

The run of `cold_start.py` (AdamW at 2e-5 after 3 steps of warm-up, batch 8, float32, clipping per block, loss
on the answer), but the embedding stays as it is and the softmax of the task loss is over the tokens of all
rows and a sample of the others, weighted for those left out, which takes half of the step away. Held-out
losses are over the whole vocabulary. Runs of one seed see the same rows in the same order; runs that share
a local loss share its warmed-up heads, which learn from what the unchanged model computes on those rows.

Local losses, `own` the input of block b, `base` what the unchanged model computes, t a token:

    recon   g(h_b) -> own                  back   g(h_b) -> h_0, the embedding
    ahead   g(h_b) -> base's h_{b+1}       shift  g(h_b)[t] -> h_0[t + 1], the next token's embedding
    next    cross-entropy of E norm(h_b + g(h_b)) with the next token, in the answer; next_all: everywhere
    lens    next, but its head is warmed up to give what the unchanged model's last layer gives, and stays so

The gauge is the gradient of each local loss on the unchanged model against the task's through the whole
depth: their cosine, and what an update by the sign of the local gradient (Adam's first) would take off the
task loss, as a share of what the sign of the task's own gradient would.

    python benchmarks/early_updates.py --model PATH --data_dir ../shared/data --gauge 4 \
        --seeds 0 1 --runs "frozen k=4" "library next_token k=4"
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import random
import time
from contextlib import suppress
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import cold_start
import local_every
from lopt import LoPT, LoPTConfig
from lopt.core.blocks import Block
from lopt.core.boundaries import BoundaryReached, Forward
from lopt.engine.clipping import clip_gradients
from lopt.losses.reconstruction import ReconstructionHead, reconstruction_loss
from lopt.losses.rows import Rows, channel_rms
from small_model import keep

TEXTS = ("gsm8k", "arc", "hellaswag")
NEXT = ("next", "next_all", "lens")
LOSSES = ("recon", "back", "ahead", "shift", *NEXT, "recon+next")
FROZEN = "frozen "
# loss: a local loss or several joined by "+"; early: lr_k1 over learning_rate; rate: learning_rate over 2e-5;
# only: the earlier blocks that learn; moves: the input embedding is untied and learns from block 1's local
# loss; the rest are fields of LoPTConfig. "at=4" is two blocks, the last of which begins at layer 4.
RUNS: dict[str, dict] = {"e2e": dict(method="e2e")}
for cut, fields in {
    "k=4": dict(num_blocks=4),
    "k=3": dict(num_blocks=3),
    "k=2": dict(num_blocks=2),
    "at=4": dict(num_blocks=2, block_boundaries=[4]),
    "at=14": dict(num_blocks=2, block_boundaries=[14]),
    "at=4,14": dict(num_blocks=3, block_boundaries=[4, 14]),
    "k=2 moves": dict(num_blocks=2, moves=True),
    "k=4 rate=0.75": dict(num_blocks=4, rate=0.75),
    "k=4 rate=2": dict(num_blocks=4, rate=2.0),
    "k=2 rate=2": dict(num_blocks=2, rate=2.0),
}.items():
    RUNS[FROZEN + cut] = dict(fields, method="frozen")
    for early in (0.03, 0.1, 0.3, 1.0):
        for loss in LOSSES:
            RUNS[f"{loss} {early:g} {cut}"] = dict(fields, loss=loss, early=early)
            last = dict(only=[fields["num_blocks"] - 2])
            RUNS[f"{loss}/last {early:g} {cut}"] = dict(fields, loss=loss, early=early) | last
    # What the library offers, only the block below the last one learning.
    learning = dict(aux_loss="next_token", frozen_blocks=fields["num_blocks"] - 2, early=1.0)
    RUNS[f"library next_token {cut}"] = fields | learning
CUT = ("method", "num_blocks", "block_boundaries", "aux_loss", "frozen_blocks")


class Tokens:
    """What a training softmax is over: the tokens of all rows, and a sample that stands for the others."""

    def __init__(self, embedding: Tensor, batches: list[dict[str, Tensor]]) -> None:
        self.embedding = embedding
        self.known = torch.cat([b["input_ids"].flatten() for b in batches]).unique()
        self.place = torch.full((len(embedding),), -1)
        self.place[self.known] = torch.arange(len(self.known))
        self.rows = embedding[self.known]

    def loss(
        self, hidden: Tensor, wanted: Tensor, teacher: Tensor | None = None, others: int = 2048
    ) -> Tensor:
        """Cross-entropy of `hidden` (N, H), normalised, with tokens `wanted` (N,) or `teacher`'s (N, H)."""
        sample = torch.randint(len(self.place), (others,))
        sample = sample[self.place[sample] < 0]
        stands_for = (len(self.place) - len(self.known)) / len(sample)
        matrix = torch.cat([self.rows, self.embedding[sample]])
        logs = torch.zeros(len(matrix))
        logs[len(self.rows) :] = math.log(stands_for)
        target = self.place[wanted] if teacher is None else (teacher @ matrix.T + logs).softmax(-1)
        return cross_entropy(hidden @ matrix.T + logs, target)


class Studied(LoPT):
    """A handle whose earlier blocks learn from `settings["loss"]`, which may be several joined by "+"."""

    def __init__(self, model: nn.Module, config: LoPTConfig, settings: dict, tokens: Tokens) -> None:
        super().__init__(model, config)
        self.kinds = settings.get("loss", "recon").split("+")
        self.only_blocks = settings.get("only", list(range(len(self.heads))))
        self.tokens = tokens
        self.norm = copy.deepcopy(self.blocks.decoder.norm).requires_grad_(False)
        self.cuts = [block.start for block in self.blocks] + [len(self.blocks.layers)]
        self.batch: dict = {}
        self.gauging = False
        size = model.config.hidden_size
        if config.is_local:
            self.heads = nn.ModuleList(
                nn.ModuleDict({kind: ReconstructionHead(size) for kind in self.kinds})
                for _ in self.blocks[:-1]
            )
            for block in self.blocks[:-1]:
                if block.index not in self.only_blocks:
                    for _, parameter in self.blocks.parameters(model, block.index):
                        parameter.requires_grad_(False)
            self._boundaries._learn = self._learn
        self.units = [dict.fromkeys(self.kinds, torch.ones(size)) for _ in self.heads]

    def target(self, kind: str, index: int, own: Tensor) -> Tensor:
        """What the head of block `index` is to give (B, T, H); for the next-token losses, its output."""
        if kind == "recon":
            return own
        state = self.batch["states"][self.cuts[index + 2] if kind == "ahead" else 0]
        return state.roll(-1, 1) if kind == "shift" else state

    def mask(self, kind: str) -> Tensor:
        """(B, T), where a loss counts."""
        mask = self.batch["attention_mask"].bool()
        if kind == "shift" or kind in NEXT:
            follows = mask if kind in ("shift", "next_all") else self.batch["labels"] != -100
            mask = torch.cat([follows[:, 1:], torch.zeros_like(mask[:, :1])], 1) & mask
        return mask

    def term(self, kind: str, index: int, hidden: Tensor, own: Tensor, warming: bool = False) -> Tensor:
        """One local loss of block `index`; reconstruction of all sorts as a share of the mean square."""
        mask = self.mask(kind)
        guess = self.units[index][kind] * self.heads[index][kind](hidden)
        if kind not in NEXT:
            target = self.target(kind, index, own)
            return reconstruction_loss(guess, target, mask) / target[mask].square().mean()
        wanted = self.batch["input_ids"].roll(-1, 1)[mask]
        lens = self.norm((hidden + guess)[mask])
        if warming:  # every other token will do
            teacher = self.batch["states"][-1][mask][::2] if kind == "lens" else None
            return self.tokens.loss(lens[::2], wanted[::2], teacher, others=512)
        return self.tokens.loss(lens, wanted)

    def _learn(self, forward: Forward, block: Block, hidden: Tensor) -> None:
        if block.index in self.only_blocks:
            assert forward.block_input is not None
            losses = [self.term(kind, block.index, hidden, forward.block_input) for kind in self.kinds]
            loss = torch.stack(losses).sum()
            forward.losses[block.index] = loss.detach()
            (self.config.lambda_aux / len(self.heads) * loss).backward()
        if self.gauging and block.index == len(self.heads) - 1:
            raise BoundaryReached

    def warm_heads(self, batches: list[dict], steps: int = 60, rate: float = 1e-2) -> list[list[float]]:
        """The library's head warm-up, on stored states of the unchanged model; losses by step and block."""
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=rate, weight_decay=0.0)
        history = []
        for step in range(steps):
            self.batch = batches[step % len(batches)]
            states, mask = self.batch["states"], self.batch["attention_mask"]
            ends = [(i, states[self.cuts[i + 1]], states[self.cuts[i]]) for i in self.only_blocks]
            if not step:
                for i, hidden, own in ends:
                    aims = {k: hidden if k in NEXT else self.target(k, i, own) for k in self.kinds}
                    self.units[i] = {kind: channel_rms(aim, mask) for kind, aim in aims.items()}
            losses = [torch.stack([self.term(k, *end, warming=True) for k in self.kinds]) for end in ends]
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            torch.cat(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append([round(loss.sum().item(), 4) for loss in losses])
        for units, heads in zip(self.units, self.heads, strict=True):
            for kind, unit in units.items():
                heads[kind].scale_output(unit)
                units[kind] = torch.ones_like(unit)
        if "lens" in self.kinds:
            self.heads.requires_grad_(False)
        return history


class Study:
    """The model, rows and losses that runs share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        rows = args.data_dir / "gsm8k/train.jsonl"
        self.rows = cold_start.questions(rows, 8 * args.steps, self.tokenizer, args.max_tokens)
        self.held_out = local_every.held_out_rows(self.tokenizer, args)
        self.batches: dict[int, list[dict]] = {}
        self.warm: dict[tuple, dict] = {}
        everything = [b for batches in self.held_out.values() for b in batches]
        everything += cold_start.encode(self.tokenizer, self.rows)
        self.tokens = Tokens(self.load().get_input_embeddings().weight.detach(), everything)

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).train()

    def seeded(self, seed: int) -> list[dict]:
        """One batch per step, in the order of `seed`, with the unchanged model's states."""
        if seed not in self.batches:
            order = random.Random(seed).sample(self.rows, len(self.rows))
            batches = cold_start.encode(self.tokenizer, order)[: self.args.steps]
            model = self.load()
            with torch.no_grad():
                for batch in batches:
                    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
                    batch["states"] = model.model(**inputs, output_hidden_states=True).hidden_states
            self.batches[seed] = batches
        return self.batches[seed]

    def start(self, settings: dict, seed: int) -> tuple[nn.Module, Studied, list | None]:
        """A new model, cut, its heads warmed up, and what the warm-up recorded."""
        torch.manual_seed(seed)
        model = self.load()
        known = {k: v for k, v in settings.items() if k in CUT}
        moves = settings.get("moves", False)
        config = LoPTConfig(tied_embeddings="untie" if moves else "freeze", **known)
        if "aux_loss" in settings:
            return model, *self.start_library(model, config, seed)
        handle = Studied(model, config, settings, self.tokens)
        model.get_input_embeddings().weight.requires_grad_(moves)  # end to end as well
        if not handle.heads:
            return model, handle, None
        key = (seed, *handle.cuts, *handle.only_blocks, *handle.kinds)
        if key not in self.warm:
            record = handle.warm_heads(self.seeded(seed))
            self.warm[key] = dict(record=record, state=copy.deepcopy(handle.heads.state_dict()))
        handle.heads.load_state_dict(self.warm[key]["state"])
        if "lens" in handle.kinds:
            handle.heads.requires_grad_(False)
        return model, handle, self.warm[key]["record"][:: len(self.warm[key]["record"]) - 1]

    def start_library(self, model: nn.Module, config: LoPTConfig, seed: int) -> tuple[LoPT, list]:
        """What the library offers, its head warm-up on stored states of the unchanged model."""
        handle = LoPT(model, config)
        cuts = [0, *(block.stop for block in handle.blocks)]

        def boundaries(batch: dict) -> tuple[list[tuple[Tensor, Tensor]], Rows]:
            pairs = [(batch["states"][cuts[i + 1]], batch["states"][cuts[i]]) for i in handle.learning]
            return pairs, Rows(batch["attention_mask"], batch["input_ids"], None, batch["labels"])

        with mock.patch("lopt.core.warmup.boundary_states", lambda handle, batch: boundaries(batch)):
            history = handle.warm_up_heads(self.seeded(seed))
        return handle, [[round(x, 4) for x in row] for row in (history[0], history[-1])]

    def task_loss(self, model: nn.Module, batch: dict) -> Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        if getattr(model, "_lopt", None) is not None:
            model._lopt._boundaries.labels = batch["labels"]  # as a call of the whole model would
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        labels = batch["labels"][:, 1:]
        where = labels != -100
        return self.tokens.loss(hidden[:, :-1][where], labels[where])

    def run(self, settings: dict, seed: int) -> dict:
        """One run: the held-out losses after it, its training loss and local losses."""
        model, handle, warmup = self.start(settings, seed)
        rate = settings.get("rate", 1.0) * cold_start.LEARNING_RATE
        groups = handle.parameter_groups(rate, settings.get("early", 0.1) * rate)
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, 3, self.args.schedule_steps)
        losses, local = [], []
        for batch in self.seeded(seed):
            handle.batch = batch
            loss = self.task_loss(model, batch)
            loss.backward()
            clip_gradients(handle, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(round(loss.item(), 4))
            local.append([round(x.item(), 4) for x in handle.local_losses()])
            print(f"  {len(losses)} {losses[-1]} {local[-1]}", flush=True)
        after = self.evaluate(model)
        ends = [local[0], local[-1]]
        return dict(settings=settings, seed=seed, after=after, loss=losses, head_warmup=warmup, local=ends)

    def times(self, names: list[str], pairs: int) -> dict[str, dict[str, float]]:
        """Median seconds of a step with the whole softmax, and over the first of `names`, taken in turns."""
        shared = self.load().get_input_embeddings().weight.requires_grad_(False)
        batch, takes = self.seeded(0)[0], {name: [] for name in names}
        started = {name: self.start(RUNS[name], 0)[:2] for name in names}
        optimizers = {}
        for name, (model, handle) in started.items():
            model.get_input_embeddings().weight = model.lm_head.weight = shared
            optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
            handle.batch = batch
        for _ in range(pairs + 1):
            for name, (model, handle) in started.items():
                begun = time.perf_counter()
                handle._labels = batch["labels"]
                cold_start.task_loss(model, batch).backward()
                clip_gradients(handle, 1.0)
                optimizers[name].step()
                optimizers[name].zero_grad()
                takes[name].append(time.perf_counter() - begun)
        first = takes[names[0]][1:]  # the first step makes the optimizer's state
        ratios = {n: median(b / a for a, b in zip(first, t[1:], strict=True)) for n, t in takes.items()}
        return {n: dict(seconds=round(median(t[1:]), 2), ratio=round(ratios[n], 3)) for n, t in takes.items()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {name: round(cold_start.held_out(model, rows), 5) for name, rows in self.held_out.items()}

    def gauge(self, cut: dict, losses: list[str], batches: list[dict]) -> dict[str, list]:
        """By local loss and earlier block: cosine with the task's gradient, and the share of its descent."""
        model = self.load()
        model.get_input_embeddings().weight.requires_grad_(False)
        for batch in batches:
            self.task_loss(model, batch).backward()
        task = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found: dict[str, list] = {}
        for loss in losses:
            model, handle, _ = self.start(dict(cut, loss=loss), 0)
            handle.gauging = True
            for batch in batches:
                handle.batch = batch
                with suppress(BoundaryReached):
                    self.task_loss(model, batch)
            found[loss] = []
            for block in handle.blocks[:-1]:
                own = {n: p.grad for n, p in handle.blocks.parameters(model, block.index) if n in task}
                theirs = torch.cat([task[name].flatten() for name in own])
                ours = torch.cat([gradient.flatten() for gradient in own.values()])
                cosine = torch.cosine_similarity(theirs, ours, 0).item()
                share = (theirs @ ours.sign() / theirs.abs().sum()).item()
                found[loss].append([round(cosine, 4), round(share, 4)])
            print(cut, loss, found[loss], flush=True)
        return found


def summarise(results: dict) -> None:
    """Held-out losses as they are for runs without local losses; for others, over frozen of the same cut."""
    by_name: dict[str, dict[int, dict]] = {}
    for key, result in results["runs"].items():
        by_name.setdefault(key.rpartition(" seed ")[0], {})[result["seed"]] = result
    print(f"{'':28} {'seeds':>5}", *(f"{text:>18}" for text in TEXTS))
    print(f"{'before':28} {'':>5}", *(f"{results['before'][text]:18.4f}" for text in TEXTS))
    for name, seeds in by_name.items():
        local = "loss" in RUNS[name] or "aux_loss" in RUNS[name]
        cut = name.split(" ", 2)[-1].removesuffix(" moves")
        reference = by_name.get(FROZEN + cut, {}) if local else {}
        pairs = [(r["after"], reference[s]["after"]) for s, r in seeds.items() if s in reference]
        pairs = pairs or [(r["after"], dict.fromkeys(TEXTS, 0.0)) for r in seeds.values()]
        cells = [local_every.spread([a[text] - b[text] for a, b in pairs]) for text in TEXTS]
        print(f"{name:28} {len(pairs):5}", *(f"{cell:>18}" for cell in cells))
    for name, took in results.get("times", {}).items():
        print(f"{name:28} {took['seconds']} s a step, {took['ratio']} of the first")


def main() -> None:
    parser = cold_start.study_flags(__doc__, "gsm8k/, arc_challenge/, hellaswag/", "early_updates.json")
    parser.add_argument("--runs", nargs="*", default=[], choices=list(RUNS), metavar="RUN")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--gauge", nargs="*", type=int, default=[], help="gauge local losses at these k")
    parser.add_argument(
        "--times", nargs="*", default=[], choices=list(RUNS), metavar="RUN", help="time these in turns"
    )
    parser.add_argument("--pairs", type=int, default=7, help="steps of each to time")
    parser.add_argument("--steps", type=int, default=20, help="the first has learning rate 0")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of each kind")
    parser.set_defaults(max_tokens=96)
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"gauge": {}, "runs": {}}

    def save() -> None:
        results.update(cold_start.setting(args))
        keep(args.output, results, indent=None)

    todo = [(n, s) for s in args.seeds for n in args.runs if f"{n} seed {s}" not in results["runs"]]
    if todo or args.gauge or args.times:
        study = Study(args)
    for k in args.gauge:
        known = results["gauge"].setdefault(f"k={k}", {})
        new = [loss for loss in LOSSES if loss not in known]
        known |= study.gauge(dict(num_blocks=k), new, study.seeded(0)[:4])
        save()
    if args.times:
        results["times"] = study.times(args.times, args.pairs)
        save()
    if todo and "before" not in results:
        results["before"] = study.evaluate(study.load())
        print("before", results["before"], flush=True)
    for name, seed in todo:
        print(name, "seed", seed, flush=True)
        results["runs"][f"{name} seed {seed}"] = study.run(RUNS[name], seed)
        save()
        gc.collect()  # a model and its handle point at each other, and each is gigabytes
    summarise(results)


if __name__ == "__main__":
    main()
