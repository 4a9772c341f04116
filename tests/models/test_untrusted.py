"""A model or data set that means harm does nothing: it is refused in one line, and nothing of it runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from conftest import save_tiny
from lopt import load_model
from lopt.cli.eval import labels
from lopt.cli.main import main
from lopt.data.load import load_rows
from lopt.evaluation.names import file_name, hashed_file_name
from lopt.models.load import load_tokenizer
from lopt.models.untrusted import UntrustedError

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "safetensors.md"
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, **kwargs):
    pathlib.Path({marker!r}).touch()
"""
COMMANDS = {
    "sft": "sft --model_name_or_path {model} --train_file {rows} --output_dir {out} --max_steps 1",
    "sft, preview": "data preview --model_name_or_path {model} --train_file {rows}",
    "grpo": "grpo --model_name_or_path {model} --train_file {rows} --task gsm8k --output_dir {out} "
    "--num_generations 2 --per_device_train_batch_size 2 --max_steps 1 --beta 0.1",
    "eval": "eval --model_name_or_path {model} --text {text} --output_dir {out}",
    "eval, base": "eval --model_name_or_path {good} --base {model} --text {text} --output_dir {out}",
    "probe": "probe --model_name_or_path {model} --base {good} --text {text} --tokens 64 --output_dir {out}",
    "probe, base": "probe --model_name_or_path {good} --base {model} --text {text} --tokens 64 "
    "--output_dir {out}",
    "compare": "compare --model_name_or_path {model} --train_file {rows} --methods lopt --output_dir {out}",
    "plan": "plan --model_name_or_path {model} --num_blocks 2",
    "demo": "demo --model {model} --output_dir {out}",
}
# What these do not load cannot harm them.
TOKENIZER_ONLY = ("sft, preview",)
CONFIG_ONLY = ("plan",)
WITHOUT_WEIGHTS = TOKENIZER_ONLY + CONFIG_ONLY


class _Malice:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.marker),)


class World:
    """Where the cases lie, and the file that none of them may make."""

    def __init__(self, root: Path) -> None:
        self.root, self.marker = root, root / "PWNED"
        self.good = save_tiny(root / "good")
        (root / "text.txt").write_text("Some text to read, of no consequence at all.\n" * 8)
        rows = [{"question": f"What is {i} plus 1?", "answer": f"#### {i + 1}"} for i in range(80)]
        (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.good, self.root / name))

    def change(self, file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def pickle(self, file: Path) -> None:
        file.write_bytes(pickle.dumps(_Malice(self.marker)))

    def run(self, name: str, model: Path, *more: str) -> int:
        places = dict(model=model, good=self.good, rows=self.root / "rows.jsonl")
        places |= dict(text=self.root / "text.txt", out=self.root / "out" / f"{model.name}{len(name)}")
        return main([*COMMANDS[name].format(**places).split(), *more])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("security"))


def remote_code(world: World) -> Path:
    folder = world.copy("remote")
    (folder / "evil.py").write_text(CODE.format(marker=str(world.marker)))
    kinds = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    world.change(folder / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=kinds)
    return folder


def remote_tokenizer(world: World) -> Path:
    folder = world.copy("remote-tokenizer")
    (folder / "evil.py").write_text(CODE.format(marker=str(world.marker)))
    kinds = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    world.change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=kinds)
    return folder


def pickled(world: World) -> Path:
    folder = world.copy("pickled")
    (folder / "model.safetensors").unlink()
    world.pickle(folder / "pytorch_model.bin")
    return folder


