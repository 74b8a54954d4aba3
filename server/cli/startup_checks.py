"""Checks of a worker's settings before any process starts: files, packages, variables.

A mistake becomes one line at once, not a worker that fails later.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path
from urllib.parse import urlsplit

from ..adapters.settings import AdapterSettings
from ..settings import ServerSettings, TraceSettings

# OpenTelemetry's own variables for the collector of traces.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# As they are compared: a name or address without scheme, port or trailing dot; an origin without a
# path, as browsers send it (files and sandboxes have the origin null).
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_ORIGIN = re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@*]+")
TRACE_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def absolute(file: str | None) -> str | None:
    """The absolute path, because a child may have another working directory."""
    return None if not file else str(Path(file).expanduser().absolute())


def check_files(settings: ServerSettings) -> None:
    """Raises ValueError, one line, if a key, the key file or a certificate cannot be used."""
    from ..http.auth import ApiKeys
    from ..http.tls import ServerTls

    # `--api-key "$KEY"` in a shell without KEY would make the empty key valid.
    if not all(key and key.split() == [key] for key in settings.api_keys):
        raise ValueError(
            "an API key is empty or contains a blank: give one without, or no --api-key"
        )
    if settings.api_key_file is not None:
        ApiKeys([], Path(settings.api_key_file))
    if settings.tls_certfile is not None:
        ServerTls(settings.tls_certfile, settings.tls_keyfile)
    elif settings.tls_keyfile is not None:
        raise ValueError("--tls-keyfile is given without --tls-certfile: give both")


def check_adapters(settings: AdapterSettings) -> None:
    """Raises ValueError, one line, if a folder for adapters cannot be used."""
    folders = {"--lora-source": settings.lora_source, "--lora-root": settings.lora_root}
    for option, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{option} {folder} is not a folder: create it or name another")
    if settings.allow_lora_updates and settings.updates_root is None:
        raise ValueError(
            "--allow-lora-updates needs --lora-root FOLDER: requests may load adapters below that"
            " folder only"
        )


def check_template(settings: ServerSettings) -> None:
    """Raises ValueError, one line, if a chat template does not compile or exceeds its bounds.

    The templates are tried in a child, which is then ended.
    """
    from ..prompts.templates.processes import LostChildError, TemplateError, try_template
    from ..prompts.templates.sources import special_tokens, template_sources

    folder = Path(settings.model)
    file = Path(settings.chat_template) if settings.chat_template else None
    sources = template_sources(folder, file)
    if sources is None:
        if settings.task == "moderation":
            raise ValueError(
                "--task moderation needs a chat template with the guard's policy, and the"
                " checkpoint has none: start with --chat-template FILE"
            )
        return
    messages = [{"role": "user", "content": "What is in this image?"}]
    variables = {"messages": messages, "tools": None, "add_generation_prompt": True}
    for source in {sources.default, sources.tool_use or sources.default}:
        try:
            try_template(source, variables | special_tokens(folder))
        except TemplateError as error:
            raise ValueError(
                f"the chat template of {sources.origin} cannot be used: {error}; start with"
                " --chat-template FILE to use another"
            ) from error
        except LostChildError as error:
            raise ValueError(f"the chat template cannot be tried: {error}") from error


def check_access(settings: ServerSettings) -> None:
    """Raises ValueError, one line, for a host or origin that no request can match."""
    for host in settings.allowed_hosts:
        if not _HOST.fullmatch(host) and not _is_ipv6(host):
            raise ValueError(
                f"--allowed-host {host!r} is not a host: give a name or address without scheme"
                " and port, such as api.example.com, *.example.com or ::1"
            )
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"--cors-origin {origin!r} is not an origin: give scheme and host, and the port if"
                " it is not the scheme's default, such as https://chat.example.com, without a"
                " trailing slash; or '*'"
            )


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except AddressValueError:
        return False
    return True


def trace_settings(
    is_wanted: bool | None,
    endpoint: str | None,
    service_name: str | None,
    environ: Mapping[str, str],
) -> TraceSettings | None:
    """Where to send traces; None if they are disabled or no endpoint is set.

    Raises ValueError, one line, if the endpoint is not a URL or OpenTelemetry is not installed.
    """
    if is_wanted is None:
        is_wanted = bool(endpoint) or any(environ.get(name) for name in ENDPOINTS)
    if not is_wanted or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if endpoint and not (
        endpoint.startswith(("http://", "https://")) and urlsplit(endpoint).netloc
    ):
        raise ValueError(
            f"--otlp-endpoint {endpoint!r} is not a URL: give one such as http://collector:4318"
        )
    if not all(map(_is_installed, TRACE_PACKAGES)):
        raise ValueError(
            "traces are enabled, but OpenTelemetry is not installed: pip install 'vlmserve[otel]',"
            " or start with --no-otel"
        )
    return TraceSettings(endpoint=endpoint or None, service_name=service_name or None)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
