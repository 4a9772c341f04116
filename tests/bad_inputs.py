"""What can be wrong with rows, files and models: the folder that test_bad_input.py runs in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from conftest import save_tiny, tiny


def row(question: object = "What is 1 plus 1?", answer: object = "2", **more: object) -> str:
    return json.dumps({"question": question, "answer": answer, **more}) + "\n"


def talk(*turns: object) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"  # type: ignore[misc]


GOOD = "".join(row(f"What is {a} plus {a * a}?", f"{a + a * a}") for a in range(12))
PREFERRED = [(f"What is {a} plus 1? ", f"It is {a + 1}.", f"It is {a}.") for a in range(12)]


def pair(prompt: object, chosen: object, rejected: object) -> str:
    given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return json.dumps({name: value for name, value in given.items() if value is not ...}) + "\n"


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


# Pairs that cannot be trained on -> what `lopt dpo --train_file NAME` says of them.
PAIRS: dict[str, tuple[str, str]] = {
    "misspelt.jsonl": (
        '{"prompt": "a", "chosen": "b", "rejcted": "c"}\n',
        "no column rejected, found prompt",
    ),
    "no_answer.jsonl": (
        pair("a", "b", "c") + pair("a", None, "c"),
        "row 1 (from 0), column `chosen`, must be",
    ),
    "blank_prompt.jsonl": (pair(" ", "b", "c"), "column `prompt`, is empty: fill it or remove the row"),
    "mixed.jsonl": (
        pair("a", "b", "c") + pair(said("a"), said("b"), "c"),
        "is messages, and the first row's",
    ),
    "questions_differ.jsonl": (
        pair(..., said("a", "b", "c", "d"), said("a", "b", "e", "f")),
        "must go on after the prompt with an assistant message, and has one of user",
    ),
    "unlike.jsonl": (pair(..., said("a", "b"), said("c", "d")), "give their prompt in a column `prompt`"),
    "equal.jsonl": (pair("a", "b", "b"), "in all rows `chosen` equals `rejected`: give others"),
}
SAID = (("user", "Hi"), ("assistant", "Hello"))
# Rows that cannot be trained on -> what `lopt sft --train_file NAME` says of them.
ROWS: dict[str, tuple[str | bytes, str]] = {
    "empty.jsonl": ("", "empty.jsonl is empty: give a file with at least one row"),
    "blank.jsonl": ("\n \n\n", "blank.jsonl has no rows"),
    "list.json": ("[]", "list.json has no rows"),
    "word.json": ('"rows"', "word.json"),
    "header.csv": ("question,answer\n", "header.csv has no rows"),
    "rows.xml": ("<rows/>", "rows.xml is of an unknown type: give .json, .jsonl"),
    "rows.jsonl.gz": (b"\x1f\x8b\x08\x00junk", "rows.jsonl.gz is no whole .gz file"),
    "gzip.jsonl": (b"\x1f\x8b\x08\x00junk", "gzip.jsonl is not UTF-8 (line 1): convert it"),
    "gzip.parquet": (b"\x1f\x8b\x08\x00junk", "gzip.parquet"),
    "utf16.jsonl": (row().encode("utf-16"), "utf16.jsonl is not UTF-8 (line 1): convert it"),
    "latin.jsonl": (row() .encode() + b'{"question": "caf\xe9", "answer": "1"}\n', "is not UTF-8 (line 2)"),
    "latin.csv": (b"question,answer\ncaf\xe9,1\n", "latin.csv is not UTF-8 (line 2)"),
    "nul.jsonl": (row() + "\0\0\0\0\n", "nul.jsonl has a NUL byte (line 2)"),
    "nul.csv": ("question,answer\0\nx\0,1\n", "nul.csv has a NUL byte (line 1)"),
    "surrogate.jsonl": ('{"question": "\\ud800", "answer": "1"}\n', "surrogate.jsonl"),
    "cut.jsonl": (row() + '{"question": "a", "ans', "cut.jsonl is broken: line 2 is not valid JSON"),
    "comma.jsonl": ('{"question": "a", "answer": "b",}\n', "line 1 is not valid JSON"),
    "array.jsonl": ('["question", "answer"]\n[1, 2]\n', "array.jsonl"),
    "number.jsonl": ("3\n4\n", "line 1 is not a JSON object"),
    "deep.jsonl": ('{"question": ' + "[" * 99_999 + "]" * 99_999 + "}\n", "line 1 is nested too deeply"),
    "twenty_megabytes.jsonl": (
        row() + '{"question": "' + "x" * 20_000_000 + '", "answer": \n',
        "twenty_megabytes.jsonl is broken: line 2 is not valid JSON",
    ),
    "nan.jsonl": ('{"question": "a", "answer": "1", "score": NaN}\n{"question": NaN}\n', "`question`"),
    "infinity.jsonl": ('{"question": Infinity, "answer": "1"}\n', "`question`, must be text"),
    "columns.jsonl": ('{"spam": "a", "eggs": "b"}\n', "found spam, eggs: rename them to one of"),
    "differing.jsonl": (row() + '{"spam": "a"}\n', "row 1 (from 0), column `question`"),
    "types.jsonl": (row() + row({"text": "a"}), "row 1 (from 0), column `question`, must be text, not dict"),
    "numbers.jsonl": (row(7), "row 0 (from 0), column `question`, must be text, not int"),
    "null.jsonl": (row() + row(None), "row 1 (from 0), column `question`, must be text, not NoneType"),
    "void.jsonl": (row() + row("  "), "row 1 (from 0), column `question`, is empty: fill it or remove"),
    "unanswered.jsonl": (row(answer="") * 3, "`answer` is empty in all 3 rows: fill it"),
    "nested.jsonl": (row(answer={"text": ["2"]}), "column `answer`, must be text or a number, not dict"),
    "twice.jsonl": ('{"question": "a", "question": "b", "answer": "c"}\n' * 2, "twice.jsonl"),
    "semicolon.csv": ("question;answer\na;b\n", "header 'question;answer': separate columns by commas"),
    "tab.csv": ("question\tanswer\na\tb\n", "separate columns by commas"),
    "same.csv": ("question,question,answer\na,b,c\n", "has two columns called 'question': rename one"),
    "quote.csv": ('question,answer\na,b\nc,"d\n', "quote.csv"),
    "ragged.csv": ("question,answer\na,b\nc,d,e\n", "ragged.csv"),
    "truncated.parquet": (b"", "truncated.parquet"),
    "twice.parquet": (b"", "twice.parquet has two columns called 'question': rename one"),
    "silent.jsonl": (talk(("user", "Hi")), "no assistant message (roles: user)"),
    "roles.jsonl": (talk(("narrator", "Hi"), ("oracle", "Hello")), "(roles: narrator, oracle)"),
    "first.jsonl": (talk(("assistant", "Hello")), "has no message before its assistant message"),
    "roleless.jsonl": ('{"messages": [{"value": "Hi"}]}\n', "without a role: give {role,"),
    "spoken.jsonl": ('{"messages": "Hi"}\n', "must be a non-empty list of {role, content} messages"),
    "parts.jsonl": (talk(("user", [{}]), ("assistant", "x")), "has a user message whose content is not"),
    "mute.jsonl": (talk(("user", ""), ("assistant", "x")), "has an empty user message: fill it or remove"),
}  # fmt: skip
FILES: dict[str, str | bytes] = {
    "rows.jsonl": GOOD,
    "pairs.jsonl": "".join(pair(*one) for one in PREFERRED),
    "notes.txt": "Some text that has nothing to do with sums. " * 40,
    "binary.txt": b"\xff\xfe\xfa",
    "blank.txt": " \n",
    "talk.jsonl": talk(*SAID) * 4,
    "unknown.yaml": "num_block: 2\n",
    "broken.yaml": "num_blocks: [2\n",
    "list.yaml": "- num_blocks\n",
    "twice.yaml": "num_blocks: 2\nmax_steps: 4\nnum_blocks: 4\n",
    "tabs.yaml": "num_blocks: 2\n\tmax_steps: 4\n",
    "latin.yaml": b"run_name: caf\xe9\n",
    "type.yaml": "num_blocks: two\n",
    "nothing.yaml": "num_blocks:\n",
    "several.yaml": "num_blocks: [2, 4]\n",
    "mapping.yaml": "num_blocks: {a: 1}\n",
    "method.yaml": "method: magic\n",
    "1.yaml": "1: 2\n",
    "wide.yaml": "seeds: first\n",
    "rewards.py": "def short(completions, **_):\n    return [1.0]\n\n\ndef text(completions, **_):\n"
    "    return ['high'] * len(completions)\n",
    "data/gsm8k/test.jsonl": '{"question": "a"}\n',
}


def build(folder: Path) -> None:
    """Write all of it into `folder`."""
    for name, content in (FILES | {name: content for name, (content, _) in (ROWS | PAIRS).items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Dataset.from_list([{"question": "a", "answer": "b"}] * 50).to_parquet(folder / "truncated.parquet")
    (folder / "truncated.parquet").write_bytes((folder / "truncated.parquet").read_bytes()[:-100])
    texts = [["a"], ["b"], ["c"]]
    pq.write_table(pa.table(texts, names=["question", "question", "answer"]), folder / "twice.parquet")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "dangling").symlink_to("nowhere")
    build_models(folder)


def build_models(folder: Path) -> None:
    """A good model, and what can be wrong with one."""
    save_tiny(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())

    def like_it(name: str, without: str = "", **changes: object) -> Path:
        shutil.copytree(folder / "model", folder / name, ignore=shutil.ignore_patterns(without))
        (folder / name / "config.json").write_text(json.dumps(config | changes))
        return folder / name

    like_it("tuned")
    like_it("done/checkpoint-1")
    shutil.copytree(folder / "model", folder / "done", dirs_exist_ok=True)
    like_it("study/models/a")
    (folder / "study/setting.json").write_text("{}")
    (folder / "study/notes.txt").write_text("mine")
    like_it("wordless", without="tokenizer*")
    like_it("unheard_of", model_type="unheard_of")
    (like_it("garbled") / "config.json").write_text('{"model_type": "lla')
    (like_it("listed") / "config.json").write_text("[1, 2]")
    save_tiny(folder / "small", hidden_size=16)
    endless = like_it("endless") / "tokenizer_config.json"
    endless.write_text(json.dumps(json.loads(endless.read_text()) | {"eos_token": None}))
    reader = like_it("reader") / "tokenizer.json"
    words = json.loads(reader.read_text())
    vocabulary = words["model"]["vocab"]
    words["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    reader.write_text(json.dumps(words))
    shutil.copytree(folder / "model", folder / "narrow")
    tiny("llama", vocab_size=100).save_pretrained(folder / "narrow")
    tiny("llama", vocab_size=config["vocab_size"]).model.save_pretrained(like_it("headless"))
    weights = like_it("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    like_it("misshapen", intermediate_size=64)
    shard = like_it("shardless") / "model.safetensors"
    shard.rename(shard.with_name("model-00001-of-00002.safetensors"))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    shard.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    save_tiny(folder / "experts", "mixtral")
    save_tiny(folder / "strict", chat_template="{{ raise_exception('no such role as assistant') }}")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(BertConfig(**sizes, vocab_size=300)).save_pretrained(folder / "encoder")
    like_it("layers_as_text", num_hidden_layers="4")
    like_it("odd_heads", num_attention_heads=5)
    like_it("no_layers", num_hidden_layers=0)
    like_it("unknown_rope", rope_parameters={"rope_type": "magic"})
    like_it("unknown_act", hidden_act="magic")
    like_it("pad_beyond", pad_token_id=99_999)
    (like_it("tokenless") / "tokenizer.json").write_text("{}")
    adapter = json.dumps({"base_model_name_or_path": str(folder / "model"), "peft_type": "LORA"})
    (like_it("adapted") / "adapter_config.json").write_text(adapter)
    save_file({}, folder / "adapted/adapter_model.safetensors")
    (folder / "lora").mkdir()
    (folder / "lora/adapter_config.json").write_text(adapter)
    save_file({}, folder / "lora/adapter_model.safetensors")
    weights = load_file(folder / "model/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, like_it("not_finite") / "model.safetensors", metadata={"format": "pt"})
    like_it("no_probability", attention_dropout=2.0)
    like_it("fewer_layers", num_hidden_layers=3)
    (like_it("settings") / "generation_config.json").write_text("{")
    weights = load_file(folder / "model/model.safetensors")
    whole = {name: (100 * tensor).to(torch.int8) for name, tensor in weights.items()}
    save_file(whole, like_it("whole_numbers") / "model.safetensors", metadata={"format": "pt"})
    twice = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (like_it("two_copies") / "model.safetensors.index.json").write_text(json.dumps(twice))
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("[")
    (folder / "half_a_run").mkdir()
    (folder / "half_a_run/trainer_state.json").write_text('{"global_step": 3')
    (folder / "probed").mkdir()
    (folder / "probed/probe.json").write_text("{}")
