"""What tests and benchmarks share: small models, the scripts' flags, and how results are written."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lopt.files import write_text
from lopt.reliability.provenance import device, versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "accelerate")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and <pad>, <bos> and <eos>; no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_llama(vocab_size: int, dropout: float = 0.2) -> LlamaForCausalLM:
    """4 layers of 32 channels, with dropout, so that a run depends on its random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, attention_dropout=dropout, pad_token_id=0,
        )
    )  # fmt: skip


def fork_ranks(ranks: int, log_of: Callable[[int], Path], work: Callable[[int], int | None]) -> list[int]:
    """Fork a process per rank, in a launcher's environment if there are several; return their ids.

    Args:
        log_of: returns the file that a rank's output is added to.
        work: what a rank does; returns its exit code. An error is printed, and gives 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            started.append(child)
            continue
        if ranks > 1:
            places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_PORT=port)
            os.environ.update({k: str(v) for k, v in places.items()}, MASTER_ADDR="127.0.0.1")
        log = os.open(log_of(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            code = work(rank) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return started


def flags(description: str | None, results: str) -> argparse.ArgumentParser:
    """Return a parser that shows the script's docstring as it is, with the flag `--output`.

    Args:
        description: the script's docstring.
        results: name of the file in benchmarks/results that is written if `--output` is not given.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / results, help="JSON file for the results")
    return parser


def keep(
    path: Path, results: dict[str, Any], packages: Sequence[str] = PACKAGES, indent: int | None = 1
) -> None:
    """Write results as JSON, with versions of `packages`, the device and the date."""
    results.update(versions=versions(packages), device=device(), date=date.today().isoformat())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=indent) + "\n")
