"""Hooks and their state: what a forward leaves behind, and which local gradients are never stepped."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach


def test_local_gradients_of_a_forward_without_backward_are_not_stepped() -> None:
    """Validation with gradients on: the next step raises, unless the gradients were cleared in between."""
    model, batch = tiny("llama"), batch_of([6, 4])
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))
    before = copy.deepcopy(model.state_dict())

    def train() -> None:
        model(**batch).loss.backward()
        optimizer.step()

    model(**batch)
    with pytest.raises(ValueError, match=r"1 of the forwards .* torch.no_grad"):
        train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none)
        train()
        optimizer.zero_grad(set_to_none)
        model(**batch)
    optimizer.zero_grad()
    with torch.no_grad():
        model(**batch)
    train()


def test_a_loss_of_two_forwards_and_accumulation_are_stepped() -> None:
    model, handle_free = tiny("llama"), tiny("llama")
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))
    (model(**batch_of([6, 4])).loss + model(**batch_of([5], seed=1)).loss).backward()
    model(**batch_of([3], seed=2)).loss.backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), handle_free.parameters(), strict=True)]
    assert all(moved)


def test_an_error_in_the_forward_leaves_no_state_and_no_step() -> None:
    model, batch = tiny("llama"), batch_of([4])
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    hook = handle.blocks.layers[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(**batch)
    hook.remove()
    assert handle._boundaries._forward is None and handle._boundaries.call == {}
    with pytest.raises(ValueError, match="no backward"):
        optimizer.step()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def test_ctrl_c_in_a_forward_leaves_no_state_and_no_step() -> None:
    model, batch = tiny("llama"), batch_of([4])
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    hook = handle.blocks.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    with torch.no_grad():
        model(**batch)
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="no backward"):
        optimizer.step()


def test_the_backward_of_any_loss_behind_the_last_boundary_counts() -> None:
    model, batch = tiny("llama"), batch_of([4])
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))
    model(**batch, output_hidden_states=True).hidden_states[-2].sum().backward()
    optimizer.step()


def test_a_warm_up_after_a_cleared_forward() -> None:
    model, batch = tiny("llama"), batch_of([4])
    handle = attach(model)
    optimizer = torch.optim.SGD(handle.parameter_groups(learning_rate=0.1))
    model(**batch)
    optimizer.zero_grad()
    assert len(handle.warm_up_heads([batch], steps=2)) == 2


def test_an_attached_model_can_be_copied_and_pickled() -> None:
    model, batch = tiny("llama"), batch_of([4])
    attach(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(**batch).loss.backward()
        assert torch.equal(copied(**batch).logits, model(**batch).logits)


def test_a_dropped_model_is_freed() -> None:
    model = tiny("llama")
    attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_recomputed_layer_runs_its_hooks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 5.23, and models from the hub, checkpoint a layer's call instead of its forward."""

    def checkpointed_call(layer, *args, **kwargs):
        call = functools.partial(super(MixtralDecoderLayer, layer).__call__, **kwargs)
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(call, *args)
        return call(*args)

    batch, gradients, entered = batch_of([6, 4]), [], []
    for checkpointing in (False, True):
        model = tiny("mixtral")
        attach(model, LoPTConfig(num_blocks=3))
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        if checkpointing:
            plain = getattr(MixtralDecoderLayer.forward, "__wrapped__", MixtralDecoderLayer.forward)
            monkeypatch.setattr(MixtralDecoderLayer, "forward", plain)
            monkeypatch.setattr(MixtralDecoderLayer, "__call__", checkpointed_call)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert entered == [0, 1, 2, 3] * 4
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    assert not any("forward" in vars(layer) for layer in model.model.layers)
