"""`python train_sft.py ...` or `torchrun train_sft.py ...`: the same as `lopt sft ...`."""

import sys

from lopt.cli.main import run

if __name__ == "__main__":
    sys.exit(run("sft", sys.argv[1:]))
