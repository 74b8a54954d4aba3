"""OpenAI's API, with the fields that vLLM and NIM add to it.

Read in this order: `chat_messages`, `template_options` and `chat` (requests), `answer_frames` and
`chat_answers`; `completions`, `completion_answers` and `logprob_columns`; `response_items`,
`responses`, `response_types` and `response_answers`; `tokenization`, which vLLM added.
"""
