"""A chat template that cannot be used ends the start with one line, from a child."""

import pytest
from support.http_side import write_checkpoint

from vlmserve.server.cli.startup_checks import check_template
from vlmserve.server.settings import ServerSettings

UNUSABLE = {
    "a syntax error": ("{% if %}", "line 1: "),
    "an endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "longer than 1 s",
    ),
    "memory at compile time": ("{{ 'x' * 9999999999 }}", "memory"),
}


def settings_of(folder, **fields):
    return ServerSettings(model=str(folder), engine_socket="", served_model_names=["m"], **fields)


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_that_cannot_be_used_is_one_line_at_the_start(tmp_path, name):
    source, reason = UNUSABLE[name]
    folder = write_checkpoint(tmp_path / "model", source)
    with pytest.raises(ValueError, match=r"the chat template of chat_template\.jinja") as error:
        check_template(settings_of(folder))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    good = tmp_path / "good.jinja"
    good.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    check_template(settings_of(folder, chat_template=str(good)))


def test_templates_that_raise_or_are_missing_do_not_end_the_start(tmp_path):
    check_template(settings_of(write_checkpoint(tmp_path / "a", "{{ raise_exception('no') }}")))
    bare = write_checkpoint(tmp_path / "b", None)
    check_template(settings_of(bare))
    with pytest.raises(ValueError, match="--task moderation needs a chat template"):
        check_template(settings_of(bare, task="moderation"))
    with pytest.raises(ValueError, match=r"nowhere\.jinja cannot be read"):
        check_template(settings_of(tmp_path / "a", chat_template=str(tmp_path / "nowhere.jinja")))
