"""What the folder of a run says of how it was made: the model it began from, the template of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lopt.evaluation.load import adapter_base
from lopt.files import read_json, write_json
from lopt.models.names import resolve_model
from lopt.reliability.record import RUN_JSON


def base_of(name: str) -> str:
    """Return the model that the one in a folder was made from.

    Raises:
        ValueError: the folder does not say, or that model is not where it was.
    """
    base = adapter_base(resolve_model(name))
    if base is not None:
        return base
    run = _run(name)
    settings = run.get("settings") or {}
    found = settings.get("model_name_or_path") or settings.get("model")
    if not isinstance(found, str):
        raise ValueError(f"{name} does not say which model it was made from: name it, as `base` NAME")
    here = run["attempts"][-1].get("working_folder") if run.get("attempts") else None
    if here and not Path(found).expanduser().exists() and (Path(here) / found).is_dir():
        return str(Path(here) / found)
    return found


def template_of(name: str, tokenizer: Any) -> str:
    """Return the template of a model: its chat template, or the plain one of the rows it was trained on."""
    if tokenizer.chat_template:
        return "chat"
    run = _run(name)
    if isinstance(run.get("template"), str):
        return "pair" if run["template"] == "text" else run["template"]
    return "qa" if (run.get("settings") or {}).get("task") else "messages"


def note_merged(adapter: Path, merged: Path) -> None:
    """Write beside a merged model how its adapter was made, where that is known."""
    run = _run(str(adapter))
    if run:
        write_json(merged / RUN_JSON, {**run, "merged_from": str(adapter.absolute())})


def _run(name: str) -> dict[str, Any]:
    """Return what run.json says, beside the model or above it, as of a checkpoint; nothing without one."""
    folder = Path(resolve_model(name))
    for place in (folder, folder.absolute().parent):
        if (place / RUN_JSON).is_file():
            try:
                found = read_json(place / RUN_JSON)
            except (ValueError, OSError) as error:
                raise ValueError(f"{place / RUN_JSON} is broken ({error}): remove it") from error
            return found if isinstance(found, dict) else {}
    return {}
