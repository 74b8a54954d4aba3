"""Whether a template reads a message's content as a string or as a list of parts.

Owns the answer, which it finds in jinja's syntax tree, as other servers' `auto` does. Knows nothing
of a template's meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jinja2 import nodes

# string: as one text. openai: as a list of parts. both: the template asks which of them it got.
ContentFormat = Literal["string", "openai", "both"]

# Filters that go through a list.
_LIST_FILTERS = frozenset({"first", "join", "last", "list", "map", "reject", "rejectattr", "select",
                           "selectattr"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class ContentFormats:
    """How contents are read. head: that of `messages[0]`, where most templates read the system
    message; turn: those of a loop over all messages. None: not read there.
    """

    head: ContentFormat | None
    turn: ContentFormat | None

    def of_role(self, role: str) -> ContentFormat:
        """The form of a message of the role."""
        first, second = (self.head, self.turn) if role == "system" else (self.turn, self.head)
        return first or second or "string"


@dataclass(slots=True)
class _Use:
    """What a template does with a content."""

    is_read: bool = False
    is_list: bool = False
    is_tested: bool = False

    @property
    def format(self) -> ContentFormat | None:
        if not self.is_read:
            return None
        if not self.is_list:
            return "string"
        return "both" if self.is_tested else "openai"


def content_formats(tree: nodes.Template) -> ContentFormats:
    """How a template reads contents, from its syntax tree."""
    head, turn = _Use(), _Use()
    aliases = _aliases(tree)

    def use_of(node: nodes.Node) -> _Use | None:
        if isinstance(node, nodes.Name) and node.name in aliases:
            node = aliases[node.name]
        if not _is_content(node):
            return None
        return head if _is_of_first(node) else turn

    for node in _content_nodes(tree, aliases):
        use = use_of(node)
        assert use is not None, "only contents are visited"
        use.is_read = True
    for listed in _listed(tree):
        if (use := use_of(listed)) is not None:
            use.is_list = True
    for test in tree.find_all(nodes.Test):
        if test.name == "string" and (use := use_of(test.node)) is not None:
            use.is_tested = True
    return ContentFormats(head.format, turn.format)


def _content_nodes(tree: nodes.Template, aliases: dict[str, nodes.Node]) -> Iterator[nodes.Node]:
    for kind in (nodes.Getattr, nodes.Getitem):
        yield from (node for node in tree.find_all(kind) if _is_content(node))
    yield from (node for node in tree.find_all(nodes.Name) if node.name in aliases)


def _listed(tree: nodes.Template) -> Iterator[nodes.Node]:
    """The expressions through which the template goes as through a list."""
    for loop in tree.find_all(nodes.For):
        yield _without_filters(loop.iter)
    for one in tree.find_all(nodes.Filter):
        if one.name in _LIST_FILTERS and one.node is not None:
            yield _without_filters(one.node)
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int):
            yield item.node


def _without_filters(node: nodes.Node) -> nodes.Node:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return node


def _aliases(tree: nodes.Template) -> dict[str, nodes.Node]:
    """Names that stand for a content: set to one, or parameters of macros that get one."""
    found: dict[str, nodes.Node] = {}
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name) and _is_content(assigned.node):
            found[assigned.target.name] = assigned.node
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            continue
        for parameter, given in zip(macro.args, call.args, strict=False):
            content = found.get(given.name) if isinstance(given, nodes.Name) else given
            if content is not None and _is_content(content):
                found[parameter.name] = content
    return found


def key_of(node: nodes.Node) -> str | None:
    """The name in `x.name` and `x['name']`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _is_content(node: nodes.Node) -> bool:
    return key_of(node) == "content"


def _is_of_first(node: nodes.Node) -> bool:
    """`messages[0].content`."""
    base = node.node if isinstance(node, nodes.Getattr | nodes.Getitem) else None
    return (
        isinstance(base, nodes.Getitem)
        and isinstance(base.arg, nodes.Const)
        and isinstance(base.arg.value, int)
    )
