"""LoPT with a block on each process: no process holds the whole model, and nothing flows backward.

    torchrun --nproc_per_node 2 examples/pipeline.py MODEL TEXTS.jsonl OUTPUT

MODEL is a folder or hub id in safetensors, TEXTS.jsonl has a "text" in every row, OUTPUT will be a plain
folder for transformers. Where there are GPUs, each process takes one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lopt import LoPTConfig, attach
from lopt.engine.pipeline import own_blocks, pipeline, save_model
from lopt.models.load import load_tokenizer
from lopt.models.part import load_part

STEPS, MICRO_BATCHES, ROWS, TOKENS = 5, 4, 2, 64


def main(name: str, texts: str, output: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("pipeline",))

    config = LoPTConfig(num_blocks=dist.get_world_size(), schedule="block_major")
    model = load_part(name, config, own_blocks(config, mesh))
    torch.manual_seed(0)
    handle = attach(model, config)
    schedule = pipeline(
        handle, handle.parameter_groups(2e-5), torch.optim.AdamW, mesh, device=device, max_norm=1.0
    )

    tokenizer = load_tokenizer(name)
    rows = [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    ids = tokenizer(tokenizer.eos_token.join(rows), return_tensors="pt")["input_ids"][0]
    count = STEPS * MICRO_BATCHES * ROWS * TOKENS
    ids = ids.repeat(count // len(ids) + 1)[:count].view(STEPS, MICRO_BATCHES, ROWS, TOKENS).to(device)

    handle.loss_scale = 1 / MICRO_BATCHES
    model.train()
    for step in range(STEPS):

        def forward(slot: int) -> torch.Tensor:
            return model(input_ids=ids[step, slot], labels=ids[step, slot]).loss / MICRO_BATCHES  # noqa: B023

        schedule.link.expect([(ROWS, TOKENS)] * MICRO_BATCHES)
        losses = schedule.step(MICRO_BATCHES, forward)
        if losses:  # on the process that has the last block
            print(f"step {step + 1}: loss {sum(losses).item():.3f}", flush=True)
    save_model(handle, schedule, output)
    if schedule.link.is_first:
        tokenizer.save_pretrained(output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
