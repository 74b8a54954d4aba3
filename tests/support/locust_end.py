"""A locustfile without users, read beside another: it ends the run after so many requests.

By count and not by time: a slow machine only takes longer.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentParser
from typing import Any

import gevent
import locust.stats
from locust import events
from locust.env import Environment

# Locust writes its figures in steps of this, and not once more at the end.
locust.stats.CSV_STATS_INTERVAL_SEC = 0.02
locust.stats.CSV_STATS_FLUSH_INTERVAL_SEC = 0


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--end-after", type=int, required=True, help="requests of the run")


@events.init.add_listener
def count(environment: Environment, **_: Any) -> None:
    numbers = itertools.count(1)

    def end_after_the_last(name: str, **_: Any) -> None:
        if name != "chat completion" or environment.runner is None:
            return
        if next(numbers) == environment.parsed_options.end_after:
            # apart from the user, whose request has just ended and whom this stops
            gevent.spawn(_end, environment.runner)

    environment.events.request.add_listener(end_after_the_last)


def _end(runner: Any) -> None:
    runner.stop()
    gevent.sleep(50 * locust.stats.CSV_STATS_INTERVAL_SEC)
    runner.quit()
