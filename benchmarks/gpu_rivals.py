"""The same training by other software that streams, where it is installed; for gpu.py.

RoundPipe (`pip install roundpipe beartype`), MegaTrain (`infinity` of its repository) and SlideFormer (its
repository on PYTHONPATH, its extension built) train the same random model on as many random tokens, in
bfloat16 and end to end. RoundPipe's optimizer runs beside the next step by default, with weights one step
old: that is "stale"; in the figure beside it the step is waited for (`is_async=False`).
Their number formats of state, clipping and accumulation are their own: "notes" says what differs.
None of this has run yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from gpu_training import GIB, random_model, seconds

Step = Callable[[], Any]


def roundpipe(config: Any, device: torch.device, ids: torch.Tensor) -> tuple[Step, str]:
    """Return what runs a step of RoundPipe, and what differs."""
    package = importlib.import_module("roundpipe")
    optim = importlib.import_module("roundpipe.optim")
    slots = len(ids)
    model = package.wrap_model_to_roundpipe(
        random_model(config, torch.device("cpu"), torch.bfloat16, copies=True),
        optim_dtype=torch.float32,
        use_sequential_preset=True,
        model_run_config=package.RoundPipeRunConfig(num_microbatch=slots, recompute_grain="layer"),
    )
    optimizer = optim.Adam(model.optim_parameters(), lr=1e-5)
    rows = ids.flatten(0, 1).cpu()
    inputs = dict(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows, return_logits=False)

    def step(stale: bool = False) -> None:
        model.forward_backward(input_kwargs=inputs, loss_fn=lambda outputs, _: outputs.loss / slots)
        model.step(lambda: (optimizer.step(), optimizer.zero_grad(), None)[-1], is_async=stale)

    step.variants = {"stale ": lambda: step(stale=True)}  # type: ignore[attr-defined]
    return step, "float32 masters and Adam on the host, no clipping"


def megatrain(config: Any, device: torch.device, ids: torch.Tensor) -> tuple[Step, str]:
    """Return what runs a step of MegaTrain, and what differs."""
    package = importlib.import_module("infinity")
    settings = importlib.import_module("infinity.config").CPUMasterConfig(
        model_name="random", dataset_path="random", max_seq_len=ids.shape[-1], batch_size=ids.shape[1],
        gradient_accumulation_steps=len(ids), dtype=torch.bfloat16, attn_implementation="sdpa",
        checkpoint_interval=1,
    )  # fmt: skip
    model = package.CPUMasterModel(
        random_model(config, torch.device("cpu"), torch.bfloat16, copies=True), settings
    )
    optimizer = torch.optim.AdamW(model.get_parameters(), lr=1e-5, fused=True)
    rows = ids.cpu()

    def step() -> None:
        for slot in rows:
            model.forward_and_backward(slot, torch.ones_like(slot), slot)
        torch.nn.utils.clip_grad_norm_(model.get_parameters(), 1.0)
        optimizer.step()
        model._sync_params_to_gpu()
        model.zero_grad()
        optimizer.zero_grad()

    return step, "bfloat16 weights stepped as they are, clipped"


def slideformer(config: Any, device: torch.device, ids: torch.Tensor) -> tuple[Step, str]:
    """Return what runs a step of SlideFormer, and what differs."""
    package = importlib.import_module("offload_transformer")
    model = package.SlideFormerOffloader(
        model=random_model(config, torch.device("cpu"), torch.bfloat16, copies=True),
        device=device,
        dtype=torch.bfloat16,
        ac_offload_nvme=False,
        offload_dir=".",
    )
    model.train()
    rows = ids.flatten(0, 1)

    def step() -> None:  # its forward has backward and updates inside
        model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows).loss.item()

    return step, "one batch of all rows: it accumulates nothing; no clipping"


RIVALS: dict[str, tuple[str, Any]] = {
    "RoundPipe": ("roundpipe", roundpipe),
    "MegaTrain": ("infinity", megatrain),
    "SlideFormer": ("offload_transformer", slideformer),
}


def installed() -> list[str]:
    """Return the names of those that can be imported."""
    return [name for name, (module, _) in RIVALS.items() if importlib.util.find_spec(module) is not None]


def measure(name: str, config: Any, device: torch.device, size: tuple[int, int, int]) -> dict[str, Any]:
    """Time two steps after two untimed ones.

    Args:
        size: (M, B, T), micro-batches of a step, and the size of one.
    """
    ids = torch.randint(0, config.vocab_size, size, device=device)
    step, notes = RIVALS[name][1](config, device, ids)
    found: dict[str, Any] = {"notes": notes}
    for variant, run in {"": step, **getattr(step, "variants", {})}.items():
        for _ in range(2):
            run()
        torch.cuda.reset_peak_memory_stats()
        took = [seconds(run, device) for _ in range(2)]
        found |= {
            f"{variant}seconds": took,
            f"{variant}tokens/s": ids.numel() * len(took) / sum(took),
            f"{variant}peak GiB": torch.cuda.max_memory_allocated() / GIB,
        }
    return found
