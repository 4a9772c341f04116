"""A user's mistake, in every command: one line that names flag and fix, exit code 2, nothing touched.

Every case is the command's words in `BASE` and what is appended to them (later flags win; `!--flag` takes one
of `BASE` out), and a part of the line. All run in the folder that `bad_inputs.build` makes.
"""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM

from bad_flags import FLAGS
from bad_inputs import PAIRS, ROWS, build
from lopt.cli.main import main

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")

TRAIN = "--model_name_or_path model --train_file rows.jsonl --output_dir out --max_steps 2 --num_blocks 2"
ASK = "--task gsm8k --num_generations 4 --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
BASE = {
    "sft": TRAIN,
    "dpo": f"{TRAIN} --train_file pairs.jsonl",
    "grpo": f"{TRAIN} {ASK} --max_completion_length 4",
    "compare": f"{TRAIN} --held_out 4 --methods e2e lopt --retention_text notes.txt",
    "data preview": TRAIN,
    "eval": "--model_name_or_path tuned --text notes.txt --output_dir out",
    "chat": "--model_name_or_path model --prompt Hi",
    "merge": "--model_name_or_path lora --output_dir out",
    "probe": "--base model --model_name_or_path tuned --text notes.txt --output_dir out",
    "report": "--run model",
    "plan": "--model_name_or_path model --json out",
    "demo": "--model model --steps 1 --output_dir out",
    "data download": "--dataset gsm8k --write_parquet --output_dir out",
}


