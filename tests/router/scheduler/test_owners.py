"""Owners share places, tokens and the queue: counted in steps and tokens, never in seconds."""

from __future__ import annotations

from collections import Counter

import pytest
from support.fake_runner import expected_token_ids, fake_image
from support.flooded import BLOCKS, PLACES, at_any_size, by_tokens, flooded, request_of
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes
from vlmserve.router.errors import QueueFullError
from vlmserve.router.messages import AddRequest, OwnerPolicy
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.sequence import Sequence
from vlmserve.router.scheduler.step_budget import Claim, quotas_of


def steps_until_first_token(bench: Bench, name: str) -> int:
    for count in range(1, 5000):
        bench.step()
        if bench.tokens[name]:
            return count
    raise AssertionError(f"{name} never got a token")


@pytest.mark.parametrize("options", [PLACES, BLOCKS], ids=["places", "blocks"])
@pytest.mark.parametrize("num_prompt", [4, 100])
def test_row_70_a_flood_of_one_owner_at_most_doubles_the_steps_to_anothers_first_token(
    options, num_prompt
):
    alone = Bench(max_model_len=400, **options)
    alone.add(request_of("small", "other", num_prompt))
    num_alone = steps_until_first_token(alone, "small")
    bench = flooded(**options)
    for count in range(8):
        name = f"small {count}"
        bench.add(request_of(name, "other", num_prompt))
        assert steps_until_first_token(bench, name) <= 2 * num_alone
        while name not in bench.endings:
            bench.step()


def new_requests_beside(bench: Bench, numbers=range(8)):
    """The steps in which each of another owner's requests, one after the other, got a token."""
    for number in numbers:
        bench.add(request_of(f"small {number}", "other", max_tokens=1))
        steps = []
        while not bench.tokens[f"small {number}"]:
            steps.append(bench.step())
        bench.step()
        yield steps


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_row_70_a_prompt_beside_a_flood_is_computed_alone_where_all_tokens_cost_alike(plans_ahead):
    bench = flooded(**PLACES, seconds_of=by_tokens, plans_ahead=plans_ahead)
    for steps in new_requests_beside(bench):
        (only,) = steps
        assert [one.request_id[:5] for one in only.sequences] == ["small"]
    for name in ("flood 0", "flood 15", "small 0", "small 7"):
        tokens = bench.tokens[name]
        assert tokens
        assert tokens == expected_token_ids(bench.sequences[name].request)[: len(tokens)], name


def test_a_prompt_shares_the_step_with_the_decodes_where_these_cost_nothing():
    bench = flooded(**PLACES, seconds_of=at_any_size)
    list(new_requests_beside(bench))
    for steps in new_requests_beside(bench, range(8, 16)):
        (shared,) = steps
        assert len(shared.sequences) > 10


def test_decodes_run_in_every_other_step_beside_any_number_of_newcomers():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    for number in range(200):
        bench.add(request_of(f"new {number}", f"owner {number}", max_tokens=1))
    was_alone = False
    while not all(bench.tokens[f"new {number}"] for number in range(200)):
        is_alone = len(bench.step().sequences) == 1
        assert not (is_alone and was_alone)
        was_alone = is_alone


@pytest.mark.parametrize("owner", ["flooder", "other"])
def test_only_a_short_prompt_of_an_owner_that_runs_nothing_is_computed_alone(owner):
    bench = flooded(**PLACES, seconds_of=by_tokens)
    bench.add(request_of("first", "other", max_tokens=300))
    while not bench.tokens["first"]:
        bench.step()
    bench.step()
    bench.add(request_of("long", owner, num_prompt=40, max_tokens=1))
    for _ in range(40):
        assert len(bench.step().sequences) > 1


def test_answers_preempted_for_another_owner_stay_as_they_were():
    bench = Bench(pools=PoolSizes(60, 8, 4), max_num_seqs=6, max_num_batched_tokens=12)
    requests = [request_of(f"a{n}", "a", max_tokens=30) for n in range(12)]
    for request in requests:
        bench.add(request)
    for number in range(60):
        if number % 5 == 0:
            requests.append(request_of(f"b{number}", "b", 9, 3))
            bench.add(requests[-1])
        bench.step()
    bench.run()
    assert bench.scheduler.snapshot().num_preemptions > 0
    for request in requests:
        assert bench.tokens[request.request_id] == expected_token_ids(request)
    bench.assert_all_free()


def service_while_both_wait(bench: Bench) -> Counter[str]:
    """Tokens of each owner that steps computed while both had requests waiting."""
    served: Counter[str] = Counter()
    while len(bench.queue.lines) > 1:
        batch = bench.step()
        assert batch is not None
        for row in batch.sequences:
            served[bench.sequences[row.request_id].owner] += len(row.token_ids)
    return served


