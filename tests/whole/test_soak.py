"""Nothing is lost, mixed up or leaked over many random requests on pools far too small for them.

`make soak` runs ten thousand; every run of the tests takes a hundred of the same kind.
"""

import asyncio

import pytest
from support.soak import Soak

FLAT_BYTES = 32 << 20


def test_a_hundred_random_requests_answer_as_alone_and_leave_nothing_behind():
    report = asyncio.run(Soak(100, seed=7).run())
    assert report.endings["abort"] > 0
    assert report.endings["length"] > 50
    assert report.num_preemptions > 0, "the pools are too large to test preemption"
    assert report.num_evictions > 0
    assert report.num_image_hits > 0
    assert report.num_prefix_hits > 0
    assert report.num_excuses <= 1


@pytest.mark.soak
def test_ten_thousand_random_requests_answer_as_alone_in_flat_memory():
    report = asyncio.run(Soak(10_000, seed=8).run())
    print(report)
    assert report.num_excuses <= 10
    assert report.rss_late - report.rss_early <= FLAT_BYTES
