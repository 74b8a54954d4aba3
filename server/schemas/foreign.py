"""Fields that clients of other servers send and that change nothing here at their usual values.

Owns the list. A field at one of its neutral values counts as absent. At any other value it is an
unknown field like any other: dropped and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FLAG = (False, True)
# Stands for every value: the field only names or routes the request.
ANY = object()

# What vLLM, SGLang, their routers and their benchmarks send. Values: what they mean here anyway.
FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "data_parallel_rank": (),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "guided_decoding_backend": (ANY,),
    "guided_whitespace_pattern": (),
    "include_reasoning": _FLAG,
    "input_ids": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": ("",),
    "mm_processor_kwargs": ({},),
    "request_id": (ANY,),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "rid": (ANY,),
    "separate_reasoning": _FLAG,
    "session_params": ({},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": _FLAG,
    "stop_regex": ("", []),
    "stream_reasoning": _FLAG,
    "thinking": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

# Never dropped: without it the model would read another prompt than the client means, and with it
# a client could run code in the server.
REJECTED: Mapping[str, str] = {
    "chat_template": "the server's own template is used. Leave it out",
}


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """True if the value changes nothing. neutral: the values that FOREIGN lists for the field."""
    return any(
        one is ANY or (type(one) is type(value) and one == value) or _is_same_number(one, value)
        for one in neutral
    )


def _is_same_number(one: Any, value: Any) -> bool:
    is_number = type(one) is int and type(value) in (int, float)
    return is_number and one == value
