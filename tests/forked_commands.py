"""Commands of several processes each, run one after another in forks of one process that has imported `lopt`.

    python forked_commands.py FOLDER

`FOLDER/commands.json` lists them: name, script, arguments, and ranks (0: not by a launcher). A rank gets the
environment that torchrun gives it. What it prints goes to `FOLDER/NAME.RANK.out` and `.err`; exit codes to
`FOLDER/codes.json`.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from pathlib import Path

import lopt.cli.grpo
import lopt.cli.sft


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(folder: Path, name: str, rank: int, words: list[str], environment: dict[str, str]) -> None:
    """Become the process of one rank; never returns."""
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    sys.argv = words
    code: object = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    folder, codes = Path(sys.argv[1]), {}
    for name, words, ranks in json.loads((folder / "commands.json").read_text()):
        port, processes = free_port(), []
        for rank in range(max(ranks, 1)):
            ids = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
            ids |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            processes.append(os.fork())
            if not processes[-1]:
                run(folder, name, rank, words, {k: str(v) for k, v in ids.items()} if ranks else {})
        codes[name] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
