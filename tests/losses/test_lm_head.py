"""The fused LM head against the plain one, against TRL's own, and by what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from conftest import batch_of, tiny
from lopt import compat
from lopt.instruments.memory import MemoryTracker
from lopt.losses.lm_head import lean_fused_head
from lopt.planning.measure import _product_in_place

CPU = torch.device("cpu")
OUTPUTS = ("log_probs", "entropy", "is_top1")


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any, lean: bool = True
) -> list[Tensor]:
    """Log-probabilities, entropy, whether the target is the first, and gradients of a loss of all."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    inputs = leaves if bias is not None else [*leaves, None]
    if lean:
        from trl.trainer import utils

        with lean_fused_head(hidden.device):
            out = utils._ChunkedLogProbFunction.apply(*inputs, targets, *options, OUTPUTS)
    else:
        out = ChunkedLogProbFunction.apply(*inputs, targets, *options, OUTPUTS)
    loss_of(out[0], out[1]).backward()
    return [out[0], out[1], out[4], *(leaf.grad for leaf in leaves)]


def loss_of(log_probs: Tensor, entropy: Tensor) -> Tensor:
    outer = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)
    return (outer * log_probs).sum() + (outer.flip(0) * entropy).sum()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """More tokens than one tile has, and a last part of the vocabulary that is smaller than the others."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(4200, 16), torch.randn(75, 16) / 4, torch.randn(75)
    return hidden, weight, bias, torch.randint(75, (4200,))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_those_of_a_plain_head(inputs: tuple, softcap: float | None) -> None:
    *tensors, targets = inputs
    found = run(*tensors, targets, 0.7, 32, softcap, 1.3)

    leaves = [x.double().requires_grad_() for x in tensors]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * 1.3
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / 0.7
    logs = logits.log_softmax(-1)
    wanted = [logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)]
    loss_of(wanted[0], wanted[1]).backward()
    for a, b in zip(found[:2], wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], logits.argmax(-1) == targets)
    for a, leaf in zip(found[3:], leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(a.double(), leaf.grad, rtol=1e-4, atol=1e-5 * leaf.grad.abs().max().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_same_to_the_bit_as_trl(inputs: tuple, dtype: str, bias: bool) -> None:
    given = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    hidden, weight, offset = (x.to(given) for x in inputs[:3])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        both = [
            run(hidden, weight, offset if bias else None, inputs[3], 0.7, 32, 3.0, 1.3, lean=lean)
            for lean in (True, False)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_tied_model_with_labels_learns_as_with_its_own_loss() -> None:
    """Only some positions have a label; the matrix is the embedding as well."""
    batch = batch_of([9, 5, 2])
    batch["labels"][:, :3] = -100
    model = tiny("llama", tie_word_embeddings=True)
    expected = model(**batch).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    add_fused_lm_head(model, outputs=OUTPUTS)
    with lean_fused_head(CPU):
        out = model(**batch, fused_lm_head=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("needed", ["input", "matrix"])
def test_only_what_learns_gets_a_gradient(inputs: tuple, needed: str) -> None:
    hidden, weight, _, targets = inputs
    (hidden if needed == "input" else weight).requires_grad_()
    with lean_fused_head(CPU):
        from trl.trainer import utils

        out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32)
    out[0].sum().backward()
    assert (hidden.grad is None) == (needed == "matrix") and (weight.grad is None) == (needed == "input")
    wanted = cross_entropy(hidden.detach() @ weight.detach().T, targets, reduction="sum")
    torch.testing.assert_close(-out[0].sum().detach(), wanted)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_more_than_a_part_of_the_gradient_is_in_float32(device: str) -> None:
    """The exact peak of the backward for the head of Qwen2.5-7B and 4,096 tokens, on fake tensors."""
    tokens, width, vocabulary, part = 4096, 3584, 152_064, 32_768
    as_on = compat.fused_head_as_on_a_gpu(_product_in_place)
    with compat.fake_tensors(), as_on if device == "cuda" else torch.enable_grad(), lean_fused_head(CPU):
        from trl.trainer import utils

        hidden = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.long)
        with MemoryTracker() as tracker:
            out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, part)
            loss = out[0].sum()
            tracker.reset_peak()
            loss.backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    inputs = gradients + 8 * tokens
    sums = 4 * width * (tokens + part)
    tile = 2 * tokens * part
    small = 2**21  # of one number for each token
    if device == "cuda":
        assert 0 <= tracker.peak.total - (inputs + 2 * weight.numel() + sums + tile) <= small
    else:
        assert tracker.peak.total <= inputs + 2 * weight.numel() + 2 * sums + 2 * tile + small
