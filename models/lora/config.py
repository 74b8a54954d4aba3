"""Reads adapter_config.json: the ranks and scales of layers, and which settings are refused.

The names of tensors in the weights decide which layers an adapter changes; `target_modules` may be
a list, a regular expression or all-linear. Imports no torch.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Annotated, Any

import msgspec
import regex

from ..errors import AdapterError
from .files import CONFIG

LORA = "LORA"
_MERGE = "merge the adapter into a checkpoint with peft's merge_and_unload"
# initializations that change the base model's weights too
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# settings with other weights or other arithmetic, by what they are called
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "target_parameters": "changed parameters (target_parameters)",
    "arrow_config": "an Arrow router (arrow_config)",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# the longest match of a regular expression from the file
_MATCH_SECONDS = 2.0

Rank = Annotated[int, msgspec.Meta(ge=1)]


class AdapterConfig(msgspec.Struct, frozen=True):
    """The settings that are read. Unknown settings are ignored."""

    peft_type: str
    r: Rank
    lora_alpha: float = 8
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    modules_to_save: list[str] | str | None = None
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its name in the trained model."""
        return self._of(self.rank_pattern, layer, self.r)

    def scale_of(self, layer: str) -> float:
        """What the layer's product of both matrices is multiplied with."""
        alpha = self._of(self.alpha_pattern, layer, self.lora_alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _of(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a name, as peft chooses."""
        return next(
            (value for key, value in (patterns or {}).items() if _ends(key, layer)), default
        )


def read_config(content: bytes) -> AdapterConfig:
    """The settings in the file's bytes. Raises AdapterError, one line, for what is not served."""
    try:
        settings = msgspec.json.decode(content)
        if not isinstance(settings, dict):
            raise AdapterError(f"{CONFIG} is not a JSON object")
        _check_kind(settings)
        config = msgspec.convert(settings, AdapterConfig, strict=True)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise AdapterError(f"{CONFIG}: {error}") from None
    _check_served(config)
    return config


def _check_kind(settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != LORA:
        raise AdapterError(f"{CONFIG}: peft_type {kind} is not served, only {LORA}; {_MERGE}")
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise AdapterError(f"{CONFIG}: {what} is not served; {_MERGE}")


def _check_served(config: AdapterConfig) -> None:
    if config.bias not in (None, "none"):
        raise AdapterError(f"{CONFIG}: bias {config.bias} is not served, only none; {_MERGE}")
    if config.modules_to_save:
        names = config.modules_to_save
        shown = names if isinstance(names, str) else ", ".join(names)
        raise AdapterError(
            f"{CONFIG}: modules_to_save ({shown}) is not served: whole layers would be copied for "
            f"each adapter; {_MERGE}"
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{CONFIG}: init_lora_weights {start} changed the base model's weights: save the "
            "adapter with peft's path_initial_model_for_weight_conversion, or merge it"
        )


def _ends(pattern: str, layer: str) -> bool:
    """Whether a pattern of peft matches the end of a layer's name. Raises AdapterError."""
    started = time.monotonic()
    try:
        return _compiled(pattern).match(layer, timeout=_MATCH_SECONDS) is not None
    except (regex.error, RecursionError) as error:
        raise AdapterError(f"{CONFIG}: the pattern {pattern!r} is invalid: {error}") from None
    except TimeoutError:
        passed = time.monotonic() - started
        raise AdapterError(
            f"{CONFIG}: the pattern {pattern!r} did not match in {passed:.0f} seconds"
        ) from None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    return regex.compile(rf"(.*\.)?({pattern})$")
