"""`lopt report`: the page of a run made again, or one page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from lopt.cli.output import check_report
from lopt.cli.parsing import parse
from lopt.reports.run import write_run_page
from lopt.reports.run_data import PAGE, read_run, read_runs
from lopt.reports.runs import write_runs_page

TOGETHER = "outputs/report"
"""Where the page of several runs is, unless a folder is given."""


def main(arguments: Sequence[str]) -> None:
    """Read what the folders of the runs hold, and write the page."""
    named = list(takewhile(lambda word: not word.startswith("--"), arguments))
    rest = list(arguments[len(named) :])
    (args,) = parse("report", ["--run", *named, *rest] if named else rest)
    folders = list(dict.fromkeys(Path(folder) for folder in args.run))
    if not folders:
        raise ValueError("no run is named: give the folder of one, as in lopt report outputs/sft")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name the --output_dir of a run")
    if len(folders) == 1 and not args.output_dir:
        print(f"The page is {write_run_page(folders[0], read_run(folders[0]))}")
        return
    output = check_report(args.output_dir or TOGETHER, [PAGE], "report", overwrite=args.overwrite_output_dir)
    runs = read_runs(folders)
    page = write_run_page(output, runs[0]) if len(runs) == 1 else write_runs_page(output, runs)
    print(f"The page is {page}")
