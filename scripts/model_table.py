"""Train every causal LM of transformers by every method, in a small random form; write docs/models.md.

python scripts/model_table.py            # all of them, about three minutes on one core
python scripts/model_table.py lfm2 opt   # these, shown and not written
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lopt import LoPTConfig, attach
from lopt.architectures import find_decoder
from lopt.core.blocks import Blocks
from lopt.engine.block_major import BlockMajor
from lopt.engine.stages import Stages
from lopt.engine.updates import Updates
from lopt.trainers.packing import rows_see_each_other
from tiny_models import small_config, small_configs, small_model

INTRODUCTION = """# Tested models

Every causal LM of transformers {version} that runs in a small random form (4 layers of 32 channels), trained
for a step by every method: its logits are bit for bit those of the plain model, every parameter has one
owner, what follows the last layer belongs to the last block, and a step moves every parameter that a plain
step moves. Packing: rows in one sequence, kept apart by their position ids, have the logits that they have
alone, with the attention kernel that is the default on a CPU and without packages for recurrent kernels.

Made by `python scripts/model_table.py`.

Language models inside a multimodal class are trained on text alone, by every method; what takes in pictures
is not trained and is saved as it came. Tried in a small random form: Gemma 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
Llava. LlavaNext has a parameter outside all blocks (`image_newline`), so `method` lopt refuses
it: use e2e or lora.
"""
TABLE = Path(__file__).parents[1] / "docs" / "models.md"
METHODS = {
    "lopt": LoPTConfig(num_blocks=2),
    "frozen": LoPTConfig(method="frozen", num_blocks=2),
    "e2e": LoPTConfig(method="e2e"),
}


COLUMNS = ("lopt", "lopt, block-major", "frozen", "e2e")


@dataclass
class Row:
    """What was found out about one architecture.

    Attributes:
        refused: Why it is refused whatever the method, in the words of the software; empty if it is not.
        methods: Of each method, why it is refused; empty if it works.
        packing: Why rows cannot share a sequence; empty if they can.
    """

    model_type: str
    model: str
    refused: str = ""
    methods: dict[str, str] = field(default_factory=dict)
    packing: str = ""


def batch() -> dict[str, Any]:
    """Return three rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()
    ids = ids * mask
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)


def moved(model: nn.Module, step: Callable[[nn.Module], Any]) -> set[str]:
    """Return the names of the parameters that a step of SGD changes; those without a gradient it does not."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= parameter.grad / parameter.grad.norm().clamp(min=1e-30)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def seeded(run: Callable[[], Any]) -> Any:
    """Return what `run` returns from a fixed random state: routers may be noisy."""
    torch.manual_seed(0)
    return run()


def plain_step(model: nn.Module) -> None:
    """Run a forward and a backward."""
    seeded(lambda: model(**batch())).loss.backward()


def block_major_step(handle: Any, model: nn.Module) -> None:
    """Run a forward and a backward of one micro-batch, block by block."""
    stages = Stages(handle)
    updates = Updates(handle, stages)
    updates.stage_done = lambda stage: None  # type: ignore[method-assign]
    schedule = BlockMajor(handle, updates)

    def forward(slot: int) -> Any:
        return seeded(lambda: model(**batch())).loss

    schedule.run_to_last_stage(1, forward)
    with schedule.last_stage(0):
        loss = forward(0)
    loss.backward()
    schedule.run_back(1, forward)


def check_parts(model: Any) -> None:
    """Assert that the decoder's parts run when `find_decoder` says, by a whole forward."""
    decoder = find_decoder(model)
    order: list[nn.Module] = []
    parts = [*decoder.front, *decoder.layers, *decoder.tail]
    hooks = [m.register_forward_pre_hook(lambda module, args: order.append(module)) for m in parts]
    with torch.no_grad():
        model(**batch())
    for hook in hooks:
        hook.remove()
    first, last = order.index(decoder.layers[0]), order.index(decoder.layers[-1])
    assert all(part in order[last:] for part in decoder.tail), "a final module runs too early"
    weighty = [part for part in decoder.front if next(part.parameters(), None) is not None]
    assert all(order.index(part) < first for part in weighty if part in order), "a first module runs too late"


