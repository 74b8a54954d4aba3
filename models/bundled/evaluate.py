"""Measure the bundled model on held-out pictures, by exact match, beside a constant answer.

    python -m vlmserve.models.bundled.evaluate                                   # with transformers
    python -m vlmserve.models.bundled.evaluate --url http://127.0.0.1:8000/v1    # a running server

Over HTTP each question is put twice: with temperature 0, and with no sampling field at all (which
means temperature 1).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import CHECKPOINT
from .client import Client, ClientError
from .exam import Item, Result, exam, scores, table


def main() -> int:
    """Parse the command line, put the exam, print tables; 1 if the server cannot be asked."""
    options = _parser().parse_args()
    items = exam(options.pictures, options.seed, tuple(options.shapes))
    if options.url is None:
        _report("transformers, float32, greedy", _grade(options.checkpoint, items), options.wrong)
        return 0
    try:
        for name, temperature in (("temperature 0", 0.0), ("no sampling fields", None)):
            client = Client(options.url, temperature, options.model, options.api_key)
            results = client.put(items, options.concurrency)
            _report(f"over HTTP, {name}", results, options.wrong)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _grade(checkpoint: Path, items: list[Item]) -> list[Result]:
    """Results without a server; torch is loaded for this alone."""
    import torch

    from .grading import Grader

    torch.set_num_threads(1)
    return Grader.load(checkpoint).grade(items)


def _report(title: str, results: list[Result], num_wrong: int) -> None:
    """Print the table, and some of the wrong answers."""
    print(f"\n## {title}\n\n{table(scores(results))}")
    wrong = [result for result in results if not result.is_right]
    for result in wrong[:num_wrong]:
        item = result.item
        print(f"wrong: {item.text!r} -> {result.answer!r}, expected {item.answer!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--url", help="of a running server, with /v1; without it: transformers")
    parser.add_argument("--model", help="name to send; default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=100, help="for each number of shapes")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to print")
    return parser


if __name__ == "__main__":
    sys.exit(main())
