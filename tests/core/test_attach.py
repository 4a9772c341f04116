"""The attached model against plain references: values, gradients, reach, and a clean detach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.instruments.memory import MemoryTracker
from lopt.losses.reconstruction import ReconstructionHead


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy, in the logits' own precision (transformers' is float32)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def reconstruction(model: nn.Module, head: nn.Module, hidden: Tensor, own: Tensor, batch: dict) -> Tensor:
    """Summed over real tokens, as `next_token`."""
    error = (head(hidden) - own) * batch["attention_mask"][..., None].to(hidden.dtype)
    return error.pow(2).sum() / error.shape[-1]


def next_token(model: nn.Module, head: nn.Module, hidden: Tensor, own: Tensor, batch: dict) -> Tensor:
    norm, lm_head = (copy.deepcopy(m).requires_grad_(False) for m in (model.model.norm, model.lm_head))
    first = batch["attention_mask"].cumsum(1) == 1  # no real token says what it is
    return task_loss(lm_head(norm(hidden + head(hidden))), batch["labels"].masked_fill(first, -100))


def joint_gradients(
    model: nn.Module, heads: nn.ModuleList, starts: list[int], batches, lam: float, local=reconstruction
) -> dict:
    """The reference: one forward and one backward of `task + λ · mean ℓ_b`, in plain PyTorch.

    Runs the decoder layer by layer from recorded arguments, cutting the graph by hand.
    """
    model, heads = copy.deepcopy(model), copy.deepcopy(heads)
    layers = model.model.layers
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    targets = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    objective: Tensor | float = 0.0
    for batch in batches:
        entered: list[Tensor] = []  # what enters each block; the graph is cut in front of all but the first

        def note(module, args, kwargs, entered=entered):
            entered.append(args[0])
            return ((args[0].detach() if len(entered) > 1 else args[0]), *args[1:]), kwargs

        handles = [layers[i].register_forward_pre_hook(note, with_kwargs=True) for i in (0, *starts)]
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        for handle in handles:
            handle.remove()
        objective = objective + task_loss(model.lm_head(hidden), batch["labels"]) / targets
        for head, hidden, own in zip(heads, entered[1:], entered[:-1], strict=True):
            if list(head.parameters()):
                count = sum(bool(list(h.parameters())) for h in heads)
                objective = objective + lam / count * local(model, head, hidden, own.detach(), batch) / tokens
    objective.backward()
    named = [*model.named_parameters(), *(("heads." + n, p) for n, p in heads.named_parameters())]
    return {name: parameter.grad for name, parameter in named}


def eager_gradients(model: nn.Module, handle, batches) -> dict:
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    targets = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        handle.loss_scale = int(batch["attention_mask"].sum()) / tokens
        logits = model(**batch).logits
        (task_loss(logits, batch["labels"]) / targets).backward()
    named = [*model.named_parameters(), *(("heads." + n, p) for n, p in handle.heads.named_parameters())]
    return {name: parameter.grad for name, parameter in named}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
def test_eager_gradients_equal_one_joint_backward(
    aux_loss: str, k: int, checkpointing: bool, dtype, tolerance: float
) -> None:
    model = tiny("llama", dtype)
    batches = [batch_of([9, 5, 2]), batch_of([4], seed=1), batch_of([3, 11], side="left", seed=2)]
    for batch in batches:
        batch["labels"][:, :3] = -100
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = attach(model, LoPTConfig(num_blocks=k, lambda_aux=10.0, aux_loss=aux_loss))
    starts = [block.start for block in handle.blocks][1:]
    plain = copy.deepcopy(model)
    plain.gradient_checkpointing_disable()  # before 5.23 hooks are recomputed too
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    local = {"recon": reconstruction, "next_token": next_token}[aux_loss]
    expected = joint_gradients(plain, handle.heads, starts, batches, 10.0, local)
    actual = eager_gradients(model, handle, batches)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        error = (gradient - actual[name]).norm() / gradient.norm().clamp(min=1e-30)
        assert gradient.norm() > 0, name
        assert error <= tolerance, f"{name}: {error:.1e}"


def test_forward_is_the_plain_models_bit_for_bit(architecture: str) -> None:
    model, batch = tiny(architecture), batch_of([9, 5, 2])
    prompt = batch_of([6, 6])["input_ids"]
    given = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=5)
    if hasattr(model.config, "output_router_logits"):  # transformers weighs cached tokens by the whole mask
        given["output_router_logits"] = False
    plain = {
        "train": model(**batch).logits.detach(),
        "eval": model.eval()(**batch).logits.detach(),
        "generate": model.generate(prompt, **given),
    }
    attach(model.train(), LoPTConfig(num_blocks=2))
    with_grad = model(**batch)
    assert with_grad.loss.requires_grad and torch.equal(with_grad.logits, plain["train"])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain["eval"])
    assert torch.equal(model.generate(prompt, **given), plain["generate"])


def test_every_parameter_learns_and_no_task_gradient_reaches_an_early_block(architecture: str) -> None:
    model, batch = tiny(architecture), batch_of([9, 5, 2])
    handle = attach(model, LoPTConfig(num_blocks=3))
    handle.loss_scale = 0.0  # only the task loss is left
    model(**batch).loss.backward()
    last = len(handle.blocks) - 1
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.ne(0).any())
        assert reached == (handle.blocks.owner(parameter) == last) or parameter.ndim == 1, name
        if handle.blocks.owner(parameter) < last and parameter.grad is not None:
            assert not parameter.grad.ne(0).any(), name
    model.zero_grad()
    handle.loss_scale = 1.0
    model(**batch).loss.backward()
    for index in range(len(handle.blocks)):
        for parameter in handle.block_parameters(index):
            assert parameter.grad is not None


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
def test_padding_never_counts(name: str, aux_loss: str) -> None:
    """Left, right and no padding give each token the same loss, whatever stands in the padding."""

    def losses(batch: dict) -> tuple[Tensor, float]:
        model = tiny(name)
        handle = attach(model, LoPTConfig(num_blocks=2, aux_loss=aux_loss))
        mask = batch["attention_mask"].bool()
        batch["input_ids"][~mask] = 55
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(batch["input_ids"], attention_mask=mask.long(), position_ids=positions).logits
        per_token = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        return per_token[(mask[:, 1:] & mask[:, :-1]).flatten()], handle.local_losses()[0].item()

    right, local = losses(batch_of([9, 4]))
    left, local_left = losses(batch_of([9, 4], side="left"))
    full = batch_of([9, 4])
    alone = [losses({k: v[i : i + 1, :n].clone() for k, v in full.items()}) for i, n in enumerate((9, 4))]
    torch.testing.assert_close(right, left, rtol=0, atol=1e-5)
    torch.testing.assert_close(right, torch.cat([x for x, _ in alone]), rtol=0, atol=1e-5)
    assert local == pytest.approx(local_left, rel=1e-5)
    assert local == pytest.approx((9 * alone[0][1] + 4 * alone[1][1]) / 13, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_detach_leaves_the_plain_model(name: str) -> None:
    model, reference, batch = tiny(name), tiny(name), batch_of([9, 5, 2])
    handle = attach(model, LoPTConfig(num_blocks=3))
    model(**batch).loss.backward()
    model(**batch)  # without a backward
    model.zero_grad()
    assert handle.detach() is model
    for each in (model, reference):
        each(**batch).loss.backward()
    plain = dict(reference.named_parameters())
    assert dict(model.named_parameters()).keys() == plain.keys()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[key].grad), key
    torch.optim.SGD(model.parameters()).step()  # is not refused
    attach(model)  # and it can be attached again


def test_each_blocks_graph_is_gone_before_the_next_one_starts() -> None:
    model = tiny("llama")
    handle = attach(model, LoPTConfig(num_blocks=4))
    seen: list[bool] = []
    for block in handle.blocks[1:]:
        layer = handle.blocks.layers[block.start]
        layer.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].grad_fn is None and not args[0].requires_grad)
        )
        earlier = [p for _, p in handle.blocks.parameters(model, block.index - 1)]
        layer.register_forward_pre_hook(
            lambda m, a, ps=earlier: seen.append(all(p.grad is not None for p in ps))
        )
    model(**batch_of([5, 3]))
    assert seen == [True] * 6


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_are_balanced_by_their_own_block(name: str, checkpointing: bool) -> None:
    """Only the balancing loss acts; the reference takes it block by block from the plain model."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model, batch = tiny(name), batch_of([9, 5])
    if checkpointing:
        model.gradient_checkpointing_enable()
    plain = copy.deepcopy(model)
    handle = attach(model, LoPTConfig(num_blocks=2, lambda_aux=0.0))
    output = model(**batch)
    output.loss.backward()

    logits = plain(**batch).router_logits
    assert len(output.router_logits) == len(logits) == 4
    own = load_balancing_loss_func(logits[:2], 4, 2, batch["attention_mask"])
    (0.1 * 2 / 4 * own).backward()
    for layer in (0, 1):
        router = f"model.layers.{layer}.mlp.gate.weight"
        expected, actual = plain.get_parameter(router).grad, model.get_parameter(router).grad
        assert expected.norm() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)
    assert torch.allclose(output.aux_loss, plain(**batch).aux_loss)
    assert handle.local_losses()[0] > 0


