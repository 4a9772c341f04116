"""The demo's page: honest in its first sentence, and every text on it escaped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lopt.reports import demo as report
from pages import HOSTILE, ParsedPage


def _arm(name: str, correct: int = 47, retention: float = 3.22, **changes: Any) -> dict[str, Any]:
    steps = [
        {
            "step": i,
            "loss": 2.0 / i,
            "local_loss": [0.5 / i],
            "gradient_share": [0.1, 0.9],
            "seconds": 4.0,
            "tokens_per_second": 700.0,
        }
        for i in (1, 2, 3)
    ]
    after = {
        "loss": 0.6,
        "accuracy": correct / 64,
        "correct": correct,
        "total": 64,
        "retention_loss": retention,
    }
    return {
        "name": name,
        "method": "lopt",
        "config": {"lr_k1": 2e-6},
        "blocks": ["layers 0-8", "layers 9-17"],
        "after": after,
        "train": steps,
        "curve": [{"step": i, "loss": 2.0 - i / 10, "retention_loss": 3.2} for i in (0, 5, 10)],
        "head_warmup": [{"step": i, "local_loss": [1.0 / i]} for i in (1, 2, 3)],
        "memory": {"parameters": 2**30, "gradients": 2**29, "optimizer": 3 * 2**20, "activations": 100},
        "seconds_per_step": 4.6,
        **changes,
    }


def _end_to_end(**changes: Any) -> dict[str, Any]:
    arm = _arm("e2e", method="e2e", blocks=["layers 0-17"], head_warmup=[], **changes)
    for step in arm["train"]:
        step |= {"local_loss": [], "gradient_share": [1.0]}
    return arm


def _results(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    answers = [
        {"by": "before", "text": "", "correct": False},
        *({"by": arm["name"], "text": "\n 2", "correct": True} for arm in arms),
    ]
    return {
        "title": "LoPT demo",
        "model": "tiny",
        "task": "sums",
        "settings": {"learning_rate": 2e-5},
        "versions": {"torch": "2.13"},
        "date": "2026-01-15",
        "device": "cpu",
        "before": {"loss": 2.0, "accuracy": 2 / 64, "correct": 2, "total": 64, "retention_loss": 3.2},
        "arms": list(arms) or [_arm("lopt k=2")],
        "samples": [{"question": "1 + 1?", "reference": "2", "answers": answers}],
        "total_seconds": 340.0,
        **changes,
    }


def test_the_sentence_says_what_each_method_did() -> None:
    assert report.outcome(_results(_arm("lopt k=2", 47, 3.22))) == (
        "In 5 min 40 s on this machine (cpu), held-out exact answers went from 2 of 64 to 47 of 64 "
        "(lopt k=2), and the loss on unrelated text from 3.20 to 3.22 (lopt k=2)."
    )
    three = report.outcome(_results(_arm("lopt k=2", 30, 3.22), _end_to_end(), _arm("frozen k=2", 0, 3.1)))
    assert "to 30 of 64 (lopt k=2), 47 of 64 (e2e) and 0 of 64 (frozen k=2), and" in three
    assert three.endswith("to 3.22 (lopt k=2), 3.22 (e2e) and 3.10 (frozen k=2).")
    unknown = _results(_arm("lopt k=2", 0, float("nan")))
    unknown["before"] |= {"total": 0, "correct": 0}
    assert "no held-out answers were checked" in report.outcome(unknown)
    assert "to nan (lopt k=2)" in report.outcome(unknown)


def test_the_terminals_table_has_a_column_for_each_method() -> None:
    lines = report.summary(_results(_arm("lopt k=2", 30, 3.22), _end_to_end(retention=3.5))).splitlines()
    table = lines[lines.index("") + 1 :]
    rows = {
        line[: line.index("  ")]: line.split()[-2:] for line in lines if line.startswith(("held", "forg"))
    }
    assert rows["held-out exact answers"] == ["30/64", "47/64"]
    assert rows["forgotten: its rise"] == ["+0.020", "+0.300"]
    assert any("before" in line and "e2e" in line for line in table)
    assert "peak of live bytes" in "\n".join(lines) and "1.5 GiB" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.05, "0.05 s"),
        (4.62, "4.6 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (340, "5 min 40 s"),
        (3660, "1 h 01 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    results = _results(total_seconds=seconds)
    assert report.outcome(results).startswith(f"In {shown} on")


def test_demo_page() -> None:
    pytest.importorskip("matplotlib")
    results = _results(_arm("lopt k=2", 30), _end_to_end(retention=3.5))
    source = report.demo_page(results)
    page = ParsedPage(source)
    assert page.tags.count("svg") == 7  # three for both, three of LoPT's own, memory
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in source and "@import" not in source
    assert report.outcome(results) in page.seen
    for shown in ("30/64", "+0.020", "+0.300", "1–11\u00a0%", "1.5 GiB", "1 block:", "lopt k=2: lr_k1"):
        assert shown in page.seen
    assert source == report.demo_page(copy.deepcopy(results))


def test_demo_page_without_the_optional_parts() -> None:
    pytest.importorskip("matplotlib")
    arm = _end_to_end(memory={})
    del arm["curve"]
    page = ParsedPage(report.demo_page(_results(arm)))
    assert page.tags.count("svg") == 1
    assert "1 block:" in page.seen and "reconstructing" not in page.seen and "live bytes" not in page.seen


def test_demo_page_says_when_the_numbers_do_not_settle_it() -> None:
    pytest.importorskip("matplotlib")
    close = report.demo_page(_results(_arm("lopt k=2", 4), _arm("frozen k=2", 30), _end_to_end(correct=33)))
    assert "Whether lopt k=2 changed the accuracy is not settled." in close
    assert "Which of frozen k=2 and e2e answers more is not settled." in close
    assert "not settled" not in report.demo_page(_results(_arm("lopt k=2"), _arm("frozen k=2", 20)))


def _poison(value: Any) -> Any:
    """Every text field, names included where they are free, replaced by a hostile string."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [_poison(item) for item in value]
    if isinstance(value, dict):
        return {key: _poison(item) for key, item in value.items()}
    return value


def test_demo_page_escapes_every_text() -> None:
    pytest.importorskip("matplotlib")
    results = _poison(_results())
    for part in ("settings", "versions"):
        results[part] = {HOSTILE: HOSTILE}
    results["arms"][0] |= {"config": {HOSTILE: HOSTILE}, "memory": {HOSTILE: 1024}}
    source = report.demo_page(results)
    assert "<script" not in source and "<img" not in source
    page = ParsedPage(source)
    assert not {"script", "img"} & set(page.tags)
    assert page.seen.count("<script>alert(1)</script>") >= 15


def test_write_demo_report_writes_one_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report.write_demo_report(_results(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == report.demo_page(_results())
