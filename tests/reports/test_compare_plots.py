"""Series of arms over learning rates, and the reach of frozen arms."""

from __future__ import annotations

from typing import Any

import pytest

from lopt.reports import compare_plots

pytest.importorskip("matplotlib")

ARMS: dict[str, dict[str, Any]] = {
    "e2e": dict(method="e2e", start=0, loss=1.0, forgetting=2.0),
    "e2e lr=5e-06": dict(method="e2e", start=0, loss=1.3, forgetting=1.0, changes={"learning_rate": 5e-6}),
    "e2e lr=0.0001": dict(method="e2e", start=0, loss=0.9, forgetting=4.0, changes={"learning_rate": 1e-4}),
    "frozen k=2": dict(method="frozen", start=6, loss=1.2, forgetting=0.5),
    "frozen cut at 9": dict(method="frozen", start=9, loss=1.5, forgetting=0.25),
    "frozen k=3 clip=global": dict(method="frozen", start=8, loss=9.0, forgetting=9.0, clip="global"),
    "frozen cut at 3 top frozen=3": dict(method="frozen", start=3, loss=1.4, forgetting=0.1, top=3),
}


def results(*names: str) -> dict[str, Any]:
    arms = {name: ARMS[name] for name in names or ARMS}
    return {
        "setting": {"training": {"learning_rate": 2e-5}},
        "base": {"adaptation": {"loss": 1.7}},
        "cells": [
            {
                "arm": name,
                "changes": arm.get("changes", {}),
                "config": {"method": arm["method"], "frozen_top": arm.get("top", 0), "clip": arm.get("clip")},
                "blocks": [[0, arm["start"]], [arm["start"], 12]] if arm["start"] else [[0, 12]],
            }
            for name, arm in arms.items()
        ],
        "summary": {
            "measures": {"loss": {"base": 1.7}, "forgetting": {"base": 0.0}},
            "arms": {
                name: {key: {"value": arm[key], "low": None, "high": None} for key in ("loss", "forgetting")}
                for name, arm in arms.items()
            },
        },
    }


def test_rates_of_one_method_are_one_series_from_the_lowest_on() -> None:
    (svg,) = compare_plots.pareto(results())
    expected = "e2e held-out task loss 1.3, rise of the losses elsewhere 1; e2e held-out task loss 1, rise"
    assert expected in svg
    assert svg.index("loss 1.3") < svg.index("loss 1, rise") < svg.index("loss 0.9")
    assert svg.count("lr=") == 0


def test_reach_is_counted_from_the_top_and_leaves_other_settings_out() -> None:
    svg = compare_plots.reach(results())
    assert svg is not None
    assert "learned: fall of the held-out task loss from 0.2 with layers 3 to 0.7 with layers 12" in svg
    assert "forgotten: rise of the losses elsewhere from 0.25 with layers 3 to 2 with layers 12" in svg


def test_two_reaches_are_no_line() -> None:
    assert compare_plots.reach(results("e2e", "e2e lr=5e-06", "frozen k=2")) is None