def test_a_frozen_block_adds_nothing_to_the_next_ones_balancing_loss() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model, batch = tiny("mixtral"), batch_of([9, 5])
    plain = copy.deepcopy(model)
    attach(model, LoPTConfig(num_blocks=3, frozen_blocks=1, lambda_aux=0.0))
    model(**batch)
    logits = plain(**batch).router_logits[2:3]  # blocks of 2, 1 and 1 layers
    (0.1 * 1 / 4 * load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])).backward()
    router = "model.layers.2.mlp.gate.weight"
    torch.testing.assert_close(model.get_parameter(router).grad, plain.get_parameter(router).grad)


def test_a_peft_model_trains_its_adapters_locally() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama-tied"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    logits = model(**batch_of([5, 3])).logits
    handle = attach(model, LoPTConfig(num_blocks=2))
    output = model(**batch_of([5, 3]))
    output.loss.backward()
    assert torch.equal(output.logits, logits)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    assert all(p.grad is not None for p in trainable.values())
    assert {handle.blocks.owner(p) for p in trainable.values()} == {0, 1}


@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
def test_head_warm_up_learns_and_touches_nothing_else(aux_loss: str) -> None:
    model, batches = tiny("llama"), [batch_of([9, 5], seed=s) for s in range(3)]
    handle = attach(model, LoPTConfig(num_blocks=3, aux_loss=aux_loss))
    model.enable_input_require_grads()  # as trainers do for gradient checkpointing
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    history = handle.warm_up_heads(batches, steps=40, learning_rate=1e-2)
    assert len(history) == 40 and len(history[0]) == 2
    assert all(last < 0.98 * first for first, last in zip(history[0], history[-1], strict=True))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *handle.heads.parameters()])
    with pytest.raises(ValueError, match="at least one batch"):
        handle.warm_up_heads([])


