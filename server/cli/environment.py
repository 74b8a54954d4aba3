"""Environment variables: VLMSERVE_<OPTION> for each option, and those of the documented service.

    a flag  >  VLMSERVE_<OPTION>  >  the documented service's name

Owns the documented service's names: some set an option, the others have no effect here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass

from ...models.settings.option_parser import PREFIX, variable_of

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_LEVELS = {
    **{"trace": "debug", "debug": "debug", "info": "info", "default": "info"},
    **{"warning": "warning", "warn": "warning", "error": "error", "critical": "error"},
}


class VariableError(ValueError):
    """A variable has an invalid value; the message is one line for the operator."""


def _same(value: str) -> str:
    return value


def _flag(value: str) -> str:
    lower = value.strip().lower()
    if lower not in _TRUE | _FALSE:
        raise ValueError("1 or 0")
    return "true" if lower in _TRUE else "false"


def _not_flag(value: str) -> str:
    return "false" if _flag(value) == "true" else "true"


def _json_or_text(value: str) -> str:
    return "json" if _flag(value) == "true" else "text"


def _level(value: str) -> str:
    level = _LEVELS.get(value.strip().lower())
    if level is None:
        raise ValueError("DEBUG, INFO, WARNING or ERROR")
    return level


@dataclass(frozen=True, slots=True)
class Adopted:
    """The option that a documented variable sets, and how to translate its value.

    translate: raises ValueError with the allowed values.
    """

    option: str
    translate: Callable[[str], str] = _same


ADOPTED: Mapping[str, Adopted] = {
    "NIM_SERVED_MODEL_NAME": Adopted("served_model_name"),
    "NIM_TENSOR_PARALLEL_SIZE": Adopted("tensor_parallel_size"),
    "NIM_MAX_MODEL_LEN": Adopted("max_model_len"),
    "NIM_MAX_IMAGES_PER_PROMPT": Adopted("max_images"),
    "NIM_SERVER_PORT": Adopted("port"),
    "NIM_LOG_LEVEL": Adopted("log_level", _level),
    "NIM_JSONL_LOGGING": Adopted("log_format", _json_or_text),
    "NIM_DISABLE_LOG_REQUESTS": Adopted("log_requests", _not_flag),
    "NIM_PEFT_SOURCE": Adopted("lora_source"),
    "NIM_PEFT_REFRESH_INTERVAL": Adopted("lora_refresh"),
    "NIM_MAX_GPU_LORAS": Adopted("max_loras"),
    "NIM_MAX_LORA_RANK": Adopted("max_lora_rank"),
    "NIM_ENABLE_KV_CACHE_REUSE": Adopted("prefix_cache", _flag),
    "NIM_CACHE_PATH": Adopted("cache_dir"),
    "NIM_ENABLE_OTEL": Adopted("otel", _flag),
    "NIM_OTEL_SERVICE_NAME": Adopted("otel_service_name"),
    "NIM_OTEL_EXPORTER_OTLP_ENDPOINT": Adopted("otlp_endpoint"),
}

# Known variables without effect, with the reason for the log and docs/settings.md.
IGNORED: Mapping[str, str] = {
    "NGC_API_KEY": "vlmserve downloads nothing from NGC; the hub's token is HF_TOKEN",
    "NIM_MAX_CPU_LORAS": "adapters in host memory are limited by bytes; see --lora-host-memory",
    "NIM_MODEL_PROFILE": "vlmserve has no profiles; choose the model by argument and options",
}


def adopt(environ: MutableMapping[str, str]) -> None:
    """Set the project's variable if only the documented one is set.

    An empty variable counts as not set. Raises VariableError.
    """
    for name, adopted in ADOPTED.items():
        value, own = environ.get(name, ""), variable_of(adopted.option)
        if not value or environ.get(own):
            continue
        try:
            environ[own] = adopted.translate(value)
        except ValueError as error:
            raise VariableError(f"{name} is {value!r}; it must be {error}") from error


def without_effect(environ: Mapping[str, str], options: Iterable[str]) -> list[str]:
    """A log line for each variable that looks like a setting but has no effect.

    options: the names of the command's parameters.
    """
    own = {variable_of(option) for option in options}
    lines = []
    for name in sorted(name for name in environ if environ[name]):
        is_unknown = name.startswith("NIM_") and name not in ADOPTED
        is_unknown |= name.startswith(PREFIX) and name not in own
        if name in IGNORED:
            lines.append(f"{name} is set and has no effect: {IGNORED[name]}")
        elif is_unknown:
            lines.append(f"{name} is set but unknown: it has no effect")
    return lines
