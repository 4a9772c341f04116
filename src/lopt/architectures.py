"""Where a causal LM keeps its parts: the decoder, its layers, what surrounds them.

No names of modules are known here: a decoder's layers are the one list of modules that it has, and what feeds
the first layer and what follows the last one shows when it runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lopt.compat import masks_by_shape

LAYERS: dict[str, str] = {}
"""Name of a decoder's list of layers, by `config.model_type`, where it has several lists of modules."""


@dataclass(frozen=True)
class Decoder:
    """A decoder and its parts, in the order in which a hidden state passes through them.

    Attributes:
        module: The decoder itself.
        front: Every part that runs before the first layer: token and position embeddings and their norms.
        layers: The layers.
        tail: What runs after the last layer: the final norm, and what follows it. A part that runs at another
            time, or never, is in neither.
        others: Of a model that takes pictures or sound as well, what text never runs through.
        layer_output: Puts a hidden state into the form in which the layers return it: alone or in a tuple.
    """

    module: nn.Module
    front: list[nn.Module]
    layers: list[nn.Module]
    tail: list[nn.Module]
    others: list[nn.Module]
    layer_output: Callable[[Tensor], Any]


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM itself, taken out of a PEFT wrapper if there is one.

    Raises:
        ValueError: `model` is not a model of transformers.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    unwrapped = model if unwrap is None else unwrap()
    if not isinstance(unwrapped, PreTrainedModel):
        raise ValueError(
            f"{type(unwrapped).__name__} is not a Hugging Face model: "
            "pass what AutoModelForCausalLM.from_pretrained returns"
        )
    return unwrapped


def compute_device(model: nn.Module) -> torch.device:
    """Return the device that `model` computes on; offloaded weights may be elsewhere."""
    base: Any = base_model(model)
    handle = getattr(base, "_lopt", None)
    return base.device if handle is None else handle.device


