"""Shared fixtures: a real server as a subprocess, and freshly drawn pictures."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from support.invariants import Standing, StandingElsewhere
from support.polling import wait_until
from support.running import RunningServer, faulty_serving, free_port, serving

from vlmserve.models.bundled.pictures import data_url, draw, random_scene

# Tiny models gain nothing from a second thread, and lose much where another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads it when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No example is too slow: other work may share the machine. Tests of models on a GPU's machine
# run without hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--server URL`: what `tests/whole/test_ray.py` runs against the ingress of a cluster."""
    parser.addoption(
        "--server", metavar="URL", help="run only the tests that ask the shared server: this one"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Little that is imported or collected becomes garbage: looking for it takes seconds.

    All of it stays, so that the collections of tests need not look at it either.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A process of xdist that reported all its tests ends at once.

    Freeing what it imported takes seconds, and the run waits for it. Nothing that happens after
    its last report would be reported.
    """
    if hasattr(config, "workerinput"):
        os._exit(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files of whole servers first: they take longest, and processes share the tests by files."""
    items.sort(key=lambda item: "tests/whole" not in item.path.as_posix())
    if config.getoption("--server") is not None:
        others = [item for item in items if "server" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files that ask the shared server go to one of the processes."""
    # Imported here: without xdist there is no such hook.
    from support.shared_server_files import make_scheduler

    return make_scheduler(config, log)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The files of a checkpoint that an HTTP worker reads, for servers with a scripted engine."""
    # Imported here: tests of models run where no HTTP library is installed.
    from support.http_side import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def server(request, tmp_path_factory) -> Iterator[RunningServer]:
    """The bundled model in float32, shared by all tests that only ask questions."""
    if (url := request.config.getoption("--server")) is not None:
        yield RunningServer.elsewhere(url)
        return
    with serving(tmp_path_factory.mktemp("server"), "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def sdk(server) -> Iterator:
    """An `openai.OpenAI` of the shared server, closed with the module."""
    # Imported here: tests of models run where no HTTP library is installed.
    from openai import OpenAI

    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def session_standing(server) -> Standing:
    return Standing(server) if server.process is not None else StandingElsewhere(server)


@pytest.fixture
def standing(session_standing) -> Iterator[Standing]:
    """The shared server with the four standing assertions around the whole test.

    For rows in which the engine must survive. Others make a `Standing` of a server of
    their own and say `holds(same_engine=False)`.
    """
    with session_standing.holds():
        yield session_standing


@pytest.fixture
def start_server(tmp_path):
    """Starts further servers, each ended with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *options, **kw: stack.enter_context(serving(tmp_path, *options, **kw))


@pytest.fixture
def start_faulty_server(tmp_path):
    """start_faulty_server(supervision={}, server={}, engine={}) -> FaultyServer."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(faulty_serving(tmp_path, **options))


@pytest.fixture(scope="module")
def start_shared_faulty_server(tmp_path_factory):
    """The same for servers that a module's tests share."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            faulty_serving(tmp_path_factory.mktemp("server"), **options)
        )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes in one thread: the order of its sums does not change."""
    import torch  # here: most tests need no torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unused_port():
    return free_port()


@pytest.fixture
def wait_for():
    return wait_until


@dataclass
class Picture:
    """A scene that no checkpoint was trained on, and its picture as a data URL."""

    scene: object
    url: str


@pytest.fixture
def draw_picture():
    """draw_picture(seed, num_shapes=1, size=(224, 224), fmt="PNG") -> Picture."""

    def make(seed, num_shapes=1, size=(224, 224), fmt="PNG") -> Picture:
        rng = numpy.random.default_rng([20_261_123, seed])
        scene = random_scene(rng, num_shapes=num_shapes, size=size, is_distinct=True)
        return Picture(scene, data_url(draw(scene), fmt))

    return make
