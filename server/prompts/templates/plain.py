"""Whether a template's work is bounded by its input, so that it may run in the worker itself.

Owns the list of what a plain template may use; the published ones use no more. Its loops go through
what it was given, once, and through what an outer loop's item has; it builds no text that it keeps;
and it does not look into texts, so a placeholder may stand for each. Everything else runs in a
child (`child.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import nodes

from .content_format import key_of

_WORD = re.compile(r"[A-Za-z0-9_-]*")
_NODES: tuple[type[nodes.Node], ...] = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.Name,
    nodes.NSRef, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword,
    nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Concat, nodes.Sub, nodes.Mod,
    nodes.CondExpr, nodes.Call, nodes.Break, nodes.Continue,
)  # fmt: skip
_TESTS = frozenset({"boolean", "defined", "false", "iterable", "mapping", "none", "number",
                    "sequence", "string", "true", "undefined"})  # fmt: skip
_FILTERS = frozenset(
    {"count", "d", "default", "items", "length", "safe", "string", "tojson", "trim"}
)
_FUNCTIONS = frozenset({"namespace", "raise_exception", "strftime_now"})
_METHODS = frozenset({"get", "items", "keys", "strip", "values"})
# Of these a template may ask how many there are, and take one by its number.
_LISTS = frozenset({"custom_tools", "loop_messages", "messages", "tool_calls", "tools"})
_TEXTS = frozenset({"content", "text"})
MAX_DEPTH, MAX_LOOPS = 2, 32


def is_plain(tree: nodes.Template) -> bool:
    """Whether the template's work is linear in what it is given, and it only copies texts."""
    texts = _names_of_texts(tree)
    every = list(_all(tree))
    return (
        all(isinstance(node, _NODES) for node in every)
        and all(_is_plain_node(node, texts) for node in every)
        and sum(isinstance(node, nodes.For) for node in every) <= MAX_LOOPS
        and _has_plain_loops(tree, [])
    )


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _all(child)


