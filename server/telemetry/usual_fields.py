"""The values of the label `field` of vlmserve_ignored_fields: usual names of other servers.

Clients of other servers send these fields, and this server drops them. A name from a client must
never become a label, so only these do.
"""

from __future__ import annotations

USUAL_FOREIGN_FIELDS = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "best_of",
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "cache_control", "cache_salt",
        "chat_template", "chat_template_kwargs", "continue_final_message", "custom_logit_processor",
        "custom_params", "data_parallel_rank", "detail", "detokenize", "documents",
        "early_stopping", "ebnf", "echo", "enable_thinking", "extra_body", "extra_key",
        "frequency_penalty", "guided_decoding_backend", "guided_whitespace_pattern", "ignore_eos",
        "images_config", "include_reasoning", "include_stop_str_in_output", "input_ids",
        "kv_transfer_params", "length_penalty", "logit_bias", "logits_processors",
        "logprob_token_ids", "logprobs", "lora_path", "media_io_kwargs", "min_p", "min_tokens",
        "mm_processor_kwargs", "n", "no_stop_trim", "presence_penalty", "priority", "prompt_embeds",
        "prompt_logprobs", "provider", "reasoning", "regex", "repetition_detection",
        "repetition_penalty", "request_id", "return_cached_tokens_details", "return_hidden_states",
        "return_meta_info", "return_prompt_token_ids", "return_routed_experts",
        "return_spec_tokens_details", "return_token_ids", "return_tokens_as_token_ids", "rid",
        "routed_experts_start_len", "seed", "separate_reasoning", "session_id", "session_params",
        "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_regex",
        "stop_token_ids", "stream_reasoning", "structured_outputs", "task", "thinking",
        "thinking_token_budget", "top_k", "truncate_prompt_tokens", "typical_p",
        "use_audio_in_video", "use_beam_search", "user", "uuid", "vllm_xargs",
    }
)  # fmt: skip
