"""The demo's page: honest in its first sentence, and every text on it escaped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lopt.reports import demo as report
from pages import HOSTILE, ParsedPage


def _results(**changes: Any) -> dict[str, Any]:
    side = {"loss": 2.0, "accuracy": 2 / 64, "correct": 2, "total": 64, "retention_loss": 3.2}
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
    sample = {"question": "1 + 1?", "reference": "2", "before": "", "after": "\n 2"}
    return {
        "title": "LoPT demo",
        "model": "tiny",
        "task": "sums",
        "method": "lopt",
        "num_blocks": 2,
        "blocks": ["layers 0-8", "layers 9-17"],
        "settings": {"learning_rate": 2e-5},
        "versions": {"torch": "2.13"},
        "date": "2026-01-15",
        "device": "cpu",
        "before": side,
        "after": {**side, "loss": 0.6, "accuracy": 47 / 64, "correct": 47, "retention_loss": 3.22},
        "samples": [{**sample, "before_correct": False, "after_correct": True}],
        "train": steps,
        "curve": [{"step": i, "loss": 2.0 - i / 10, "retention_loss": 3.2} for i in (0, 5, 10)],
        "head_warmup": [{"step": i, "local_loss": [1.0 / i]} for i in (1, 2, 3)],
        "memory": {"parameters": 2**30, "gradients": 2**29, "optimizer": 3 * 2**20, "activations": 100},
        "seconds_per_step": 4.6,
        "total_seconds": 340.0,
        **changes,
    }


def _sentence(correct: tuple[int, int], retention: tuple[float, float], total: int = 64) -> str:
    results = copy.deepcopy(_results())
    for side, count, loss in zip(("before", "after"), correct, retention, strict=True):
        share = count / total if total else 0.0
        results[side] |= {"correct": count, "total": total, "accuracy": share, "retention_loss": loss}
    return report.outcome(results)


def test_sentence_better_and_worse() -> None:
    assert _sentence((2, 47), (3.2, 3.22)) == (
        "In 5 min 40 s on this machine (cpu), held-out exact answers improved from 2 of 64 to 47 of 64, "
        "while loss on unrelated text got worse, from 3.20 to 3.22."
    )
    worse = _sentence((47, 2), (3.22, 3.2))
    assert "exact answers got worse, from 47 of 64 to 2 of 64" in worse
    assert "unrelated text improved from 3.22 to 3.20" in worse


def test_sentence_equal_and_unknown() -> None:
    same = _sentence((5, 5), (3.2, 3.2))
    assert "answers stayed at 5 of 64, while loss on unrelated text stayed at 3.20." in same
    assert "stayed at about 3.20." in _sentence((5, 5), (3.2, 3.201))
    assert "went from 3.20 to nan" in _sentence((5, 5), (3.2, float("nan")))
    assert "no held-out answers were checked" in _sentence((0, 0), (3.2, 3.2), total=0)


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
    results = _results()
    source = report.demo_page(results)
    page = ParsedPage(source)
    assert page.tags.count("svg") == 6
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in source and "@import" not in source
    assert report.outcome(results) in page.seen
    for shown in (
        "−1.400 better",
        "+0.020 worse",
        "0.9–10.7\u00a0%",
        "+70.3 points better",
        "1.0 GiB",
        "1.5 GiB",
    ):
        assert shown in page.seen
    assert source == report.demo_page(copy.deepcopy(results))


def test_demo_page_without_the_optional_parts() -> None:
    pytest.importorskip("matplotlib")
    results = _results(method="e2e", num_blocks=1, blocks=["layers 0-17"], head_warmup=[])
    del results["curve"]
    for step in results["train"]:
        step |= {"local_loss": [], "gradient_share": [1.0]}
    page = ParsedPage(report.demo_page(results))
    assert page.tags.count("svg") == 3
    assert "1 block:" in page.seen and "reconstructing" not in page.seen


def test_demo_page_says_when_the_numbers_do_not_settle_it() -> None:
    pytest.importorskip("matplotlib")
    close = _results(after={**_results()["before"], "correct": 4, "accuracy": 4 / 64})
    assert "do not settle" in report.demo_page(close)
    assert "do not settle" not in report.demo_page(_results())


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
    results["memory"] = {HOSTILE: 1024}
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
