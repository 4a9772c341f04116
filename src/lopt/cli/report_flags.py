"""The flags of the commands that measure, plan or fetch. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lopt.data.presets import PRESETS
from lopt.options import flag

OPTIMIZERS = (
    "adamw_torch_fused, adamw_torch, sgd, adagrad, rmsprop, adamw_bnb_8bit, adamw_torch_8bit, "
    "adamw_torch_4bit, lion_32bit, lion_8bit"
)
DEVICES = "rtx3090, rtx4090, rtx5090, l40s, a100-40, a100-80, h100, h200"
BENCHMARKS = "mmlu, ifeval, arc_challenge, gsm8k, hellaswag, truthfulqa_mc, truthfulqa_gen, winogrande"


@dataclass
class CompareArguments:
    """What is compared, and by which metrics."""

    groups: ClassVar[dict[str, str]] = {
        "Comparison": "methods",
        "Measured": "adaptation_tasks",
        "Output": "keep_models",
    }

    methods: list[str] = flag(
        ["e2e", "lopt", "frozen", "lora"],
        "Arms: e2e, lopt, frozen or lora, each with settings of its own if needed, for example "
        "lopt:num_blocks=4,lambda_aux=1 or lora:learning_rate=2e-4.",
    )
    sweep: list[str] = flag(
        [],
        "Settings that every arm they apply to takes in turn, for example lambda_aux=0,0.1,1,10 or "
        "block_boundaries=4,9,14 (several boundaries: 6+12).",
    )
    seeds: list[int] = flag([0, 1, 2], "One run of every arm for each.")
    adaptation_tasks: list[str] = flag(
        [], "Benchmarks of the task itself, as in lopt eval, beside the held-out rows."
    )
    retention_tasks: list[str] = flag([], "Benchmarks of what should be kept, as in lopt eval.")
    retention_text: list[str] = flag([], "Plain text files whose loss should not rise.")
    text_tokens: int = flag(2048, "Tokens of each text that are measured.")
    retention_rows: list[str] = flag(
        [], "Files of other tasks' rows, as of --train_file, whose answers' loss should not rise."
    )
    data_dir: str | None = flag(None, "Local copies of the benchmarks, as in lopt eval.")
    limit: int | None = flag(None, "Items per benchmark and file of --retention_rows. Default: all.")
    keep_models: bool = flag(False, "Keep the trained model of every run under --output_dir/models.")


@dataclass
class EvalArguments:
    """Which models, on what, how."""

    groups: ClassVar[dict[str, str]] = {
        "Models": "model_name_or_path",
        "Measured": "tasks",
        "Loading": "param_dtype",
        "Output": "output_dir",
    }

    model_name_or_path: list[str] | None = flag(
        None,
        "One or more models: folders (models, or adapters of --method lora), hub ids, aliases, gemma3-270m.",
    )
    base: str | None = flag(
        None,
        "The model that the others were made from; the report says what they gained and lost against it.",
    )
    tasks: list[str] | None = flag(
        None, f"Benchmarks: {BENCHMARKS}, or any other task of lm-evaluation-harness."
    )
    text: list[str] | None = flag(
        None, "UTF-8 files whose loss per token and perplexity are measured: cheap."
    )
    data_dir: str | None = flag(
        None, "Folder with the benchmarks' rows as <name>/<split>.jsonl. Default: the hub."
    )
    limit: int | None = flag(None, "Only the first N items of each task (each subject of mmlu).")
    num_fewshot: list[str] | None = flag(
        None,
        "Shots of single tasks, as arc_challenge=25 hellaswag=10. Default: as the task is defined (gsm8k 5, "
        "most others 0), mmlu 5.",
    )
    batch_size: str = flag("auto", "Sequences in a batch, or auto: a number of tokens that suits the device.")
    apply_chat_template: bool = flag(False, "Put prompts into the tokenizer's chat template.")
    text_tokens: int = flag(8192, "Tokens of each --text that are measured.")
    text_window: int = flag(256, "Tokens that are read together.")
    param_dtype: str = flag(
        "float32", "Dtype of the weights: float32, bfloat16, float16 or auto.", aliases=["--dtype"]
    )
    attn_implementation: str | None = flag(None, "For example sdpa, eager, flash_attention_2.")
    model_revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")
    output_dir: str = flag("outputs/eval", "Results, samples and the report; finished tasks are kept.")
    overwrite_output_dir: bool = flag(
        False, "Replace results there that were made otherwise (other model, settings or rows)."
    )


@dataclass
class ChatArguments:
    """Which model, and how it answers."""

    groups: ClassVar[dict[str, str]] = {
        "Model": "model_name_or_path",
        "Talk": "prompt",
        "Sampling": "max_new_tokens",
        "Loading": "param_dtype",
    }

    model_name_or_path: str | None = flag(
        None, "A folder (of a run, a checkpoint, a model or an adapter), a hub id, an alias or gemma3-270m."
    )
    base: str | None = flag(
        None,
        "Answer with another model too: alone, the one that the run began from; else a folder or hub id.",
        nargs="?",
        const="auto",
    )
    prompt: str | None = flag(None, "Answer this and end. Default: talk.")
    system: str = flag("", "What the model is told first.")
    template: str | None = flag(
        None,
        "chat, or a plain one: messages, alpaca, qa, pair (the text as it is). Default: the model's chat "
        "template, else that of the rows that the run was trained on.",
    )
    max_new_tokens: int = flag(512, "Tokens of an answer.")
    temperature: float | None = flag(
        None, "0 takes the likeliest token. Default, here and below: the model's generation_config.json."
    )
    top_p: float | None = flag(None, "Draw from the likeliest tokens that have this share together.")
    top_k: int | None = flag(None, "Draw from this many of the likeliest tokens.")
    repetition_penalty: float | None = flag(None, "Above 1: less of what was said before.")
    seed: int = flag(0, "Of every answer.")
    param_dtype: str = flag(
        "auto", "Dtype of the weights: auto (as saved), float32, bfloat16, float16.", aliases=["--dtype"]
    )
    attn_implementation: str | None = flag(None, "For example sdpa, eager, flash_attention_2.")
    model_revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")


@dataclass
class MergeArguments:
    """Which adapter, and where the merged model goes."""

    groups: ClassVar[dict[str, str]] = {"Model": "model_name_or_path", "Output": "output_dir"}

    model_name_or_path: str | None = flag(
        None, "The folder of a run of --method lora, or of another adapter."
    )
    base: str | None = flag(
        None, "The model that the adapter belongs to. Default: the one that the adapter names."
    )
    param_dtype: str = flag(
        "auto",
        "Dtype of the merged weights: auto (that of the base model), float32, bfloat16, float16.",
        aliases=["--dtype"],
    )
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")
    output_dir: str = flag("", "A new folder. Default: that of the adapter with -merged behind it.")


@dataclass
class ProbeArguments:
    """Which models, on which text."""

    groups: ClassVar[dict[str, str]] = {
        "Models": "base",
        "Text": "text",
        "Boundaries": "num_blocks",
        "Loading": "param_dtype",
        "Output": "output_dir",
    }

    base: str | None = flag(None, "The model that the others were tuned from: a folder or a hub id.")
    model_name_or_path: list[str] | None = flag(
        None, "One or more tuned models: folders or hub ids, LoRA adapters as well."
    )
    text: list[str] | None = flag(None, "Plain text that the models read: one or more UTF-8 files.")
    tokens: int = flag(2048, "Tokens of each text, from its start.")
    window: int = flag(128, "Tokens that are read together.")
    batch_size: int = flag(16, "Windows at a time.")
    num_blocks: int | None = flag(
        None, "Mark the boundaries of this many blocks. Default: the tuned model's lopt_config.json."
    )
    block_boundaries: list[int] | None = flag(
        None, "Layers (from 0) at which blocks 2..k start; overrides --num_blocks."
    )
    param_dtype: str = flag(
        "float32", "Dtype that the models are run in: float32, bfloat16, auto.", aliases=["--dtype"]
    )
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")
    output_dir: str = flag("outputs/probe", "Folder for probe.json and report.html.")
    overwrite_output_dir: bool = flag(False, "Replace an earlier report there.")


@dataclass
class PlanArguments:
    """The run that is planned; flags that `lopt sft` has as well mean the same."""

    groups: ClassVar[dict[str, str]] = {
        "Model": "model_name_or_path",
        "Memory": "param_dtype",
        "Method": "num_blocks",
        "Batch": "per_device_train_batch_size",
        "Machine": "device_name",
        "Search": "fit",
        "Output": "json",
        "Check on this machine": "calibrate",
    }

    model_name_or_path: str | None = flag(
        None,
        "A folder, a config.json, a hub id or, without any network: qwen3-4b, qwen3-8b, qwen3-14b, "
        "qwen3-32b, qwen2.5-7b, qwen2.5-32b, llama3.1-8b, gemma3-270m, smollm2-135m.",
    )
    model_revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")
    param_dtype: str = flag("float32", "Dtype of the weights: float32 or bfloat16.", aliases=["--dtype"])
    state_dtype: str = flag("float32", "Dtype of the optimizer's state: float32 or bfloat16.")
    master_weights: bool | None = flag(
        None, "Float32 masters of bfloat16 weights in the optimizer's state. Default: where the host steps."
    )
    prefetch_gib: float = flag(
        2.0, "With --offload: GiB on the device for what is being copied; --fit chooses its own."
    )
    bf16: bool | None = flag(None, "Mixed precision in bfloat16. Default: on, off with --use_cpu.")
    use_cpu: bool = flag(False, "Plan for a CPU instead of a GPU.")
    method: list[str] = flag(
        ["lopt"], "What is planned beside eager e2e, and what --fit chooses among: lopt, e2e, frozen, lora."
    )
    num_blocks: list[int] | None = flag(
        None, "k, one or more. Default: those of 2, 4, 8 that the layers allow."
    )
    stages: list[int] | None = flag(
        None,
        "With block-major: stages of the model, one or more. Default: one per block; --fit tries several.",
    )
    stage_layers: list[int] | None = flag(
        None, "Instead of --stages: the largest number of layers of a stage, one or more."
    )
    optimizer_device: Literal["auto", "cpu"] = flag(
        "auto", "cpu plans --offload block with steps in host memory; --fit tries both unless it is given."
    )
    clip: Literal["block", "global"] = flag("block", "Clip per block or over all gradients: block or global.")
    frozen_blocks: int = flag(0, "Number of blocks, from the first on, that do not learn.")
    aux_loss: Literal["recon", "next_token"] = flag(
        "recon", "What the other earlier blocks learn: recon or next_token."
    )
    local_every: int = flag(1, "Earlier blocks learn on every N-th step.")
    tied_embeddings: Literal["untie", "freeze"] = flag(
        "untie", "An embedding shared with the LM head: untie trains two copies, freeze none."
    )
    lora_r: int = flag(16, "Rank of the adapters of --method lora.")
    lora_alpha: int = flag(32, "Scale of the adapters of --method lora.")
    lora_target_modules: list[str] | None = flag(
        None, "Modules that get an adapter. Default: every linear layer but the head."
    )
    command: Literal["sft", "dpo"] = flag(
        "sft", "What is planned: sft, or dpo, whose rows are pairs and which has a reference model."
    )
    precompute_ref_log_probs: bool = flag(
        False, "With --command dpo: the reference model has run before, and is not on the device."
    )
    per_device_train_batch_size: int = flag(4, "Rows in a micro-batch.")
    gradient_accumulation_steps: int = flag(8, "Micro-batches per step.")
    max_length: int = flag(1024, "Tokens in a row.")
    num_processes: int = flag(
        1,
        "Processes with a GPU each, by DDP on one machine; the batch is that of each. With --schedule "
        "pipeline those of all pipelines.",
    )
    fsdp2: bool = flag(
        False, "With --num_processes: FSDP2 shards weights, gradients and optimizer state over them."
    )
    pipeline_size: int | None = flag(
        None, "With --schedule pipeline: processes of a pipeline. Default: as many as blocks."
    )
    pipeline_depth: int = flag(
        2, "With --schedule pipeline: micro-batches that may be on their way between two processes."
    )
    block_boundaries: list[int] | None = flag(
        None,
        "With --schedule pipeline: layers (from 0) at which blocks 2..k start. Default: chosen so that the "
        "slowest process is as quick as can be.",
    )
    optim: str = flag("adamw_torch_fused", f"The optimizer: {OPTIMIZERS}.")
    device_name: str | None = flag(
        None, f"The GPU, which decides about time: {DEVICES}. Default: much like an rtx4090."
    )
    tflops: list[float] | None = flag(
        None,
        "TFLOP/s that the device reaches in training: one number, or those of layers with a graph, of layers "
        "without one and of the LM head, as --calibrate prints them. Default: 0.6 of the GPU's peak.",
    )
    bandwidth: list[float] | None = flag(
        None,
        "GB/s from host memory to the GPU: one number, or two if the way back differs. Default: 0.8 of the "
        "GPU's PCIe.",
    )
    host_gbps: float | None = flag(
        None, "GB/s at which steps in host memory read and write weights, gradients and state. Default: 40."
    )
    link_gbps: list[float] | None = flag(
        None,
        "GB/s each way between processes (10 Gbit/s are 1.25); in pipelines with replicas two numbers if it "
        "differs between the replicas of a block. Default: 0.8 of the GPU's NVLink, or its PCIe.",
    )
    latency_ms: float = flag(
        0.0, "With --schedule pipeline: milliseconds from one process to the next, half of what ping shows."
    )
    fit: str | None = flag(
        None,
        "Propose the fastest setting for a GPU of this size, such as 24GiB or 80GB; device: that of "
        "--device_name.",
    )
    host_memory: str | None = flag(
        None, "With --fit: host memory that offloading may take, such as 64GiB. Default: any."
    )
    json: str | None = flag(None, "Write the plan to this file as JSON.")
    svg: str | None = flag(None, "Write the bars to this file as SVG.")
    calibrate: bool = flag(
        False,
        "Measure this machine's rates, run a few steps of the first method and k here, and compare memory "
        "and time with the plan.",
    )
    schedule: Literal["eager", "block_major", "pipeline"] = flag(
        "eager",
        "pipeline plans a block on each device; eager or block_major is what --calibrate runs, and without "
        "it both are planned.",
    )
    offload: Literal["none", "optimizer", "block"] = flag(
        "none", "What --calibrate keeps in host memory: none, optimizer or block."
    )
    gradient_checkpointing: bool = flag(False, "Whether --calibrate, or a pipeline, recomputes activations.")


@dataclass
class ReportArguments:
    """Which runs."""

    groups: ClassVar[dict[str, str]] = {"Runs": "run", "Output": "output_dir"}

    run: list[str] = flag([], "One or more folders of lopt sft, dpo or grpo; may be given without the flag.")
    output_dir: str = flag(
        "", "Folder for report.html. Default: of one run its own, of several outputs/report."
    )
    overwrite_output_dir: bool = flag(False, "Replace an earlier report there.")


@dataclass
class DownloadArguments:
    """What to fetch, and where to."""

    groups: ClassVar[dict[str, str]] = {"Data": "dataset", "Output": "write_parquet"}

    dataset: list[str] = flag([], f"One or more of {', '.join(PRESETS)}, or all.")
    revision: str | None = flag(None, "Branch, tag or commit, of one data set.")
    write_parquet: bool = flag(False, "Write NAME.parquet as well; without it only the cache is filled.")
    output_dir: str = flag("data", "Folder of the Parquet files.")
    overwrite: bool = flag(False, "Replace files that are there already.")


@dataclass
class PreviewArguments:
    """How much to show."""

    groups: ClassVar[dict[str, str]] = {"Preview": "rows"}

    rows: int = flag(3, "Number of sequences or pairs to show.")


@dataclass
class DemoArguments:
    """What the demo runs. Every default is the demo of the documentation."""

    groups: ClassVar[dict[str, str]] = {
        "Model and task": "model",
        "Training": "methods",
        "Output": "output_dir",
    }

    model: str = flag("gemma3-270m", "A folder, a hub id, or a packaged model: gemma3-270m or smollm2-135m.")
    task: str = flag("chain_sum", "A reasoning-gym task: chain_sum or gsm_symbolic.")
    held_out: int = flag(64, "Problems kept back for the evaluation.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")
    methods: list[str] = flag(["lopt", "e2e", "frozen"], "What is compared; the model of the first is kept.")
    num_blocks: int = flag(2, "k, the number of blocks of lopt and frozen.")
    steps: int = flag(20, "Optimizer steps of each method.")
    batch_size: int = flag(8, "Problems per step.")
    learning_rate: float = flag(2e-5, "Learning rate of the last block.")
    seed: int = flag(0, "Seed of problems, heads and order.")
    output_dir: str = flag("outputs/demo", "Folder for model, figures and report.")
    overwrite_output_dir: bool = flag(False, "Replace an earlier demo in that folder.")