LONG = "x" * 300
CASES: list[tuple[str, str, str]] = [
    *(("sft", f"--train_file {name}", message) for name, (_, message) in ROWS.items()),
    *(("dpo", f"--train_file {name}", message) for name, (_, message) in PAIRS.items()),
    # -- files
    ("sft", "--train_file none.jsonl", "--train_file: none.jsonl does not exist: check the path"),
    ("sft", "--train_file data", "--train_file: data is a folder: name the files to read"),
    ("sft", "--train_file pipe.jsonl", "pipe.jsonl is no regular file: write the rows to a file first"),
    ("sft", "--train_file /dev/null", "/dev/null"),
    ("sft", f"--train_file {LONG}.jsonl", "File name too long"),
    ("sft", "--train_file rows.jsonl header.csv", "mixes file types (rows.jsonl, header.csv)"),
    ("sft", "--max_steps -1 --streaming", "--streaming needs --max_steps"),
    ("sft", "!--train_file", "give exactly one of --train_file and --dataset_name (neither is given)"),
    ("sft", "--dataset_name org/name", "give exactly one of --train_file and --dataset_name (both"),
    ("sft", "--dataset_preset spam", "--dataset_preset"),
    ("sft", "--dataset_preset tulu3", "--dataset_preset tulu3"),
    ("sft", "--dataset_split test", "--dataset_split must be train"),
    ("sft", "--held_out 12", "--held_out 12 takes 12 of 12 rows and leaves none to train on"),
    ("sft", "--max_samples 0", "--max_samples must be >= 1 (got 0)"),
    ("sft", "--max_seq_length 8", "Raise it or shorten the prompts"),
    ("sft", "--max_length 32 --max_seq_length 64", "are two names of one length: give one of them"),
    ("sft", "--seed -1", "--seed must be >= 0 and <= 4294967295 (got -1)"),
    ("sft", "--max_length 1", "--max_length must be >= 2 (got 1)"),
    ("sft", "--assistant_only_loss", "--assistant_only_loss needs a tokenizer with a chat template"),
    ("sft", "!--train_file --data_mix rows.jsonl:1 none.csv:1", "none.csv does not exist"),
    ("sft", "--data_mix rows.jsonl", "--train_file is for one source, and --data_mix names several"),
    ("sft", "--train_file s3://bucket/rows.jsonl", "rows.jsonl needs a package that is not installed"),
    ("sft", "--train_file talk.jsonl --model_name_or_path strict", "no such role as assistant"),
    # -- models
    ("sft", "!--model_name_or_path", "--model_name_or_path is missing: give a folder, a hub id, gemma3"),
    ("sft", "--model_name_or_path ./nowhere", "--model_name_or_path ./nowhere is not a folder: give one"),
    ("sft", "--model_name_or_path rows.jsonl", "--model_name_or_path rows.jsonl is not a folder: give one"),
    ("sft", "--model_name_or_path data", "--model_name_or_path data cannot be loaded"),
    ("sft", "--model_name_or_path encoder", "is a BertForMaskedLM, not a decoder-only causal LM: use a"),
    ("sft", "--model_name_or_path unheard_of", "--model_name_or_path unheard_of cannot be loaded"),
    ("sft", "--model_name_or_path garbled", "--model_name_or_path garbled cannot be loaded"),
    ("sft", "--model_name_or_path listed", "--model_name_or_path listed cannot be loaded"),
    ("sft", "--model_name_or_path wordless", "the tokenizer of wordless cannot be loaded"),
    ("sft", "--model_name_or_path endless", "set eos_token in its tokenizer_config.json"),
    ("sft", "--model_name_or_path narrow", "the model's embedding 100 rows: give the tokenizer that belongs"),
    ("sft", "--model_name_or_path headless", "lm_head.weight is missing. Get both from one place"),
    ("sft", "--model_name_or_path cut", "--model_name_or_path cut: its weights are damaged"),
    ("sft", "--model_name_or_path shardless", "model-00002-of-00002.safetensors"),
    ("sft", "--model_name_or_path misshapen", "its weights do not fit its config.json: "),
    ("sft", "--model_name_or_path layers_as_text", "layers_as_text cannot be loaded: Validation error for"),
    ("sft", "--model_name_or_path odd_heads", "not a multiple of the number of attention heads (5)"),
    ("sft", "--model_name_or_path no_layers", "has num_hidden_layers 0 in its config.json: correct it"),
    ("sft", "--model_name_or_path unknown_rope", "cannot be loaded: a file of it has an unknown or missing"),
    ("sft", "--model_name_or_path unknown_act", "unknown or missing 'magic'"),
    ("sft", "--model_name_or_path pad_beyond", "Padding_idx must be within num_embeddings"),
    ("sft", "--model_name_or_path tokenless", "the tokenizer of tokenless cannot be loaded: a file of it"),
    ("sft", "--model_name_or_path adapter", "adapter holds an adapter (adapter_config.json), and a whole"),
    ("sft", "--model_name_or_path adapted", "adapted holds an adapter (adapter_config.json), and a whole"),
    ("sft", "--model_name_or_path no_probability", "has attention_dropout 2.0 in its config.json, which is"),
    ("sft", "--model_name_or_path whole_numbers", "weight holds integers (I8), as quantized weights do"),
    ("sft", "--model_name_or_path two_copies", "holds its weights twice, in model.safetensors and"),
    ("sft", "--model_name_or_path settings", "generation_config.json is no JSON object: get it again"),
    ("sft", "--model_name_or_path fewer_layers", "belongs to a layer that it does not have and 8 more. Get"),
    ("sft", "--attn_implementation magic", "magic"),
    ("sft", "--param_dtype int8", "--param_dtype must be one of float32, bfloat16, float16, auto (got int8)"),
    ("sft", "--model_name_or_path experts --schedule block_major", "use --schedule eager"),
    ("sft", "--model_name_or_path experts --schedule block_major --offload block", "use --schedule eager"),
    # -- settings that mean nothing, or contradict each other
    ("sft", "--num_blocks 5", "--num_blocks must be <= 4, the model's number of layers (got 5)"),
    ("sft", "--num_blocks 0", "--num_blocks must be >= 1 (got 0)"),
    ("sft", "--num_blocks two", "--num_blocks: invalid int value: 'two'"),
    ("sft", "--block_boundaries 2 1", "--block_boundaries must be increasing layer numbers from 1 on"),
    ("sft", "--block_boundaries 2 4", "--block_boundaries must be < 4, the model's number of layers"),
    ("sft", "--frozen_blocks 1", "--frozen_blocks must be <= 0 (got 1 of 2 blocks), or no earlier"),
    ("sft", "--frozen_blocks 1 --method e2e", "--frozen_blocks needs --method lopt (got e2e): leave it out"),
    ("sft", "--method magic", "--method: invalid choice: 'magic' (choose from"),
    ("sft", "--aux_loss magic", "--aux_loss: invalid choice: 'magic'"),
    ("sft", "--local_every 0", "--local_every must be >= 1 (got 0)"),
    ("sft", "--lambda_aux -1", "--lambda_aux must be >= 0 (got -1.0)"),
    ("sft", "--lambda_aux nan", "--lambda_aux must be finite and >= 0 (got nan)"),
    ("sft", "--schedule block_major --stages 7", "--stages must be <= 6, the layers, the embedding and the"),
    ("sft", "--schedule block_major --num_blocks 4 --stages 3", "--stages must be >= 4, the number of"),
    ("sft", "--schedule block_major --stages 4 --stage_layers 1", "--stages and --stage_layers say the same"),
    ("sft", "--stages 4 --method e2e", "--stages 4 needs --schedule block_major: add it"),
    ("sft", "--schedule block_major --optimizer_device cpu", "add --offload block"),
    ("sft", "--offload block", "--offload block needs --schedule block_major: add it"),
    ("sft", "--schedule block_major --offload disk", "--offload: invalid choice: 'disk'"),
    ("sft", "--prefetch_gib -1", "--prefetch_gib must be >= 0 (got -1.0)"),
    (
        "sft",
        '--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":true}',
        "use_reentrant=true gives no gradient",
    ),
    ("sft", "--learning_rate -0.1", "--learning_rate must be > 0 (got -0.1)"),
    ("sft", "--learning_rate inf", "--learning_rate must be finite and > 0 (got inf)"),
    ("sft", "--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
    ("sft", "--max_steps 0", "--max_steps must be >= 1, or left out for --num_train_epochs (got 0)"),
    ("sft", "--num_train_epochs 0", "--num_train_epochs must be > 0 (got 0.0)"),
    ("sft", "--per_device_train_batch_size 0", "--per_device_train_batch_size must be >= 1 (got 0)"),
    ("sft", "--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be >= 1 (got 0)"),
    ("sft", "--dataloader_num_workers -1", "--dataloader_num_workers must be >= 0 (got -1)"),
    ("sft", "--weight_decay nan", "--weight_decay must be finite and >= 0 (got nan)"),
    ("sft", "--bf16 true --fp16 true", "--fp16 and --bf16 contradict each other: give one of them"),
    ("sft", "--fp16 --use_cpu", "--fp16 needs a GPU: leave it out, or use --bf16"),
    ("sft", "--eval_strategy steps --eval_steps 2", "--eval_strategy steps has no rows to evaluate on"),
    ("sft", "--lr_scheduler_type magic", "magic"),
    ("sft", "--report_to magic", "--report_to: magic is not supported, only"),
    ("sft", "--report_to tensorboard none", "--report_to none cannot be given beside another name"),
    ("sft", "--optim adamm", "--optim adamm is no class of torch.optim and none of"),
    ("sft", "--optim NAdam --optim_args speed=9", "--optim_args speed=9: torch.optim.NAdam takes"),
    ("sft", "--optim SGD --optim_args momentum", "--optim_args momentum: write name=value, for"),
    ("sft", "--state_dtype int8", "--state_dtype must be one of float32, bfloat16 (got int8)"),
    ("sft", "--max_time soon", "--max_time soon is no duration: write 90m, 2h"),
    ("sft", "--max_time 0", "--max_time 0 is no duration"),
    ("sft", "--colour red", "--colour is no flag of lopt sft: --help lists them"),
    ("sft", "--num_blcks 2", "--num_blcks is no flag of lopt sft: did you mean --num_blocks?"),
    ("sft", "rows.jsonl", "rows.jsonl is no flag of lopt sft"),
    ("sft", "--retention_text none.txt", "--retention_text none.txt cannot be read: No such file"),
    ("sft", "--retention_text blank.txt", "--retention_text blank.txt is empty or too short: give a file"),
    ("sft", "--retention_text pipe.jsonl", "--retention_text pipe.jsonl is a pipe: write the text to a file"),
    ("sft", "--retention_every 5", "--retention_every: add --retention_text or --retention_tasks"),
    ("sft", "--max_forgetting 0.1", "add --retention_text"),
    ("sft", "--retention_data_dir data", "add --retention_tasks"),
    *FLAGS,
    # -- --config
    ("sft", "--config none.yaml", "--config none.yaml is not a file"),
    ("sft", "--config", "--config: expected one argument"),
    ("sft", "--config=unknown.yaml", "--config unknown.yaml: 'num_block' is no flag: did you mean num_bl"),
    ("sft", "--config broken.yaml", "--config broken.yaml is not valid YAML: "),
    ("sft", "--config list.yaml", "--config list.yaml must hold flags, one 'name: value' per line"),
    ("sft", "--config twice.yaml", "is not valid YAML: line 3: num_blocks is given twice"),
    ("sft", "--config tabs.yaml", "line 2"),
    ("sft", "--config latin.yaml", "--config latin.yaml is not valid YAML: 'utf-8' codec"),
    ("sft", "--config type.yaml !--num_blocks", "--num_blocks: invalid int value: 'two'"),
    ("sft", "--config nothing.yaml", "num_blocks has no value: give it one, or leave the line out"),
    ("sft", "--config several.yaml", "num_blocks takes one value, not a list"),
    ("sft", "--config mapping.yaml", "--num_blocks: invalid int value"),
    ("sft", "--config method.yaml", "--method: invalid choice: 'magic'"),
    ("sft", "--config 1.yaml", "--config 1.yaml: 1 is no flag"),
    ("compare", "--config wide.yaml", "--seeds: invalid int value: 'first'"),
    # -- output folders
    ("sft", "--output_dir rows.jsonl", "--output_dir rows.jsonl is a file: choose a folder"),
    ("sft", "--output_dir rows.jsonl/out", "is a file: choose a folder"),
    ("sft", "--output_dir /proc/lopt", "--output_dir /proc/lopt cannot be written to"),
    ("sft", "--output_dir done", "--output_dir done holds a run already: go on with --resume"),
    ("sft", "--output_dir done --overwrite_output_dir --train_file empty.jsonl", "empty.jsonl is empty"),
    ("sft", "--output_dir done --overwrite_output_dir --model_name_or_path cut", "its weights are damaged"),
    ("sft", "--output_dir model --overwrite_output_dir", "would write over the model it starts from, model"),
    ("sft", "--output_dir model/out", "would write over the model it starts from"),
    (
        "sft",
        "--output_dir done --model_name_or_path done/checkpoint-1 --overwrite_output_dir",
        "--output_dir done would write over the model it starts from, done/checkpoint-1",
    ),
    ("sft", "--resume", "--resume: there is no whole checkpoint in out: check --output_dir"),
    ("sft", "--resume --output_dir done", "checkpoint-1 is passed over"),
    ("sft", "--resume --overwrite_output_dir", "contradict each other: give one of them"),
    # -- lopt grpo, where it is not lopt sft
    ("grpo", "!--model_name_or_path", "--model_name_or_path is missing"),
    ("grpo", "--train_file blank.jsonl", "blank.jsonl has no rows"),
    ("grpo", "--train_file unanswered.jsonl", "none of the 3 rows has an answer: it expects `#### <number>`"),
    ("grpo", "--train_file null.jsonl", "row 1 (from 0), column `question`, must be text, not NoneType"),
    ("grpo", "--train_file columns.jsonl", "--task gsm8k needs the columns `question` and `answer`, found"),
    ("grpo", "--task numinamath", "--task numinamath needs the columns `problem` and"),
    ("grpo", "--task chess", "--task must be one of gsm8k, numinamath"),
    ("grpo", "!--train_file !--task", "nothing says what a right answer is: give --task"),
    ("grpo", "!--train_file !--task --reward_funcs rewards:short", "--train_file or --dataset_name"),
    ("grpo", "--max_prompt_length 8", "--max_prompt_length 8: all 12 prompts are longer: raise it"),
    ("grpo", "--max_seq_length 64", "use --max_prompt_length, --max_completion_length"),
    ("grpo", "--num_generations 3", "--num_generations 3 does not divide the 4 completions"),
    ("grpo", "--num_generations 1", "--num_generations must be >= 2 (got 1)"),
    ("grpo", "--held_out 8 --per_device_eval_batch_size 3", "change --per_device_eval_batch_size"),
    ("grpo", "--streaming", "--streaming is for lopt sft"),
    ("grpo", "--reward_funcs praise", "--reward_funcs: no reward 'praise': give one of gsm8k"),
    ("grpo", "--reward_funcs nowhere_to_be_found:f", "--reward_funcs: no module nowhere_to_be_found"),
    ("grpo", "--reward_funcs rewards:nothing", "--reward_funcs: rewards has no nothing: check the name"),
    ("grpo", "--num_blocks 5", "--num_blocks must be <= 4, the model's number of layers (got 5)"),
    ("grpo", "--learning_rate 0", "--learning_rate must be > 0 (got 0.0)"),
    ("grpo", "--output_dir model --overwrite_output_dir", "would write over the model"),
    ("grpo", "--model_name_or_path cut", "--model_name_or_path cut: its weights are damaged"),
    # -- lopt compare
    ("compare", "--methods magic", "--methods magic: there is no method 'magic': use"),
    ("compare", "--methods lopt lopt", "twice: leave one of them out"),
    ("compare", "--methods lopt:num_blocks=9", "--num_blocks must be <= 4, the model's number of layers"),
    ("compare", "--methods lopt:colour=red", "'colour' is no setting of lopt: use num_blocks"),
    ("compare", "--sweep lambda_aux", "write it as name=value,value"),
    ("compare", "--seeds 1 1", "--seeds 1 1: give one or more, each once"),
    ("compare", "--method e2e", "here --methods names what is compared"),
    ("compare", "--train_file semicolon.csv", "separate columns by commas"),
    ("compare", "--held_out 12", "leaves none to train on"),
    ("compare", "--output_dir data", "--output_dir data holds something else: choose a new folder"),
    ("compare", "--output_dir model --overwrite_output_dir", "--output_dir model holds something else"),
    (
        "compare",
        "--output_dir study --model_name_or_path study/models/a --overwrite_output_dir",
        "--output_dir study would write over the model it starts from",
    ),
    ("compare", "--output_dir study --overwrite_output_dir --train_file null.jsonl", "must be text"),
    # -- lopt data preview and download
    ("data preview", "--rows 0", "--rows must be >= 1 (got 0)"),
    ("data preview", "--train_file utf16.jsonl", "is not UTF-8 (line 1)"),
    ("data preview", "--train_file roleless.jsonl", "without a role"),
    ("data preview", "--max_length 8", "Raise it or shorten the prompts"),
    ("data preview", "!--model_name_or_path", "--model_name_or_path is missing"),
    ("data preview", "--model_name_or_path endless", "set eos_token"),
    ("data download", "!--dataset", "--dataset is missing: give all or some of"),
    ("data download", "!--write_parquet", "--output_dir has no effect without --write_parq"),
    ("data download", "--dataset spam", "--dataset must be one of all, metamathqa, "),
    ("data download", "--dataset all --revision v1", "--revision belongs to one data set: name one"),
    ("data download", "--output_dir rows.jsonl", "--output_dir rows.jsonl is a file: choose a folder"),
    # -- lopt eval
    ("eval", "!--model_name_or_path", "--model_name_or_path is missing: give folders"),
    ("eval", "!--text", "nothing to measure: give --tasks"),
    ("eval", "--model_name_or_path ./no", "./no is not a folder"),
    ("eval", "--model_name_or_path model model", "--model_name_or_path model is given twice"),
    ("eval", "--base tuned", "--base tuned is the only model: give others"),
    ("eval", "--limit 0", "--limit must be >= 1 (got 0)"),
    ("eval", "--batch_size some", "--batch_size must be auto, or >= 1 (got some)"),
    ("eval", "--param_dtype int8", "--param_dtype must be one of float32"),
    ("eval", "--num_fewshot 5 --tasks gsm8k", "--num_fewshot must be such as arc_challenge=25 (got 5)"),
    ("eval", "--num_fewshot gsm8k=1", "--num_fewshot has no effect without --tasks: add it"),
    ("eval", "--model_name_or_path whole_numbers", "holds integers (I8)"),
    ("eval", "--output_dir rows.jsonl", "--output_dir rows.jsonl is a file: choose a folder"),
    ("eval", "--limit 5", "--limit has no effect without --tasks: add it, or leave it out"),
    ("eval", "--apply_chat_template", "--apply_chat_template has no effect without --tasks"),
    ("eval", "--text none.txt", "none.txt cannot be read"),
    ("eval", "--text model/model.safetensors", "is not UTF-8"),
    ("eval", "--text pipe.jsonl", "pipe.jsonl is a pipe"),
    ("eval", "--tasks gsm8k --data_dir no", "--data_dir no is not a folder"),
    ("eval", "--tasks gsm8k --data_dir model", "gsm8k/test.jsonl is missing"),
    ("eval", "--tasks gsm8k --data_dir data", "test.jsonl, line 1, lacks the columns answer"),
    ("eval", "--output_dir done/..", "holds a model: choose another --output_dir"),
    ("eval", "--base model --model_name_or_path reader", "different tokenizers"),
    ("eval", "--model_name_or_path narrow", "the model's embedding 100 rows"),
    ("eval", "--model_name_or_path not_finite", "not_finite holds numbers that are not finite: model.norm."),
    ("eval", "--model_name_or_path no_layers", "has num_hidden_layers 0 in its config.json"),
    ("plan", "--model_name_or_path odd_heads", "odd_heads has no readable config: Class validation error"),
    ("eval", "--model_name_or_path cut", "its weights are damaged"),
    ("eval", "--model_name_or_path encoder", "not a decoder-only causal LM"),
    ("eval", "--model_name_or_path adapter", "adapter_config.json is broken"),
    ("eval", "--colour red", "--colour is no flag of lopt eval"),
    # -- lopt report
    ("report", "!--run", "no run is named: give the folder of one, as in lopt report outputs/sft"),
    ("report", "--run nowhere", "nowhere is no folder: name the --output_dir of a run"),
    ("report", "", "model holds no run of lopt sft, dpo or grpo"),
    ("report", "--run half_a_run", "half_a_run is damaged: one of its JSON files cannot be read"),
    ("report", "--run model tuned --output_dir notes.txt", "is a file: choose a folder"),
    ("sft", "--quiet --json_logs", "--quiet and --json_logs contradict each other: give one of them"),
    # -- lopt probe
    ("probe", "!--base", "--base is missing: give the model before tuning"),
    ("probe", "!--model_name_or_path", "--model_name_or_path is missing: give one or more"),
    ("probe", "!--text", "--text is missing: give a file"),
    ("probe", "--base ./nowhere", "--base ./nowhere is not a folder"),
    ("probe", "--text none.txt", "none.txt cannot be read: No such file"),
    ("probe", "--text blank.txt", "blank.txt is empty"),
    ("probe", "--text binary.txt", "binary.txt is not UTF-8 text: convert it"),
    ("probe", "--model_name_or_path small", "this one is llama, 4 layers of 16 channels"),
    ("probe", "--model_name_or_path reader", "their tokenizers read the text"),
    ("probe", "--num_blocks 9", "--num_blocks must be <= 4, the model's number of layers (got 9)"),
    ("probe", "--tokens 0", "--tokens must be >= 1 (got 0)"),
    ("probe", "--window 600 --tokens 600", "--window: the model has 512 positions"),
    ("probe", "--output_dir notes.txt", "is a file: choose a folder"),
    ("probe", "--output_dir probed", "--output_dir probed holds a report already: replace it with"),
    ("probe", "--base headless", "--base headless: its weights do not fit its config.json"),
    # -- lopt plan
    ("plan", "!--model_name_or_path", "--model_name_or_path is missing: give a folder, a hub id or one of"),
    ("plan", "--model_name_or_path ./nowhere", "--model_name_or_path ./nowhere is not a folder"),
    ("plan", "--model_name_or_path encoder", "not a decoder-only causal LM"),
    ("plan", "--model_name_or_path garbled", "--model_name_or_path garbled has no readable config"),
    ("plan", "--model_name_or_path rows.jsonl", "--model_name_or_path rows.jsonl has no readable config"),
    ("plan", "--param_dtype int8", "--param_dtype must be one of float32, bfloat16 (got int8)"),
    ("plan", "--num_blocks 1", "--num_blocks must be >= 2 and <= 4, the model's layers (got 1)"),
    ("plan", "--num_blocks 7", "--num_blocks must be >= 2 and <= 4, the model's layers (got 7)"),
    ("plan", "--num_blocks 2 --frozen_blocks 1", "--frozen_blocks must be <= 0, which leaves an earlier"),
    ("plan", "--frozen_blocks 3", "--frozen_blocks must be <= 2, which leaves an earlier block"),
    ("plan", "--optim lomo", "--optim must be one of adamw_torch_fused"),
    ("plan", "--max_length 1", "--max_length must be >= 2 (got 1)"),
    ("plan", "--local_every 0", "--local_every must be >= 1 (got 0)"),
    ("plan", "--offload block", "--offload block needs --schedule block_major: add it"),
    ("plan", "--bandwidth 0", "--bandwidth must be > 0 (got 0.0)"),
    ("plan", "--tflops nan", "--tflops must be finite and > 0 (got nan)"),
    ("plan", "--fit much", "--fit must be a size such as 24GiB, 80GB (both in bytes) or 24"),
    ("plan", "--fit 24Gb", "--fit must be a size such as 24GiB, 80GB (both in bytes) or 24 (GiB) (got 24Gb)"),
    ("plan", "--schedule block_major", "--schedule has no effect without --calibrate: add it, or leave"),
    ("plan", "--calibrate", "--json must be left out with --calibrate, which measures and compares (got"),
    ("plan", "--tflops 1 2", "--tflops must be 1 or 3 numbers (got [1.0, 2.0])"),
    ("plan", "--device_name gtx", "--device_name must be one of rtx3090, rtx4090"),
    ("plan", "--device_name h100 --use_cpu", "--device_name must be left out with --use_cpu (got h100)"),
    ("plan", "--fit device", "--fit must be a size, or device with --device_name (got device)"),
    ("plan", "--host_memory 64GiB", "--host_memory must be given with --fit (got 64GiB)"),
    ("plan", "--fit 8 --host_memory x", "--host_memory must be a size such as 24GiB, 80GB (both in bytes)"),
    ("plan", "--max_length 99999999999", "--max_length must be >= 2 and <= 2147483647 (got 99999999999)"),
    ("plan", "--svg nowhere/a.svg", "--svg must be a file in a folder that exists: make it first"),
    ("plan", "--json pipe.jsonl", "--json must be a regular file, and this is a device or a pipe (got"),
    ("plan", "--svg data", "--svg must be a file, and this is a folder (got data)"),
    # -- lopt chat and lopt merge
    ("chat", "!--model_name_or_path", "no model is named: give the folder of a run"),
    ("chat", "--model_name_or_path ./nowhere", "--model_name_or_path ./nowhere is not a folder"),
    ("chat", "--model_name_or_path encoder", "not a decoder-only causal LM"),
    ("chat", "--model_name_or_path not_finite", "holds numbers that are not finite"),
    ("chat", "--base", "model does not say which model it was made from: name it, as --base NAME"),
    ("chat", "--base encoder", "not a decoder-only causal LM"),
    ("chat", "--prompt=", "--prompt is empty"),
    ("chat", "--template poem", "--template must be one of chat, messages, alpaca, qa, pair (got poem)"),
    ("chat", "--template chat", "--template chat: model has no chat template"),
    ("chat", "--temperature -1", "--temperature must be >= 0 (got -1.0)"),
    ("chat", "--top_p 1.5", "--top_p must be > 0 and <= 1 (got 1.5)"),
    ("chat", "--param_dtype int8", "--param_dtype must be one of"),
    ("merge", "!--model_name_or_path", "no adapter is named: give the folder of a run"),
    ("merge", "--model_name_or_path model", "model holds no adapter to merge (it is a whole model already)"),
    ("merge", "--model_name_or_path adapted", "adapted holds no adapter to merge (it is a whole model"),
    ("merge", "--model_name_or_path nowhere", "nowhere is not a folder"),
    ("merge", "--output_dir data", "--output_dir data is not empty, and nothing is overwritten"),
    ("merge", "--output_dir notes.txt", "--output_dir notes.txt is a file: choose a folder"),
    ("merge", "--base encoder", "not a decoder-only causal LM"),
    # -- lopt demo
    ("demo", "--model ./nowhere", "--model ./nowhere is not a folder"),
    ("demo", "--model encoder", "not a decoder-only causal LM"),
    ("demo", "--task chess", "--task must be one of gsm_symbolic, chain_sum (got chess)"),
    ("demo", "--methods lora", "--methods must be one of lopt, e2e, frozen (got lora)"),
    ("demo", "--methods e2e e2e", "--methods e2e e2e: give one or more, each once"),
    ("demo", "--steps 0", "--steps must be >= 1 (got 0)"),
    ("demo", "--num_blocks 9", "--num_blocks must be <= 4, the model's number of layers (got 9)"),
    ("demo", "--learning_rate nan", "--learning_rate must be finite and > 0 (got nan)"),
    ("demo", "--output_dir done", "--output_dir done holds a run already: start anew with"),
    ("demo", "--output_dir model --overwrite_output_dir", "would write over the model it starts from"),
]  # fmt: skip
# Found when weights are read, or when rows are tokenized; not before.
LATE = (
    "headless",
    "cut",
    "misshapen",
    "fewer_layers",
    "shardless",
    "strict",
    "unknown_rope",
    "unknown_act",
    "pad_beyond",
    "adapted",
    "not_finite",
    "max_seq_length",
    "max_length 2",
    "attn_implementation",
    "--window",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()}


def words_of(command: str, changes: str) -> list[str]:
    words, given = command.split(), BASE[command].split(" --")
    more = [word for word in changes.split() if not word.startswith("!")]
    without = [word[1:] for word in changes.split() if word.startswith("!")]
    kept = [f"--{part.removeprefix('--')}" for part in given]
    return [*words, *(w for part in kept if part.split()[0] not in without for w in part.split()), *more]


@pytest.mark.parametrize(("command", "changes", "message"), CASES)
def test_a_mistake(
    command: str,
    changes: str,
    message: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "80")
    if not any(word in changes for word in LATE):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # calling it is a TypeError
    before = snapshot(world)
    datasets.disable_progress_bars()
    try:
        assert main(words_of(command, changes)) == 2
    finally:
        datasets.enable_progress_bars()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [line for line in lines if not re.search(r"(it|model)/s\]", line)]  # progress bars
    print(*lines)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"lopt {command.split()[0]}: error: ") and message in lines[0]
    assert len(lines[0]) < 1500
    assert snapshot(world) == before and not (world / "out").exists()


def test_the_table_is_of_all_commands() -> None:
    from lopt.cli.main import COMMANDS

    assert {command.split()[0] for command, _, _ in CASES} == set(COMMANDS)
