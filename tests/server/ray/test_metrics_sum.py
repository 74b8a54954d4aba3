"""The metrics of several servers as one text."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vlmserve.server.ray.metrics_sum import sum_of_metrics

ONE = """\
# HELP tokens_total Tokens.
# TYPE tokens_total counter
tokens_total 3.0
# HELP finished_total Requests.
# TYPE finished_total counter
finished_total{reason="stop"} 2.0
# HELP cache_usage_perc Share.
# TYPE cache_usage_perc gauge
cache_usage_perc 0.5
# HELP seconds Time.
# TYPE seconds histogram
seconds_bucket{le="1.0"} 1.0
seconds_bucket{le="+Inf"} 2.0
seconds_count 2.0
seconds_sum 2.5
"""
OTHER = ONE.replace("3.0", "4.0").replace("0.5", "0.1").replace('"stop"', '"length"')


def values(text):
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_counts_are_added_and_shares_averaged():
    summed = values(sum_of_metrics([ONE, OTHER]))
    assert summed["tokens_total",] == 7.0
    assert summed["finished_total", "stop"] == summed["finished_total", "length"] == 2.0
    assert summed["cache_usage_perc",] == pytest.approx(0.3)
    assert summed["seconds_bucket", "1.0"] == 2.0
    assert summed["seconds_bucket", "+Inf"] == summed["seconds_count",] == 4.0
    assert summed["seconds_sum",] == 5.0


def test_one_server_keeps_its_text():
    assert values(sum_of_metrics([ONE])) == values(ONE.encode())
    assert b"# TYPE tokens_total counter" in sum_of_metrics([ONE])
