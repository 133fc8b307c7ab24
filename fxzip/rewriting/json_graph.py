"""A network as JSON, and back: its graph, node by node, and the modules that it holds."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx, nn

from ..errors import LoadError, SaveError
from ..tracing.allowed import check_keywords, check_name, check_node
from ..tracing.containers import Part, flatten
from ..tracing.provenance import Provenance, mark, provenance_data
from ..tracing.structure import Rebuild
from .json_modules import modules_as_json, modules_of_json
from .json_structures import call_as_json, call_of_json, classes_of
from .json_values import decoded, encoded, fields
from .module import EmittedModule, ZippedModule
from .stored_names import Names, name_of
from .stored_tensors import TensorTable, tensors_again

_KINDS: dict[str, type[EmittedModule]] = {"ZippedModule": ZippedModule, "EmittedModule": EmittedModule}
_OPERATIONS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOTES: dict[str, Any] = {"part": str, "from": list, "writes": bool, "unmerge": bool}
_MOST = 500_000
"""How many nodes, modules or tensors a network may have."""


def network_as_json(network: EmittedModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The network as JSON has it, and the tensors that go into a file of their own, by key.

    Raises:
        SaveError: it holds something that cannot be stored.
    """
    table = TensorTable()
    modules = modules_as_json(network, table)
    nodes = [_node(node) for node in network.graph.nodes]
    data, notes = table.contents()
    kind = "ZippedModule" if isinstance(network, ZippedModule) else "EmittedModule"
    return {"kind": kind, **notes, "modules": modules, "nodes": nodes, "notes": _notes(network)}, data


def network_of_json(stored: Any, data: dict[str, Tensor], names: Names) -> EmittedModule:
    """The network.

    Raises:
        LoadError: the JSON is of no network, or names what a file may not name.
    """
    kind, entries, notes, modules, nodes, own = fields(
        stored, kind=str, tensors=list, data=dict, modules=list, nodes=list, notes=dict
    )
    if kind not in _KINDS:
        raise LoadError(f"there is no kind of network {kind[:80]!r}")
    if max(map(len, (entries, notes, modules, nodes))) > _MOST:
        raise LoadError(f"a network has at most {_MOST:,} nodes, modules and tensors")
    root = modules_of_json(modules, tensors_again(data, {"data": notes, "tensors": entries}), names)
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for entry in nodes:
        _add_node(graph, entry, root, made, names)
    if [node.op for node in graph.nodes][-1:] != ["output"] or len(graph.find_nodes(op="output")) != 1:
        raise LoadError("a graph ends with the one node that says what it returns")
    result = _KINDS[kind](root, graph)
    for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        vars(result)[held] = vars(root)[held]
    if isinstance(result, ZippedModule):
        result.heads  # noqa: B018 - a structure that is none raises
        if not all(isinstance(task, str) for task in result.tasks):
            raise LoadError("the names of tasks must be strings")
    if not all(key.startswith("fxzip_") and key != "fxzip_report" for key in own):
        raise LoadError("notes have the names of fxzip's")
    result.meta.update(decoded(own))
    return result


def own_names(network: EmittedModule) -> list[Any]:
    """Functions and classes that a network calls or holds, whoever defines them."""
    called = [node.target for node in network.graph.nodes if node.op == "call_function"]
    built = [own for call in called if type(call) is Rebuild for own in classes_of(call.structure)]
    for node in network.graph.nodes:
        passed = flatten((node.args, node.kwargs), lambda own: isinstance(own, fx.Node))[1]
        built += [own for own in classes_of(passed) if hasattr(own, "_fields")]  # named tuples
    called = [*built, *(own for own in called if type(own) not in (Part, Rebuild))]
    found: list[Any] = [type(module) for module in network.modules() if module is not network]
    for module in network.modules():
        found += [value for value in vars(module).values() if callable(value) and not isinstance(value, nn.Module)]
    return [own for own in dict.fromkeys([*called, *found]) if _has_name(own)]


