"""Where a checkpoint's chat template is found: in transformers' order, whatever its form."""

import json

import pytest

from vlmserve.server.prompts.templates.sources import special_tokens, template_sources


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_places_are_tried_in_transformers_order(tmp_path):
    places = ["tokenizer_config.json", "chat_template.jinja", "chat_template.json",
              "processor_config.json"]  # fmt: skip
    assert template_sources(tmp_path) is None
    for name in places:
        content = f"in {name}"
        write(tmp_path, name, content if name.endswith("jinja") else {"chat_template": content})
        found = template_sources(tmp_path)
        assert (found.origin, found.default, found.tool_use) == (name, content, None)
    write(tmp_path, "own.jinja", "mine")
    assert template_sources(tmp_path, tmp_path / "own.jinja").default == "mine"


def test_lists_of_templates_have_a_default_and_one_for_tools(tmp_path):
    names = ("default", "tool_use", "rag")
    templates = [{"name": name, "template": f"{name}!"} for name in names]
    write(tmp_path, "tokenizer_config.json", {"chat_template": templates})
    found = template_sources(tmp_path)
    assert (found.default, found.tool_use) == ("default!", "tool_use!")
    write(tmp_path, "chat_template.jinja", "usual")
    write(tmp_path, "additional_chat_templates/tool_use.jinja", "tools")
    found = template_sources(tmp_path)
    assert (found.default, found.tool_use) == ("usual", "tools")


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    write(tmp_path, "chat_template.json", "{")
    with pytest.raises(ValueError, match=r"chat_template\.json is not JSON"):
        template_sources(tmp_path)
    write(tmp_path, "large.jinja", "x" * (1 << 20) + "x")
    with pytest.raises(ValueError, match=r"large\.jinja has over 1,048,576 bytes"):
        template_sources(tmp_path, tmp_path / "large.jinja")


def test_special_tokens_may_be_objects(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
