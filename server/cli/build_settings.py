"""From the values of the command line to the settings of the supervisor and its children.

Order: find the model (which may download it), build the settings, check files and names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...models.memory.host_memory import available_cpu_memory
from ...models.settings.option_parser import settings_from
from ...router.config import EngineConfig
from ..adapters.settings import AdapterSettings
from ..settings import ServerSettings
from ..supervisor.settings import SupervisorSettings
from .adapter_sources import find_adapters
from .model_source import resolve_model
from .start_options import StartOptions
from .startup_checks import (
    absolute,
    check_access,
    check_adapters,
    check_files,
    check_template,
    trace_settings,
)

# An engine on a CPU takes 80 % (models/memory/available.py); the rest is for decoders and others.
WORKERS_SHARE = 0.15
LEAST_WORKER_BYTES = 1 << 30
# At most, if adapters may be served and --max-loras is not given.
DEFAULT_MAX_LORAS = 8


@dataclass(frozen=True, slots=True)
class AllSettings:
    """What one start of the server needs."""

    start: StartOptions
    engine: EngineConfig
    server: ServerSettings
    supervisor: SupervisorSettings


def build_settings(values: Mapping[str, Any]) -> AllSettings:
    """All settings; raises ModelFilesError or ValueError, one line for the operator."""
    start = settings_from(StartOptions, values)
    if start.max_replicas is not None:
        raise ValueError("--max-replicas needs --ray: on one machine --replicas is a fixed number")
    folder = resolve_model(start.model, start.revision, start.cache_dir)
    model = str(folder.path)
    names = _names(values["served_model_name"]) or [folder.name]
    adapters = _adapter_settings(start, values, names)
    engine = settings_from(
        EngineConfig,
        values,
        model=model,
        socket_path="",
        parent_pid=os.getpid(),
        max_loras=values["max_loras"] or _default_max_loras(adapters),
        adapters=tuple(adapter.ref for adapter in adapters.at_start),
    )
    server = settings_from(
        ServerSettings,
        values,
        model=model,
        engine_socket="",
        served_model_names=names,
        adapters=adapters,
        max_loras=engine.max_loras,
        max_queue_wait_s=values["max_queue_wait"],
        hub_id=folder.name if "/" in folder.name else None,
        chat_template=absolute(values["chat_template"]),
        api_key_file=absolute(values["api_key_file"]),
        tls_certfile=absolute(values["tls_certfile"]),
        tls_keyfile=absolute(values["tls_keyfile"]),
        traces=trace_settings(start.otel, start.otlp_endpoint, start.otel_service_name, os.environ),
    )
    check_access(server)
    check_adapters(adapters)
    check_files(server)
    check_template(server)
    supervisor = settings_from(SupervisorSettings, values)
    if server.max_memory_bytes is None:
        limit = default_worker_memory(supervisor.num_workers)
        server = msgspec.structs.replace(server, max_memory_bytes=limit)
    return AllSettings(start, engine, server, supervisor)


def _adapter_settings(
    start: StartOptions, values: Mapping[str, Any], model_names: Sequence[str]
) -> AdapterSettings:
    """Raises ModelFilesError."""
    return settings_from(
        AdapterSettings,
        values,
        at_start=find_adapters(start.lora, model_names, start.cache_dir),
        lora_source=absolute(values["lora_source"]),
        lora_root=absolute(values["lora_root"]),
    )


def default_worker_memory(num_workers: int) -> int:
    """The bytes at which a worker ends admission, unless the option sets them."""
    available = available_cpu_memory().num_bytes
    return max(LEAST_WORKER_BYTES, int(available * WORKERS_SHARE) // num_workers)


def _default_max_loras(adapters: AdapterSettings) -> int:
    """As many as may be served, at most DEFAULT_MAX_LORAS: each takes device memory."""
    known = len(adapters.at_start)
    return DEFAULT_MAX_LORAS if adapters.may_change else min(known, DEFAULT_MAX_LORAS)


def _names(given: Sequence[str] | None) -> list[str]:
    """The names in all values, each of which may contain several; without duplicates."""
    names = [name.strip() for value in given or [] for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))
