"""The next chunks of prompts planned while a step is computed: which, how long, and when not.

The fake runner raises where a row that was planned ahead is not what it was when it is computed.
"""

from __future__ import annotations

from support.fake_runner import expected_token_ids, fake_image
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes
from vlmserve.router.messages import AddRequest


def request_of(request_id: str, max_tokens: int = 6, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=[1, 2, 3], max_tokens=max_tokens, **fields
    )


def long_request(request_id: str, num_tokens: int = 40, **fields) -> AddRequest:
    first = ord(request_id[0])  # no two begin alike
    prompt = list(range(first, first + num_tokens))
    return AddRequest(request_id=request_id, prompt_token_ids=prompt, max_tokens=4, **fields)


def behind_decodes(*names: str, max_tokens: int = 20) -> Bench:
    """Short answers that have their first token."""
    bench = Bench(pools=PoolSizes(96, 8, 4), plans_ahead=True)
    for name in names:
        bench.add(request_of(name, max_tokens=max_tokens))
    bench.step()
    return bench


def lens_ahead(bench: Bench) -> list[tuple[str, int, int]]:
    """The rows planned ahead: their requests, first positions and tokens."""
    return [(row.request_id, row.start, len(row.token_ids)) for row in bench.rows_ahead]


def test_the_next_chunk_of_a_prompt_is_planned_while_the_last_is_computed():
    bench, asked = behind_decodes("a", "b"), long_request("long")
    bench.add(asked)
    batch = bench.plan()  # 16 tokens a step
    assert batch is not None
    assert lens_ahead(bench) == [("a", 4, 1), ("b", 4, 1), ("long", 14, 14)]
    assert bench.rows_ahead[-1].token_ids == asked.prompt_token_ids[14:28]
    assert bench.scheduler.has_all_ahead
    bench.finish(batch)
    planned = bench.rows_ahead
    batch = bench.plan()
    assert batch is not None
    assert all(one is other for one, other in zip(batch.sequences, planned, strict=True))
    assert lens_ahead(bench)[-1] == ("long", 28, 12)  # the last, which samples
    assert bench.rows_ahead[-1].sampling is not None
    bench.finish(batch)
    bench.run()
    assert bench.tokens["long"] == expected_token_ids(asked)
    bench.assert_all_free()


def test_a_chunk_is_as_long_as_planned_when_decodes_have_ended_and_no_other_row_gets_their_tokens():
    bench = Bench(pools=PoolSizes(96, 8, 4), plans_ahead=True)
    last = expected_token_ids(request_of("a"))[1]
    bench.add(request_of("a", stop_token_ids=[last]))
    bench.add(request_of("b", max_tokens=20))
    bench.step()
    asked = [long_request("c"), long_request("d")]
    for one in asked:
        bench.add(one)
    bench.step()
    assert bench.endings == {"a": "stop"}
    planned = bench.rows_ahead
    batch = bench.plan()
    assert batch is not None
    assert [one.request_id for one in batch.sequences] == ["b", "c"]
    assert all(one is other for one, other in zip(batch.sequences, planned[1:], strict=True))
    assert len(batch.sequences[1].token_ids) == 14
    bench.finish(batch)
    bench.run()
    assert [bench.tokens[one.request_id] for one in asked] == list(map(expected_token_ids, asked))


def test_when_the_planned_chunk_ends_too_the_next_prompt_gets_the_whole_step():
    bench = behind_decodes("a", max_tokens=3)
    for name in "cd":
        bench.add(long_request(name))
    batch = bench.plan()
    assert batch is not None
    bench.scheduler.abort(bench.sequences["a"])
    bench.finish(batch)
    batch = bench.plan()
    assert batch is not None
    bench.scheduler.abort(bench.sequences["c"])
    bench.finish(batch)
    batch = bench.plan()
    assert batch is not None
    assert [(one.request_id, len(one.token_ids)) for one in batch.sequences] == [("d", 16)]
    bench.finish(batch)
    bench.run()
    bench.assert_all_free()


def test_a_chunk_before_an_image_that_is_not_encoded_is_planned_with_the_result():
    bench = behind_decodes("a")
    bench.add(long_request("long", images=[fake_image("p", 2)], spans=[ImageSpan(20)]))
    ahead = []
    while (batch := bench.plan()) is not None:
        ahead.append((len(bench.rows_ahead), bench.scheduler.has_all_ahead))
        bench.finish(batch)
    # 15 tokens; 15 with the image; 10, for which it is encoded
    assert ahead[:3] == [(1, False), (2, True), (2, True)]
    bench.assert_all_free()


def test_no_chunk_of_a_prompt_that_reports_log_probabilities_is_planned_ahead():
    bench, asked = behind_decodes("a"), long_request("long", num_prompt_logprobs=1)
    bench.add(asked)
    batch = bench.plan()
    assert batch is not None
    assert lens_ahead(bench) == [("a", 4, 1)]
    assert not bench.scheduler.has_all_ahead
    bench.finish(batch)
    bench.run()
    assert bench.tokens["long"] == expected_token_ids(asked)


def test_chunks_of_owners_that_share_a_step_are_planned_with_the_result():
    """What each gets of it depends on what both have used until then."""
    for other, is_planned in (("", True), ("t", False)):
        bench = behind_decodes("a")
        bench.add(long_request("c"))
        bench.add(long_request("d", owner=other))
        bench.step()
        batch = bench.plan()
        assert batch is not None
        assert bench.scheduler.has_all_ahead == is_planned
        bench.finish(batch)
        bench.run()
        bench.assert_all_free()