@pytest.mark.slow
def test_weights_of_3_to_1_divide_the_tokens_of_a_thousand_requests_3_to_1():
    bench = Bench(pools=PoolSizes(4096, 8, 4), max_num_seqs=16, max_num_batched_tokens=64)
    for number in range(500):
        bench.add(request_of(f"a{number}", "a", 4 + number % 5, 10 + number % 7, weight=3.0))
        bench.add(request_of(f"b{number}", "b", 4 + number % 3, 10 + number % 11))
    served = service_while_both_wait(bench)
    assert served.total() > 8_000
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.05)
    bench.run()
    bench.assert_all_free()


def test_shares_cost_at_most_three_percent_of_the_steps():
    def num_steps(owners: str) -> int:
        bench = Bench(pools=PoolSizes(4096, 8, 4), max_num_seqs=16, max_num_batched_tokens=64)
        for number in range(120):
            bench.add(request_of(f"r{number}", owners[number % len(owners)], 4 + number % 9, 20))
        count = 0
        while bench.step() is not None:
            count += 1
        return count

    alone = num_steps("a")
    for owners in ("abbb", "abcdefgh"):
        assert num_steps(owners) <= 1.03 * alone


def test_an_owner_of_many_small_requests_gets_no_more_than_one_of_few_large_ones():
    bench = Bench(pools=PoolSizes(4096, 8, 4), max_num_seqs=8, max_num_batched_tokens=32)
    for number in range(600):
        bench.add(request_of(f"small {number}", "small", 3, 3))
    for number in range(60):
        bench.add(request_of(f"large {number}", "large", 20, 30))
    served = service_while_both_wait(bench)
    assert served["small"] / served["large"] == pytest.approx(1.0, rel=0.1)


def test_chunks_of_long_prompts_share_a_step_by_weight():
    bench = Bench(pools=PoolSizes(4096, 8, 4), max_model_len=400, max_num_batched_tokens=32)
    for owner, weight in (("a", 3.0), ("b", 1.0)):
        bench.add(request_of(owner, owner, 300, 2, weight=weight))
    for _ in range(5):
        batch = bench.step()
        rows = {row.request_id: len(row.token_ids) for row in batch.sequences}
        assert rows == {"a": 24, "b": 8}


def test_an_owner_alone_gets_every_place_and_every_token():
    bench = Bench(max_num_seqs=4, max_num_batched_tokens=16)
    for number in range(8):
        bench.add(request_of(str(number), "a"))
    batch = bench.step()
    assert (len(batch.sequences), batch.num_tokens) == (4, 16)
    assert bench.step().num_tokens == 4
    bench.run()
    assert bench.scheduler.snapshot().num_preemptions == 0


def test_each_answer_of_a_request_takes_a_place_of_its_owner():
    """Eight answers of one request started at once while another owner waited."""
    bench = Bench(pools=PoolSizes(512, 8, 4), max_num_seqs=8, max_num_batched_tokens=16)
    many = [f"m{number}" for number in range(1, 8)]
    bench.add(request_of("m0", "many", max_tokens=40, choice_ids=many))
    for number in range(12):
        bench.add(request_of(f"one {number}", "one", max_tokens=40))
    for _ in range(12):
        bench.step()
    running = bench.scheduler.owners.num_running
    assert running.total() == 8
    assert abs(running["many"] - running["one"]) <= 2
    bench.run()
    bench.assert_all_free()


def test_priorities_count_inside_an_owner_and_across_owners_only_if_the_key_may():
    def order(policy: OwnerPolicy) -> list[str]:
        bench = Bench(max_num_seqs=1)
        bench.add(request_of("a", "a"))
        bench.step()
        for number in range(3):
            bench.add(request_of(f"a{number}", "a"))
            bench.add(request_of(f"b{number}", "b", priority=-1, policy=policy))
        bench.run()
        return list(bench.endings)

    plain = order(OwnerPolicy())
    assert plain.index("a0") < plain.index("b2"), "a's turn comes in between"
    assert order(OwnerPolicy(cross_priority=True))[:4] == ["a", "b0", "b1", "b2"]


def test_a_request_is_served_in_time_however_many_other_owners_keep_coming():
    """A new owner each step, every one of them with little work, never holds up the oldest."""
    bench = Bench(pools=PoolSizes(64, 8, 4), max_num_seqs=2, max_num_batched_tokens=8)
    bench.add(request_of("large", "large", num_prompt=50, max_tokens=10))
    for number in range(400):
        bench.add(request_of(f"n{number}", f"owner {number % 40}", max_tokens=5))
        bench.step()
        if "large" in bench.endings:
            break
    assert "large" in bench.endings
    bench.run()
    bench.assert_all_free()


