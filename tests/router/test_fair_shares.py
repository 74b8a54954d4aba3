"""Counters of service by key: equal shares, weights, no credit for idle time, no growth."""

import pytest

from vlmserve.router.fair_shares import FairShares


def serve(shares: FairShares, keys: list[str], num_turns: int, cost=lambda key: 1.0) -> dict:
    """Turns in which all keys always have work; the service that each got."""
    served = dict.fromkeys(keys, 0.0)
    for _ in range(num_turns):
        key = min(keys, key=shares.used)
        shares.charge(key, cost(key))
        served[key] += cost(key)
    return served


def of(*keys: str, **weights: float) -> FairShares:
    shares = FairShares(lambda key: weights.get(key, 1.0))
    for key in keys:
        shares.join(key)
    return shares


def test_keys_with_work_get_equal_service_whatever_a_turn_costs():
    costs = {"a": 1.0, "b": 7.0, "c": 2.5}
    served = serve(of(*costs), list(costs), 3_000, costs.__getitem__)
    assert max(served.values()) - min(served.values()) <= 2 * max(costs.values())


def test_weights_divide_the_service():
    served = serve(of("a", "b", a=3.0), ["a", "b"], 4_000)
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.01)


def test_a_key_that_was_idle_has_no_credit():
    shares = of("a")
    serve(shares, ["a"], 500)
    shares.join("b")
    served = serve(shares, ["a", "b"], 100)
    assert served["b"] == pytest.approx(50, abs=1)


def test_leaving_and_joining_again_does_not_clear_what_a_key_has_used():
    shares = of("a", "b")
    shares.charge("a", 100.0)
    shares.leave("a")
    shares.join("a")
    assert serve(shares, ["a", "b"], 100)["b"] == 100


def test_no_key_waits_for_ever():
    shares = of(*"abcdefgh", a=100.0)
    served = serve(shares, list("abcdefgh"), 5_000)
    assert min(served.values()) > 0


def test_what_is_remembered_is_bounded_by_the_keys_that_are_active():
    shares = of("steady")
    for number in range(10_000):
        shares.join(f"key {number}")
        shares.charge(f"key {number}", 0.5)
        shares.charge("steady", 1.0)
        shares.leave(f"key {number}")
    assert len(shares) < 100
    shares.leave("steady")
    assert len(shares) == 0


def test_a_charge_after_the_last_work_of_a_key_is_dropped():
    shares = of("a")
    shares.leave("a")
    shares.charge("a", 5.0)
    assert len(shares) == 0


def test_a_key_that_begins_to_wait_is_lifted_to_the_least_of_the_others():
    """One key ran little while another ran much: that was a credit for the first."""
    shares = of("light", "heavy")
    shares.charge("heavy", 1_000.0)
    shares.lift("light")
    assert shares.used("light") == shares.used("heavy") == 1_000.0
    shares.charge("light", 50.0)
    shares.lift("light")
    assert shares.used("light") == 1_050.0, "lifting never lowers"
    alone = of("a")
    alone.lift("a")
    assert alone.used("a") == 0.0
