"""Run benchmarks on a live model by lm-evaluation-harness: the same prompts, requests, filters and metrics.

The harness's own `HFLM` computes every log-likelihood and generation, its evaluator scores them. Added here:
tasks run one after the other, so that each can be kept when it is finished; batch sizes that suit a CPU; the
model, the tokenizer and the random state are restored.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.evaluation.ifeval import steady_languages
from lopt.evaluation.outcomes import Evaluation, TaskOutcome, cut_prompts, merge
from lopt.evaluation.tasks import (
    BENCHMARKS,
    LoadedTasks,
    check_tasks,
    load_tasks,
    quiet_harness,
    random_state_kept,
)
from lopt.instruments.memory import free_memory
from lopt.models.router_logits import without_router_logits

try:
    from lm_eval import evaluator
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError('benchmarks need lm-evaluation-harness: pip install "lopt[eval]"') from error

__all__ = [
    "BENCHMARKS",
    "Evaluation",
    "TaskOutcome",
    "check_tasks",
    "combine",
    "cut_prompts",
    "evaluate",
    "run_task",
    "run_tasks",
]


class Budget(NamedTuple):
    """What a batch may have with "auto", if memory allows: more is hardly faster on that device.

    Attributes:
        scored: tokens, padding included, of a batch whose log-likelihoods are computed.
        generated: tokens, prompts and answers, of a batch that generates.
        sequences: in any batch.
    """

    scored: int
    generated: int
    sequences: int


CPU_BUDGET = Budget(scored=2048, generated=2048, sequences=64)
GPU_BUDGET = Budget(scored=16384, generated=2**17, sequences=256)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: Mapping[str, int] | None = None,
    batch_size: int | str | None = None,
    apply_chat_template: bool = False,
    progress: bool = True,
    seed: int | None = None,
) -> Evaluation:
    """Evaluate a model, which may be in training and have boundaries; its state is restored.

    Args:
        tasks: names of `BENCHMARKS`, or any other task of the harness.
        data_dir: local rows (see `lopt.evaluation.tasks`); None for the hub.
        limit: the first so many items of each task (each subject of MMLU); None for all.
        num_fewshot: shots by task name; others as the task's definition sets them, 5 for MMLU.
        batch_size: sequences in a batch, or "auto", as which None counts: for a caller who has no such
            choice, so that no message proposes one.
        apply_chat_template: put prompts into the tokenizer's chat template.
        progress: show the harness's progress bars.
        seed: of the choice of shots and of everything else that is random; None for the harness's own seeds.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: see `check_tasks`; a batch does not fit into memory.
    """
    loaded = load_tasks(tasks, data_dir, num_fewshot)
    options: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "progress": progress,
        "seed": seed,
    }
    whole = run_tasks(model, tokenizer, loaded, **options)
    if remark := cut_prompts(whole.results):
        warnings.warn(remark, stacklevel=2)
    return whole


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: LoadedTasks, **options: Any
) -> Evaluation:
    """Evaluate a model on all tasks of `loaded`; `options` are those of `run_task`."""
    parts = {name: run_task(model, tokenizer, task, **options) for name, task in loaded.tasks.items()}
    return combine(parts, loaded)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    *,
    limit: int | None = None,
    batch_size: int | str | None = None,
    apply_chat_template: bool = False,
    progress: bool = True,
    seed: int | None = None,
) -> Evaluation:
    """Evaluate a model on one task of `load_tasks`; arguments and errors as for `evaluate`."""
    name = task.config.task
    steady = steady_languages() if name.startswith("ifeval") else contextlib.nullcontext()
    with _state_kept(model, seed), steady, quiet_harness(), _output(progress):
        task.set_fewshot_seed(DEFAULT_OTHER_SEED if seed is None else seed)
        lm = _LiveModel(model, copy.deepcopy(tokenizer), batch_size or "auto")
        try:
            results = evaluator.evaluate(
                lm,
                {"tasks": {name: task}, "groups": {}},
                limit=limit,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=True,
            )
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if message := _out_of_memory(error, name, lm, proposes_batch=batch_size is not None):
                raise ValueError(message) from error
            raise
    samples = results.pop("samples")
    found: dict[str, Any] = {**results, **({"cut_prompts": {name: lm.cut}} if lm.cut else {})}
    return Evaluation(found, {name: samples[name]})


def combine(parts: Mapping[str, Evaluation], loaded: LoadedTasks) -> Evaluation:
    """Return results of single tasks as the harness gives them for all, groups and their means included."""
    merged = merge(parts)
    whole = merged.results
    groups = whole.setdefault("groups", {})
    for name, group in loaded.groups.items():
        names = [task.task_name for task in group.get_all_tasks()]
        if not names or not all(task in parts for task in names):
            continue
        with quiet_harness():
            mean = dict(group.aggregate(whole["results"]))
        whole["results"][name] = mean
        whole["versions"][name] = group.version
        whole["higher_is_better"][name] = whole["higher_is_better"][names[0]]
        shots = {whole["n-shot"][task] for task in names}
        if len(shots) == 1:
            whole["n-shot"][name] = shots.pop()
        whole.setdefault("group_subtasks", {})[name] = group.child_names
        if group.has_aggregation:
            groups[name] = mean
    if not groups:
        del whole["groups"]
    return merged


class _LiveModel(HFLM):
    """HFLM on a model in memory, with batches that fit and a count of prompts that do not.

    Log-likelihoods and generations are HFLM's own, but for what it never reads: logits before the first token
    that is scored. "auto" is the batch that a budget of tokens and half of the free memory allow, not HFLM's
    search for the largest that fits: the device may be shared.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int | str) -> None:
        self.budget = None
        if batch_size == "auto":
            batch_size = 1
            self.budget = CPU_BUDGET if model.device.type == "cpu" else GPU_BUDGET
        self.needed: int | None = None
        self.cut: dict[str, int] = {}
        self._scored: dict[tuple[int, ...], int] = {}
        self._can_keep = "logits_to_keep" in signature(model.forward).parameters
        super().__init__(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)

    @property
    def max_length(self) -> int:
        return self.needed or super().max_length

    @property
    def _logit_bytes(self) -> int:
        """Bytes of a position's logits and their softmax, in float32: what takes the memory of scoring."""
        return 12 * int(self.model.get_input_embeddings().weight.shape[0])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = ["".join(request.args) for request in requests]
        longest, most = len(self.tok_encode(max(texts, key=len))), self.max_length + 1
        if longest > most // 2:  # characters are a rough guide only
            longest = self._longest(texts, most)
        if self.budget:
            self._fit(self.budget.scored, self._logit_bytes, longest)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.budget:
            self._fit(self.budget.scored, self._logit_bytes, self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> Any:
        """Return HFLM's; note how many tokens at the end of each input are scored."""
        for _, context, scored in requests:
            key = tuple((context + scored)[-(self.max_length + 1) : -1])
            self._scored[key] = max(len(scored), self._scored.get(key, 0))
        try:
            return super()._loglikelihood_tokens(requests, *args, **options)
        finally:
            self._scored = {}

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return logits (B, n, V) of the last n of T positions, from the first one that is scored on.

        HFLM counts positions from the end. The LM head and the softmax would else cost more than all layers
        of a small model with a large vocabulary.
        """
        keep = max(map(self._scored_from_end, inps.tolist())) if self._scored else inps.shape[1]
        if keep == inps.shape[1] or not self._can_keep:
            return super()._model_call(inps, *args, **options)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=keep).logits

    def _scored_from_end(self, row: list[int]) -> int:
        """Return how far before the end of a row, which may be padded with 0, its first scored token is."""
        ends = [len(row)]
        while ends[-1] and not row[ends[-1] - 1]:
            ends.append(ends[-1] - 1)
        inputs = {end: tuple(row[:end]) for end in ends}
        found = [len(row) - end + self._scored[key] for end, key in inputs.items() if key in self._scored]
        return max(found, default=len(row))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        limits = [normalize_gen_kwargs(dict(r.args[1]), self.max_gen_toks)["max_gen_toks"] for r in requests]
        new, most = max(limits), self.max_length
        if new >= most:
            raise ValueError(
                f"{requests[0].task_name} lets a model generate {new} tokens, its context is {most}: "
                "leave it out of `tasks`, or use a model with a longer context"
            )
        longest = self._longest([request.args[0] for request in requests], most - new) + new
        if self.budget:
            config = self.model.config.get_text_config()
            heads = config.num_attention_heads
            width = getattr(config, "head_dim", None) or config.hidden_size // heads
            kept = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width  # keys and values
            cached = config.num_hidden_layers * kept * self.model.dtype.itemsize
            self._fit(self.budget.generated, cached, longest)
        self.needed = min(most, longest)
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.needed = None

    def _fit(self, tokens: int, bytes_per_token: int, longest: int) -> None:
        """Set the batch to so many tokens, or to what half of the free memory has room for."""
        assert self.budget is not None
        room = free_memory(self.model.device) // 2 // bytes_per_token
        self.batch_size_per_gpu = max(1, min(self.budget.sequences, min(tokens, room) // longest))

    def _longest(self, texts: list[str], most: int) -> int:
        """Return the tokens of the longest text; count the texts that the harness cuts from the left."""
        lengths = [len(self.tok_encode(text)) for text in set(texts)]
        if cut := sum(length > most for length in lengths):
            self.cut = {"prompts": len(lengths), "cut": cut, "tokens": most}
        return max(lengths)


@contextlib.contextmanager
def _state_kept(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Evaluate inside, with the harness's seeds; leave model and random state as they were."""
    with _modes_kept(model), without_router_logits(model), _seeded(seed):
        yield


@contextlib.contextmanager
def _modes_kept(model: PreTrainedModel) -> Iterator[None]:
    """Disable gradients inside; restore every module's training mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Use the harness's seeds inside; restore the random state afterwards."""
    with random_state_kept():
        random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
        np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
        torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)
        yield


@contextlib.contextmanager
def _output(progress: bool) -> Iterator[None]:
    """Hide what the harness prints, and its progress bars too unless `progress`."""
    # It has no switch for the bar over contexts.
    bars = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with contextlib.redirect_stdout(io.StringIO()), bars:
        yield


def _out_of_memory(error: RuntimeError, task: str, lm: HFLM, *, proposes_batch: bool) -> str | None:
    """Return a message with what would fit, None if the error is not about memory."""
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        return None
    size = lm.batch_size
    smaller = max(1, size // 4) if isinstance(size, int) else 1
    fixes = [f"`batch_size` {smaller} (it was {size})"] if proposes_batch and size != 1 else []
    if lm.model.dtype == torch.float32:
        fixes.append("`param_dtype` bfloat16")
    fixes.append("a device with more memory")
    return f"{task} does not fit into the memory of {lm.device}: try {', '.join(fixes)}"
