"""What can be refitted: linear calls with the bias and the BatchNorm behind them; scales and shifts of other calls.

Calls that share parameters make one unit and get one solution. What reads a parameter but cannot be refitted is named,
with the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ...partition.alignment import attribute
from .kernels import Kernel
from .parameter_uses import Extent, Survey, Use, extent, overlap, storage_of

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OWNERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a unit.

    Attributes:
        node, call, at: the ATen call, and the place of the activations among its arguments.
        end: node and number of the call that gives the result: `call`, or the one that adds the bias; `end_name`: its
            name.
        norm: the BatchNorm right behind a linear call, which takes part.
        name: of the call.
        shape: of its result.
        returned: the shape in which the node of `end` returns the result; None: it does not.
    """

    node: fx.Node
    call: int
    at: int
    end: tuple[fx.Node, int]
    end_name: str
    norm: fx.Node | None
    name: str
    shape: torch.Size
    returned: torch.Size | None

    @property
    def output(self) -> fx.Node:
        return self.norm or self.end[0]


@dataclass(frozen=True, eq=False)
class Unit:
    """Calls that are fitted together.

    Attributes:
        name: for the report.
        sites: the calls that share the parameters, in order.
        kernel: of a linear call.
        scale, shift: parameters that multiply or are added to features one by one.
        axis: along which these lie in the result.
        owner: a module that could get a bias.
    """

    name: str
    sites: tuple[Site, ...]
    kernel: Kernel | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    axis: int | None = None
    owner: nn.Module | None = None

    @property
    def norm(self) -> fx.Node | None:
        return self.sites[0].norm

    @property
    def inputs(self) -> int:
        """How many inputs each output of a linear call has; 0 for others."""
        return 0 if self.kernel is None else self.kernel.flat.shape[-1]


