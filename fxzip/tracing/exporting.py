"""The last rung: `torch.export` with a dynamic batch, brought to the form that the other rungs give.

That is: one placeholder for each argument, the model's own parameters under their own names, the output in its own
structure, no guards.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._functorch.vmap
import torch.fx.traceback
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from .calls import Call
from .containers import Part, flatten, is_plain, is_tensor
from .guards import form_of_argument, guard_rank, is_trivial, require
from .structure import Rebuild, Structure, notation
from .symbolic import bind, left_out
from .threads import only_here, without_warnings
from .ways import entered

_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Position of the submodule among the arguments."""


def trace_export(root: nn.Module, call: Call, dynamic: Sequence[tuple[int, ...]]) -> fx.GraphModule:
    """The exported graph of the root; `call` should have a batch of at least 2, because export fixes sizes of 1.

    >>> module = trace_export(nn.Linear(3, 4), Call((torch.ones(2, 3),), {}), [(0,)])
    >>> module(torch.ones(5, 3)).shape
    torch.Size([5, 4])
    """
    given, arguments = flatten((call.args, call.kwargs))
    returned: list[Structure] = []
    shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) or None for axes in dynamic),)
    with without_warnings(), _compiling_here(), _flat_forward(root, arguments, returned):
        exported = torch.export.export(root, tuple(given), dynamic_shapes=shapes, strict=False)
        if _transforms(exported.graph):
            exported = exported.run_decompositions({})  # `vmap` and its like become the calls that they stand for
    if _transforms(exported.graph):
        raise NotImplementedError(f"`{_transforms(exported.graph)}` has no counterpart in calls on plain tensors")
    module = exported.module(check_guards=False)
    graph = module.graph
    inline_regions(module, graph)
    _by_shape(graph)
    leaves = _own_placeholders(root, graph, call)
    _guard_sizes(graph, leaves, given, dynamic, getattr(exported, "_guards_code", ()))
    _own_output(graph, returned[-1])
    graph.set_codegen(CodeGen())
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    attributes = {
        str(node.target): _attribute(root, module, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    return fx.GraphModule(attributes, graph, class_name="GraphModule")


def _transforms(graph: fx.Graph) -> str:
    """A node that enters or leaves a transform of `torch.func`, "" if there is none. Such a graph cannot be run in
    parts: whoever stops in the middle leaves the process inside of the transform."""
    kinds = ((node, str(getattr(node.target, "__module__", ""))) for node in graph.nodes if node.op == "call_function")
    return next((node.name for node, kind in kinds if kind.startswith("torch._functorch")), "")


@contextmanager
def _compiling_here() -> Iterator[None]:
    """While `torch.export` runs, `torch.compiler.is_compiling()` is true in all threads; here in this one only. What
    other threads run meanwhile notes nothing in the metadata of the trace."""
    with ExitStack() as stack:
        for name in ("is_compiling", "is_exporting"):
            original = getattr(torch.compiler, name)
            others = functools.wraps(original)(functools.partial(bool, original()))
            here = only_here(inspect.unwrap(original), others)
            stack.enter_context(mock.patch.object(torch.compiler, name, here))
        for name in ("set_current_meta", "annotate"):
            noting = getattr(fx.traceback, name, None)
            if noting is not None:
                elsewhere = functools.wraps(noting)(lambda *_args, **_options: nullcontext())
                stack.enter_context(mock.patch.object(fx.traceback, name, only_here(noting, elsewhere)))
        for name, own in (("_add_batch_dim", _mapped_first), ("_remove_batch_dim", _moved_back)):
            original = getattr(torch._functorch.vmap, name)
            here = only_here(functools.partial(own, original), original)
            stack.enter_context(mock.patch.object(torch._functorch.vmap, name, here))
        yield


def _mapped_first(add: Callable[..., Tensor], value: Tensor, axis: int, level: int) -> Tensor:
    """Enter a `vmap` with the mapped axis in front: `torch.export` loses track of most calls where it is elsewhere."""
    return add(value.movedim(axis, 0) if axis else value, 0, level)


def _moved_back(remove: Callable[..., Tensor], value: Tensor, level: int, size: int, axis: int) -> Tensor:
    """Leave a `vmap` with the mapped axis in front, for the same reason, and put it where `out_dims` says."""
    found = remove(value, level, size, 0)
    return found.movedim(0, axis) if axis else found


def _attribute(root: nn.Module, module: nn.Module, target: str) -> Any:
    """The root's own tensor if it has one of that name: the same object as before, tied if it was tied."""
    for owner in (root, module):
        try:
            value = operator.attrgetter(target)(owner)
        except AttributeError:
            continue
        if isinstance(value, Tensor) or owner is module:
            return value
    raise AttributeError(target)


def _by_shape(graph: fx.Graph) -> None:
    """Let views be what they are by shape, wherever their values lie: a kernel other than that which `torch.export` has
    seen, of attention say, may lay its result out in another way, which `view` refuses."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def inline_regions(module: nn.Module, graph: fx.Graph) -> None:
    """Copy the body of regions without gradient, or with autocast off, into the graph: they change nothing here."""
    for node in list(graph.nodes):
        position = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if position is None or (position == 4 and node.args[2] is not False):
            continue
        holder = node.args[position]
        body = getattr(module, holder.target)
        inline_regions(body, body.graph)
        inputs = iter(node.args[position + 1 :])
        env: dict[fx.Node, Any] = {}
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    env[inner] = next(inputs)
                elif inner.op != "output":
                    env[inner] = graph.node_copy(inner, env.__getitem__)
                    if inner.op == "get_attr":
                        env[inner].target = f"{holder.target}.{inner.target}"
        results = fx.node.map_arg(body.graph.output_node().args[0], env.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


@contextmanager
def _flat_forward(root: nn.Module, arguments: Structure, returned: list[Structure]) -> Iterator[None]:
    """Inside, the root takes the leaves of its arguments and returns those of its output, whose structure is noted:
    `torch.export` knows few containers."""
    inner = root.forward
    before = vars(root).get("forward")

    def forward(*given: Any) -> list[Any]:
        args, kwargs = arguments.build(given)
        found, structure = flatten(entered(inner, *args, **kwargs), _is_value)
        returned.append(structure)
        return found

    root.forward = forward
    try:
        yield
    finally:
        if before is None:
            del root.forward
        else:
            root.forward = before


def _is_value(value: Any) -> bool:
    """Whether it can be an output of an exported graph: a tensor or a size."""
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def _own_placeholders(root: nn.Module, graph: fx.Graph, call: Call) -> list[fx.Node]:
    """One placeholder for each argument, by its name, in the order of the signature. What the exported graph reads,
    leaf by leaf."""
    flat = [node for node in graph.nodes if node.op == "placeholder"]
    pieces, leaves = iter(flat), list[fx.Node]()
    bound, named = bind(root, call)
    optional = left_out(bound)
    given = dict(zip(named, call.args, strict=False)) | call.kwargs  # in the order in which they were flattened
    with graph.inserting_before(flat[0]):
        wholes = {name: graph.placeholder(name) for name in named}
    with graph.inserting_before(flat[-1].next):
        for name, value in named.items():
            form = form_of_argument(value, is_tensor, optional=name in optional)
            if not is_trivial(form):
                graph.call_function(require, (wholes[name], form, name))
        for name, value in given.items():
            for leaf in _read(graph, wholes[name], value):
                next(pieces).replace_all_uses_with(leaf)
                leaves.append(leaf)
    for piece in flat:
        graph.erase_node(piece)
    return leaves


def _guard_sizes(
    graph: fx.Graph, leaves: Sequence[fx.Node], given: Sequence[Tensor], dynamic: Sequence[tuple[int, ...]],
    guards: Sequence[str],
) -> None:  # fmt: skip
    """Leave a guard behind for all that export took for granted: sizes along axes that are not dynamic, which are
    built into the graph, their number, and what it has found of those that are (`guards`, in its own notation)."""
    last = [node for node in graph.nodes if node.op == "placeholder" or node in leaves][-1]
    with graph.inserting_after(last):
        end = graph.call_function(operator.getitem, ((), slice(None)))  # what follows is put in front of it

    with graph.inserting_before(end):
        for leaf, value, axes in zip(leaves, given, dynamic, strict=True):
            guard_rank(graph, leaf, value.ndim)
            for axis in (axis for axis in range(value.ndim) if axis not in axes):
                size = graph.call_method("size", (leaf, axis))
                what = f"the size of axis {axis} of `{leaf.name}`"
                graph.call_function(require, (size, ("is", value.shape[axis]), what, "the input"))
        for guard in (part for text in guards for part in _conjuncts(ast.parse(text, mode="eval").body)):
            held = _expression(graph, leaves, guard)
            if isinstance(held, fx.Node):
                graph.call_function(require, (held, ("is", True), f"`{_readable(ast.unparse(guard))}`", "the input"))
    graph.erase_node(end)


def _conjuncts(tree: ast.expr) -> list[ast.expr]:
    """What is joined by `and`, as PyTorch 2.10 writes a range."""
    return tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]


_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def _expression(graph: fx.Graph, leaves: Sequence[fx.Node], tree: ast.expr) -> Any:
    """A guard of `torch.export`, `L['given'][0].size()[1] <= 8`, as nodes.

    Raises:
        NotImplementedError: it says something else of the input than how its sizes compare.
    """
    match tree:
        case ast.Constant(value=int(value)):
            return value
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=ast.Subscript(slice=ast.Constant(value=int(place))), attr="size")),
            slice=ast.Constant(value=int(axis)),
        ):
            return graph.call_method("size", (leaves[place], axis))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            sides = (_expression(graph, leaves, left), _expression(graph, leaves, right))
            if type(op) in _OPERATORS:
                return graph.call_function(_OPERATORS[type(op)], sides)
        case ast.Call(
            func=ast.Attribute(attr="sym_max" | "sym_min" as name) | ast.Name(id="max" | "min" as name), args=[*given]
        ):
            own, call = (_expression(graph, leaves, one) for one in given), f"sym_{name.removeprefix('sym_')}"
            return graph.call_function(getattr(torch, call), tuple(own))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return graph.call_function(operator.neg, (_expression(graph, leaves, operand),))
    raise NotImplementedError(f"`{_readable(ast.unparse(tree))}` of the sizes of the input is needed")


def _readable(guard: str) -> str:
    """A guard as messages write it."""
    return re.sub(r"L\['\w+'\]\[(\d+)\]", r"input \1", guard)


def _read(graph: fx.Graph, whole: fx.Node, value: Any) -> list[fx.Node]:
    """Nodes that take the leaves out of a container, in order."""
    if isinstance(value, Tensor):
        return [whole]
    found = flatten(value)[0]
    if not is_plain(value):
        return [graph.call_function(Part(place, len(found)), (whole,)) for place in range(len(found))]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [(key, item) for key, item in items if flatten(item)[0]]
    nodes = [(graph.call_function(operator.getitem, (whole, key)), item) for key, item in parts]
    return [leaf for node, item in nodes for leaf in _read(graph, node, item)]


def _own_output(graph: fx.Graph, structure: Structure) -> None:
    """The output in its own structure again; what torch.fx has no notation for is built by a call."""
    output = graph.output_node()

    def create(target: Rebuild, args: tuple[Any, ...]) -> fx.Node:
        with graph.inserting_before(output):
            return graph.call_function(target, args)

    output.args = (notation(structure, list(output.args[0]), create),)  # type: ignore[arg-type]
