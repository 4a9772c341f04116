"""Ranks wait for each other as long as it takes, and for nobody who has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from lopt.reliability import ranks
from lopt.reliability.ranks import RankError, on_first_rank, together


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Call a function as each of two ranks, which are threads; return what came of it."""
    store, here = HashStore(), threading.local()
    monkeypatch.setattr(ranks, "_group", lambda: (store, here.rank, 2))

    def run(function: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None, None]

        def as_rank(rank: int) -> None:
            here.rank = rank
            try:
                found[rank] = function(rank)
            except ValueError as error:
                found[rank] = error

        threads = [threading.Thread(target=as_rank, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    return run


def test_all_go_on_when_all_are_done(run: Any) -> None:
    done: list[int] = []
    slow = threading.Event()

    def work(rank: int) -> int:
        if rank == 0:
            assert slow.wait(60)
        done.append(rank)
        slow.set()
        return 10 * rank

    def twice(rank: int) -> tuple[int, list[int], int]:
        first = together(lambda: work(rank))
        return first, sorted(done), together(lambda: rank)

    assert run(twice) == [(0, [0, 1], 0), (10, [0, 1], 1)]


def test_a_failure_is_everybodys(run: Any) -> None:
    def fail(rank: int) -> None:
        if rank == 0:
            raise ValueError("the disk is full")

    errors = run(lambda rank: together(lambda: fail(rank)))
    assert [str(error) for error in errors] == ["the disk is full"] * 2
    assert not isinstance(errors[0], RankError) and isinstance(errors[1], RankError)
    assert run(lambda rank: together(lambda: rank)) == [0, 1]  # the next one is not mistaken for it


def test_the_first_rank_works_for_all(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [SimpleNamespace(process_index=rank, world_size=1) for rank in range(2)]
    called: list[int] = []
    run(lambda rank: on_first_rank(arguments[rank], lambda: called.append(rank)))
    assert called == [0]
