"""The model of a step's time: its terms against the desk check's, and its statements."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmserve.bench.step_model import (
    BEFORE,
    CARDS,
    STEPS,
    TODAY,
    aims,
    bound_ms,
    estimate_ms,
    main,
    terms,
)

H100 = CARDS[0]
ROOT = Path(__file__).resolve().parents[2]


def total(code, name: str, card=H100, quantize: str | None = None) -> float:
    return sum(terms(card, code, STEPS[name], quantize).values())


def test_the_model_agrees_with_the_desk_check_of_33f2d30() -> None:
    """Its section C and findings B2, B4 and B11, on an H100; within 15 %, or within its range."""
    assert bound_ms(H100, STEPS["decode/1"]) == pytest.approx(5.0, rel=0.02)
    assert bound_ms(H100, STEPS["decode/64"]) == pytest.approx(5.7, rel=0.02)
    assert total(BEFORE, "decode/1") == pytest.approx(6.9, rel=0.15)
    assert total(BEFORE, "decode/64") == pytest.approx(9.2, rel=0.15)
    assert 8 + 16 < total(BEFORE, "decode/32/long") < 8 + 32
    top_p = total(BEFORE, "decode/64/top-p") - total(BEFORE, "decode/64")
    assert 1.0 <= top_p <= 2.0
    unpacking = total(BEFORE, "decode/64/chunk", quantize="int8")
    assert 10 < unpacking - total(BEFORE, "decode/64", quantize="int8") < 20


def test_no_step_takes_longer_than_before_and_none_is_below_its_bound() -> None:
    for card in CARDS:
        for name, step in STEPS.items():
            assert bound_ms(card, step) < total(TODAY, name, card), (card.name, name)
            assert total(TODAY, name, card) <= total(BEFORE, name, card) + 0.1
            assert all(value >= 0 for value in terms(card, TODAY, step).values())


def test_a_long_row_and_a_chunk_cost_little_more_than_their_bytes() -> None:
    assert total(TODAY, "decode/32/long") < 1.5 * bound_ms(H100, STEPS["decode/32/long"])
    (_, share, _), (_, times, is_met) = aims()
    assert is_met
    assert times < 1.3
    assert 0.7 < share < 1.0


def test_rows_of_known_cards_get_an_estimate() -> None:
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "decode/1") == pytest.approx(
        total(TODAY, "decode/1"), abs=0.01
    )
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "encode") == H100.encode_ms[1]
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "prefill/1") is None
    assert estimate_ms("NVIDIA T4", "none", "decode/1") is None


def test_the_documented_estimates_are_those_of_the_model(capsys) -> None:
    main()
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "gpu-benchmark.md").read_text("utf-8")
    for name, step in STEPS.items():
        figures = (bound_ms(H100, step), total(BEFORE, name), total(TODAY, name))
        row = f"| `{name}` | " + " | ".join(f"{one:.1f}" for one in figures) + " |"
        assert row in page, row
        assert name in printed
    for aim, value, is_met in aims():
        assert f"{aim}: {value:.2f}, {'met' if is_met else 'not met'}" in printed
