"""A zipped network as a file for other programs: ONNX, or a program of `torch.export`.

The file is compared with the network before it is handed over.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibration.rejections import describe
from ..errors import FxzipError, InputError, OptionError
from ..rewriting.module import ZippedModule
from ..tracing import difference, flat_inputs, modes_kept, plain_context, run_eager
from ..tracing.calls import Call, as_call, batch_size, leaves, with_batch
from ..tracing.option_values import checked

_SIZES = (1, 3, 7)


@plain_context()
@checked
def export(network: fx.GraphModule, path: str | Path, sample_input: Any = None) -> Path:
    """Write a zipped network, or one task of it (`single`), as `.onnx` or `.pt2`, for any batch size.

    The file is run at other batch sizes and compared with the network before it gets its name. Outputs are named after
    the tasks, or `head_0`, `head_1`, ...; where a head returns several tensors, `head_0_0`, `head_0_1`, ...

    >>> import fxzip
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> zipped = fxzip.compile_zip(a, b, torch.randn(16, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     program = torch.export.load(export(zipped, f"{folder}/zip.pt2"))
    >>> [y.shape[0] for y in program.module()(torch.randn(5, 4))]
    [5, 5]

    Args:
        network: in the mode in which it is to run; it is exported in eval mode.
        path: ends in `.onnx` (needs the extra `onnx`) or `.pt2`. A file that is there is replaced.
        sample_input: one batch of what the network takes. None: made up in the shapes and dtypes of the compile's; pass
            a batch where random numbers will not do.

    Returns:
        The path.

    Raises:
        OptionError: another suffix. InputError: packages are missing, or there is no sample. FxzipError: the file gives
        another result than the network.
    """
    target = Path(path)
    writers: dict[str, Callable[[fx.GraphModule, Call, Path], None]] = {".onnx": _onnx, ".pt2": _program}
    if target.suffix not in writers:
        raise OptionError(f"`path` must end in {' or '.join(writers)}; found {str(target)!r}.")
    call = inputs_of(network, sample_input)
    folder = tempfile.TemporaryDirectory(dir=target.absolute().parent)
    with modes_kept(network), folder as place:
        network.eval()
        written = Path(place) / target.name
        writers[target.suffix](network, call, written)
        for file in Path(place).iterdir():  # ONNX keeps large weights beside the graph
            if file != written:
                os.replace(file, target.parent / file.name)
        os.replace(written, target)
    return target


def output_names(network: fx.GraphModule) -> list[str]:
    """Names for the tensors that a network returns, in order.

    >>> import fxzip
    >>> output_names(fxzip.side_by_side([nn.Linear(2, 1), nn.Linear(2, 1)], torch.ones(1, 2)))
    ['head_0', 'head_1']
    """
    heads: tuple[Any, ...] = (network.graph.output_node().args[0],)
    tasks: tuple[str, ...] = ("output",)
    if isinstance(network, ZippedModule):
        heads = network.heads
        tasks = network.tasks or tuple(f"head_{k}" for k in range(len(heads)))
    names = []
    for head, task in zip(heads, tasks, strict=True):
        found: list[fx.Node] = []
        fx.node.map_arg(head, found.append)
        names += [task] if len(found) == 1 else [f"{task}_{i}" for i in range(len(found))]
    return names


def inputs_of(network: fx.GraphModule, sample_input: Any) -> Call:
    """A batch in the order of the network's placeholders: the one that is given, or one of the compile's shapes.

    Raises:
        InputError: the network does not take it, or none is given and no shapes are known.
    """
    if sample_input is None:
        return Call(tuple(flat_inputs(network, sample_of(network))), {})
    given = as_call(sample_input)
    try:
        call = Call(tuple(flat_inputs(network, given)), {})
        with modes_kept(network):
            run_eager(network.eval(), call)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"`sample_input` must be one batch of what the network takes; found {describe(given)}: {reason}"
        ) from error
    return call


def sample_of(network: fx.GraphModule) -> Call:
    """A batch in the shapes and dtypes with which the network was compiled, whole numbers in their range then.

    Raises:
        InputError: they are not known.
    """
    meta = getattr(network, "meta", {})
    known = meta.get("fxzip_inputs") or meta.get("fxzip_report", {}).get("inputs")
    if not known:
        raise InputError(
            "`sample_input` must be one batch of what the network takes; the shapes that it was compiled for are not "
            "known."
        )
    generator = torch.Generator().manual_seed(0)
    device = next((t.device for t in (*network.parameters(), *network.buffers())), None)
    values = []
    for entry in known:
        dtype = getattr(torch, entry["dtype"])
        value = torch.zeros(entry["shape"], dtype=dtype)
        if dtype.is_floating_point:
            value = torch.randn(entry["shape"], generator=generator).to(dtype)
        elif "range" in entry:  # numbers of tokens, masks: zeros alone may mean that nothing is there
            least, most = entry["range"]
            value = torch.randint(least, most + 1, entry["shape"], generator=generator).to(dtype)
        values.append(value.to(device))
    return Call(tuple(values), {})


def _dynamic(call: Call, batch: Any) -> tuple[dict[int, Any] | None, ...]:
    """The batch of every input, as `torch.export` wants it told."""
    size = batch_size(call)
    return tuple({0: batch} if value.ndim and value.shape[0] == size else None for value in call.args)


def _two_rows(call: Call) -> Call:
    """An exporter takes a batch of one for a constant."""
    return with_batch(call, 2) if batch_size(call) == 1 else call


def _program(network: fx.GraphModule, call: Call, path: Path) -> None:
    call = _two_rows(call)
    with torch.no_grad():
        program = torch.export.export(network, call.args, dynamic_shapes=(*_dynamic(call, torch.export.Dim("batch")),))
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    _check(network, call, lambda args: leaves([loaded(*args)]), "torch.export")


def _onnx(network: fx.GraphModule, call: Call, path: Path) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX needs the package `{error.name}`, which is not installed. Install it with "
            "`pip install 'fxzip[onnx]'`."
        ) from None
    call = _two_rows(call)
    inputs = [node.name for node in network.graph.nodes if node.op == "placeholder"][: len(call.args)]
    torch.onnx.export(
        network, call.args, path, dynamo=True, input_names=inputs, output_names=output_names(network), verbose=False,
        dynamic_shapes=(*_dynamic(call, torch.export.Dim("batch")),), external_data=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        given = {name: value.detach().cpu().numpy() for name, value in zip(inputs, args, strict=True) if name in names}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    _check(network, call, run, "onnxruntime")


def _check(network: nn.Module, call: Call, run: Callable[[Sequence[Tensor]], list[Tensor]], who: str) -> None:
    """Compare what was written with the network, at several batch sizes.

    Raises:
        FxzipError: it is another function.
    """
    sizes = _SIZES if batch_size(call) else (None,)
    for size in sizes:
        other = call if size is None else with_batch(call, size)
        expected = [value.cpu() for value in leaves([run_eager(network, other)])]
        reason = difference([value.cpu() for value in run(other.args)], expected)
        if reason is not None:
            raise FxzipError(
                f"The exported network must give what the zipped one gives; in {who}, on a batch of {size}, {reason}."
            )
