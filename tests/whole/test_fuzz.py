"""A sample of the fuzzing in every run, and every input that was ever found to break something.

The long form is `make fuzz`: it puts what it finds into fuzz_corpus/, from where it is read here
for good.
"""

import random
from pathlib import Path

import pytest
from support.fuzz_targets import TARGETS
from support.mutations import mutated

CORPUS = Path(__file__).resolve().parents[1] / "fuzz_corpus"
NUM_SAMPLES = 4_000
SEED = 6


@pytest.mark.parametrize("name", TARGETS)
def test_a_seeded_sample_of_hostile_inputs_breaks_no_promise(name):
    target = TARGETS[name]
    rng = random.Random(f"{SEED} {name}")
    for data in target.seeds:
        target.check(data)
    for _ in range(NUM_SAMPLES):
        data = mutated(target.seeds, target.words, rng)
        try:
            target.check(data)
        except Exception as error:
            raise AssertionError(f"{name} breaks on {data!r}") from error


def findings():
    return sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", findings(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_once_found_stays_mended(path):
    TARGETS[path.parent.name].check(path.read_bytes())


def test_every_finding_belongs_to_a_target():
    assert {path.parent.name for path in findings()} <= set(TARGETS)
