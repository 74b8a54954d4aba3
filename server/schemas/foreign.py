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

# What vLLM, SGLang, their routers and their benchmarks send to chat and text completions. Values:
# what they mean here anyway.
FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": _FLAG,
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
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "extra_key": (),
    "guided_decoding_backend": (ANY,),
    "guided_whitespace_pattern": (),
    "images_config": ({},),
    "include_reasoning": _FLAG,
    "input_ids": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "lora_path": ("",),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": ([],),
    "repetition_detection": ({},),
    "request_id": (ANY,),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_routed_experts": (False,),
    "return_spec_tokens_details": (False,),
    "rid": (ANY,),
    "routed_experts_start_len": (0,),
    "separate_reasoning": _FLAG,
    "session_id": (ANY,),
    "session_params": ({},),
    "spaces_between_special_tokens": _FLAG,
    "stop_regex": ("", []),
    "stream_reasoning": _FLAG,
    "task": (),
    "thinking": (),
    "thinking_token_budget": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "use_audio_in_video": (False,),
    "vllm_xargs": ({},),
}

# What chat and text completions honour, and the same clients send to every route.
FOREIGN_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    **FOREIGN,
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "no_stop_trim": (False,),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "return_prompt_token_ids": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "seed": (),
    "skip_special_tokens": (True,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "top_k": (-1, 0),
    "truncate_prompt_tokens": (0,),
    "user": (ANY,),
}

# Never dropped: without it the model would read another prompt than the client means, and with it
# a client could run code in the server.
REJECTED: Mapping[str, str] = {
    "chat_template": "the server's own template is used. Leave it out",
}


# A member of an object at one of these counts as absent.
EMPTY: tuple[Any, ...] = (None, False, [], {})


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """True if the value changes nothing. neutral: the values that do not, such as FOREIGN lists.

    An object is neutral if each of its members is empty, or as in a neutral object.
    """
    return any(one is ANY or _is_like(one, value) for one in neutral)


def _is_like(neutral: Any, value: Any) -> bool:
    if isinstance(neutral, dict) and isinstance(value, dict):
        return all(
            _is_empty(one) or (name in neutral and neutral[name] == one)
            for name, one in value.items()
        )
    is_same = type(neutral) is type(value) and neutral == value
    return is_same or _is_same_number(neutral, value)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict) and not value)


def _is_same_number(one: Any, value: Any) -> bool:
    is_number = type(one) is int and type(value) in (int, float)
    return is_number and one == value
