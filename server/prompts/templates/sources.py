"""Finds a checkpoint's chat templates and the special tokens that they may name.

Owns the order of the places, which is that of transformers: the processor's own files before the
tokenizer's configuration. Knows nothing of jinja.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN_OF_TEXT = "<|begin_of_text|>"
DEFAULT, TOOL_USE = "default", "tool_use"
# More named templates of a checkpoint.
ADDITIONAL = "additional_chat_templates"
# The published ones have 4 to 6 KB.
MAX_BYTES = 1 << 20
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclass(frozen=True, slots=True)
class TemplateSources:
    """The texts of a checkpoint's templates by their names, and the file they are from.

    default: for all conversations. tool_use: for those with tools, where the checkpoint has one.
    """

    origin: str
    default: str
    tool_use: str | None = None


def template_sources(folder: Path, file: Path | None = None) -> TemplateSources | None:
    """The checkpoint's templates; None if it has none. file: use this one instead.

    Raises ValueError, one line, if a file cannot be used.
    """
    if file is not None:
        return TemplateSources(file.name, _text_of(file))
    for find in (_in_processor_config, _in_legacy_json, _in_jinja_files, _in_tokenizer_config):
        found = find(folder)
        if found is not None:
            return found
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and its like by name; some checkpoints write them as objects."""
    config = read_json(folder / "tokenizer_config.json")
    legacy = read_json(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {"bos_token": BEGIN_OF_TEXT}
    for name in _SPECIAL_TOKENS:
        value = config.get(name, legacy.get(name))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty if there is no such file. Raises ValueError that names the file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains no JSON object")
    return content


def _in_processor_config(folder: Path) -> TemplateSources | None:
    path = folder / "processor_config.json"
    return _named(read_json(path).get("chat_template"), path.name)


def _in_legacy_json(folder: Path) -> TemplateSources | None:
    path = folder / "chat_template.json"
    return _named(read_json(path).get("chat_template"), path.name)


def _in_jinja_files(folder: Path) -> TemplateSources | None:
    path = folder / "chat_template.jinja"
    tool_use = folder / ADDITIONAL / f"{TOOL_USE}.jinja"
    if not path.exists():
        return None
    return TemplateSources(
        path.name, _text_of(path), _text_of(tool_use) if tool_use.exists() else None
    )


def _in_tokenizer_config(folder: Path) -> TemplateSources | None:
    path = folder / "tokenizer_config.json"
    return _named(read_json(path).get("chat_template"), path.name)


def _named(value: Any, origin: str) -> TemplateSources | None:
    """One template, or several by name: as an object, or as a list of name and template."""
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
    templates = {DEFAULT: value} if isinstance(value, str) else value
    if not isinstance(templates, dict):
        return None
    texts = {name: text for name, text in templates.items() if isinstance(text, str)}
    if DEFAULT not in texts:
        return None
    return TemplateSources(origin, texts[DEFAULT], texts.get(TOOL_USE))


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8: {error}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"the chat template {path} has over {MAX_BYTES:,} bytes")
    return text