def unlisted(own: list[Any]) -> list[str]:
    """Names of those that a file may not name by itself: `load` takes them where its caller trusts them."""
    return [".".join(name_of(called)) for called in own if not _is_listed(list(name_of(called)))]


def _is_listed(name: list[str]) -> bool:
    for find in (Names().function, Names().module, Names().container):
        try:
            find(name)
        except LoadError:
            continue
        return True
    return False


def _has_name(own: Any) -> bool:
    try:
        name_of(own)
    except SaveError:
        return False
    return True


def _notes(network: EmittedModule) -> dict[str, Any]:
    """What fxzip notes of a network, where it is plain; the report is a file of its own."""
    found = {}
    for key, value in network.meta.items():
        if isinstance(key, str) and key.startswith("fxzip_") and key != "fxzip_report":
            try:
                found[key] = encoded(value)
            except SaveError:  # what a stage keeps for the next one
                continue
    return found


def _node(node: fx.Node) -> dict[str, Any]:
    try:
        return {
            "op": node.op, "name": node.name,
            "target": node.target if isinstance(node.target, str) else call_as_json(node.target),
            "args": [encoded(value, _special) for value in node.args],
            "kwargs": {key: encoded(value, _special) for key, value in node.kwargs.items()},
            "notes": encoded(provenance_data(node)),
        }  # fmt: skip
    except SaveError as error:
        raise SaveError(f"Node `{node.name}` cannot be stored: {error}.") from error


def _special(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"$node": value.name}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"$named": [list(name_of(type(value))), [encoded(item, _special) for item in value]]}
    return None


def _add_node(graph: fx.Graph, entry: Any, root: nn.Module, made: dict[str, fx.Node], names: Names) -> None:
    op, name, target, args, kwargs, notes = fields(
        entry, op=str, name=str, target=(str, list, dict), args=list, kwargs=dict, notes=dict
    )

    def named_tuple(held: Any) -> Any:
        kind = names.container(held[0])
        if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
            raise LoadError(f"{held[0]!r:.80} is no named tuple")
        return kind(*decoded(held[1], reading))

    reading = {"$node": made.__getitem__, "$named": named_tuple}
    if op not in _OPERATIONS or not _NODE_NAME.fullmatch(name) or name in made:
        raise LoadError(f"there is no node {op[:80]!r} of the name {name[:80]!r}")
    if isinstance(target, str) is (op == "call_function"):
        raise LoadError(f"node {name!r} calls {target!r:.80}")
    called = target if isinstance(target, str) else call_of_json(target, names)
    given = tuple(decoded(args, reading))
    check_name(op, called)
    check_node(op, called, given)
    check_keywords(kwargs)
    if op in ("call_module", "get_attr"):
        _check_target(root, op, target)
    node = graph.create_node(op, called, given, decoded(kwargs, reading), name=name)
    if node.name != name:
        raise LoadError(f"no node can have the name {name!r}")
    made[name] = node
    own = decoded(notes)
    if any(type(value) is not _NOTES.get(key) for key, value in own.items()) or not all(
        isinstance(source, str) for source in own.get("from", [])
    ):
        raise LoadError(f"the notes of node {name!r} are none of fxzip's")
    if own:
        mark(node, Provenance.of_data(own))


def _check_target(root: nn.Module, op: str, target: str) -> None:
    """Whether a path leads to a module or tensor of the network, and nowhere else."""
    *above, last = target.split(".")
    module: nn.Module | None = root
    for step in above:
        module = None if module is None else module._modules.get(step)
    if module is None:
        found = None
    elif op == "call_module":
        found = module._modules.get(last)
    else:
        stores: tuple[Any, ...] = (module._parameters, module._buffers, vars(module))
        found = next((store[last] for store in stores if isinstance(store.get(last), Tensor)), None)
    if found is None:
        raise LoadError(f"the network holds no {target[:200]!r}")
