"""Text files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lopt import files
from lopt.files import follow_umask, save_tensors, write_text


def test_text_is_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "page.html"
    write_text(path, "λ\nline\n")
    assert path.read_bytes() == "λ\nline\n".encode()
    write_text(path, "shorter")
    assert path.read_text() == "shorter" and [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"format": "pt"})
        write_text(tmp_path / "run.json", "{}")
        (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
        follow_umask(tmp_path.iterdir())
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("x.safetensors", "run.json")} == {mode}


def test_windows_flushes_files_that_are_open_for_writing_and_no_folders(tmp_path: Path, monkeypatch) -> None:
    # Windows refuses `os.open` of a folder, and `os.fsync` of what is open for reading only.
    path = tmp_path / "run.json"
    path.write_text("{}")
    opened: list[tuple[Path, int]] = []
    real = files.os.open
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "open", lambda p, flags: opened.append((p, flags)) or real(p, flags))
    files.fsync(path)
    files.fsync(tmp_path)
    monkeypatch.undo()
    assert opened == [(path, files.os.O_RDWR)]


def test_macos_flushes_the_cache_of_the_drive(tmp_path: Path, monkeypatch) -> None:
    calls: list[int] = []
    macos = SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda descriptor, command: calls.append(command))
    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setitem(files.sys.modules, "fcntl", macos)
    files.fsync(tmp_path)
    assert calls == [51]
