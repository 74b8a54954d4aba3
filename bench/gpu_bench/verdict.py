"""Which statements of the docs that are marked "unverified" a document of a run settles.

Owns the list of statements. Knows nothing of how a row is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .document import OK
from .plan import CHUNK, DECODE, GRAPHS, INT8, LONG, PRODUCTS

Found = dict[str, Any]


def _has_tests(found: Found) -> bool:
    """The tests marked `gpu` ran, and none failed."""
    return bool(found["tests"].get("passed")) and not found["tests"].get("failed")


def _has_rows(*kinds: str, **wanted: Any) -> Callable[[Found], bool]:
    """A row of each kind was measured on a GPU, with these fields."""

    def has(found: Found) -> bool:
        rows = [row for row in found["rows"] if row["status"] == OK]
        alike = [row for row in rows if wanted.items() <= row.items()]
        return all(any(row["kind"] == kind for row in alike) for kind in kinds)

    return has


def _replays(found: Found) -> bool:
    return any(row.get("replayed") for row in found["rows"] if row["mode"] == GRAPHS)


# a page, what it states, and what a run must have
STATEMENTS: Sequence[tuple[str, str, Sequence[Callable[[Found], bool]]]] = (
    ("README.md", "serving on a GPU", [_has_tests, _has_rows(DECODE)]),
    ("docs/index.md", "serving on a GPU", [_has_tests, _has_rows(DECODE)]),
    ("docs/gpu-benchmark.md", "all figures of vlmserve on a GPU", [_has_rows(DECODE)]),
    ("docs/benchmarks.md", "anything on a GPU", [_has_tests, _has_rows(DECODE)]),
    ("docs/gpus.md", "what to expect, of this card", [_has_rows(DECODE, "encode")]),
    ("docs/explanation/fleet.md", "requests a second of a GPU", [_has_rows(DECODE, "encode")]),
    ("docs/explanation/caches.md", "int8 images and host memory on a GPU", [_has_tests]),
    ("docs/explanation/drafts.md", "drafts on a GPU", [_has_tests]),
    ("docs/attention.md", "triton on a GPU", [_has_tests, _has_rows(DECODE, load=LONG)]),
    ("docs/architecture.md", "fused kernels; planning ahead", [_has_tests, _has_rows("profile")]),
    ("docs/settings.md", "--cuda-graphs", [_has_tests, _replays]),
    ("docs/loading.md", "the measured step sizes the pools", [_has_rows(DECODE, load=CHUNK)]),
    ("docs/quantization.md", "int8 on a GPU", [_has_rows(DECODE, PRODUCTS, quantize=INT8)]),
)
# of other things: they need more than one GPU, docker, a quantized checkpoint, or llm-d itself
ELSEWHERE = (
    "docs/deploy.md",
    "docs/how-to/adapters.md",
    "docs/how-to/gateways.md",
    "docs/reliability.md",
    "docs/tensor-parallelism.md",
    "docs/tutorial/first-container.md",
)


def verdict(found: Found) -> list[str]:
    """A line for each statement, and one for each aim. found: a document of a run."""
    device = found["machine"].get("device", "an unknown device")
    lines = [f"{device}, commit {found['machine'].get('commit', 'unknown')}"]
    is_gpu = "capability" in found["machine"]
    if not is_gpu:
        lines.append("not a run on a GPU: nothing is settled")
    for page, statement, needed in STATEMENTS:
        is_settled = is_gpu and all(holds(found) for holds in needed)
        lines.append(f"{'can go' if is_settled else 'stays ':<8}{page}: {statement}")
    for aim in found["aims"]:
        passed = {True: "met", False: "missed", None: "not measured"}[aim["passed"]]
        lines.append(f"{passed:<14}{aim['aim']}: {aim['value']}, at least {aim['at_least']}")
    return lines