def check_owners(model: Any) -> None:
    """Assert that every parameter has one owner, and the final modules belong to the last block."""
    blocks = Blocks(model, METHODS["lopt"])
    owned = [name for index in range(len(blocks)) for name, _ in blocks.parameters(model, index)]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters()), "owners"
    for module in blocks.tail:
        assert all(blocks.owner(p) == len(blocks) - 1 for p in module.parameters()), "final modules"


def check_method(method: str, model: Any, expected: set[str]) -> None:
    """Assert that attaching changes no logit, and that a step moves what it should.

    Args:
        expected: what a step of the plain model moves.

    Raises:
        ValueError: this method is refused for this model.
    """
    plain = copy.deepcopy(model)
    handle = attach(model, METHODS[method.removesuffix(", block-major")])
    for parameter, other in zip(plain.parameters(), model.parameters(), strict=False):
        parameter.requires_grad_(other.requires_grad)  # kernels may differ where nothing learns
    logits = [seeded(functools.partial(made, **batch())).logits.detach() for made in (plain, model)]
    assert torch.equal(*logits), "logits differ"
    model.zero_grad()
    handle.heads.zero_grad()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    step = plain_step if method != "lopt, block-major" else functools.partial(block_major_step, handle)
    change = moved(model, step)
    assert expected & trainable <= change, f"{min(expected & trainable - change)} does not move"
    assert change <= trainable, f"{min(change - trainable)} moves"


def examine(config: Any, model_class: Any) -> Row:
    """Return what is found out about one architecture.

    Raises:
        AssertionError: the software is wrong about it.
    """
    row, model = Row(config.model_type, model_class.__name__), small_model(config, model_class)
    try:
        check_parts(model)
        check_owners(model)
    except ValueError as error:
        row.refused = str(error)
        return row
    expected = moved(copy.deepcopy(model), plain_step)
    for method in COLUMNS:
        row.methods[method] = ""
        try:
            check_method(method, copy.deepcopy(model), expected)
        except ValueError as error:
            row.methods[method] = str(error)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    try:
        row.packing = "rows see each other" if rows_see_each_other(model, collate) else ""
    except ValueError as error:
        row.packing = str(error).split(". ")[0]
    return row


def examine_all(wanted: list[str]) -> tuple[list[Row], list[str]]:
    """Return the rows of the wanted model types (all if none), and the types that do not run so small."""
    rows, others, wrong = [], [], []
    for config_class, model_class in small_configs():
        name = config_class.model_type
        if wanted and name not in wanted:
            continue
        try:
            config = small_config(config_class)
            plain_step(small_model(config, model_class))
        except Exception:  # of any kind, and nothing of ours has run
            others.append(name)
            continue
        print(name, flush=True)
        try:
            rows.append(examine(config, model_class))
        except (AssertionError, RuntimeError, TypeError) as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            wrong.append(name)
    if wrong:
        raise SystemExit(f"the software is wrong about {', '.join(wrong)}")
    return rows, others


def render(rows: list[Row], others: list[str]) -> str:
    """Return docs/models.md."""
    lines = [INTRODUCTION.format(version=transformers.__version__)]
    lines.append("| model type | class | " + " | ".join((*COLUMNS, "packing")) + " |")
    lines.append("| --- " * (len(COLUMNS) + 3) + "|")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused:
            why = row.refused.replace(row.model, "the model").replace(f"'{row.model_type}'", "...")
            reasons.setdefault(why, []).append(row.model_type)
            continue
        cells = ["yes" if not row.methods[method] else "no" for method in COLUMNS]
        lines.append(f"| {' | '.join((row_name(row), *cells, 'no' if row.packing else 'yes'))} |")
        for why in {*row.methods.values()} - {""}:
            reasons.setdefault(why.replace(row.model, "the model"), []).append(row.model_type)
    lines.append("\n## Refused\n\n| why | model types |\n| --- | --- |")
    lines += [f"| {why.replace('|', '/')} | {', '.join(names)} |" for why, names in sorted(reasons.items())]
    lines.append(f"\nNot looked at, since they do not run in so small a form: {', '.join(others)}.\n")
    return "\n".join(lines)


def row_name(row: Row) -> str:
    """Return the first two cells of a row."""
    return f"`{row.model_type}` | `{row.model}`"


def main() -> None:
    """Examine the architectures, and write the table if they are all."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    text = render(*examine_all(sys.argv[1:]))
    if sys.argv[1:]:
        print(text)
    else:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
