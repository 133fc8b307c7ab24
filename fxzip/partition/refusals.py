"""What is said where a trunk cannot go as far as was asked for, or cannot begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from .alignment import Alignment
from .node_names import cut_names


def beyond(until: str, node: fx.Node, alignment: Alignment, ends: Mapping[str, str], names: set[str]) -> str:
    """Why `until` cannot be reached, by the first node that is not shared, and how far the trunk can go."""
    parting = next((text for text in alignment.parting if text), "")
    reason = ends.get(node.name) or (
        f"the models part: the first {parting}" if parting else "what it needs is not shared"
    )
    last = [name for name in cut_names(list(node.graph.nodes)) if name in names]
    hint = f" The trunk can reach up to {last[-1]!r}." if last else ""
    needs = f"{until!r} needs node `{node.name}`, which is not shared"
    return f"`until` must lie in what the models share; {needs}: {reason}.{hint}"


def nothing_shared(alignment: Alignment, order: Sequence[fx.Node], ends: Mapping[str, str], names: set[str]) -> str:
    """Why nothing with weights is shared."""
    first = next((n for n in order if n.name not in names), None)
    parting = next((text for text in alignment.parting if text), "")
    if first is not None and first.name in ends:
        why = f"node `{first.name}` ends the trunk: {ends[first.name]}"
    elif parting:
        why = f"they part at the first node: the first {parting}"
        why += ". Make that alike in all models, share what lies behind it (`start=`), or nothing at all (`until=0`)"
    else:
        why = "no node with parameters lies before the cut"
    place = "`start`" if alignment.stems else "the input"
    return f"`compile_zip` needs models that agree from {place} on; {why}."


def too_early(until: str, order: Sequence[fx.Node], names: set[str], weighed: set[str]) -> str:
    """What to do where the name that the user gives lies in front of all weights; `weighed`: nodes that could be shared
    and depend on some."""
    last = next((node.name for node in reversed(order) if node.name in names), "the input")
    first = next((node.name for node in order if node.name in weighed), None)
    found = "none can be shared:" if first is None else f"the first place with some is `until={first!r}`. Or"
    return f" `until={until!r}` ends at node `{last}`; {found} share nothing at all, `until=0`."