def test_parameter_groups_cover_everything_once() -> None:
    model = tiny("gemma3")
    handle = attach(model, LoPTConfig(num_blocks=3))
    groups = handle.parameter_groups(learning_rate=2e-5, weight_decay=0.1)
    grouped = [id(p) for g in groups for p in g["params"]]
    every = [*model.parameters(), *handle.heads.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in every)
    assert groups[0]["lr"] == 2e-5 and {g["lr"] for g in groups if g["block"] < 2} == {0.1 * 2e-5}
    assert {g["lr"] for g in handle.parameter_groups(2e-5, lr_k1=1e-5)} == {2e-5, 1e-5}
    assert all(p.ndim >= 2 for g in groups if g["weight_decay"] for p in g["params"])


def test_frozen_and_freeze_leave_alone_what_they_say() -> None:
    model = tiny("gemma3")
    handle = attach(model, LoPTConfig(method="frozen", num_blocks=2))
    model(**batch_of([5, 3])).loss.backward()
    assert len(handle.heads) == 0 and handle.block_parameters(0) == []
    assert all((p.grad is not None) == (handle.blocks.owner(p) == 1) for p in model.parameters())
    handle.detach()
    assert all(p.requires_grad for p in model.parameters())
    handle = attach(model, LoPTConfig(tied_embeddings="freeze"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad
    model(**batch_of([5, 3])).loss.backward()


@pytest.mark.parametrize("method", ["e2e", "lora"])
def test_without_a_cut_nothing_is_added(method: str) -> None:
    model, reference, batch = tiny("gemma3"), tiny("gemma3"), batch_of([5, 3])
    handle = attach(model, LoPTConfig(method=method, num_blocks=4))
    for each in (model, reference):
        each(**batch).loss.backward()
    assert len(handle.blocks) == 1 and len(handle.heads) == 0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_one_block_is_end_to_end() -> None:
    model, reference, batch = tiny("gemma3"), tiny("gemma3"), batch_of([5, 3])
    attach(model, LoPTConfig(num_blocks=1))
    for each in (model, reference):
        each(**batch).loss.backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_mistakes_are_named() -> None:
    model = tiny("llama")
    attach(model)
    with pytest.raises(ValueError, match="attached already"):
        attach(model)
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    attach(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**batch_of([5, 3]))
    model = tiny("llama")
    attach(model)
    with pytest.raises(ValueError, match="2-D attention mask"):
        model(input_ids=batch_of([4])["input_ids"], attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        attach(nn.Linear(2, 2))


@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
def test_frozen_blocks_are_left_out(aux_loss: str) -> None:
    """The first of three blocks rests; the others learn what they learn otherwise."""
    model, batches = tiny("llama", torch.float64), [batch_of([9, 5, 2]), batch_of([4], seed=1)]
    plain = copy.deepcopy(model)
    handle = attach(model, LoPTConfig(num_blocks=3, aux_loss=aux_loss, frozen_blocks=1))
    assert list(handle.learning) == [1] and handle.block_parameters(0) == []
    starts = [block.start for block in handle.blocks][1:]
    local = {"recon": reconstruction, "next_token": next_token}[aux_loss]
    expected = joint_gradients(plain, handle.heads, starts, batches, 10.0, local)
    actual = eager_gradients(model, handle, batches)
    frozen = {name for name, _ in handle.blocks.parameters(model, 0)}
    for name, gradient in expected.items():
        if name in frozen:
            assert actual[name] is None
        else:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-14)
    assert len(handle.local_losses()) == 1
    assert len(handle.warm_up_heads(batches, steps=2)[0]) == 1
    groups = handle.parameter_groups(1e-3)
    assert {g["block"] for g in groups} == {1, 2} and all(g["params"] for g in groups)
    handle.detach()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"`frozen_blocks` must be <= 0 .* `method` frozen"):
        attach(tiny("llama"), LoPTConfig(num_blocks=2, frozen_blocks=1))


def test_next_token_learns_in_every_architecture_and_needs_tokens(architecture: str) -> None:
    model, batch = tiny(architecture), batch_of([9, 5, 2])
    plain = model(**batch).logits.detach()
    handle = attach(model, LoPTConfig(num_blocks=3, aux_loss="next_token"))
    output = model(**batch)
    output.loss.backward()
    assert torch.equal(output.logits, plain)
    for index in (0, 1):
        assert any(bool(p.grad.ne(0).any()) for p in handle.block_parameters(index))
    whole = [x.item() for x in handle.local_losses()]
    labels = batch["labels"].clone()
    labels[:, :6] = -100
    model(**batch | {"labels": labels})
    assert all(part.item() < x for part, x in zip(handle.local_losses(), whole, strict=True))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])  # all real tokens count again
    assert [x.item() for x in handle.local_losses()] == pytest.approx(whole)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with pytest.raises(ValueError, match=r"`aux_loss` next_token .* `aux_loss` recon"):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