def test_what_is_remembered_of_owners_is_bounded_by_those_with_requests():
    bench = Bench(max_num_seqs=4)
    bench.add(request_of("steady", "steady", max_tokens=60))
    for number in range(500):
        bench.add(request_of(f"r{number}", f"owner {number}", max_tokens=1))
        bench.step()
        if "steady" in bench.endings:
            del bench.endings["steady"]
            bench.tokens.pop("steady")
            bench.add(request_of("steady", "steady", max_tokens=60))
    owners = bench.queue.owners
    assert owners.num_remembered <= 4 * len(owners) + 20
    bench.run()
    bench.assert_all_free()


def test_pictures_of_one_owner_do_not_hold_up_anothers():
    bench = Bench(
        pools=PoolSizes(4096, 64, 4), max_num_seqs=16, max_num_batched_images=1,
        image_cost_tokens=40, num_image_layers=8, max_num_batched_tokens=20,
    )  # fmt: skip

    def with_image(name: str, owner: str) -> AddRequest:
        picture = fake_image(name, 2)
        return request_of(name, owner, images=[picture], spans=[ImageSpan(1)], max_tokens=30)

    for number in range(30):
        bench.add(with_image(f"a{number}", "a"))
    for _ in range(10):
        bench.step()
    bench.add(with_image("b", "b"))
    # An image takes about four steps beside streams; one of the other owner may go before.
    assert steps_until_first_token(bench, "b") <= 24


# The queue's limits


def sequence_of(name: str, owner: str, num_prompt=3, weight=1.0) -> Sequence:
    return Sequence(name, 0, request_of(name, owner, num_prompt, weight=weight))


def test_an_owner_that_fills_the_queue_costs_no_other_owner_a_place_in_it():
    queue = RequestQueue(QueueLimits(8, 10**6, 10**9))
    for number in range(8):
        queue.put(sequence_of(f"a{number}", "a"))
    with pytest.raises(QueueFullError):
        queue.put(sequence_of("a8", "a"))
    for number in range(4):
        queue.put(sequence_of(f"b{number}", "b"))
    for owner in "ab":
        with pytest.raises(QueueFullError, match=r"of them of this API key.*--max-queue-requests"):
            queue.put(sequence_of("more", owner))
    queue.put(sequence_of("c", "c"))


def test_a_heavier_owner_may_fill_more_of_the_queue():
    queue = RequestQueue(QueueLimits(8, 10**6, 10**9))
    for number in range(8):
        queue.put(sequence_of(f"a{number}", "a"))
    for number in range(6):
        queue.put(sequence_of(f"b{number}", "b", weight=3.0))
    with pytest.raises(QueueFullError):
        queue.put(sequence_of("b6", "b", weight=3.0))


@pytest.mark.parametrize("limits", [QueueLimits(99, 12, 10**9), QueueLimits(99, 10**6, 1)])
def test_tokens_and_bytes_are_shared_alike(limits):
    queue = RequestQueue(limits)
    images = {"images": [fake_image("p")], "spans": [ImageSpan(0)]}
    queue.put(Sequence("a", 0, request_of("a", "a", 12, **images)))
    with pytest.raises(QueueFullError):
        queue.put(Sequence("a2", 0, request_of("a2", "a", 3, **images)))
    queue.put(Sequence("b", 0, request_of("b", "b", 3, **images)))


def test_a_place_in_line_counts_other_owners_turns_and_not_their_whole_lines():
    queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
    for number in range(100):
        queue.put(sequence_of(f"a{number}", "a"))
    assert queue.position("a", 1.0, 0) == 101
    assert queue.position("b", 1.0, 0) == 2
    assert queue.position("b", 0.25, 0) == 5


def test_quotas_are_fair_by_weight_and_leave_nothing_unused():
    claims = {"a": Claim(1.0, 0, 100), "b": Claim(1.0, 0, 10), "c": Claim(2.0, 6, 100)}
    quotas = quotas_of(claims, 64)
    assert quotas["b"] == 10
    assert quotas["a"] == 20
    assert quotas["c"] == 34, "six more are its running answers"
    assert quotas_of({"a": Claim(1.0, 9, 100)}, 5) == {}
    assert quotas_of({"a": Claim(1.0, 9, 3), "b": Claim(1.0, 0, 2)}, 5) == {}, "both fit"
