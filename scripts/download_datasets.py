"""`python scripts/download_datasets.py ...`: the same as `lopt data download ...`."""

import sys

from lopt.cli.main import run

if __name__ == "__main__":
    sys.exit(run("data", ["download", *sys.argv[1:]]))
