"""`lopt probe`: how far tuned models' hidden states and weights are from their base's, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.cli.eval import labels
from lopt.cli.output import check_report
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.report_flags import ProbeArguments
from lopt.core.config import LoPTConfig
from lopt.evaluation.texts import read_texts
from lopt.files import write_json, write_text
from lopt.reliability.provenance import versions
from lopt.validation import check_number

FILES = ("probe.json", "report.html")


def main(arguments: Sequence[str]) -> None:
    """Check all flags and tokenizers, run the base, then one tuned model after the other."""
    (args,) = parse("probe", arguments)
    texts = check(args)

    from lopt.evaluation.drift.probe import naming_base, probe  # after the checks: these imports take seconds
    from lopt.evaluation.load import Loading
    from lopt.reports.drift import drift_page, drift_table

    with naming_base():
        ((base, base_path),) = labels([args.base]).items()
    models = labels(args.model_name_or_path)
    folder = check_report(args.output_dir, FILES, "probe", overwrite=args.overwrite_output_dir)
    record = record_of("probe", arguments)
    cut = None
    if args.num_blocks is not None or args.block_boundaries is not None:
        cut = LoPTConfig(num_blocks=args.num_blocks or 1, block_boundaries=args.block_boundaries)
    drifts = probe(
        base_path,
        models,
        list(texts.values()),
        Loading(args.param_dtype, trust_remote_code=args.trust_remote_code),
        cut=cut,
        tokens=args.tokens,
        window=args.window,
        batch_size=args.batch_size,
    )
    about = {name: getattr(args, name) for name in ("base", "text", "tokens", "window", "param_dtype")}
    packages = versions(("lopt", "torch", "transformers"))
    by_label = {label: {"path": models[label], **drift.to_dict()} for label, drift in drifts.items()}
    result = {**about, "versions": packages, "models": by_label}
    write_json(folder / "probe.json", result, allow_nan=False)
    facts = {**about, "text": ", ".join(args.text), **models, **packages}
    write_text(folder / "report.html", drift_page(drifts, base, list(texts), facts))
    record.write(folder)
    print(drift_table(drifts))
    print(f"The report is {folder / 'report.html'}, its numbers are in {folder / 'probe.json'}")


def check(args: ProbeArguments) -> dict[str, str]:
    """Refuse what cannot work before a model is loaded; return the texts by name.

    Raises:
        ValueError: a flag is missing or out of range, a file cannot be read.
    """
    for name, what in (
        ("base", "the model before tuning"),
        ("model_name_or_path", "one or more tuned models"),
        ("text", "a file with plain text to run them on"),
    ):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: give {what}")
    for name in ("tokens", "window", "batch_size"):
        check_number(name, getattr(args, name), minimum=1)
    return read_texts(args.text or [], args.tokens, "text")
