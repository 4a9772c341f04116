"""Peak of activations and of everything, end to end and by LoPT, exactly and without a GPU.

Fake tensors have shapes and no data, so the Qwen2.5-7B shape (bfloat16, 4 sequences of 1,024 tokens)
is measured on any machine: the same model code, every tensor counted while it lives. "activations" is
what forward and backward hold beside parameters and their gradients, which exist before the step.
The loss is PyTorch's fused linear cross-entropy; with TRL's fused LM head, which keeps the head's
gradient in float32 while it works (2 GiB here, in every method), it is measured a second time.
A small model of the same proportions is measured on real tensors and on fake ones.

    python benchmarks/activation_memory.py
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear_cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lopt import LoPTConfig, attach
from lopt.compat import checkpoint_activations
from lopt.instruments.memory import peak_memory
from small_model import flags, keep

SHAPE_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)
SHAPE_SMALL = dict(
    hidden_size=112,
    intermediate_size=592,
    num_hidden_layers=28,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=1024,
    tie_word_embeddings=False,
)
METHODS = {"e2e": LoPTConfig(method="e2e"), **{f"k={k}": LoPTConfig(num_blocks=k) for k in (2, 4, 7)}}


def activations(
    shape: dict, config: LoPTConfig, fake: bool, batch: int, tokens: int, checkpointing=False, trl=False
):
    """Peak bytes of activations and of all tensors in one forward and backward."""
    # transformers reads position_ids to find out whether rows are packed, which fake tensors cannot
    # answer; it would then build a mask that a real run does not have.
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
    torch.set_default_dtype(torch.bfloat16 if fake else torch.float32)
    with FakeTensorMode() if fake else nullcontext():
        model = Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation="sdpa")).train()
        add_fused_lm_head(model)
        if checkpointing:
            checkpoint_activations(model)
        handle = attach(model, config)
        for parameter in [*model.parameters(), *handle.heads.parameters()]:
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.ones(batch, tokens, dtype=torch.long)
        peak = peak_memory(lambda: loss(model, ids, trl).backward(), model, handle.heads)
    torch.set_default_dtype(torch.float32)
    return {"activations": peak.activations, "total": peak.total}


def loss(model, ids: torch.Tensor, trl: bool) -> torch.Tensor:
    if trl:
        return model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks
    return linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten(), options=options)


def table(name: str, shape: dict, **how) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for method, config in METHODS.items():
        rows[method] = activations(shape, config, **how)
        rows[method]["ratio"] = rows[method]["activations"] / rows["e2e"]["activations"]
        gib = rows[method]["activations"] / 2**30
        print(
            f"{name:32} {method:5} {gib:8.3f} GiB of activations, {rows[method]['ratio']:.3f} of e2e",
            flush=True,
        )
    return rows


def main() -> None:
    args = flags(__doc__, "activation_memory.json").parse_args()
    large = dict(fake=True, batch=4, tokens=1024)
    small = dict(batch=1, tokens=512)
    results = {
        "7B shape": table("7B shape", SHAPE_7B, **large),
        "7B shape, checkpointed": table("7B shape, checkpointed", SHAPE_7B, checkpointing=True, **large),
        "7B shape, TRL's head": table("7B shape, TRL's head", SHAPE_7B, trl=True, **large),
        "small, real float32": table("small, real float32", SHAPE_SMALL, fake=False, **small),
        "small, fake bfloat16": table("small, fake bfloat16", SHAPE_SMALL, fake=True, **small),
    }
    keep(args.output, results)


if __name__ == "__main__":
    main()