def test_heads_are_float32_beside_bfloat16_weights(aux_loss: str) -> None:
    model = tiny("llama", torch.bfloat16)
    handle = attach(model, LoPTConfig(aux_loss=aux_loss))
    model(**batch_of([5, 3])).loss.backward()
    assert {p.dtype for p in handle.heads.parameters()} == {torch.float32}
    assert handle.local_losses()[0].dtype == torch.float32
    assert isinstance(handle.heads[0], ReconstructionHead)


def test_a_plain_loop_in_eval_mode_still_learns_locally() -> None:
    model = tiny("llama").eval()  # what from_pretrained returns
    handle = attach(model)
    model(**batch_of([5, 3]))
    assert all(p.grad is not None for p in handle.block_parameters(0))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_resting_early_blocks_have_no_gradient_and_change_nothing(name: str, checkpointing: bool) -> None:
    """Between the steps of `local_every` the last block learns exactly what it learns otherwise."""
    model, batch = tiny(name), batch_of([9, 5, 2])
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = attach(model, LoPTConfig(num_blocks=3))
    expected = model(**batch)
    expected.loss.backward()
    last = {n: p.grad.clone() for n, p in handle.blocks.parameters(model, 2)}
    model.zero_grad()
    handle.heads.zero_grad()
    handle.learns_locally = False
    actual = model(**batch)
    actual.loss.backward()
    assert torch.equal(actual.logits, expected.logits) and not handle.local_losses()
    for name_, gradient in last.items():
        torch.testing.assert_close(model.get_parameter(name_).grad, gradient, rtol=1e-6, atol=1e-9)
    for index in (0, 1):
        assert all(p.grad is None for p in handle.block_parameters(index))
    handle.learns_locally = True
    model(**batch).loss.backward()
    assert len(handle.local_losses()) == 2


