"""Nodes that die, updates and scaling under load: which requests are lost."""

import os
import signal
from pathlib import Path

import ray
from conftest import NODE, under_load
from ray import serve
from support.polling import wait_until

FAR_S = 200.0
NUM_CLIENTS = 6
# Looked for seldom: each look asks Ray's controller, and takes cores from what it waits for.
EVERY_S = 0.5
# Of clients that only have to be there: what they ask takes cores from what they wait for.
PAUSE_S = 0.2


def replicas_running():
    """How many engines run and pass their health checks."""
    state = serve.status().applications["vlmserve"].deployments["engine"]
    return state.replica_states.get("RUNNING", 0) if state.status == "HEALTHY" else 0


def will_run(number):
    return wait_until(lambda: replicas_running() == number, FAR_S, EVERY_S)


def has_answers_of(load, number):
    """Whether `number` replicas are among the last answers."""
    load.recent.clear()
    return lambda: len(set(load.recent)) >= number


def processes_of_engines():
    """The process of each replica that is alive."""
    actors = ray._private.state.actors().values()
    return [one["Pid"] for one in actors if "#engine#" in one["Name"] and one["State"] == "ALIVE"]


def test_the_death_of_a_node_costs_only_its_requests_and_the_cluster_is_whole_again(running):
    with under_load(running, NUM_CLIENTS, stream=True, max_tokens=100, ignore_eos=True) as load:
        assert wait_until(has_answers_of(load, 3), FAR_S)
        node = running.nodes_with_engines_alone()[0]
        before = load.outcomes.total()
        running.cluster.remove_node(node, allow_graceful=False)
        assert wait_until(lambda: load.outcomes.total() > before + 2 * NUM_CLIENTS, FAR_S)
        assert wait_until(has_answers_of(load, 2), FAR_S)
    print(f"a node died: {dict(load.outcomes)}")
    lost = load.outcomes.total() - load.outcomes["whole"]
    # Only the streams that had started there: each client has one request open.
    assert load.outcomes["error event"] == lost <= NUM_CLIENTS
    assert load.outcomes["whole"] > 2 * NUM_CLIENTS
    running.cluster.add_node(**NODE)
    assert will_run(3)
    with under_load(running, NUM_CLIENTS) as load:
        assert wait_until(has_answers_of(load, 3), FAR_S)
    assert set(load.outcomes) == {"whole"}


def test_an_update_one_after_the_other_loses_no_request(running):
    with under_load(running, 2, PAUSE_S, max_tokens=4) as load:
        assert wait_until(has_answers_of(load, 2), FAR_S)
        first = set(load.replicas)
        # Of the ingresses too: there are two from now on.
        running.deploy(replicas=2, ingresses=2, options={"max_num_seqs": 32})
        assert will_run(2)
        assert wait_until(has_answers_of(load, 2), FAR_S)
        assert not first & set(load.recent)
    print(f"an update: {dict(load.outcomes)}")
    assert set(load.outcomes) == {"whole"}


def test_an_update_of_one_replica_and_scaling_up_and_down_lose_no_request(running):
    fast = {"metrics_interval_s": 1, "look_back_period_s": 2}
    fast |= {"upscale_delay_s": 1, "downscale_delay_s": 4}
    args = {
        "replicas": 1,
        "max_replicas": 3,
        "ingresses": 2,
        "autoscaling": fast,
        "target_share": 0.5,
    }
    args |= {"options": {"max_num_seqs": 4, "max_num_batched_tokens": 512}}
    with under_load(running, 1, PAUSE_S, max_tokens=4) as trickle:
        # The limit is the next test's.
        running.deploy(**args, unready_limit_s=20)
        assert will_run(1)
        with under_load(running, 8, max_tokens=64, ignore_eos=True) as load:
            assert will_run(3)
            assert wait_until(has_answers_of(load, 3), FAR_S)
        assert will_run(1)
    print(f"scaled: {dict(load.outcomes)}, {dict(trickle.outcomes)}")
    assert set(load.outcomes) == set(trickle.outcomes) == {"whole"}


def test_a_hung_server_is_replaced(running):
    """Its processes are stopped: neither its supervisor nor its engine can help."""
    assert wait_until(lambda: len(processes_of_engines()) == 1, FAR_S, EVERY_S)
    with under_load(running, 1, PAUSE_S) as load:
        assert wait_until(has_answers_of(load, 1), FAR_S)
        first = load.recent[-1]
    waiting, processes = processes_of_engines(), []
    while waiting:
        for children in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            found = [int(pid) for pid in children.read_text().split()]
            waiting += found
            processes += found
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    with under_load(running, 1, PAUSE_S) as load:
        assert wait_until(lambda: bool(load.recent) and load.recent[-1] != first, FAR_S)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), FAR_S)
