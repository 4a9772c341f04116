"""Group relative policy optimization by LoPT: TRL's GRPOTrainer with boundaries.

Rollouts, old and reference log-probabilities run without gradients, so they see a plain model; the
local losses belong to the training forward alone, over the real tokens of prompt and completion.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl import GRPOTrainer

from lopt.compat import send_weights_to_vllm, vllm_engine_made_by
from lopt.core.boundaries import BoundaryReached
from lopt.data.templates import as_text
from lopt.models.router_logits import without_router_logits
from lopt.trainers.heads import warm_up_batches
from lopt.trainers.mixin import LoPTMixin
from lopt.trainers.rollouts import in_pipeline
from lopt.trainers.vllm import engine_with_dtype, merged_weights

logger = logging.getLogger(__name__)


class LoPTGRPOTrainer(LoPTMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with one argument more, `lopt_config`."""

    _buffered_inputs: Any  # TRL's: the micro-batches of the current generation batch
    _counted: Any = None  # the generation batch whose micro-batches these are the real tokens of:
    _own_tokens: list[int]  # on this rank
    _all_tokens: list[int]  # on all ranks
    _metrics: Any  # TRL's: figures of each generation since the last log
    _logs: dict[str, Any]  # TRL's: rows of the last generation
    _groups: Counter[str]  # of completions to one prompt in this run: all, and those with equal rewards
    _step: int  # TRL's: micro-batches so far
    num_iterations: int
    num_generations: int
    reward_weights: Tensor
    use_vllm: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._groups = Counter()
        with vllm_engine_made_by(engine_with_dtype(self)), in_pipeline():
            super().__init__(*args, **kwargs)
        if self.use_vllm and is_peft_model(self.model):
            send_weights_to_vllm(self.vllm_generation, lambda: merged_weights(self.model))
        if self.grid is not None:
            self.log_completions &= self.grid.is_main
            if any(isinstance(reward, nn.Module) for reward in self.reward_funcs):
                raise ValueError("`schedule` pipeline: a reward that is a model would be in every process")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `LoPTMixin.train`; say at the end if no reward of the run differed within its group."""
        self._groups.clear()
        result = super().train(*args, **kwargs)
        count = self._groups["all"]
        if count and self._groups["equal"] == count and self.is_world_process_zero():
            logger.warning(
                "nothing was learned from the rewards: they were equal within each of the %d groups of "
                "completions to one prompt. Look at completions with `log_completions`; raise "
                "`temperature`, `num_generations` or `max_completion_length`, or give prompts that the model "
                "answers right at times",
                count,
            )
        return result

    def sample_completions(self, count: int = 3) -> dict[str, Any] | None:
        """Return a prompt of the last generation, its first completions and their rewards.

        Returns:
            None before the first generation;
            `prompt`, and `completions`: a list of `completion` and `reward`, the weighted sum of all rewards.
        """
        prompts, answers, rewards = (list(self._logs[key]) for key in ("prompt", "completion", "rewards"))
        if not prompts:
            return None
        weights = dict(zip(rewards, self.reward_weights.tolist(), strict=True))
        found = []
        for i in range(min(count, self.num_generations, len(answers))):
            given = {name: list(self._logs["rewards"][name])[i] for name in rewards}
            reward = sum(weights[name] * value for name, value in given.items() if value == value)  # not NaN
            found.append({"completion": as_text(answers[i]), "reward": reward})
        return {"prompt": as_text(prompts[0]), "completions": found}

    def _count_equal_rewards(self) -> None:
        """Count the groups of the generation that TRL has just noted, of all ranks."""
        size, advantages = self.num_generations, list(self._logs["advantages"])
        groups = len(advantages) // size
        idle = sum(not any(advantages[i : i + size]) for i in range(0, len(advantages), size))
        equal = round(self._metrics["train"]["frac_reward_zero_std"][-1] * groups)  # but for rounding
        self._groups["all"] += groups
        self._groups["equal"] += max(idle, equal)

    def loss_share(self, tokens: int | None) -> float:
        """Return the part of the optimizer step that a micro-batch is, by tokens where those are known.

        Micro-batches of one generation batch share its part by their tokens. If an optimizer step
        spans several generation batches (`steps_per_generation` below the accumulation), each counts
        by its number of micro-batches: the tokens of a later one are not known yet.
        """
        count = self.current_gradient_accumulation_steps
        here = self._step % self.args.steps_per_generation
        first = here - (self.micro_batch - 1)
        start, stop = max(first, 0), min(first + count, len(self._all_tokens))
        assert tokens is not None
        return tokens / sum(self._all_tokens[start:stop]) * (stop - start) / count * self.args.world_size

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.offload is not None and self.offload.weights is not None:
            self.offload.weights.fetch_all()
        self.stops.obey()
        with self.guard.during("generation"), without_router_logits(self.model):
            made = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._count_equal_rewards()
        self.stops.obey()
        return made

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.grid is None:
            return super()._calculate_rewards(*args, **kwargs)
        own = super()._calculate_rewards(*args, **kwargs).tolist() if self.runs_task else None
        return torch.tensor(self.grid.from_last(own), device=self.args.device)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return TRL's; zeros for the old ones where another process has the last block, and the loss."""
        rest = (logits_to_keep, batch_size)
        if self.runs_task or torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, *rest, **kwargs
            )
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with suppress(BoundaryReached):  # of every chunk
                super()._get_per_token_logps_and_entropies(model, ids, mask, *rest, **kwargs)
        zeros = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        return zeros, zeros, None

    # Rollouts may serve several optimizer steps (`num_iterations`, `steps_per_generation`): those that are
    # not used up belong to a checkpoint.

    def rollout_state(self) -> Any:
        """Return the number of micro-batches so far, and the rollouts."""
        return self._step, self._buffered_inputs

    def set_rollout_state(self, state: Any) -> None:
        """Restore what `rollout_state` returned."""
        self._step, self._buffered_inputs = state

    def save_own_state(self, folder: Path) -> None:
        """Write heads and unused rollouts into a checkpoint."""
        super().save_own_state(folder)
        if self.runs_task and self._step % (self.args.steps_per_generation * self.num_iterations):
            folder.mkdir(parents=True, exist_ok=True)  # the first rank may not be there yet
            torch.save(self.rollout_state(), folder / self._rollouts_name)

    def load_own_state(self, folder: Path) -> None:
        """Read what `save_own_state` wrote.

        Raises:
            ValueError: another number of processes wrote it.
        """
        super().load_own_state(folder)
        written = len(list(folder.glob("rollouts_*.pt")))
        if written not in (0, self.args.world_size):
            raise ValueError(
                f"{folder} holds unused rollouts of {written} processes: resume it with so many "
                f"(these are {self.args.world_size}), or from another checkpoint"
            )
        if written:
            # torch cannot restore to a CPU with a number, which `args.device` is with several processes.
            device = "cpu" if self.args.device.type == "cpu" else self.args.device
            path = folder / self._rollouts_name
            self.set_rollout_state(torch.load(path, weights_only=True, map_location=device))

    @property
    def _rollouts_name(self) -> str:
        return f"rollouts_{self.args.process_index}.pt"

    def real_tokens(self, inputs: Any) -> int | None:
        """Return the real tokens of a micro-batch; those of a generation batch are counted at once."""
        if self._counted is not self._buffered_inputs:
            self._counted = self._buffered_inputs
            masks = [(batch["prompt_mask"], batch["completion_mask"]) for batch in self._counted]
            own = torch.stack([prompt.sum() + completion.sum() for prompt, completion in masks])
            every = self.accelerator.reduce(own, "sum")
            self._own_tokens, self._all_tokens = torch.stack([own, every]).tolist()
        return self._own_tokens[self._step % self.args.steps_per_generation]

    def head_warm_up_batches(self) -> Iterable[Mapping[str, Any]]:
        """Return prompts of the training rows, 8 or more a batch, the same on all ranks."""
        return warm_up_batches(self, max(8, self.args.per_device_train_batch_size), self._prompts)

    def prompt_tokens(self, row: dict[str, Any]) -> int:
        """Return the number of tokens of a row's prompt, as it is given to the model."""
        return len(self._tokenize_prompts([row["prompt"]])[0][0])

    def _prompts(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = self._tokenize_prompts([row["prompt"] for row in rows])[0]
        return dict(self.processing_class.pad({"input_ids": ids}, return_tensors="pt"))
