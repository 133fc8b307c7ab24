"""Whether what a file says of nodes and spaces is what a report says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LoadError

_NONE = type(None)
_SPACE: Mapping[str, tuple[type, ...]] = {
    "name": (str,), "size": (int,), "kept": (int,), "legality": (str,), "reason": (str,), "folded": (list,),
    "correlation": (int, float, _NONE),
}  # fmt: skip
_NARROWED: Mapping[str, tuple[type, ...]] = {"name": (str,), "size": (int,), "kept": (int,)}
_NODE: Mapping[str, tuple[type, ...]] = {
    "path": (str,), "shape": (list, _NONE), "plain": (bool,), "flops": (int,), "spaces": (list,), "narrowed": (list,),
    "stop": (dict, _NONE),
}  # fmt: skip


def check_facts(report: Mapping[str, Any]) -> None:
    """Raises a LoadError unless "nodes", "spaces" and "narrowed" hold what `node_facts` and `space_facts` give.

    Files of earlier versions have no "nodes", and spaces without "sizes" and "error".

    >>> check_facts({"spaces": [], "nodes": {}})
    """
    spaces, narrowed, nodes = (report.get(key) for key in ("spaces", "narrowed", "nodes"))
    for space in _all(spaces, list):
        _check(space, _SPACE)
        sizes, error = space.get("sizes", []), space.get("error")
        of_kind = _of(sizes, int) and _of(space["folded"], bool) and (error is None or _of(error, int, float, _NONE))
        _expect(of_kind and len(sizes) > 0 if "sizes" in space else of_kind, f"the space {space['name'][:80]!r}")
    most = []
    for own in _all(narrowed, list):
        for space in _all(own, list):
            _check(space, _NARROWED)
            _expect(type(space.get("error")) in (int, float, _NONE), f"the space {space['name'][:80]!r}")
        most.append(len(own))
    for name, node in _all(nodes, dict).items():
        _check(node, _NODE)
        stop = node["stop"]
        if stop is not None:
            _check(stop, {"kind": (str,), "reason": (str,)})
        known = _of(node["shape"] or [], int) and _of(node["spaces"], int) and _of(node["narrowed"], int)
        inside = known and all(0 <= n < len(spaces or ()) for n in node["spaces"])
        inside = inside and all(0 <= n < max(most, default=0) for n in node["narrowed"])
        _expect(inside, f"the node {str(name)[:80]!r}")


def _all(value: Any, kind: type) -> Any:
    """The value, or an empty one where there is none."""
    _expect(value is None or type(value) is kind, f"a {kind.__name__} of facts")
    return kind() if value is None else value


def _of(values: Any, *kinds: type) -> bool:
    return type(values) is list and all(type(value) in kinds for value in values)


def _check(value: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    _expect(type(value) is dict, "a fact")
    for key, kind in kinds.items():
        _expect(type(value.get(key, ...)) in kind, f"{key!r} of a node or space")


def _expect(true: bool, what: str) -> None:
    if not true:
        raise LoadError(f"{what} is not as a report has it")