def called(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return attribute(net, str(node.target)) if node.op == "call_module" else None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def find_units(
    net: fx.GraphModule, found: Survey, nodes: Collection[fx.Node], *, still: bool = False
) -> tuple[list[Unit], dict[str, str]]:
    """The units whose calls all lie in `nodes`, in order of their first calls; and what is left, with the reason.

    `still`: those on values that no input has an influence on, too.
    """
    uses = {n: use for n, use in enumerate(found.uses) if use.node in nodes and (still or not use.still)}
    names = _names(net, uses)
    left = {names[number]: why for number, use in uses.items() if (why := _why_not(use))}
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, use in uses.items():
        if use.kernel is not None:
            groups[_key(use)].append(number)
    joined: dict[int, int] = {}
    norms: dict[int, fx.Node] = {}
    for numbers in groups.values():
        joined |= biases_apart(uses, numbers)
        norms |= _norms_behind(net, uses, numbers, nodes)
    absorbed = {*joined.values(), *(n for n, use in uses.items() if use.node in norms.values())}
    for number, use in uses.items():
        if use.kernel is None and (use.scale is not None or use.shift is not None):
            if number in absorbed:
                left.pop(names[number], None)
            elif not _why_not(use):
                groups[_key(use)].append(number)
    units = []
    for numbers in sorted(groups.values()):
        mine = {*numbers, *(joined[number] for number in numbers if number in joined)}
        other = _other_reader(found, mine, [uses[number] for number in mine])
        if other is not None:
            left |= {names[number]: f"`{other.name}` reads its parameters too" for number in numbers}
        else:
            units.append(_unit(net, uses, numbers, names[numbers[0]], joined, norms))
    return units, left


def _why_not(use: Use) -> str:
    if use.sums and use.kernel is None:
        return f"`{use.name}` is no linear call with a parameter as its weight"
    if use.kernel is None and (use.scale is not None or use.shift is not None) and use.returned is None:
        return f"the result of `{use.name}` is not what the node returns"
    if use.kernel is None and (use.scale is not None or use.shift is not None) and _axis(use) is None:
        return "it has no parameter per feature"
    return ""


def _axis(use: Use) -> int | None:
    """Along which axis of its result the parameters of a scale or a shift lie; None if not along one."""
    held = use.scale if use.scale is not None else use.shift
    along = [] if held is None or use.returned != use.shape else [a for a, n in enumerate(held.shape) if n > 1]
    if held is None or len(along) != 1:
        return None
    second = "batch_norm" in use.name or "group_norm" in use.name
    return 1 if second else len(use.shape) - held.ndim + along[0]


def _key(use: Use) -> Hashable:
    """Equal for calls that take the same parameters in the same way."""
    if use.kernel is None:
        return use.name, *(None if t is None else (extent(t), t.shape) for t in (use.scale, use.shift))
    k = use.kernel
    bias = None if k.bias is None else extent(k.bias)
    geometry = k.form, k.axes, k.groups, k.stride, k.padding, k.dilation, k.transposed
    return extent(k.weight), k.weight.shape, k.weight.stride(), bias, geometry


def _other_reader(found: Survey, mine: Collection[int], uses: Sequence[Use]) -> fx.Node | None:
    """A node that reads the parameters of a unit, but is not one of its calls."""
    held = [t for use in uses for t in (use.scale, use.shift) if t is not None]
    held += [t for use in uses if use.kernel for t in (use.kernel.weight, use.kernel.bias) if t is not None]
    own = [extent(t) for t in held]

    def reads(extents: Sequence[Extent]) -> bool:
        return any(overlap(a, b) for a in own for b in extents)

    others = [use.node for number, use in enumerate(found.uses) if number not in mine and reads(use.reads)]
    others += [node for node, read in found.static_reads if reads((read,))]
    return next(iter(others), None)


def biases_apart(uses: dict[int, Use], numbers: Sequence[int]) -> dict[int, int]:
    """For linear calls whose bias another call adds, the same at all of them: number of the one -> of the other."""
    result = {}
    for number, use in uses.items():
        if use.name != "add" or use.follows not in numbers or use.shift is None or use.shift.ndim != 1:
            continue  # a normalisation has a shift too
        source = uses[use.follows]
        assert source.kernel is not None
        last = source.kernel.axes == (len(source.shape) - 1,) and source.kernel.bias is None
        if (
            last
            and use.shape.numel() == source.shape.numel()
            and use.shape[-1:] == source.shape[-1:] == use.shift.shape
            and _leads_to(source.node, use.node)
        ):
            result[use.follows] = number
    same = {extent(shift) for number in result.values() if (shift := uses[number].shift) is not None}
    return result if len(result) == len(numbers) and len(same) == 1 else {}


def _leads_to(node: fx.Node, other: fx.Node) -> bool:
    """Whether all that a node returns goes to another, and there alone."""
    found: fx.Node | None = node
    while found is not None and found is not other:
        found = only_user(found)
    return found is other


def _norms_behind(
    net: fx.GraphModule, uses: dict[int, Use], numbers: Sequence[int], inside: Collection[fx.Node]
) -> dict[int, fx.Node]:
    """The BatchNorm that alone reads the result of a linear call, both called once.

    The call may be a module, a function, or the last call of a leaf module; its features must lie where those of the
    BatchNorm do.
    """
    use = uses[numbers[0]]
    behind = only_user(use.node)
    if len(numbers) > 1 or behind is None or behind not in inside or behind.op != "call_module":
        return {}
    if not _is_returned_as_features(use):
        return {}
    found = called(net, behind)
    twice = sum(node.op == "call_module" and node.target == behind.target for node in net.graph.nodes) > 1
    usable = isinstance(found, _NORMS) and found.running_mean is not None and found.affine and not twice
    return {numbers[0]: behind} if usable else {}


def _is_returned_as_features(use: Use) -> bool:
    """Whether a node returns the result of a linear call, with its outputs along axis 1, where a BatchNorm has its
    features."""
    assert use.kernel is not None
    if use.returned is None or len(use.kernel.axes) > 1:
        return False
    if use.returned == use.shape:
        return use.kernel.axes == (1,)
    return len(use.returned) == 2 and use.kernel.axes == (len(use.shape) - 1,)


def _unit(
    net: fx.GraphModule, uses: dict[int, Use], numbers: Sequence[int], name: str, joined: dict[int, int],
    norms: dict[int, fx.Node],
) -> Unit:  # fmt: skip
    """The unit made of these uses."""
    first = uses[numbers[0]]
    sites = []
    for number in numbers:
        use = uses[number]
        last = uses[joined.get(number, number)]
        sites.append(
            Site(
                use.node,
                use.call,
                use.at,
                (last.node, last.call),
                last.name,
                norms.get(number),
                use.name,
                use.shape,
                last.returned,
            )
        )
    if first.kernel is None:
        return Unit(name, tuple(sites), scale=first.scale, shift=first.shift, axis=_axis(first))
    kernel = first.kernel
    if numbers[0] in joined:
        kernel = replace(kernel, bias=uses[joined[numbers[0]]].shift)
    module = called(net, first.node)
    own = isinstance(module, _OWNERS) and all(uses[number].node.target == first.node.target for number in numbers)
    owner = module if own and kernel.bias is None and getattr(module, "bias", None) is None else None
    return Unit(name, tuple(sites), kernel, owner=owner)


def _names(net: fx.GraphModule, uses: dict[int, Use]) -> dict[int, str]:
    """A name for each use: its node's, with the parameter's where the node has several uses."""
    params = {storage_of(param): name for name, param in net.named_parameters()}
    times = Counter(use.node for use in uses.values())
    result = {}
    for number, use in uses.items():
        held = use.kernel.weight if use.kernel is not None else use.scale if use.scale is not None else use.shift
        storages = [read[0] for read in use.reads] if held is None else [storage_of(held)]
        own = next((params[storage] for storage in storages if storage in params), "")
        result[number] = use.node.name if times[use.node] == 1 else f"{use.node.name} ({own})"
    return result
