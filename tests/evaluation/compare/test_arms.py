"""What `--methods` and `--sweep` mean."""

from __future__ import annotations

import pytest

from lopt import LoPTConfig
from lopt.evaluation.compare.arms import parse_arms


def names(methods: list[str], *sweep: str, **base: object) -> list[str]:
    return [arm.name for arm in parse_arms(methods, sweep, LoPTConfig(**base))]


def test_each_arm_has_its_own_settings_over_those_of_the_command() -> None:
    methods = ["e2e", "ll", "lopt:num_blocks=4,lambda_aux=1", "lora:learning_rate=2e-4,lora_r=4"]
    methods += ["lopt:num_blocks=4,aux_loss=next_token,frozen_blocks=2"]
    arms = parse_arms(methods, (), LoPTConfig(num_blocks=3, tied_embeddings="freeze"))
    assert [arm.name for arm in arms] == [
        "e2e", "lopt k=3", "lopt k=4 λ=1", "lora lr=0.0002 lora_r=4", "lopt k=4 next_token frozen=2",
    ]  # fmt: skip
    assert [arm.config.method for arm in arms] == ["e2e", "lopt", "lopt", "lora", "lopt"]
    assert all(arm.config.tied_embeddings == "freeze" for arm in arms)
    assert arms[2].config.num_blocks == 4 and arms[2].config.lambda_aux == 1.0 and not arms[2].changes
    assert dict(arms[3].changes) == {"learning_rate": 2e-4, "lora_r": 4}


def test_a_sweep_multiplies_the_arms_it_applies_to() -> None:
    assert names(["e2e", "lopt"], "lambda_aux=0,10", "clip=block,global") == [
        "e2e clip=block", "e2e clip=global",
        "lopt k=2 λ=0 clip=block", "lopt k=2 λ=0 clip=global",
        "lopt k=2 λ=10 clip=block", "lopt k=2 λ=10 clip=global",
    ]  # fmt: skip
    assert names(["e2e", "lopt", "frozen"], "block_boundaries=1,2+3") == [
        "e2e", "lopt cut at 1", "lopt cut at 2+3", "frozen cut at 1", "frozen cut at 2+3",
    ]  # fmt: skip
    # What an arm says itself is not swept; blocks by number win over the command's boundaries.
    assert names(["lopt:lambda_aux=3", "lopt"], "lambda_aux=1") == ["lopt k=2 λ=3", "lopt k=2 λ=1"]
    (arm,) = parse_arms(["lopt:num_blocks=4"], (), LoPTConfig(block_boundaries=[1]))
    assert arm.config.block_boundaries is None


def test_frozen_blocks_are_left_out_where_there_are_none() -> None:
    arms = parse_arms(["lopt", "e2e", "frozen", "lora"], (), LoPTConfig(frozen_blocks=1))
    assert [arm.config.frozen_blocks for arm in arms] == [1, 0, 0, 0]


def test_residency_is_that_of_the_command_or_the_arms_own() -> None:
    """A value of an arm takes back what of the command's does not go with it."""
    base = LoPTConfig(schedule="block_major", stages=6, offload="block", optimizer_device="cpu")
    methods = ["e2e", "lopt", "frozen:stage_layers=2", "lora:schedule=eager"]
    methods += ["e2e:offload=optimizer,stages=3"]
    found = [arm.config for arm in parse_arms(methods, (), base)]
    assert [(c.schedule, c.stages, c.stage_layers, c.offload, c.optimizer_device) for c in found] == [
        ("block_major", 6, None, "block", "cpu"),
        ("block_major", 6, None, "block", "cpu"),
        ("block_major", None, 2, "block", "cpu"),
        ("eager", None, None, "none", "auto"),
        ("block_major", 3, None, "optimizer", "auto"),
    ]
    assert names(["e2e"], "schedule=eager,block_major") == ["e2e schedule=eager", "e2e schedule=block_major"]


@pytest.mark.parametrize(
    ("methods", "sweep", "message"),
    [
        (["magic"], (), "there is no method 'magic': use lopt, e2e, frozen, lora"),
        (["lopt:num_blocks"], (), "write each setting as name=value"),
        (["lopt:num_blocks=four"], (), "num_blocks must be a whole number (got four)"),
        (["lopt:num_blocks=0"], (), "`num_blocks` must be >= 1 (got 0)"),
        (["lopt:block_boundaries=6-12"], (), "joined by +"),
        (["lora:learning_rate=fast"], (), "must be a finite number"),
        (["lora:learning_rate=nan"], (), "must be a finite number"),
        (["e2e:gradient_checkpointing=maybe"], (), "must be true or false (got maybe)"),
        (["e2e:pipeline_size=2"], (), "'pipeline_size' is no setting of e2e: use "),
        (["e2e:stages=2"], (), "`stages` 2 needs `schedule` block_major: add it"),
        (["lopt:num_blocks=4,schedule=block_major,stages=2"], (), "`stages` must be >= 4"),
        (["e2e:lambda_aux=1"], (), "'lambda_aux' is no setting of e2e"),
        (["lopt:seed=1"], (), "'seed' is no setting of lopt: use num_blocks, "),
        (["lopt", "ll"], (), "names the arm 'lopt k=2' twice"),
        (["lopt"], ["lambda_aux"], "`sweep` lambda_aux: write it as name=value,value"),
        (["lopt"], ["colour=red"], "'colour' is no setting of lopt"),
        (["e2e"], ["lambda_aux=1"], "`sweep` lambda_aux applies to none of the `methods` e2e"),
    ],
)
def test_mistakes(methods: list[str], sweep: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_arms(methods, sweep, LoPTConfig())
    assert message in str(error.value)
