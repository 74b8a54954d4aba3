"""Nothing is lost, mixed up or leaked over many random requests on pools far too small for them.

`make soak` runs ten thousand; `make test-slow` takes a hundred of the same kind.
"""

import asyncio

import pytest
from support.soak import Report, Soak

FLAT_BYTES = 32 << 20


@pytest.mark.slow
def test_a_hundred_random_requests_answer_as_alone_and_leave_nothing_behind():
    report = asyncio.run(Soak(100, seed=7).run())
    assert report.endings["abort"] > 0
    assert report.endings["length"] > 50
    assert report.num_preemptions > 0, "the pools are too large to test preemption"
    assert report.num_evictions > 0
    assert report.num_image_hits > 0
    assert report.num_images_sent > report.num_evictions // 2
    assert report.num_prefix_hits > 0
    assert report.num_excuses <= 1


@pytest.mark.slow
def test_random_requests_with_adapters_answer_as_the_merged_model_alone(tmp_path):
    report = asyncio.run(Soak(60, seed=9, adapters=tmp_path).run())
    assert report.num_adapted > 15
    assert report.num_slot_loads > 8, "adapters never left their slots"
    assert report.num_preemptions > 0
    assert report.num_image_hits > 0
    assert report.num_prefix_hits > 0
    assert report.num_excuses <= 1


@pytest.mark.slow
def test_a_hundred_random_requests_answer_with_drafts_as_alone_without(tmp_path):
    report = asyncio.run(Soak(100, seed=11, adapters=tmp_path, has_drafts=True).run())
    check_drafts(report)


@pytest.mark.slow
def test_sixty_random_requests_answer_with_overlap_as_alone_without():
    check_overlap(asyncio.run(Soak(60, seed=13, has_overlap=True).run()))


@pytest.mark.soak
def test_ten_thousand_random_requests_answer_with_overlap_as_alone_without():
    report = asyncio.run(Soak(10_000, seed=14, has_overlap=True).run())
    print(report)
    check_overlap(report)
    assert report.rss_late - report.rss_early <= FLAT_BYTES


def check_overlap(report: Report) -> None:
    assert report.num_passes_used > 50
    assert report.num_chunk_passes_used > 5
    assert report.num_passes_started > report.num_passes_used, "no pass was thrown away"
    assert report.endings["stop"] > 0
    assert report.endings["abort"] > 0
    assert report.num_preemptions > 0
    assert report.num_image_hits > 0
    assert report.num_excuses <= 1 + sum(report.endings.values()) // 1000


@pytest.mark.soak
def test_ten_thousand_random_requests_answer_with_drafts_as_alone_without(tmp_path):
    report = asyncio.run(Soak(10_000, seed=12, adapters=tmp_path, has_drafts=True).run())
    print(report)
    check_drafts(report)
    assert report.rss_late - report.rss_early <= FLAT_BYTES


def check_drafts(report: Report) -> None:
    assert report.num_draft_tokens > report.num_accepted_tokens > 50
    assert report.endings["stop"] > 0
    assert report.endings["abort"] > 0
    assert report.num_preemptions > 0
    assert report.num_adapted > 10
    assert report.num_excuses <= 1 + sum(report.endings.values()) // 1000


@pytest.mark.soak
def test_ten_thousand_random_requests_answer_as_alone_in_flat_memory():
    report = asyncio.run(Soak(10_000, seed=8).run())
    print(report)
    assert report.num_excuses <= 10
    assert report.rss_late - report.rss_early <= FLAT_BYTES
