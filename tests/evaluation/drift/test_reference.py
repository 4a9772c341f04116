"""Drift against closed-form cases, numpy and hooks written out by hand."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tiny
from lopt import LoPTConfig, attach
from lopt.evaluation.drift.reference import LayerDrift, Reference, compare_states, drift
from small_model import byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 2


def model_of(name: str = "llama", **changes: object):
    return tiny(name, vocab_size=len(byte_tokenizer()), **changes).eval()


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rotation_scale_and_shift_leave_cka_at_one() -> None:
    base = gaussian(50, 8)
    rotation = torch.linalg.qr(gaussian(8, 8, 1)).Q
    moved = compare_states("x", base, 3 * base @ rotation + 7)
    assert moved.cka == pytest.approx(1, abs=1e-12)
    assert moved.cosine < 0.9 and moved.relative_l2 > 1
    doubled = compare_states("x", base, 2 * base)
    assert doubled.cka == pytest.approx(1, abs=1e-12) and doubled.cosine == pytest.approx(1, abs=1e-12)
    assert doubled.relative_l2 == pytest.approx(1, abs=1e-12)
    assert doubled.variance_tuned == pytest.approx(4 * doubled.variance_base)
    assert doubled.norm_tuned == pytest.approx(2 * doubled.norm_base)
    assert compare_states("x", base, -base).cosine == pytest.approx(-1, abs=1e-12)


def test_independent_states_are_not_similar() -> None:
    far = compare_states("x", gaussian(4000, 4), gaussian(4000, 4, 1))
    assert far.cka < 0.01 and abs(far.cosine) < 0.05
    assert far.relative_l2 == pytest.approx(math.sqrt(2), abs=0.05)


def test_by_hand() -> None:
    """B' = [[1, 0], [-1, 0]], T' = [[1, 1], [-1, -1]]: T'ᵀB' = [[2, 0], [2, 0]], B'ᵀB' = [[2, 0], [0, 0]],
    T'ᵀT' = [[2, 2], [2, 2]], so CKA = 8 / (2 · 4) = 1."""
    base, tuned = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    found = compare_states("x", base, tuned)
    expected = LayerDrift("x", 0.5, 1.0, 0.5, 1.0, 1.0, math.sqrt(2), 1.0, math.sqrt(0.5), 1.0)
    for name, value in vars(expected).items():
        assert getattr(found, name) == (value if name == "name" else pytest.approx(value, abs=1e-15)), name
    # B' = the line, T' = the cross: T'ᵀB' = [[2, 0], [0, 0]], ‖B'ᵀB'‖ = 2, ‖T'ᵀT'‖ = √8: CKA = 4 / (2√8)
    line = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert compare_states("x", line, cross).cka == pytest.approx(1 / math.sqrt(2), abs=1e-15)
    still = compare_states("x", torch.ones(3, 2), torch.ones(3, 2))
    assert math.isnan(still.cka) and still.relative_l2 == 0 and still.cosine == pytest.approx(1)


def test_against_numpy_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    b, t = gaussian(101, 6) + 100, gaussian(101, 6, 1) * 2
    t[:, :3] += b[:, :3]
    monkeypatch.setattr("lopt.evaluation.drift.reference.CHUNK", 17)
    found = compare_states("x", b.float(), t.float())
    x, y = b.float().double().numpy(), t.float().double().numpy()
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))  # by tokens here, by channels there
    cka = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    expected = {
        "mean_base": x.mean(), "mean_tuned": y.mean(), "variance_base": x.var(0).mean(),
        "variance_tuned": y.var(0).mean(), "norm_base": norms[0].mean(), "norm_tuned": norms[1].mean(),
        "relative_l2": np.linalg.norm(y - x) / np.linalg.norm(x),
        "cosine": ((x * y).sum(1) / norms[0] / norms[1]).mean(), "cka": cka,
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_a_model_against_itself_has_not_moved(architecture: str) -> None:
    model = model_of(architecture)
    found = drift(model, model, byte_tokenizer(), [TEXT], tokens=60, window=16)
    assert found.tokens == 60 and found.boundaries == []
    assert [layer.name for layer in found.layers] == ["embedding", *(f"layer {i}" for i in range(4))]
    for layer in found.layers:
        assert layer.relative_l2 == 0 and layer.mean_base == layer.mean_tuned
        assert layer.variance_base == layer.variance_tuned > 0 and layer.norm_base == layer.norm_tuned > 0
        assert layer.cosine == pytest.approx(1, abs=1e-12) and layer.cka == pytest.approx(1, abs=1e-12)
    assert set(found.weights.values()) == {0.0}
    assert set(found.weights) == {
        "embedding", *(f"layer {i}" for i in range(4)), "final norm", "head", "block 1", "all",
        "norms and biases",
    }  # fmt: skip


def test_states_are_those_of_each_window_alone() -> None:
    """Neither padding nor the first special token counts; the last states are those before the norm."""
    base, tuned, tokenizer = model_of(), model_of(seed=1).train(), byte_tokenizer()
    random = torch.get_rng_state()
    found = drift(base, tuned, tokenizer, [TEXT, "short"], tokens=40, window=16, batch_size=3)
    assert tuned.training and torch.equal(torch.get_rng_state(), random)
    assert found.tokens == 40 + 5
    ids = tokenizer(TEXT)["input_ids"]
    rows = [ids[0:16], ids[16:32], ids[32:40], tokenizer("short")["input_ids"]]
    states = [[] for _ in range(2)]
    for model, parts in zip((base, tuned), states, strict=True):
        last: list[Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        for row in rows:
            with torch.no_grad():
                model(input_ids=torch.tensor([[tokenizer.bos_token_id, *row]]))
            parts.append(last[-1][0, 1:])
        hook.remove()
    expected = compare_states("layer 3", *(torch.cat(parts) for parts in states))
    for name, value in vars(expected).items():
        assert getattr(found.layers[-1], name) == (
            pytest.approx(value, rel=1e-5) if name != "name" else value
        )


def test_only_what_moved_has_drifted() -> None:
    base = model_of("llama-tied")
    tuned = copy.deepcopy(base)
    handle = attach(tuned, LoPTConfig(block_boundaries=[1, 3]))
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight *= 1.5
        tuned.lm_head.weight += 1
    found = drift(base, tuned, byte_tokenizer(), [TEXT], tokens=48)
    assert found.boundaries == [1, 3] and handle.hooks
    assert [layer.relative_l2 > 0 for layer in found.layers] == [False, False, False, True, True]
    moved = {name for name, value in found.weights.items() if value}
    assert moved == {"layer 2", "head", "block 2", "block 3", "all"}
    layer, head = base.model.layers[2], base.lm_head.weight
    whole = sum(p.square().sum() for p in layer.parameters() if p.ndim > 1)
    apart = layer.mlp.up_proj.weight.square().sum() / 4
    assert found.weights["layer 2"] == pytest.approx((apart / whole).sqrt().item(), rel=1e-6)
    assert found.weights["head"] == pytest.approx(math.sqrt(head.numel()) / head.norm().item(), rel=1e-6)
    ends = [head, *(p for p in base.model.layers[3].parameters() if p.ndim > 1)]
    assert found.weights["block 3"] == pytest.approx(
        math.sqrt(head.numel() / sum(p.square().sum() for p in ends).item()), rel=1e-6
    )
    handle.detach()
    plain = Reference.of(base, byte_tokenizer(), [TEXT], tokens=48).drift(tuned, boundaries=[1, 3])
    assert plain.to_dict() == found.to_dict()
    assert json.loads(json.dumps(plain.to_dict(), allow_nan=False))["boundaries"] == [1, 3]


def test_the_reference_is_the_base_as_it_was() -> None:
    """One reference serves many tuned models, also the base itself after it was trained."""
    model, tokenizer = model_of(), byte_tokenizer()
    before = copy.deepcopy(model)
    reference = Reference.of(model, tokenizer, [TEXT], tokens=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    first = reference.drift(model, tokenizer)
    assert first.weights["all"] == pytest.approx(0.01, rel=1e-4)
    assert reference.drift(before).layers[-1].relative_l2 == 0
    assert reference.drift(model) == first == drift(before, model, tokenizer, [TEXT], tokens=32)


def test_adapters_count_as_the_weights_they_make(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base, tokenizer = model_of(), byte_tokenizer()
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    reference = Reference.of(base, tokenizer, [TEXT], tokens=32)
    live = reference.drift(adapted, boundaries=[2])
    merged = reference.drift(adapted.merge_and_unload(), boundaries=[2])
    assert live.weights == pytest.approx(merged.weights, rel=1e-5) and live.weights["layer 0"] > 0.01
    assert live.weights["head"] == live.weights["embedding"] == 0
    assert live.layers[-1].cka == pytest.approx(merged.layers[-1].cka, rel=1e-5)


def test_what_cannot_be_compared() -> None:
    base, tokenizer = model_of(), byte_tokenizer()
    reference = Reference.of(base, tokenizer, [TEXT], tokens=32)
    with pytest.raises(ValueError, match="4 layers of 32 channels and 2 layers of 32"):
        reference.drift(model_of(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shapes \[.*\] and \[300, 32\]"):
        reference.drift(tiny("llama", vocab_size=300))
    with pytest.raises(ValueError, match="only one of them has a weight"):
        reference.drift(model_of("qwen3"))
    with pytest.raises(ValueError, match="`block_boundaries` must be < 4"):
        reference.drift(base, boundaries=[9])
    other = byte_tokenizer()
    other.bos_token = other.eos_token
    with pytest.raises(ValueError, match="tokenizers read the text as different tokens"):
        reference.drift(base, other)
    with pytest.raises(ValueError, match="`window`: the model has 64 positions"):
        Reference.of(base, tokenizer, [TEXT], window=100)
    with pytest.raises(ValueError, match="too short"):
        Reference.of(base, tokenizer, [""])
