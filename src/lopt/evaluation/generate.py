"""Greedy completions in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lopt.architectures import check_positions, compute_device
from lopt.models.router_logits import without_router_logits


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """Return a greedy completion of each prompt, without special tokens.

    Args:
        progress: label of a progress bar with an ETA; no bar if None.
    """
    if prompts:  # a tokenizer takes no empty list
        longest = max(len(ids) for ids in tokenizer(list(prompts))["input_ids"])
        check_positions(
            model, longest + max_new_tokens, "prompt and completion together have {limit} at most"
        )
    generate: Any = model.generate
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"  # every completion follows its prompt directly
    texts: list[str] = []
    batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
    total = len(batches) * max_new_tokens
    with (
        without_router_logits(model),
        tqdm(total=total, desc=progress, unit="token", disable=progress is None) as bar,
    ):
        for done, batch in enumerate(batches, start=1):
            inputs = tokenizer(list(batch), return_tensors="pt", padding=True).to(compute_device(model))
            output = generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id,
                streamer=_Progress(bar),
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            bar.update(done * max_new_tokens - bar.n)  # a batch may end early
    tokenizer.padding_side = side
    model.train(training)
    return texts


class _Progress(BaseStreamer):
    """Advances a progress bar with every generated token."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as a matrix
            self.bar.update()

    def end(self) -> None:
        """Do nothing: no token is held back."""
