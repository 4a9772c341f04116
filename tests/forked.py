"""Python scripts of several processes each, in forks of one process that has the libraries.

Importing them takes longer than a few steps of a small model. A process gets the environment that torchrun
gives a rank, and prints to files.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
Job = tuple[str, list[str], int]
"""A name, the script with its arguments, and the ranks (0: a process without a launcher)."""


def run_all(folder: Path, jobs: list[Job], cwd: Path | None = None, **environment: str) -> dict[str, str]:
    """Run every job and return what its ranks printed, by name.

    Raises:
        AssertionError: a process failed; with the end of what each of its job wrote to standard error.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    paths = [TESTS.parent / "src", TESTS, TESTS.parent / "benchmarks", os.environ.get("PYTHONPATH", "")]
    base = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "forked.py"), str(folder)], cwd=cwd,
        env=os.environ | base | environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        name: "".join((folder / f"{name}.{rank}.out").read_text() for rank in range(max(ranks, 1)))
        for name, _, ranks in jobs
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def become(folder: Path, name: str, rank: int, words: list[str], environment: dict[str, str]) -> None:
    """Be the process of one rank; never returns."""
    for stream, suffix in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(folder / f"{name}.{rank}.{suffix}", flags, 0o600), stream)
    os.environ.update(environment)
    sys.argv = words
    code: object = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run_one(folder: Path, name: str, words: list[str], ranks: int) -> bool:
    """Return whether all ranks of a job ended well; where one does not, the others are ended."""
    port, processes = free_port(), []
    for rank in range(max(ranks, 1)):
        ids = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
        environment = {key: str(value) for key, value in ids.items()} | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(os.fork())
        if not processes[-1]:
            become(folder, name, rank, words, environment if ranks else {})
    failed = False
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not failed:
            failed = True
            for other in processes:
                os.kill(other, signal.SIGKILL)
    return not failed


def main() -> None:
    import gc

    # What the scripts need, so that no fork has to import it.
    import conftest  # noqa: F401
    import lopt.cli.grpo
    import lopt.cli.sft
    import lopt.evaluation.retention_callback  # noqa: F401

    gc.collect()
    gc.freeze()
    folder = Path(sys.argv[1])
    for name, words, ranks in json.loads((folder / "jobs.json").read_text()):
        if not run_one(folder, name, words, ranks):
            errors = [(folder / f"{name}.{rank}.err").read_text()[-5000:] for rank in range(max(ranks, 1))]
            sys.exit(f"{name} failed:\n" + "\n".join(errors))


if __name__ == "__main__":
    main()
