"""`python train_grpo.py ...` or `accelerate launch train_grpo.py ...`: the same as `lopt grpo ...`."""

import sys

from lopt.cli.main import run

if __name__ == "__main__":
    sys.exit(run("grpo", sys.argv[1:]))
