"""A checkpoint is whole or passed over, with a sentence that says why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lopt.models.untrusted import UntrustedError
from lopt.reliability import checkpoint, manifest
from lopt.reliability.checkpoint import (
    WRITING,
    check_checkpoint,
    checkpoints,
    choose,
    find_checkpoint,
    move_in,
    publish,
    recover,
    rotate,
    seal,
    staging,
    step_of,
)
from lopt.reliability.manifest import MANIFEST, VERIFY, CheckpointError, Hashes, HashingFile, Verify, damage


def write(folder: Path, step: int, published: bool = True, verify: Verify = "hash") -> Path:
    """A checkpoint of a few files."""
    staged = staging(folder, f"checkpoint-{step}")
    (staged / "shards").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (staged / "shards" / "rank 0").write_bytes(b"")
    seal(staged, verify)
    if published:
        publish(staged, folder / staged.name)
    return folder / staged.name if published else staged


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 9), "model.safetensors has 9 of 10,240"),
    "emptied": (lambda p: os.truncate(p / "model.safetensors", 0), "model.safetensors is empty"),
    "grown": (lambda p: (p / "shards/rank 0").write_text("x"), "shards/rank 0 has 1 of 0 bytes"),
    "bit-flipped": (lambda p: flip(p / "model.safetensors"), "model.safetensors was changed"),
    "missing": (lambda p: (p / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "extra": (lambda p: (p / "optimizer.pt").write_text("x"), "optimizer.pt is not in its manifest.json"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "it has no manifest.json: an older version"),
    "broken manifest": (lambda p: os.truncate(p / MANIFEST, 30), "its manifest.json cannot be read"),
    "odd manifest": (lambda p: (p / MANIFEST).write_text("[1]"), "its manifest.json cannot be read"),
    "bytes": (lambda p: (p / MANIFEST).write_bytes(b"\xff\x00"), "its manifest.json cannot be read"),
    "everything": (lambda p: [f.unlink() for f in p.iterdir() if f.is_file()], "it has no manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, fault: str) -> None:
    good, newest = write(tmp_path, 9), write(tmp_path, 10)
    assert choose(tmp_path).path == newest and damage(good) is None
    harm, sentence = FAULTS[fault]
    harm(newest)
    choice = choose(tmp_path)
    assert choice.path == good
    assert choice.reasons()[0].startswith(f"checkpoint-10 is passed over: {sentence}")


def test_a_clock_that_goes_backwards_does_not_matter(tmp_path: Path) -> None:
    for step, age in ((2, 10), (10, 2000), (9, 0)):
        os.utime(write(tmp_path, step), (age, age))
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 9, 10]
    assert choose(tmp_path).path == tmp_path / "checkpoint-10"


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-x", "checkpoint-3.old", "my-checkpoint-3", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4").write_text("a file")
    assert choose(tmp_path).path is None and not choose(tmp_path).passed_over
    assert choose(tmp_path / "nowhere").path is None


def test_what_a_kill_leaves(tmp_path: Path) -> None:
    """Half written: removed. Sealed and not yet renamed: finished. Between two renames: finished as well."""
    write(tmp_path, 3)
    half = staging(tmp_path, "checkpoint-4")
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    write(tmp_path, 5, published=False)
    assert choose(tmp_path).path == tmp_path / "checkpoint-3"
    assert recover(tmp_path) == [tmp_path / "checkpoint-5"]
    assert choose(tmp_path).path == tmp_path / "checkpoint-5" and not (tmp_path / WRITING).exists()
    write(tmp_path, 5, published=False)
    os.rename(tmp_path / "checkpoint-5", staging(tmp_path, "replaced-checkpoint-5"))
    assert recover(tmp_path) == [tmp_path / "checkpoint-5"] and damage(tmp_path / "checkpoint-5") is None
    assert recover(tmp_path) == []


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_any_system_call_there_is_a_whole_checkpoint(
    tmp_path: Path, monkeypatch, moment: int
) -> None:
    """Checkpoint 7 is written again over a whole one, and stopped at each rename, removal and flush."""
    write(tmp_path, 7)
    calls = [0]

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (checkpoint, "seal")):
            patched.setattr(module, name, dying(getattr(module, name)))
        with contextlib.suppress(KeyboardInterrupt):
            write(tmp_path, 7)
    recover(tmp_path)
    assert choose(tmp_path).path == tmp_path / "checkpoint-7" and not choose(tmp_path).passed_over
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_what_cannot_be_read_back_is_not_published(tmp_path: Path, monkeypatch) -> None:
    """A disk that gives other bytes than it got: the cache had the right ones until it was dropped."""
    monkeypatch.setattr(manifest, "_forget_cached", lambda path: flip(path) if path.stat().st_size else None)
    with pytest.raises(CheckpointError, match="checkpoint-6 cannot be read back"):
        write(tmp_path, 6)
    assert not (tmp_path / "checkpoint-6").exists() and not recover(tmp_path)


@pytest.mark.parametrize("written", VERIFY)
@pytest.mark.parametrize("asked", VERIFY)
def test_how_much_is_compared(tmp_path: Path, monkeypatch, capsys, written: Verify, asked: Verify) -> None:
    """Bytes are read once when they are written and once when they are resumed, with `hash`, else never."""
    reads: list[str] = []
    real = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda path, *where: reads.append(path.name) or real(path, *where))
    path = write(tmp_path, 1, verify=written)
    names = ["model.safetensors", "rank 0", "trainer_state.json"]
    cached_and_disk = 2 if written == "hash" else 0
    assert sorted(reads) == sorted(names * cached_and_disk)
    reads.clear()
    find_checkpoint(str(tmp_path), "auto", asked)
    assert sorted(reads) == (names if written == asked == "hash" else [])
    said = capsys.readouterr().out
    assert ("without hashes" in said) == (asked == "hash" and written != "hash")
    flip(path / "model.safetensors")
    assert (damage(path, asked) is not None) == (written == asked == "hash")
    os.truncate(path / "model.safetensors", 9)
    assert (damage(path, asked) is not None) == (asked != "none")
    (path / MANIFEST).unlink()
    assert damage(path, asked) is not None


def test_an_unnamed_checkpoint_is_read_once(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, 5, published=False)
    reads: list[str] = []
    real = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda path, *where: reads.append(path.name) or real(path, *where))
    assert find_checkpoint(str(tmp_path), "auto") == str(tmp_path / "checkpoint-5")
    assert len(reads) == 3


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path, monkeypatch) -> None:
    """By pieces, whatever the sizes of the writes; of what was given, not of what the disk has."""
    monkeypatch.setattr(manifest, "PIECE", 1000)
    monkeypatch.setattr(manifest, "_hash", None)  # nothing is read
    content, hashes = bytes(range(256)) * 30, Hashes()
    with HashingFile(tmp_path / "a", hashes) as file:
        for start, stop in ((0, 3), (3, 3), (3, 999), (999, 1000), (1000, 1001), (1001, 4500), (4500, 7680)):
            assert file.write(memoryview(content)[start:stop]) == stop - start
    assert (tmp_path / "a").read_bytes() == content
    pieces = [hashlib.sha256(content[at : at + 1000]).hexdigest() for at in range(0, 7680, 1000)]
    assert hashes.of(tmp_path / "a") == pieces
    with HashingFile(tmp_path / "empty", hashes):
        pass
    assert hashes.of(tmp_path / "empty") == [hashlib.sha256().hexdigest()]
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"), HashingFile(Path("/dev/full"), hashes) as file:
            torch.save({"a": torch.ones(1000)}, file)


def test_rotation_never_deletes_the_last_good_one(tmp_path: Path) -> None:
    """A damaged checkpoint 8 is ahead of the run that went on from 4 and has proven 5."""
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (write(tmp_path, 8) / MANIFEST).unlink()
    five = tmp_path / "checkpoint-5"
    assert rotate(tmp_path, None, five) == rotate(tmp_path, 0, five) == []
    assert [p.name[-1] for p in rotate(tmp_path, 3, five, best=str(tmp_path / "checkpoint-2"))] == ["1", "3"]
    assert [p.name[-1] for p in rotate(tmp_path, 1, five)] == ["2", "4"]
    assert choose(tmp_path).path == five


def test_a_checkpoint_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    assert check_checkpoint(path) is None
    (path / MANIFEST).rename(tmp_path / "kept")
    assert "taken as it is" in str(check_checkpoint(path))
    (tmp_path / "kept").rename(path / MANIFEST)
    flip(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="was changed"):
        check_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a folder"):
        check_checkpoint(tmp_path / "nowhere")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_in_a_sharded_checkpoint_does_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / ".metadata").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UntrustedError, match=r"it would run posix\.mkdir"):
        check_checkpoint(tmp_path / "checkpoint-1")
    assert not (tmp_path / "owned").exists()


def test_a_model_moves_in_with_its_config_last(tmp_path: Path, monkeypatch) -> None:
    """Over an older model; killed at any rename, the folder has a whole model or no config."""
    names = ["a.safetensors", "config.json", "z.json"]
    for moment in range(4):
        folder, staged = tmp_path / f"out{moment}", tmp_path / f"new{moment}"
        for place, text in ((folder, "old"), (staged, "new")):
            place.mkdir()
            for name in names:
                (place / name).write_text(text)
        count = iter(range(9))
        replace = os.replace

        def dying(*args, count=count, moment=moment, replace=replace):
            if next(count) == moment:
                raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying)
            try:
                move_in(staged, folder, "config.json")
            except KeyboardInterrupt:
                assert not (folder / "config.json").exists()
            else:
                assert moment == 3 and {(folder / n).read_text() for n in names} == {"new"}


def test_a_model_that_takes_the_place_of_another_is_alone(tmp_path: Path) -> None:
    """What is left of the other would be loaded with it or in place of it; the rest is the user's."""
    whole = ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"]
    shard, index = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    parts = ["config.json", shard, index, "tokenizer.json"]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").touch()
    for names in (whole, adapter, parts, whole, parts):
        staged = tmp_path / "new"
        staged.mkdir()
        for name in names:
            (staged / name).touch()
        move_in(staged, folder, "config.json" if "config.json" in names else "adapter_config.json")
        assert {path.name for path in folder.iterdir()} == {*names, "notes.txt"}
