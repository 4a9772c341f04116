"""`lopt probe`: how far tuned models' hidden states and weights are from their base's, layer by layer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

import lopt
from lopt.cli.arguments import ProbeArguments
from lopt.cli.eval import labels
from lopt.cli.output import check_report
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.core.blocks import split
from lopt.core.config import LoPTConfig
from lopt.evaluation.drift.reference import CANNOT, Drift, Reference
from lopt.evaluation.drift.states import windows
from lopt.evaluation.load import adapter_base, load_examinee, load_examinees_tokenizer
from lopt.evaluation.texts import read_texts
from lopt.files import write_text
from lopt.planning.shapes import model_config
from lopt.reports.drift import drift_page, drift_table

FILES = ("probe.json", "report.html")


def main(arguments: Sequence[str]) -> None:
    """Check all flags and tokenizers, run the base, then one tuned model after the other."""
    (args,) = parse("probe", arguments)
    texts = check(args)
    with _named("--base"):
        ((base, base_path),) = labels([args.base]).items()
    models = labels(args.model_name_or_path)
    folder = check_report(args.output_dir, FILES, overwrite=args.overwrite_output_dir)
    record = record_of("probe", arguments)
    drifts = probe(args, base_path, models, list(texts.values()))
    about = {"base": args.base, "text": args.text, "tokens": args.tokens, "window": args.window}
    about |= {"param_dtype": args.param_dtype}
    versions = {package.__name__: package.__version__ for package in (lopt, torch, transformers)}
    moved = {label: {"path": models[label], **drift.to_dict()} for label, drift in drifts.items()}
    result = {**about, "versions": versions, "models": moved}
    facts = {**about, "text": ", ".join(args.text), **models, **versions}
    write_text(folder / "probe.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_text(folder / "report.html", drift_page(drifts, base, list(texts), facts))
    record.write(folder)
    print(drift_table(drifts))
    print(f"The report is {folder / 'report.html'}, its numbers are in {folder / 'probe.json'}")


def check(args: ProbeArguments) -> dict[str, str]:
    """Refuse what cannot work before a model is loaded; returns the texts by name.

    Raises:
        ValueError: a flag is missing or out of range, a file cannot be read, matplotlib is missing.
    """
    for flag, value, what in (
        ("--base", args.base, "the model before tuning"),
        ("--model_name_or_path", args.model_name_or_path, "one or more tuned models"),
        ("--text", args.text, "a file with plain text to run them on"),
    ):
        if not value:
            raise ValueError(f"{flag} is missing: give {what}")
    for flag, number in (
        ("--tokens", args.tokens),
        ("--window", args.window),
        ("--batch_size", args.batch_size),
    ):
        if number < 1:
            raise ValueError(f"{flag} {number} is not possible: use 1 or more")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the report needs matplotlib: pip install "lopt[eval]"')
    return read_texts(args.text or [], args.tokens, "--text")


def probe(
    args: ProbeArguments, base: str, models: Mapping[str, str], texts: Sequence[str]
) -> dict[str, Drift]:
    """Drift of every tuned model by its label; one model is in memory at a time.

    Args:
        base: its folder or hub id. models: those of the tuned models, by label.

    Raises:
        ValueError: a model cannot be loaded, is not of the base's shape or reads the text differently.
    """
    sizes = {"tokens": args.tokens, "window": args.window}
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    with _named("--base"):
        tokenizer, config = load_examinees_tokenizer(base, **trust), model_config(base, **trust)
    rows = windows(tokenizer, texts, **sizes)
    boundaries = {}
    for label, path in models.items():
        _check_alike(label, config, model_config(adapter_base(path) or path, **trust))
        if windows(load_examinees_tokenizer(path, **trust), texts, **sizes) != rows:
            raise ValueError(f"{label}: {CANNOT}, their tokenizers read the text as different tokens")
        boundaries[label] = boundaries_of(path, args, config.get_text_config().num_hidden_layers)
    drifts = {}
    with tqdm(total=1 + len(models), desc="Models", unit="model") as bar:
        with _named("--base"):
            model: Any = load_examinee(base, dtype=args.param_dtype, **trust)
        reference = Reference.of(model, tokenizer, texts, batch_size=args.batch_size, **sizes)
        bar.update()
        for label, path in models.items():
            del model  # before the next one is loaded
            model = load_examinee(path, dtype=args.param_dtype, **trust)
            drifts[label] = reference.drift(model, boundaries=boundaries[label])
            bar.update()
    return drifts


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """What goes wrong with a model names the flag that it was given by."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("`model_name_or_path`", flag)) from error


def _check_alike(label: str, base: PreTrainedConfig, tuned: PreTrainedConfig) -> None:
    shapes = []
    for whole in (base, tuned):
        config = whole.get_text_config()
        layers, size = config.num_hidden_layers, config.hidden_size
        shapes.append(f"{config.model_type}, {layers} layers of {size} channels, {config.vocab_size} tokens")
    if shapes[0] != shapes[1]:
        raise ValueError(f"{label}: {CANNOT}, the base is {shapes[0]}, this one is {shapes[1]}")


def boundaries_of(path: str, args: ProbeArguments, layers: int) -> list[int]:
    """Layers at which blocks 2..k start: the flags', or those of the run that wrote the model.

    Raises:
        ValueError: the flags are impossible for this model; its lopt_config.json is broken.
    """
    note = Path(path) / "lopt_config.json"
    if args.num_blocks is not None or args.block_boundaries is not None:
        config = LoPTConfig(num_blocks=args.num_blocks or 1, block_boundaries=args.block_boundaries)
    elif note.is_file():
        try:
            config = LoPTConfig(**json.loads(note.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{note} cannot be read ({error}): give --num_blocks instead") from error
    else:
        return []
    return [start for start, _ in split(layers, config)[1:]]