def test_gradients_are_on_again_after_an_error() -> None:
    model = tiny("llama")
    handle = attach(model, LoPTConfig(num_blocks=2))
    handle.learns_locally = False

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    hook = handle.blocks.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(**batch_of([4]))
    assert torch.is_grad_enabled()
    hook.remove()
    model(**batch_of([4])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_casts_of_weights_go_with_their_block() -> None:
    """Autocast keeps bfloat16 copies of weights until it ends, which is after all blocks of a forward."""
    model = tiny("llama", num_hidden_layers=8)
    handle = attach(model, LoPTConfig(num_blocks=8))
    live: list[int] = []
    with MemoryTracker(model, handle.heads) as tracker:
        handle.after_local_backward = lambda index: live.append(tracker.current.activations)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch_of([8, 8]))
    casts = sum(2 * p.numel() for p in handle.blocks.layers[0].parameters() if p.ndim > 1)
    assert live[-1] - live[1] < casts


def test_the_task_gradient_passes_through_a_frozen_top() -> None:
    """Layers in the middle have the gradients of the plain model, all others none."""
    plain, model = tiny("llama", num_hidden_layers=6), tiny("llama", num_hidden_layers=6)
    model.load_state_dict(plain.state_dict())
    batch = batch_of([5, 3])
    plain(**batch).loss.backward()
    handle = attach(model, LoPTConfig(method="frozen", block_boundaries=[2], frozen_top=2))
    model(**batch).loss.backward()
    middle = {f"model.layers.{index}" for index in (2, 3)}
    for name, parameter in model.named_parameters():
        if name.rpartition(".layers.")[0] and ".".join(name.split(".")[:3]) in middle:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
    handle.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_top_keeps_a_shared_embedding() -> None:
    model = tiny("llama-tied")
    attach(model, LoPTConfig(num_blocks=2, frozen_top=1, head_warmup_steps=0))
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding and not embedding.requires_grad


def test_a_frozen_top_leaves_a_layer_of_the_last_block() -> None:
    with pytest.raises(ValueError, match=r"`frozen_top` must be < 2, the layers of the last block"):
        attach(tiny("llama"), LoPTConfig(num_blocks=2, frozen_top=2))
