"""Measure the bundled model on held-out pictures by exact match, compared with a constant answer.

    python -m vlmserve.models.bundled.exam.evaluate   # with transformers
    python -m vlmserve.models.bundled.exam.evaluate --url http://127.0.0.1:8000/v1   # a server

Over HTTP each question is sent twice: with temperature 0, and without sampling fields, which means
temperature 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import CHECKPOINT
from .client import Client, ClientError
from .exam import Item, Result, exam, scores, table


def main() -> int:
    """Run the exam and print a table. Returns 1 if the server fails."""
    options = _parser().parse_args()
    items = exam(options.pictures, options.seed, tuple(options.shapes))
    try:
        results = _put(items, options) if options.url else _grade(items, options.checkpoint)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table({name: scores(group) for name, group in results.items()}))
    for name, group in results.items():
        _print_wrong(name, group, options.wrong)
    return 0


def _put(items: list[Item], options: argparse.Namespace) -> dict[str, list[Result]]:
    """Results over HTTP: greedy, and with the API's default sampling."""
    ways = {"temperature 0": 0.0, "no sampling fields": None}
    return {
        name: Client(options.url, temperature, options.model, options.api_key).put(
            items, options.concurrency
        )
        for name, temperature in ways.items()
    }


def _grade(items: list[Item], checkpoint: Path) -> dict[str, list[Result]]:
    """Results without a server; only this imports torch."""
    import torch

    from .grading import Grader

    torch.set_num_threads(1)
    return {"greedy": Grader.load(checkpoint).grade(items)}


def _print_wrong(name: str, results: list[Result], number: int) -> None:
    """Print the first wrong answers."""
    wrong = [result for result in results if not result.is_right]
    for result in wrong[:number]:
        item = result.item
        print(f"wrong, {name}: {item.text!r} -> {result.answer!r}, expected {item.answer!r}")


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