def shards_elsewhere(world: World) -> Path:
    folder = world.copy("shards")
    (folder / "model.safetensors").unlink()
    names = {"model.embed_tokens.weight": "../good/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def link(world: World) -> Path:
    folder = world.copy("link")
    secret = world.root / "secret.json"
    (folder / "tokenizer_config.json").rename(secret)
    (folder / "tokenizer_config.json").symlink_to(secret)
    return folder


def kernel(world: World) -> Path:
    folder = world.copy("kernel")
    world.change(folder / "config.json", attn_implementation="someone/fast-attention")
    return folder


def endless(world: World) -> Path:
    folder = world.copy("endless")
    loop = "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text(loop)
    return folder


# What each must be told, and the commands that do not load what is bad and so come to no harm.
MODELS = {
    "remote code": (remote_code, "--trust_remote_code", TOKENIZER_ONLY),
    "remote tokenizer": (remote_tokenizer, "--trust_remote_code", CONFIG_ONLY),
    "pickle": (pickled, "pytorch_model.bin, a pickle", WITHOUT_WEIGHTS),
    "shards elsewhere": (shards_elsewhere, "'../good/model.safetensors'", WITHOUT_WEIGHTS),
    "link": (link, "tokenizer_config.json is a link out of that folder", ()),
    "kernel": (
        kernel,
        "attn_implementation sdpa, or someone/fast-attention if you trust it",
        WITHOUT_WEIGHTS,
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_command_refuses(
    case: str, world: World, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    make, message, harmless = MODELS[case]
    folder = make(world)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on the terminal"))
    for name in COMMANDS:
        if name in harmless:
            continue
        code = world.run(name, folder)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and "error: " in error and message in error, (name, error)
        assert not world.marker.exists(), name
    assert not list((world.root / "out").rglob("*.safetensors"))


def test_the_library_names_the_argument_that_replaces_a_kernel(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(UntrustedError, match="give `attn_implementation` sdpa, or someone/fast-attention if"):
        load_model(str(kernel(world)))


def test_the_flag_is_what_runs_code(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above has teeth: with the flag the same folder's code runs, and trains."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    assert not world.marker.exists()
    try:
        more = ("--trust_remote_code", "--num_blocks", "2", "--head_warmup_steps", "1", "--report_to", "none")
        assert world.run("sft", world.root / "remote", *more) == 0
        assert world.marker.exists()
    finally:
        world.marker.unlink(missing_ok=True)


def test_code_beside_an_architecture_that_is_known_stays_unread(world: World) -> None:
    folder = world.copy("beside")
    (folder / "evil.py").write_text(CODE.format(marker=str(world.marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(world.marker)))
    world.pickle(folder / "training_args.bin")
    kinds = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    for file in ("config.json", "generation_config.json"):
        world.change(folder / file, auto_map=kinds, custom_generate="evil")
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Evil"}}))
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=2)
    assert type(model).__name__ == "LlamaForCausalLM" and not world.marker.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "model.bin",
                                  "..\\x.safetensors", "C:\\x.safetensors", 7, None, ""])  # fmt: skip
def test_shards_stay_in_their_folder(name: object, world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.good, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UntrustedError, match="which is no safetensors file in that folder"):
        load_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UntrustedError, match="is no index of weights"):
        load_model(str(folder))


def test_the_hubs_own_cache_is_made_of_links(world: World, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(world.good, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load_model(str(snapshot)).num_parameters() and load_tokenizer(str(snapshot)).eos_token


def test_an_adapter_that_is_a_pickle_is_refused(world: World, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("peft")
    folder = world.root / "adapter"
    folder.mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(world.good), "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    world.pickle(folder / "adapter_model.bin")
    both = Path(shutil.copytree(folder, world.root / "both"))  # transformers would load the adapter by itself
    shutil.copytree(world.good, both, dirs_exist_ok=True)
    for path in (folder, both):
        for name in ("eval", "probe"):
            assert world.run(name, path) == 2
            assert "adapter_model.bin, a pickle" in capsys.readouterr().err
    with pytest.raises(UntrustedError, match=r"adapter_model\.bin"):
        load_model(str(both))
    assert not world.marker.exists()


def test_the_way_to_convert_works(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = PAGE.read_text(encoding="utf-8").split("```")[1]
    snippet = snippet.removeprefix("python")
    folder = Path(shutil.copytree(world.good, tmp_path / "old-model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    world.pickle(folder / "training_args.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UntrustedError, match=r"pytorch_model\.bin.*From \.bin to safetensors"):
        load_model("./old-model")
    exec(snippet, {})
    converted = load_model("./old-model").state_dict()
    assert all(torch.equal(converted[name], value) for name, value in weights.items())
    (folder / "model.safetensors").unlink()
    world.pickle(folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        exec(snippet, {})
    assert not world.marker.exists()


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """A run with a checkpoint after its first step of two."""
    more = ["--num_blocks", "2", "--head_warmup_steps", "1", "--report_to", "none", "--save_steps", "1"]
    assert world.run("sft", world.good, *more, "--output_dir", str(world.root / "run")) == 0
    return world.root / "run"


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin", ".metadata"],
)
def test_a_checkpoint_with_malice_does_nothing(
    name: str, finished: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    checkpoint = out / "checkpoint-1"
    (checkpoint / "manifest.json").unlink()  # whoever can forge a checkpoint can forge that, too
    if name == "rng_state.pth":
        assert (checkpoint / name).is_file()
    world.pickle(checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    flags = ["--resume", str(checkpoint), "--output_dir", str(out), "--max_steps", "2", "--report_to", "none"]
    code = world.run("sft", world.good, *flags, "--num_blocks", "2")
    error = capsys.readouterr().err.strip()[-1000:]
    assert code == (0 if name == "training_args.bin" else 2), error
    assert code == 0 or ("error: " in error and "refused" in error)
    assert not world.marker.exists()


def test_names_stay_in_their_folder(tmp_path: Path) -> None:
    """Names of tasks, models and arms become file names; presets are looked up and never opened."""
    for name in (
        "../../x",
        "/etc/passwd",
        "..",
        "a/..",
        "a\\..\\b",
        "x\0y",
        "~/x",
        "a" * 20 + "/" * 9,
        "\u202e/x",
    ):
        for made in (file_name(name), hashed_file_name(name), *labels([f"org/{name.replace('/', '_')}"])):
            assert (tmp_path / f"finished/{made}.json").resolve().parent == tmp_path / "finished", name
            assert made not in ("", ".", "..") or made == file_name(name), name
        for command in (["sft", "--dataset_preset", name], ["data", "download", "--dataset", name]):
            assert main([*command, "--output_dir", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


# -- chat templates and strings ------------------------------------------------------------------------

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mknod('PWNED') }}",
    "{{ messages|attr('__class__') }}{{ (messages|map('attr', '__init__')|list)[0] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ namespace.__init__.__globals__['os'].mknod('PWNED') }}",
    "{% include 'rows.jsonl' %}{% import 'os' as os %}",
    "{{ raise_exception('no') }}",
    "{% set x = messages.append(1) %}{{ self._TemplateReference__context }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_reaches_nothing(
    template: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(world.good, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.chdir(tmp_path)
    code = world.run("sft, preview", folder)
    shown = capsys.readouterr()
    assert code == 2 and len(shown.err.strip().splitlines()[-1]) < 1000
    assert "/bin" not in shown.out + shown.err and not list(tmp_path.rglob("PWNED"))


def test_a_chat_template_without_an_end_is_refused(
    world: World, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopt.models.chat_template.CPU_SECONDS", 1)
    folder = endless(world)
    for name in ("sft", "eval"):
        assert world.run(name, folder) == 2
        assert "does not come to an end" in capsys.readouterr().err


def test_special_tokens_in_a_rows_text_are_special_tokens(world: World) -> None:
    """As SECURITY.md says."""
    tokenizer = load_tokenizer(str(world.good))
    assert tokenizer("a<eos>b")["input_ids"].count(tokenizer.eos_token_id) == 1


# -- data ----------------------------------------------------------------------------------------------


def test_data_sets_with_a_script_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(marker=str(world.marker)))
    for name in (folder, folder / "evil.py"):
        flags = ["--model_name_or_path", str(world.good), "--dataset_name", str(name)]
        assert main(["sft", *flags, "--output_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "--dataset_name" in error and "script" in error, error
    assert not world.marker.exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_rows_are_not_opened(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a picture's place would be opened when its row is read: this one would fail."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    row = {"question": ["a"], "answer": ["b"], "image": [{"path": "/nowhere/secret.png", "bytes": None}]}
    table = Dataset.from_dict(row, features=features).data.table
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(train_file=str(tmp_path / "rows.parquet"), streaming=streaming)
    assert list(rows) == [{"question": "a", "answer": "b"}]


def test_a_data_sets_card_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret\n")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.txt").write_text("plain\n")
    for name in ("../secret.txt", str(tmp_path / "secret.txt")):
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
        )
        for streaming in (False, True):
            with pytest.raises(ValueError, match="`dataset_name`"):
                list(load_rows(dataset_name=str(folder), streaming=streaming))
