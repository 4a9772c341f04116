"""Rollouts of GRPO in a pipeline come from a vLLM server, since no process has the whole model.

The process with the last block asks the server and computes the rewards, and the others, which have the same
prompts, take both from it. Before that each sends its weights to it, and it passes them on to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopt.compat import replaced, send_weights_to_vllm
from lopt.engine import grid
from lopt.engine.grid import Grid
from lopt.engine.links import told_if_gone

Entry = tuple[str, str, list[int]]
"""Name, dtype ("float32") and shape of a weight, as the server is told."""
_TAG = 1  # of what is sent here; hidden states have 0


class PipelineRollouts:
    """Takes the place of TRL's `VLLMGeneration` in a process of a pipeline.

    Args:
        place: Of this process.
        make: TRL's class.
        options: Of it.
    """

    def __init__(self, place: Grid, make: Callable[..., Any], **options: Any) -> None:
        self._place, self._model = place, options["model"]
        self._vllm = make(**options) if place.is_last else None
        self._parts: list[list[Entry]] = []  # of the processes of a pipeline, in their order

    @property
    def vllm_client(self) -> PipelineRollouts:
        """TRL asks the client of a main process, which each process of a single pipeline is to it."""
        return self

    def get_server_info(self) -> Any:
        """Return what the server says of itself; nothing to warn of in a process that does not ask it."""
        if self._vllm is None:
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}
        return self._vllm.vllm_client.get_server_info()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return completions as TRL's class does."""
        return self._place.from_last(self._vllm and self._vllm.generate(*args, **kwargs))

    def sync_weights(self) -> None:
        """Send the weights of all processes to the server; all call this."""
        place, group = self._place, self._place.group
        own = {name: weight.data for name, weight in self._model.named_parameters() if not weight.is_meta}
        if not self._parts:
            entries = [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in own.items()]
            self._parts = _once(place.gather(entries)[:: place.replicas])
        if place.is_main:
            assert self._vllm is not None
            known = [entry for part in self._parts for entry in part]
            send_weights_to_vllm(self._vllm, partial(self._received, own), known)
            self._vllm.sync_weights()
        elif place.replica == 0:
            for name, *_ in self._parts[place.position]:
                with told_if_gone(place.size - 1):
                    group.send([own[name].contiguous()], place.size - 1, _TAG).wait()

    def _received(self, own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every weight of the model, those of this process last."""
        device = next(iter(own.values())).device
        for position, part in enumerate(self._parts[:-1]):
            for name, dtype, shape in part:
                value = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                with told_if_gone(position):
                    self._place.group.recv([value], position, _TAG).wait()
                yield name, value
        for name, *_ in self._parts[-1]:
            yield name, own[name]


def _once(parts: list[list[Entry]]) -> list[list[Entry]]:
    """Leave out what an earlier part has: a frozen matrix that is embedding and LM head."""
    seen: set[str] = set()
    found = []
    for part in parts:
        found.append([(name, dtype, shape) for name, dtype, shape in part if name not in seen])
        seen |= {name for name, *_ in part}
    return found


def in_pipeline() -> AbstractContextManager[Any]:
    """Return what a GRPO trainer is made in, so that its rollouts are those of a pipeline if it is in one."""
    from trl.trainer import grpo_trainer

    place = grid.current()
    if place is None:
        return nullcontext()
    made = partial(PipelineRollouts, place, grpo_trainer.VLLMGeneration)
    return replaced(grpo_trainer, VLLMGeneration=made)
