"""Nodes that die, updates and scaling under load: which requests are lost."""

import os
import signal

import ray
from conftest import FAR_S, NODE, under_load
from ray import serve
from support.polling import wait_until

from server_state import descendants, is_running

NUM_CLIENTS = 6
# Looked for seldom: each look asks Ray's controller, and takes cores from what it waits for.
EVERY_S = 0.5


def state_of_engines():
    """Ray's state of the deployment of engines, and how many replicas are in which state."""
    state = serve.status().applications["vlmserve"].deployments["engine"]
    return state.status, dict(state.replica_states)


def wait_for_engines(number):
    """Until `number` engines run and pass their health checks, and no other is there."""
    wanted = ("HEALTHY", {"RUNNING": number})
    assert wait_until(lambda: state_of_engines() == wanted, FAR_S, EVERY_S), (
        f"not {number} engines, but {state_of_engines()}"
    )


def wait_for_answers_of(load, number):
    """Until `number` replicas have answered from now on."""
    load.recent.clear()
    assert wait_until(lambda: len(set(load.recent)) >= number, FAR_S), (
        f"no answers of {number} replicas: {load}"
    )


def processes_of_engines():
    """The process of each replica that is alive."""
    actors = ray._private.state.actors().values()
    return [one["Pid"] for one in actors if "#engine#" in one["Name"] and one["State"] == "ALIVE"]


def test_the_death_of_a_node_costs_only_its_requests_and_the_cluster_is_whole_again(running):
    with under_load(running, NUM_CLIENTS, stream=True, max_tokens=100, ignore_eos=True) as load:
        wait_for_answers_of(load, 3)
        node = running.nodes_with_engines_alone()[0]
        before = load.outcomes.total()
        running.cluster.remove_node(node, allow_graceful=False)
        assert wait_until(lambda: load.outcomes.total() > before + 2 * NUM_CLIENTS, FAR_S), load
        wait_for_answers_of(load, 2)
    print(f"a node died: {dict(load.outcomes)}")
    lost = load.outcomes.total() - load.outcomes["whole"]
    # Only the streams that had started there: each client has one request open.
    assert load.outcomes["error event"] == lost <= NUM_CLIENTS
    assert load.outcomes["whole"] > 2 * NUM_CLIENTS
    running.cluster.add_node(**NODE)
    wait_for_engines(3)
    with under_load(running, NUM_CLIENTS) as load:
        wait_for_answers_of(load, 3)
    assert set(load.outcomes) == {"whole"}


def test_an_update_one_after_the_other_loses_no_request(running, size):
    with under_load(running, 2, size.pause_s, max_tokens=4) as load:
        wait_for_answers_of(load, 2)
        first = set(load.replicas)
        # Of the ingresses too: there are two from now on.
        running.deploy(replicas=2, ingresses=2, options={"max_num_seqs": 32})
        wait_for_engines(2)
        wait_for_answers_of(load, 2)
        assert not first & set(load.recent)
    print(f"an update: {dict(load.outcomes)}")
    assert set(load.outcomes) == {"whole"}


def test_an_update_of_one_replica_and_scaling_up_and_down_lose_no_request(running, size):
    fast = {"metrics_interval_s": 1, "look_back_period_s": 2}
    fast |= {"upscale_delay_s": 1, "downscale_delay_s": 4}
    args = {
        "replicas": 1,
        "max_replicas": size.most_engines,
        "ingresses": 2,
        "autoscaling": fast,
        "target_share": 0.5,
    }
    args |= {"options": {"max_num_seqs": 4, "max_num_batched_tokens": 512}}
    with under_load(running, 1, size.pause_s, max_tokens=4) as trickle:
        # The limit is the next test's.
        running.deploy(**args, unready_limit_s=20)
        wait_for_engines(1)
        with under_load(running, 8, max_tokens=64, ignore_eos=True) as load:
            wait_for_engines(size.most_engines)
            wait_for_answers_of(load, size.most_engines)
        wait_for_engines(1)
    print(f"scaled: {dict(load.outcomes)}, {dict(trickle.outcomes)}")
    assert set(load.outcomes) == set(trickle.outcomes) == {"whole"}


def test_a_hung_server_is_replaced(running, size):
    """Its processes are stopped: neither its supervisor nor its engine can help."""
    assert wait_until(lambda: len(processes_of_engines()) == 1, FAR_S, EVERY_S)
    with under_load(running, 1, size.pause_s) as load:
        wait_for_answers_of(load, 1)
        first = load.recent[-1]
    processes = descendants(processes_of_engines()[0])
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    with under_load(running, 1, size.pause_s) as load:
        assert wait_until(lambda: bool(load.recent) and load.recent[-1] != first, FAR_S), load
    assert wait_until(lambda: not any(map(is_running, processes)), FAR_S), processes