def _is_plain_node(node: nodes.Node, texts: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return _is_plain_filter(node)
    if isinstance(node, nodes.Test):
        return node.name in _TESTS and not node.args
    if isinstance(node, nodes.Call):
        return _is_plain_call(node)
    if isinstance(node, nodes.Compare):
        return _is_plain_comparison(node, texts)
    if isinstance(node, nodes.Assign):
        return _is_plain_assignment(node)
    if isinstance(node, nodes.Getitem):
        return _is_plain_item(node)
    if isinstance(node, nodes.Mod | nodes.Sub):
        return _is_number(node.left) and isinstance(node.right, nodes.Const)
    return not isinstance(node, nodes.Getattr) or not node.attr.startswith("_")


def _is_plain_filter(node: nodes.Filter) -> bool:
    if node.name not in _FILTERS or node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if node.name in ("length", "count"):
        return node.node is not None and _is_list(node.node)
    if node.name == "tojson":
        return not node.args and all(
            one.key == "indent"
            and isinstance(one.value, nodes.Const)
            and one.value.value in range(9)
            for one in node.kwargs
        )
    return node.name in ("default", "d") or not (node.args or node.kwargs)


def _is_plain_call(node: nodes.Call) -> bool:
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if isinstance(node.node, nodes.Name):
        values = [one.value for one in node.kwargs]
        are_constant = all(isinstance(value, nodes.Const) for value in values)
        return node.node.name in _FUNCTIONS and are_constant
    if not isinstance(node.node, nodes.Getattr) or node.node.attr not in _METHODS or node.kwargs:
        return False
    return not node.args or (node.node.attr == "get" and all(map(_is_constant, node.args)))


def _is_plain_comparison(node: nodes.Compare, texts: set[str]) -> bool:
    """Of texts nothing is asked but whether they are empty."""
    sides = [node.expr, *(one.expr for one in node.ops)]
    if any(isinstance(side, nodes.Const) and side.value == "" for side in sides):
        return True
    if any(_is_text(side, texts) for side in sides):
        return False
    return all(
        not isinstance(side, nodes.Const)
        or not isinstance(side.value, str)
        or _WORD.fullmatch(side.value) is not None
        for side in sides
    )


def _is_plain_assignment(node: nodes.Assign) -> bool:
    """Nothing that is kept grows: a text is kept with constants around it, if any, and no list."""
    values = list(_all(node.node))
    if isinstance(node.target, nodes.NSRef):
        grows = (nodes.Add, nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict)
        return not any(isinstance(one, grows) for one in values)
    if not isinstance(node.target, nodes.Name):
        return False
    lists = [one for one in values if isinstance(one, nodes.List | nodes.Tuple | nodes.Dict)]
    sums = [one for one in values if isinstance(one, nodes.Add | nodes.Concat)]
    return all(map(_is_constant, lists)) and max(map(_num_variables, sums), default=0) <= 1


def _is_plain_item(node: nodes.Getitem) -> bool:
    """A number or a slice would cut a text."""
    if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return not node.arg.value.startswith("_")
    if isinstance(node.arg, nodes.Name):
        return True
    return _is_list(node.node)


def _has_plain_loops(node: nodes.Node, items: list[set[str]]) -> bool:
    """Inner loops go through a part of the outer loop's item, so that no text is read twice.

    items: for each outer loop the names that stand for its item, or for a part of it.
    """
    if isinstance(node, nodes.For):
        if node.recursive or len(items) >= MAX_DEPTH:
            return False
        if items and _root_of(node.iter) not in items[-1]:
            return False
        items = [*items, _names_of_item(node)]
    return all(_has_plain_loops(child, items) for child in node.iter_child_nodes())


def _names_of_item(loop: nodes.For) -> set[str]:
    """The names that stand for a loop's item or a part of it, whichever way the body takes."""
    names = {name.name for name in _all(loop.target) if isinstance(name, nodes.Name)}
    assigned = [
        (one.target.name, _root_of(one.node))
        for one in loop.find_all(nodes.Assign)
        if isinstance(one.target, nodes.Name)
    ]
    names |= {name for name, _ in assigned}
    while True:
        others = {name for name, root in assigned if name in names and root not in names}
        if not others:
            return names
        names -= others


def _root_of(node: nodes.Node) -> str | None:
    """`message` in `message.tool_calls[0].function | items`."""
    while not isinstance(node, nodes.Name):
        if isinstance(node, nodes.Call | nodes.Filter | nodes.Getattr | nodes.Getitem):
            if node.node is None:
                return None
            node = node.node
        else:
            return None
    return node.name


def _names_of_texts(tree: nodes.Template) -> set[str]:
    """Names that are set to a text, or to an item of one, anywhere."""
    names: set[str] = set()
    while True:
        found = {
            assigned.target.name
            for assigned in tree.find_all(nodes.Assign)
            if isinstance(assigned.target, nodes.Name) and _is_text(assigned.node, names)
        }
        if found <= names:
            return names
        names |= found


def _is_text(node: nodes.Node, names: set[str]) -> bool:
    """Whether the expression may be a client's text, or has one in it."""
    if key_of(node) in ("role", "type"):
        return False
    return any(
        key_of(one) in _TEXTS or (isinstance(one, nodes.Name) and one.name in names)
        for one in _all(node)
    )


def _is_list(node: nodes.Node) -> bool:
    return (isinstance(node, nodes.Name) and node.name in _LISTS) or key_of(node) in _LISTS


def _is_number(node: nodes.Node) -> bool:
    is_length = isinstance(node, nodes.Filter) and node.name in ("length", "count")
    return is_length or (key_of(node) in ("index", "index0", "length"))


def _is_constant(node: nodes.Node) -> bool:
    return not any(isinstance(one, nodes.Name | nodes.Call | nodes.Filter) for one in _all(node))


def _num_variables(node: nodes.Node) -> int:
    """How many parts of a sum are no constants."""
    if isinstance(node, nodes.Add):
        return _num_variables(node.left) + _num_variables(node.right)
    if isinstance(node, nodes.Concat):
        return sum(map(_num_variables, node.nodes))
    return 0 if _is_constant(node) else 1
