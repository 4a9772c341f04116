"""`lopt merge`: a run of adapters as one plain model, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lopt.cli.folder import folder_first
from lopt.cli.output import check_writable
from lopt.cli.parsing import parse
from lopt.cli.report_flags import MergeArguments
from lopt.models.names import DTYPES, resolve_model
from lopt.validation import check_choice


def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked cheaply, then load, merge and save."""
    (args,) = parse("merge", folder_first(arguments))
    adapter, target = _check(args)

    from lopt.cli.run_folder import note_merged  # after the checks: these imports take seconds
    from lopt.evaluation.load import Loading, adapter_base
    from lopt.models.load import save_model
    from lopt.models.processor import copy_processor
    from lopt.trainers.lora import merged

    base = resolve_model(args.base) if args.base is not None else str(adapter_base(str(adapter)))
    loading = Loading(args.param_dtype, trust_remote_code=args.trust_remote_code)
    tokenizer = loading.tokenizer(str(adapter))
    model = merged(loading.on_host(base), adapter, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "model"  # under its name once it is whole
        save_model(model, made, tokenizer)
        copy_processor(base, model.config, made)
        note_merged(adapter, made)
        if target.exists():  # and empty
            target.rmdir()
        shutil.move(made, target)
    print(f"{adapter} and {base} are one model in {target}. Talk to it: lopt chat {target}")


def _check(args: MergeArguments) -> tuple[Path, Path]:
    """Return the folder of the adapter and the new one.

    Raises:
        ValueError: there is no adapter in the folder, or something in the new one.
    """
    if args.model_name_or_path is None:
        raise ValueError("no adapter is named: give the folder of a run, as in lopt merge outputs/sft")
    check_choice("param_dtype", args.param_dtype, DTYPES)
    adapter = Path(args.model_name_or_path).expanduser()
    if not adapter.is_dir():
        raise ValueError(f"{adapter} is not a folder: give that of a run of --method lora")
    whole = (adapter / "config.json").is_file()
    if whole or not (adapter / "adapter_config.json").is_file():
        why = "it is a whole model already" if whole else "no adapter_config.json"
        raise ValueError(
            f"{adapter} holds no adapter to merge ({why}): give the folder of a run of --method lora"
        )
    place = Path(os.path.abspath(adapter))  # whose name is not . or ..
    target = (
        Path(args.output_dir).expanduser() if args.output_dir else place.with_name(f"{place.name}-merged")
    )
    check_writable(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(
            f"`output_dir` {target} is not empty, and nothing is overwritten: choose a new folder"
        )
    return adapter, target
