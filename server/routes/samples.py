"""Examples of the API's document: the documented samples, and a few of what else there is.

Owns nothing but these values: tests compare the samples with the reference's own files. A
server's document carries its own model's name in them.
"""

from __future__ import annotations

from ..schemas.anthropic.answers import MessageAnswer
from ..schemas.llama_stack.answers import (
    OldStackModel,
    StackCompletion,
    StackModelList,
    old_stack_model_card,
    stack_model_card,
)
from ..schemas.model_answers import ModelList, model_card
from ..schemas.moderation.verdicts import Moderation
from ..schemas.openai.chat_answers import ChatCompletion
from ..schemas.openai.completion_answers import TextCompletion
from ..schemas.openai.response_answers import Response
from ..schemas.service_answers import PlaygroundInfo, Rendering

MODEL = "meta/llama-3.2-11b-vision-instruct"
PICTURE = (
    "https://upload.wikimedia.org/wikipedia/commons/thumb/d/dd/"
    "Gfp-wisconsin-madison-the-nature-boardwalk.jpg/"
    "2560px-Gfp-wisconsin-madison-the-nature-boardwalk.jpg"
)
QUESTION = "What is in this image?"
ANSWER = "This image shows a boardwalk in a field of tall grass. ..."

CHAT_REQUEST = {
    "model": MODEL,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": QUESTION},
                {"type": "image_url", "image_url": {"url": PICTURE}},
            ],
        }
    ],
    "max_tokens": 256,
}

STREAMED_REQUEST = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is a boardwalk?"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
}

TOOLS_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                },
            },
        }
    ],
    "tool_choice": "auto",
}

FORM_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name a colour."}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "colour",
            "schema": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "blue"]}},
                "required": ["colour"],
            },
        },
    },
    "logprobs": True,
    "top_logprobs": 2,
}

CHAT_COMPLETION: ChatCompletion = {
    "id": "chat-8c5f5115fa464ab593963d5764498350",
    "object": "chat.completion",
    "created": 1729020253,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens": 17, "total_tokens": 138, "completion_tokens": 121},
    "prompt_logprobs": None,
}

TEXT_COMPLETION: TextCompletion = {
    "id": "cmpl-8c5f5115fa464ab593963d5764498350",
    "object": "text_completion",
    "created": 1729020253,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "text": " blue.",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "prompt_logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 4, "total_tokens": 7, "completion_tokens": 3},
}

STACK_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": [{"image": {"uri": PICTURE}}, QUESTION]}],
}

STREAMED_STACK_REQUEST = {
    "model_id": MODEL,
    "messages": [{"role": "user", "content": "What is a boardwalk?"}],
    "sampling_params": {"strategy": {"type": "top_p", "temperature": 0.7, "top_p": 0.9}},
    "stream": True,
}

STACK_COMPLETION: StackCompletion = {
    "completion_message": {"role": "assistant", "content": ANSWER, "stop_reason": "end_of_turn"},
    "logprobs": None,
}

MESSAGES_REQUEST = {
    "model": MODEL,
    "max_tokens": 256,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "url", "url": PICTURE}},
                {"type": "text", "text": QUESTION},
            ],
        }
    ],
}

MESSAGES_TOOLS_REQUEST = {
    "model": MODEL,
    "max_tokens": 256,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [
        {
            "name": "get_weather",
            "description": "The weather of a city.",
            "input_schema": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        }
    ],
    "tool_choice": {"type": "any"},
}

COUNT_TOKENS_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
}

MESSAGE: MessageAnswer = {
    "id": "msg_8c5f5115fa464ab593963d5764498350",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [{"type": "text", "text": ANSWER, "citations": None}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 17,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 121,
    },
}

RESPONSES_REQUEST = {
    "model": MODEL,
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": PICTURE},
                {"type": "input_text", "text": QUESTION},
            ],
        }
    ],
    "max_output_tokens": 256,
    "store": False,
}

STREAMED_RESPONSES_REQUEST = {
    "model": MODEL,
    "instructions": "You are brief.",
    "input": "What is a boardwalk?",
    "stream": True,
}

RESPONSE: Response = {
    "id": "resp_8c5f5115fa464ab593963d5764498350",
    "object": "response",
    "created_at": 1729020253,
    "status": "completed",
    "background": False,
    "completed_at": 1729020254,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": 256,
    "max_tool_calls": None,
    "metadata": {},
    "model": MODEL,
    "output": [
        {
            "id": "msg_8c5f5115fa464ab593963d5764498351",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 17,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 121,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 138,
    },
    "user": None,
}

MODEL_LIST: ModelList = {
    "object": "list",
    "data": [model_card(MODEL, MODEL, 1724796510, 131072)],
}

OLD_STACK_MODEL: OldStackModel = old_stack_model_card(MODEL, MODEL, 131_072)
STACK_MODEL_LIST: StackModelList = {"data": [stack_model_card(MODEL, MODEL, 131_072)]}

MODERATION: Moderation = {
    "id": "modr-0d9cbdc0a3a4447f8b7ea4a3a9b9cf3c",
    "model": MODEL,
    "results": [
        {
            "flagged": True,
            "categories": {"Violent Crimes": True, "Privacy": False},
            "category_scores": {"Violent Crimes": 0.98, "Privacy": 0.0},
            "category_applied_input_types": {"Violent Crimes": ["text"], "Privacy": ["text"]},
        }
    ],
}

RENDERED_IDS = [
    *(128000, 128006, 882, 128007, 271, 128256, 3923, 374, 304, 420, 2217, 30),
    *(128009, 128006, 78191, 128007, 271),
]
RENDERING: Rendering = {
    "object": "rendering",
    "model": MODEL,
    "format": "chat_template",
    "reason": None,
    "chat_template": "chat_template.jinja",
    "content_format": "both",
    "token_ids": RENDERED_IDS,
    "features": {
        "mm_hashes": {"image": ["17c25d9aead2914d"]},
        "mm_placeholders": {"image": [{"offset": 5, "length": 1}]},
    },
    "prompts": [
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What is"
            " in this image?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "token_ids": RENDERED_IDS,
            "images": [
                {"position": 5, "num_tokens": 1, "num_tiles": 2, "digest": "17c25d9aead2914d"}
            ],
        }
    ],
}

PLAYGROUND_INFO: PlaygroundInfo = {
    "version": "0.1.0",
    "is_bundled_model": False,
    "max_model_len": 131_072,
    "tile_size": 560,
    "max_image_tiles": 4,
    "max_images": 16,
    "max_image_bytes": 20_971_520,
    "max_request_bytes": 67_108_864,
    "max_pixels": 25_000_000,
    "max_side": 16_384,
    "max_body_bytes": 67_108_864,
}
