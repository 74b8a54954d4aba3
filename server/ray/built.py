"""The application with its arguments, for `serve build`, which takes no builder with arguments.

    VLMSERVE_RAY_ARGS='{"max_replicas": 4}' serve build vlmserve.server.ray.built:application

A file that it writes needs the same variable, in `runtime_env.env_vars`.
"""

from __future__ import annotations

import os

import orjson

from .application import ARGS_VARIABLE, app

application = app(orjson.loads(os.environ.get(ARGS_VARIABLE) or "{}"))
