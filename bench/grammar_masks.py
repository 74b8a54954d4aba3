"""Measures what grammars add to a decode step: masks of 32 sequences, 128,256 tokens.

    OMP_NUM_THREADS=1 python bench/grammar_masks.py

A random checkpoint of m100's layers with a vocabulary of 128,256 entries and a tokenizer of as many
random tokens. The same decode step runs with a grammar on every row and with none, in turn; medians
of wall time. Filling the masks is also timed alone: it overlaps with the forward if a core is free.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from checkpoints import build, layout
from engine_requests import GREEDY, open_runner
from processes import arguments, print_document
from vlmserve.models.batch import CrossSegment, ScheduledSequence, StepBatch
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.server.structured_output.grammar_text import (
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)

VOCAB_SIZE = 128_256
CONTEXT = 48
BLOCK_SIZE = 16
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["circle", "square", "triangle"]},
        "sizes": {"type": "array", "items": {"type": "number"}},
        "inner": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
    "required": ["name", "kind", "sizes", "inner"],
}
# a grammar, and the text before the measured step: inside a string, most tokens are allowed
FORMS = {
    "JSON schema": (json_schema_grammar(SCHEMA), '{"name":"some'),
    "free JSON": (json_object_grammar(), '{"a":[1,{"b":"some'),
    "regex": (regex_grammar(r"([a-z]+ ){2,40}[0-9]{3}"), "some words "),
}


def write_tokenizer(folder: Path, vocab_size: int, seed: int = 0) -> None:
    """A byte-level vocabulary: every byte, then random words, as many with a blank in front."""
    rng = np.random.default_rng(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(alphabet)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,:;-_(){}[]\"'"))
    while len(words) < vocab_size - 1:
        word = "".join(rng.choice(letters, int(rng.integers(2, 11))))
        words["\u0120" + word if rng.random() < 0.5 else word] = None
    vocab = {word: index for index, word in enumerate(list(words)[: vocab_size - 1])}
    vocab["<|eot_id|>"] = vocab_size - 1
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eot_id|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_runner(folder: Path, args: argparse.Namespace) -> ModelRunner:
    config = layout("m100")
    config.text_config.vocab_size = args.vocab_size
    config.image_token_index = args.vocab_size
    build(config, folder, dtype=getattr(torch, args.dtype), with_processor=False)
    write_tokenizer(folder, args.vocab_size)
    return open_runner(
        str(folder),
        device="cpu",
        dtype=args.dtype,
        max_model_len=256,
        max_num_seqs=args.sequences,
    )


def decode_step(
    runner: ModelRunner, tokenizer: Tokenizer, num_seqs: int, form: str | None
) -> StepBatch:
    """A decode of each sequence behind CONTEXT tokens, all under the same form or none."""
    blocks = -(-(CONTEXT + 1) // BLOCK_SIZE)
    matcher = None
    if form is not None:
        grammar, written = FORMS[form]
        matcher = runner.compile_grammar(grammar, [runner.info.vocab_size - 1])
        for token_id in tokenizer.encode(written).ids:
            matcher.accept(token_id)
        assert not matcher.has_failed, "the grammar does not allow what is written"
    return StepBatch(
        sequences=[
            ScheduledSequence(
                request_id=str(index),
                token_ids=[1 + index],
                start=CONTEXT,
                block_ids=list(range(index * blocks, (index + 1) * blocks)),
                segments=[CrossSegment(1, [])],
                sampling=GREEDY,
                matcher=None if matcher is None else matcher.copy(),
            )
            for index in range(num_seqs)
        ]
    )


def measure(
    runner: ModelRunner, steps: dict[str, StepBatch], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step, `rounds` times in turn; "NAME mask" is the filling alone."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, batch in steps.items():
            start = time.perf_counter()
            runner.execute(batch)
            seconds[name].append(time.perf_counter() - start)
            if matchers := [one.matcher for one in batch.sequences if one.matcher is not None]:
                start = time.perf_counter()
                runner.grammars.fill(matchers)
                seconds[f"{name} mask"].append(time.perf_counter() - start)
        if number == 0:  # the first round warms up
            seconds.clear()
    return seconds


def report(seconds: dict[str, list[float]]) -> dict[str, object]:
    ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    plain = ms["none"]
    print(f"{'form':<16} {'step ms':>9} {'over none':>10} {'mask alone ms':>14}")
    levels = []
    for name in ("none", *FORMS):
        mask = ms.get(f"{name} mask", 0.0)
        # Paired by round: what the machine does meanwhile falls on both.
        pairs = zip(seconds[name], seconds["none"], strict=True)
        over = statistics.median(one / other for one, other in pairs) - 1
        print(f"{name:<16} {ms[name]:>9.1f} {over:>10.1%} {mask:>14.2f}")
        level = {"form": name, "step_ms": round(ms[name], 2), "mask_ms": round(mask, 3)}
        levels.append(level | {"over_none": round(over, 4), "mask_share": round(mask / plain, 4)})
    return {"levels": levels}


def main() -> None:
    args = arguments(
        __doc__,
        sequences=32,
        rounds=9,
        dtype=["bfloat16", "float32"],
        vocab_size=VOCAB_SIZE,
    )
    with tempfile.TemporaryDirectory() as name:
        runner = make_runner(Path(name), args)
        tokenizer = Tokenizer.from_file(str(Path(name) / "tokenizer.json"))
        steps = {
            form or "none": decode_step(runner, tokenizer, args.sequences, form)
            for form in (None, *FORMS)
        }
        seconds = measure(runner, steps, args.rounds)
    print_document(args, **report(seconds))


if __name__ == "__main__":
    main()
