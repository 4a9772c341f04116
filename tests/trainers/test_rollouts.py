"""GRPO in a pipeline, with a stand-in for the vLLM server, learns what one process learns with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.generation import vllm_generation

from lopt.cli import grpo
from lopt.trainers import checks
from pipeline_runs import assert_same, figures, run


class Server:
    """Answers by a rule that depends on every weight it was sent, as TRL's client of a vLLM server does."""

    def __init__(self, **_: Any) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def init_communicator(self, device: Any) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def get_server_info(self) -> Any:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, known: list[Any], weights: Any) -> None:
        names = []
        for (name, dtype, shape), (sent, value) in zip(known, weights, strict=True):
            assert (name, dtype, list(shape)) == (sent, str(value.dtype)[6:], list(value.shape))
            names.append(name)
            self.weights[name] = value.clone()
        assert len(set(names)) == len(names)

    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> Any:
        state = sum(int(self.weights[name].double().abs().sum() * 1e6) for name in sorted(self.weights))
        answers = [
            [
                (state + 7 * sum(prompt) + 3 * i + j) % 90 + 5
                for j in range(2 + (state + i) % (max_tokens - 2))
            ]
            for prompt in prompts
            for i in range(n)
        ]
        scores = [[[-3.0 - token / 50] for token in answer] for answer in answers]
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": scores}


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(text)) % 5) for text in completions]


def test_grpo_learns_what_one_process_learns(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server, raising=False)
    monkeypatch.setattr(checks, "check_vllm", lambda args: None)  # which wants a GPU
    read = grpo.grpo_rows
    monkeypatch.setattr(grpo, "grpo_rows", lambda *args: read(*args)._replace(rewards=[length_reward]))
    rows = [{"question": f"What is {n}?", "answer": f"It is #### {n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = dict(
        model_name_or_path=tiny_folder, train_file=tmp_path / "rows.jsonl", task="gsm8k", report_to="none",
        learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4,
        num_generations=4, max_completion_length=6, num_iterations=2, head_warmup_steps=2, num_blocks=3,
        use_vllm=True, vllm_mode="server", save_steps=3, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    one, three = tmp_path / "one", tmp_path / "three"
    run(1, "grpo", *flags, "--output_dir", one, "--schedule", "block_major")
    run(3, "grpo", *flags, "--output_dir", three, "--schedule", "pipeline")
    assert_same(one, three)
    rows = figures(one)
    assert rows == figures(three) and rows[0]["frac_reward_zero_std"] < 1
