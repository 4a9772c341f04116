"""Small random models of every supported architecture, and real data where it is present."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from small_model import byte_tokenizer

torch.set_num_threads(int(os.environ.get("LOPT_TEST_THREADS", "1")))

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.1, output_router_logits=True)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=True,
    ),
    "phi3": lambda: Phi3Config(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "opt": lambda: OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0,
    ),
    "phi": lambda: PhiConfig(**SHAPE),
    "falcon": lambda: FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
    ),
    "lfm2": lambda: Lfm2Config(
        **SHAPE, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8
    ),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A small random model, always the same for the same arguments."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).train()
    for parameter in model.parameters():  # the stock initialisation is too flat to tell errors apart
        torch.nn.init.normal_(parameter.data, std=0.2) if parameter.ndim > 1 else None
    return model


def batch_of(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token rows of the given lengths, padded to the longest, labels on real tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where] = torch.randint(3, 97, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


BATCHES = [
    batch_of([9, 5, 2]),
    batch_of([4], seed=1),
    batch_of([3, 11], side="left", seed=2),
    batch_of([6, 6], seed=3),
]
"""Micro-batches of several widths, padded on either side."""


def assert_moved_alike(
    start: Mapping[str, torch.Tensor],
    one: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    share: float = 1e-3,
) -> None:
    """Assert that two runs from `start` end at the same weights, up to a share of how far they moved.

    In the norm of each tensor, not element by element: where a gradient is nothing but rounding, Adam makes a
    whole step of its sign, and the sign depends on the order in which this CPU's kernels sum.
    """
    assert one.keys() == other.keys()
    for name, end in one.items():
        moved = (end - start[name]).norm()
        assert (other[name] - end).norm() <= share * moved, (name, float((other[name] - end).norm() / moved))


_modules_when_frozen = 0


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not about one, which count a CPU's bytes or have several processes."""
    about_one = "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
    if not about_one and os.environ.get("LOPT_TEST_GPU") != "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the processes that tests start


def pytest_runtest_setup() -> None:
    """Leave what modules hold, millions of objects, out of garbage collection: every `train()` collects."""
    global _modules_when_frozen
    if len(sys.modules) > _modules_when_frozen + 100:
        freeze_after_collecting()
        _modules_when_frozen = len(sys.modules)


def freeze_after_collecting() -> None:
    """Collect all garbage, also what was in use when it was frozen, and freeze the rest."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def no_garbage() -> None:
    """For tests that count bytes: models of the modules before are gone."""
    freeze_after_collecting()


@pytest.fixture(autouse=True)
def optimizers_step() -> None:
    """accelerate keeps per process whether its optimizers step; an interrupted training leaves that off."""
    GradientState()._set_sync_gradients(True)


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return tiny


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public benchmark data; see `LOPT_DATA_DIR` in CONTRIBUTING.md."""
    root = os.environ.get("LOPT_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data"
    if not Path(root).is_dir():
        pytest.skip(f"no benchmark data at {root}: set LOPT_DATA_DIR")
    return Path(root)


def save_tiny(folder: Path, name: str = "llama", chat_template: str | None = None, **changes: object) -> Path:
    """A small random model with a byte-level tokenizer, as a folder that from_pretrained reads."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    tiny(name, vocab_size=len(tokenizer), max_position_embeddings=512, **changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 little sums as question and answer, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"question": f"What is {a} plus {a * a}?", "answer": f"{a + a * a}" * (a % 3 + 1)} for a in range(48)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def fixed_rollouts(tokenizer: Any, text: Callable[[int, str], str]) -> Callable[..., dict[str, Any]]:
    """A rollout function for TRL: completion i of a batch is `text(i, prompt)`, whatever the model says."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
            "completion_ids": [tokenizer(text(i, p))["input_ids"] for i, p in enumerate(prompts)],
            "logprobs": None,
        }

    return rollout
