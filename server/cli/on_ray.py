"""`vlmserve serve --ray ADDRESS`: runs the application on a cluster until Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from ...models.settings.option_parser import declarations
from ...router.processes.logs import say
from ..ray.application import NOT_HERE, SETTINGS, RayApplication, application
from .start_options import StartOptions

NAME = "vlmserve"
LOCAL = "local"
# Options of the command that have a part in this file, and none in a replica's server.
READ_HERE = frozenset(
    ("model", "ray", "replicas", "max_replicas", "host", "port", "tls_certfile", "tls_keyfile")
)


def serve_on_ray(address: str, values: Mapping[str, Any]) -> None:
    """Deploy, wait for a signal, then stop the application as a rolling update would.

    values: of the command line. Raises ValueError, one line, for options that do not apply.
    """
    given = RayApplication(
        model=_absolute(values["model"]),
        options=_given(values),
        replicas=values["replicas"],
        max_replicas=values["max_replicas"],
    )
    if values["port"] == 0:
        raise ValueError("--port 0 does not apply with --ray: name a port, the same on all nodes")
    # Nothing is reported to Ray's makers unless the operator asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A proxy that imports slowly on a busy machine is no dead one. Read by a local cluster's parts.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Ray's workers would run at nice 15, and so would engines: beside a busy process they starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    _connect(address)
    # After Ray has set its own handlers.
    stop = _signals()
    serve.start(proxy_location="EveryNode", http_options=_http(values))
    try:
        serve.run(application(given), name=NAME, route_prefix="/")
        scheme = "http" if values["tls_certfile"] is None else "https"
        say(f"vlmserve is ready on {scheme}://{values['host']}:{values['port']} of every node")
        stop.wait()
        say("vlmserve: stopping; open requests finish first")
    finally:
        serve.delete(NAME)
        ray.shutdown()


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have another value than their default, less those that are read here.

    Raises ValueError for one that does not apply.
    """
    found = {}
    for declared in (one for kind in (StartOptions, *SETTINGS) for one in declarations(kind)):
        name = declared.parameter
        value = values.get(name)
        if value in (None, declared.default) or name in READ_HERE:
            continue
        if name in NOT_HERE:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} does not apply on Ray: {NOT_HERE[name]}")
        found[name] = value
    return found


def _absolute(model: str | None) -> str | None:
    """A folder of this machine by its whole path, which every node must have."""
    return os.path.abspath(model) if model and os.path.isdir(model) else model


def _signals() -> threading.Event:
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    return stop


def _connect(address: str) -> None:
    """To a cluster, or to a new one. Raises ConnectionError."""
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False)
        return
    try:
        ray.init(address=address)
    except ConnectionError as error:
        raise ConnectionError(
            f"no cluster of Ray answers at {address}: start one with `ray start --head`, or give"
            " --ray local"
        ) from error


def _http(values: Mapping[str, Any]) -> HTTPOptions:
    return HTTPOptions(
        host=values["host"],
        port=values["port"],
        ssl_certfile=values["tls_certfile"],
        ssl_keyfile=values["tls_keyfile"],
    )
