"""Launchers and settings that cannot work with boundaries are refused before any work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from trl import DPOConfig

from conftest import tiny
from lopt import LoPTConfig, LoPTDPOTrainer, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.cli.main import main
from lopt.trainers.checks import check_before, check_settings, check_workers
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig


@pytest.fixture(autouse=True)
def vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt.trainers.vllm.find_spec", lambda name: name)


def test_launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = LoPTSFTConfig(output_dir=str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not run on DeepSpeed"):
        check_settings(args, LoPTConfig())
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="needs FSDP2"):
        check_settings(args, LoPTConfig())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {"accelerate": "99"})
    with pytest.raises(ImportError, match="FSDP2 needs accelerate >= 99"):
        check_settings(args, LoPTConfig(method="e2e"))
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {})
    check_settings(args, LoPTConfig())
    with pytest.raises(ValueError, match="`aux_loss` recon"):
        check_settings(args, LoPTConfig(aux_loss="next_token"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone"):
        check_settings(args, LoPTConfig())


BLOCK = LoPTConfig(schedule="block_major", offload="block")


def test_weights_that_travel_are_not_for_vllm(tmp_path: Path) -> None:
    args = LoPTGRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8)
    args.use_vllm = True
    with pytest.raises(ValueError, match="weights that are not on the device"):
        check_settings(args, BLOCK)
    check_settings(args, LoPTConfig(method="lora"))
    args.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match="changes those by rounding: use DDP"):
        check_settings(args, LoPTConfig(method="lora"))


@pytest.fixture
def shape_only(tmp_path: Path) -> str:
    """A folder with the config of a tied model and no weights: what is refused was refused before loading."""
    tiny("llama-tied").config.save_pretrained(tmp_path / "shape")
    return str(tmp_path / "shape")


ROWS = Dataset.from_list([{"prompt": "Question ", "chosen": "yes", "rejected": "no"}])


def test_what_a_models_name_says_is_checked_before_it_is_loaded(shape_only: str, tmp_path: Path) -> None:
    grpo = LoPTGRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_vllm=True)
    with pytest.raises(ValueError, match=r"`use_vllm`.*: add `tied_embeddings` freeze"):
        LoPTGRPOTrainer(shape_only, reward_funcs=len, args=grpo, train_dataset=ROWS)
    dpo = DPOConfig(output_dir=str(tmp_path), sync_ref_model=True, bf16=False)
    with pytest.raises(ValueError, match=r"`sync_ref_model`.*: add `tied_embeddings` freeze"):
        LoPTDPOTrainer(shape_only, args=dpo, train_dataset=ROWS)
    sft = LoPTSFTConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`num_blocks` must be <= 4"):
        LoPTSFTTrainer(shape_only, args=sft, train_dataset=ROWS, lopt_config=LoPTConfig(num_blocks=9))


def test_only_an_embedding_that_is_untied_is_refused(tmp_path: Path) -> None:
    """With adapters, with one block and with `tied_embeddings` freeze the LM head stays tied."""
    args = LoPTGRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_vllm=True)
    model = tiny("llama-tied")
    with pytest.raises(ValueError, match="`use_vllm`"):
        check_settings(args, LoPTConfig(), model)
    check_before([args], LoPTConfig(), model, adapters=LoraConfig())
    check_settings(args, LoPTConfig(), get_peft_model(model, LoraConfig(target_modules="all-linear")))
    for config in (LoPTConfig(num_blocks=1), LoPTConfig(tied_embeddings="freeze"), LoPTConfig(method="e2e")):
        check_settings(args, config, tiny("llama-tied"))
    check_settings(args, LoPTConfig(), tiny("llama"))


def test_trainers_that_balance_routers_run_eagerly(tmp_path: Path) -> None:
    """By the model's coefficient if the trainer is given none; before the data is looked at."""
    staged, words = LoPTConfig(method="e2e", schedule="block_major"), "cannot balance routers over all layers"
    model = tiny("mixtral", output_router_logits=False)
    for trainer, args, more in (
        (LoPTSFTTrainer, LoPTSFTConfig(output_dir=str(tmp_path)), {}),
        (LoPTDPOTrainer, DPOConfig(output_dir=str(tmp_path), bf16=False), {}),
        (LoPTGRPOTrainer, LoPTGRPOConfig(output_dir=str(tmp_path)), {"reward_funcs": len}),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(model, args=args, train_dataset=ROWS, lopt_config=staged, **more)
        args.router_aux_loss_coef = 0.0
        check_settings(args, staged, model)
        with pytest.raises(ValueError, match=words):
            check_settings(args, staged, tiny("mixtral"))
        args.router_aux_loss_coef = 0.01
        check_settings(args, staged, tiny("llama"))
        check_settings(args, LoPTConfig(), model)


def test_several_gpus_in_one_process(
    monkeypatch: pytest.MonkeyPatch, shape_only: str, tmp_path: Path, capsys: Any
) -> None:
    """transformers would wrap the model in DataParallel, whose replicas share one handle."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    monkeypatch.setattr("sys.argv", ["/bin/lopt", "sft", "--hub_token", "hf_secret"])
    args, words = LoPTSFTConfig(output_dir=str(tmp_path)), "2 GPUs are visible to one process"
    with pytest.raises(ValueError, match=words + r".*--nproc_per_node 2 --no-python lopt sft \.\.\.\)"):
        LoPTSFTTrainer(shape_only, args=args, train_dataset=ROWS, lopt_config=LoPTConfig(method="e2e"))
    for command in (["sft"], ["grpo", "--task", "gsm8k"]):
        assert main([*command, "--model_name_or_path", "nowhere/there", "--output_dir", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    model = tiny("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="`device_map` spreads"):
        check_settings(args, LoPTConfig(), model)
    check_settings(args, LoPTConfig(method="lora"), model)


def test_precision_and_weights_under_fsdp2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    model = tiny("llama").bfloat16()
    for method in ("lopt", "e2e", "lora"):
        config = LoPTConfig(method=method)
        with pytest.raises(ValueError, match="`state_dtype` bfloat16 does not go with FSDP2"):
            check_settings(LoPTSFTConfig(output_dir=str(tmp_path), state_dtype="bfloat16"), config)
        for masters in (True, False):
            args = LoPTSFTConfig(output_dir=str(tmp_path), master_weights=masters)
            with pytest.raises(ValueError, match="add `bf16`, by which it keeps them in float32"):
                check_settings(args, config, model)
            check_settings(args, config, tiny("llama"))
            args = LoPTSFTConfig(output_dir=str(tmp_path), master_weights=masters, bf16=True, use_cpu=True)
            check_settings(args, config, model)
    with pytest.raises(ValueError, match="does not find the final norm of OPTForCausalLM"):
        check_settings(LoPTSFTConfig(output_dir=str(tmp_path)), LoPTConfig(), tiny("opt"))
    check_settings(LoPTSFTConfig(output_dir=str(tmp_path)), LoPTConfig(method="e2e"), tiny("opt"))
    with pytest.raises(ValueError, match="this process has no weights"):
        check_settings(LoPTSFTConfig(output_dir=str(tmp_path)), LoPTConfig(), tiny("llama").to("meta"))


def test_a_stream_has_no_workers_where_processes_start_anew(tmp_path: Path, monkeypatch) -> None:
    args = LoPTSFTConfig(output_dir=str(tmp_path), dataloader_num_workers=2)
    for method in ("fork", "spawn", "forkserver"):
        monkeypatch.setattr("multiprocessing.get_start_method", lambda method=method: method)
        check_workers(args, streaming=False)
        with nullcontext() if method == "fork" else pytest.raises(ValueError, match=f"by {method}"):
            check_workers(args, streaming=True)


def test_too_few_rows_are_refused_in_python_too(tiny_folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "1?", "answer": "1"}])
    args = LoPTGRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, num_generations=4, use_cpu=True
    )
    trainer = LoPTGRPOTrainer(
        str(tiny_folder), lambda completions, **_: [0.0] * len(completions), args, train_dataset=rows
    )
    with pytest.raises(
        ValueError, match="the 1 training rows are fewer than the 2 prompts of one generation"
    ):
        trainer.train()