def position_limit(model: nn.Module) -> int | None:
    """Return how many positions a model has a table of; None if it computes positions, without an end.

    A table is an embedding beside that of the tokens, or a buffer for positions, as long as the config says.
    """
    base: Any = base_model(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tokens = base.get_input_embeddings()
    for module in base.modules():
        # Some tables begin with a few rows for padding.
        if isinstance(module, nn.Embedding) and module is not tokens and 0 <= len(module.weight) - limit <= 2:
            return limit
        if any("pos" in name and limit in b.shape for name, b in module.named_buffers(recurse=False)):
            return limit
    return None


def check_positions(model: nn.Module, tokens: int, fix: str) -> None:
    """Raise a ValueError if a row of `tokens` tokens is longer than the model's table of positions.

    Args:
        fix: What to do about it, with `{limit}` where the number of positions goes.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"a row of {tokens} tokens is longer than {type(base_model(model)).__name__}'s table of {limit} "
            f"positions: {fix.format(limit=limit)}"
        )


def find_decoder(model: PreTrainedModel, is_local: bool = False) -> Decoder:
    """Return the decoder of a causal LM.

    Args:
        model: It may be on the meta device.
        is_local: Refuse as well what local losses cannot work with.

    Raises:
        ValueError: The model is an encoder, has no LM head or an unknown layout, or its decoder does not run
            its layers once each, in order, on token ids alone. With `is_local`, its layers are given more
            than one hidden state with a gradient, through which a later block's would reach an earlier one.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a decoder-only causal LM with a head: use a ...ForCausalLM model")
    # Some models give another module as their decoder, or a causal LM, so others are looked at as well.
    given = model.get_decoder()
    inner = [part for part in given.children() if isinstance(part, PreTrainedModel)]
    for decoder in (given, model.base_model, *model.children(), *inner):
        layers = _layers(decoder, config)
        if layers is not None:
            break
    else:
        raise ValueError(
            f"{name} keeps its layers in an unknown place. If it is a decoder-only model, add one line: "
            f"lopt.architectures.LAYERS['{config.model_type}'] = \"name of the decoder's list of layers\""
        )
    others = [] if config is model.config else _beside(model, decoder)
    order, inputs, form = _run(model if others else decoder, decoder, layers, others, is_local)
    if is_local:
        _check_inputs(name, config, inputs)
    first, last = order.index(layers[0]), order.index(layers[-1])
    front: list[nn.Module] = []
    tail: list[tuple[int, nn.Module]] = []
    for part in _parts(decoder, layers):
        inside, weightless = set(part.modules()), next(part.parameters(), None) is None
        times = [time for time, module in enumerate(order) if module in inside]
        if times and times[-1] > last and (times[0] > last or weightless):
            tail.append((times[-1], part))
        elif (times and times[-1] < first) or weightless:
            front.append(part)
    final = [part for _, part in sorted(tail, key=lambda pair: pair[0])]
    return Decoder(decoder, front, layers, final, [part for part in others if part not in order], form)


def _beside(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """Return the modules around a decoder, but for the LM head."""
    around: list[nn.Module] = []
    module: nn.Module = model
    while module is not decoder:
        parts = list(module.children())
        inner = next(part for part in parts if decoder in part.modules())
        around += [part for part in parts if part not in (inner, model.get_output_embeddings())]
        module = inner
    return around


def _layers(decoder: nn.Module, config: Any) -> list[nn.Module] | None:
    """Return the layers of a decoder: its one list of modules, or the one as long as its config says."""
    lists = {n: list(m) for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m)}
    named = LAYERS.get(config.model_type)
    if named is not None:
        return lists.get(named)
    if len(lists) > 1:
        lists = {n: m for n, m in lists.items() if len(m) == config.num_hidden_layers}
    return next(iter(lists.values())) if len(lists) == 1 else None


def _parts(decoder: nn.Module, layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield what a decoder is made of but its layers; of mere containers what they hold."""
    for child in decoder.children():
        held = list(child.children()) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
        yield from (part for part in held if part not in layers)


def _run(
    model: nn.Module, decoder: nn.Module, layers: list[nn.Module], others: list[nn.Module], gradients: bool
) -> tuple[list[nn.Module], list[list[Any]], Callable[[Tensor], Any]]:
    """Return modules in the order in which a forward calls them, what each layer is given, and returns.

    The forward is on two tokens, with layers that return what they are given. So it costs next to nothing,
    runs on the meta device as well, and changes no weight and no random state.

    Args:
        model: What is run: the decoder, or the model around it.
        decoder: Its parts are looked at.
        layers: Its layers.
        others: Modules that are looked at as well.
        gradients: Whether they are enabled.

    Raises:
        ValueError: It fails, or does not call each layer once, in order.
    """
    watched = {module: None for part in _parts(decoder, layers) for module in part.modules()}
    watched |= dict.fromkeys([*layers, *others])
    elsewhere = any(parameter.is_meta for parameter in model.parameters())
    device = torch.device("meta") if elsewhere else next(decoder.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    # On the meta device some decoders look at a mask's values, and others, without one, at those of the ids.
    calls_with = (dict(input_ids=ids), dict(input_ids=ids, attention_mask=torch.ones_like(ids)))
    reason = ""
    for given, form in itertools.product(calls_with, _OUTPUTS):
        calls: list[nn.Module] = []
        inputs: list[list[Any]] = []
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(masks_by_shape(1))  # the masks' values, which no layer reads, are not on meta
            stack.enter_context(_evaluating(model))
            for module in watched:
                hook = module.register_forward_pre_hook(_recorder(calls))
                stack.callback(hook.remove)
            for layer in layers:
                stack.enter_context(_passing_through(layer, form, inputs))
            try:
                last = _call(model, elsewhere, dict(given, use_cache=False))[0]
            except Exception as error:  # of any kind: the model's own code on an input it may not expect
                reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
                continue
        if [module for module in calls if module in layers] != layers:
            reason = "it does not run each of its layers once, in order"
        elif len({hidden.shape for hidden, *_ in inputs}) == 1 and last.shape[:2] == ids.shape:
            return calls, inputs, form
    name = type(model).__name__
    raise ValueError(f"{name} is not a plain stack of layers over token ids, and cannot be cut: {reason}")


def _call(model: nn.Module, on_meta: bool, given: dict[str, Any]) -> Any:
    """Call `model`, of which a part may be on the meta device, with all of it there if `on_meta`."""
    if not on_meta:
        return model(**given)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    empty = {key: t.detach().to("meta").requires_grad_(t.requires_grad) for key, t in tensors}
    return functional_call(model, empty, (), given)


def _as_output(beside: int | None, hidden: Tensor) -> Any:
    """Return a hidden state alone, or in a tuple with so many None beside it."""
    return hidden if beside is None else (hidden, *[None] * beside)


# What a layer may return; picklable, since a model that is attached can be copied.
_OUTPUTS = [functools.partial(_as_output, beside) for beside in (None, 0, 1, 2)]


def _recorder(calls: list[nn.Module]) -> Callable[[nn.Module, tuple], None]:
    return lambda module, args: calls.append(module)


@contextmanager
def _passing_through(
    layer: nn.Module, form: Callable[[Tensor], Any], inputs: list[list[Any]]
) -> Iterator[None]:
    """Within, `layer` returns the hidden state that it is given, as `form` does; what it is given is kept."""
    own = vars(layer).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        inputs.append([hidden, *args[1:], *kwargs.values()])
        return form(hidden)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _check_inputs(name: str, config: Any, inputs: list[list[Any]]) -> None:
    """Raise a ValueError if a layer is given more than one hidden state that earlier blocks have made.

    Args:
        inputs: What each layer is given, its hidden state first.
    """
    reason = ""
    if inputs[0][0].shape[2:] != (config.hidden_size,):
        reason = "hand on several hidden states per token, and a local loss compares one"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "use keys and values of earlier ones, through which gradients would cross a boundary"
    elif any(_carries_gradient(others) for _, *others in inputs):
        reason = "read the embedding as well, through which gradients would cross a boundary"
    if reason:
        raise ValueError(f"{name} cannot be cut: its layers {reason}. Use `method` frozen, e2e or lora")


def _carries_gradient(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.requires_grad
    if isinstance(given, dict):
        given = list(given.values())
    return isinstance(given, list | tuple) and any(_carries_gradient(part) for part in given)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within, `module` and all in it are in eval mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
