"""DPO's rows and numbers: what would fail late or teach something else is a line before any work."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from lopt.trainers.preferences import check_left, check_preference_numbers, check_preferences


def said(role: str, content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more}]


PAIR = {"prompt": "Question: ", "chosen": "yes", "rejected": "no"}
ASKED = said("user", "q")
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"chosen": None},
        "row 1 (from 0) of the train rows, column `chosen`, must be text or a list of messages, not",
    ),
    (
        {"prompt": 3},
        "column `prompt`, must be text or a list of messages, not int: fill it or remove the row",
    ),
    ({"chosen": ["yes"]}, "column `chosen`, has a message without a role"),
    ({"chosen": []}, "column `chosen`, must be a non-empty list"),
    (
        {"chosen": said("assistant", "y")},
        "mixes text and messages (`prompt` text, `chosen` messages, `rejected` te",
    ),
    ({"prompt": [{"from": "human", "value": "q"}]}, "column `prompt`, has a message without a role"),
    (
        {"prompt": ASKED, "chosen": said("user", "y")},
        "`chosen`, must end in an assistant message, not in one of user",
    ),
    (
        {"prompt": ASKED, "chosen": ASKED + said("assistant", "y")},
        "begins with the messages of `prompt`: leave",
    ),
]


class Rows(list):
    """Rows that no type has been made of, as those of a stream."""

    column_names = tuple(PAIR)

    def select_columns(self, names: list[str]) -> Rows:
        return self


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_rows_that_are_no_preferences(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_preferences(Rows([PAIR, PAIR | changes]), "train")
    assert message in str(error.value)


def test_rows_that_teach_nothing(caplog: pytest.LogCaptureFixture) -> None:
    equal, empty = PAIR | {"rejected": "yes"}, PAIR | {"rejected": " "}
    messages = {"prompt": ASKED, "chosen": said("assistant", "y"), "rejected": said("assistant", "")}
    check_preferences(Rows([PAIR, equal, empty, messages]), "train")
    assert "1 of 4 train rows have equal `chosen` and `rejected`: remove" in caplog.text
    assert "2 of 4 train rows have an empty `chosen` or `rejected`" in caplog.text
    for rows, why in ((Rows([equal, equal]), "in all of them `chosen` equals"), (Rows(), "there are none")):
        with pytest.raises(ValueError, match=f"the eval rows prefer nothing, {why}"):
            check_preferences(rows, "eval")
    check_preferences(Dataset.from_list([{"promt": "q", "chosen": "a b", "rejected": "a c"}]), "train")
    assert "have no column `prompt` (they have `promt`, `chosen`, `rejected`)" in caplog.text


def test_rows_that_max_length_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([PAIR, PAIR])
    check_left(rows, rows, "train")
    assert not caplog.text
    check_left(rows, rows.select([0]), "train")
    assert "1 of 2 train rows are left out, their prompt alone is as long as `max_length`" in caplog.text
    with pytest.raises(
        ValueError, match=r"all 2 train rows are left out, .*: raise it, or shorten the prompts"
    ):
        check_left(rows, rows.select([]), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "`beta` must be > 0 (got 0.0)"),
        ({"beta": None}, "`beta` must be > 0 (got 0)"),
        ({"beta": float("nan")}, "`beta` must be finite and > 0 (got nan)"),
        ({"label_smoothing": 0.5}, "`label_smoothing` must be >= 0 and < 0.5 (got 0.5)"),
        ({"loss_weights": [0.0]}, "`loss_weights` are all 0, so that nothing would be learned"),
        ({"loss_type": []}, "`loss_type` is empty: name a loss"),
        ({"max_length": 0}, "`max_length` must be >= 2 (got 0)"),
        ({"max_steps": 10**20}, "`max_steps` must be <= 2147483647"),
        ({"ref_model_sync_steps": 0}, "`ref_model_sync_steps` must be >= 1 (got 0)"),
    ],
)
def test_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_preference_numbers(DPOConfig("out", report_to="none", use_cpu=True, bf16=False, **changes))
    assert message in str(error.value)
