"""README and documentation say what is there: paths, commands, flags, imports, quoted messages."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import lopt
from lopt.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
HISTORY = ("changelog.md",)  # names things that are gone
COMMANDS = (
    *("sft", "dpo", "grpo", "chat", "merge", "eval", "compare", "report", "probe", "plan", "demo"),
    *("data preview", "data download", "data preview dpo", "compare dpo"),
)
TOP = ("benchmarks", "docs", "examples", "scripts", "src", "tests")
# Flags of other programs that the pages name.
FOREIGN = {
    "--config_file", "--nnodes", "--node_rank", "--nproc_per_node", "--num_processes", "--rdzv_backend",
    "--rdzv_endpoint", "--find-links", "--no-deps", "--no-index", "--wheel", "--help", "--help-all",
    "--version", "--config", "--steps", "--max_tokens", "--schedule_steps", "--tokens", "--pairs",
    "--logprobs-mode", "--dtype", "--logdir", "--backend-store-uri", "--master_addr", "--master_port",
    "--rdzv_id", "--signal", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--device",
    "--machine_rank", "--main_process_ip", "--main_process_port",
}  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of fenced code blocks, also of indented ones."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [
        re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        for indent, kind, body in found
        if kind in languages
    ]


@functools.cache
def flags(command: str) -> frozenset[str]:
    """Every flag of a command, from its `--help-all`."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command.split(), "--help-all"])
    return frozenset(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1500


@pages
def test_paths_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./{{}},*-]+", text):
        name = path.rstrip(".,")
        for part in expanded(name):
            assert list(ROOT.glob(part)), f"{page.name} names {name}, which does not exist"


@pages
def test_links_exist(page: Path) -> None:
    """On the repository's own pages; `mkdocs build --strict` holds the same for the site."""
    if not page.is_relative_to(ROOT / "docs"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links {target}, which does not exist"


@pages
def test_commands_and_their_flags_exist(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "bash", "text"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if "train_sft.py" in words:
                command = "sft"
            elif "train_grpo.py" in words:
                command = "grpo"
            elif words[:1] == ["lopt"] and len(words) > 1 and words[1].islower():
                command = " ".join(words[1:3]) if words[1] == "data" else words[1]
                command += " dpo" if words[1:4] == ["data", "preview", "dpo"] else ""
                assert command in COMMANDS, f"{page.name}: {line}"
            else:
                continue
            for flag in (word.split("=")[0] for word in words if word.startswith("--")):
                assert flag in flags(command) | FOREIGN, f"{page.name}: {command} has no {flag}"


@pages
def test_flags_exist(page: Path) -> None:
    if page.name in HISTORY:
        return
    known = FOREIGN.union(*map(flags, COMMANDS))
    text = "\n".join(re.findall(r"`[^`\n]+`", page.read_text("utf-8")))
    for flag in set(re.findall(r"(?<![\w-])--[a-z]\w[\w-]*", text)):
        assert flag in known, f"{page.name} names {flag}, which no command has"
    for command in re.findall(r"`lopt ([a-z]+)", text):
        assert command in {known.split()[0] for known in COMMANDS}, f"{page.name} names lopt {command}"


@pages
def test_imports_work(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: no {alias.name} in {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


@pages
def test_modules_named_in_the_text_exist(page: Path) -> None:
    if page.name in HISTORY:
        return
    for name in re.findall(r"`(lopt(?:\.\w+)+)", page.read_text("utf-8")):
        importable(name)


def test_references_are_public_names() -> None:
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE):
        importable(name)
        assert not any(part.startswith("_") for part in name.split("."))


def test_quoted_messages_are_in_the_source() -> None:
    """The first column of the tables of docs/troubleshooting.md; `…` stands for what varies."""
    sources = "\n".join(itertools.chain.from_iterable(map(messages, sorted((ROOT / "src").rglob("*.py")))))
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\|(.*?)(?<!\\)\|", text, re.MULTILINE)
    quoted = re.findall(r"`` (.+?) ``", "\n".join(rows))
    assert len(quoted) >= 30
    missing = []
    for message in quoted:
        for part in filter(None, map(str.strip, message.split("…"))):
            argument = re.sub(r"--(\w+)", r"`\1`", part)  # the command line turns `name` into --name
            if part not in sources and argument not in sources:
                missing.append(part)
    assert not missing, f"no message of the source says {missing}"


def test_the_notebook_has_outputs() -> None:
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "stream" in kinds and "error" not in kinds


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == lopt.__version__


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "same logits: True" in said and "same answers: True" in said


def test_the_rooms_of_the_readme() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").split("## Where things are")[1].split("```")[1]
    rooms = {p.name for p in (ROOT / "src/lopt").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"(\w+)/", tree))


def test_every_extra_is_installable() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"(?:lopt|\.)\[([a-z,]+)\]", page.read_text("utf-8")):
            assert set(names.split(",")) <= extras.keys(), f"{page.name}: {names}"


def expanded(path: str) -> list[str]:
    """`a{b,c}` becomes `ab` and `ac`; a pair of braces that is not closed was cut off and is dropped."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [path.split("{")[0].rstrip("/")]
    return [
        whole
        for part in match[1].split(",")
        for whole in expanded(path[: match.start()] + part + path[match.end() :])
    ]


def importable(name: str) -> None:
    """Fail unless `name` is a module of lopt or a name in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(found, part), f"there is no {name}"
            found = getattr(found, part)
        return
    raise AssertionError(f"there is no {name}")


def messages(path: Path) -> list[str]:
    """Every text of a module, the pieces of an f-string joined by `…`."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return "…"

    tree = ast.parse(path.read_text("utf-8"))
    return [text(node) for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))]


def test_shell_blocks_are_well_formed() -> None:
    for page in PAGES:
        for block in blocks(page.read_text("utf-8"), "bash"):
            shlex.split(block, comments=True)
