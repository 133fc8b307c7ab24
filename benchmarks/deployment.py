"""What `torch.compile`, bfloat16, int8 and ONNX make of a zip: accuracy and latency, next to one of its networks.

    python benchmarks/deployment.py --data DIR --checkpoints DIR

Int8 is quantised after training, by onnxruntime from the exported file, and sees the calibration images only. Latencies
are the least of interleaved runs, relative to one of the networks as it is, in eager float32. A processor without
bfloat16 units computes the same numbers, but takes many times as long: there each value is rounded to bfloat16 behind
its call, which sums in float32 as those units do, and no latency is given.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import evaluate, find_models, parser
from cifar_data import Images, draw_calibration, holdout_split, load_cifar, mixed_batches
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only
from training import Trained

import fxzip

Network = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Row:
    """One form of the zip. Accuracies from 0 to 1; latencies relative to the first network in eager float32.

    `alone`: latency of the first network in the same form. None: the form only shows what numbers come out.
    """

    form: str
    per_task: tuple[float, ...]
    joint: float
    latency: float | None
    alone: float | None


def eager(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    return network


def compiled(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    torch._dynamo.reset()  # the caches of the forms before
    return torch.compile(copy.deepcopy(network))


def bfloat16(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    half = copy.deepcopy(network).bfloat16()
    return lambda x: half(x.bfloat16())


class _Rounding(fx.Interpreter):
    """Rounds what each call gives to bfloat16, in float32 tensors."""

    def run_node(self, n: fx.Node) -> Any:
        return tree_map_only(Tensor, _rounded, super().run_node(n))


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float() if x.is_floating_point() else x


def bfloat16_rounded(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    graph = network if isinstance(network, fx.GraphModule) else fx.symbolic_trace(network)
    return _Rounding(copy.deepcopy(graph).bfloat16().float()).run


def bfloat16_compiled(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    half = torch.compile(copy.deepcopy(network).bfloat16())
    return lambda x: half(x.bfloat16())


def _session(path: Path) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)
    name = session.get_inputs()[0].name

    def forward(x: Tensor) -> Any:
        outputs = tuple(torch.from_numpy(y) for y in session.run(None, {name: x.numpy()}))
        return outputs if len(outputs) > 1 else outputs[0]

    return forward


def onnx(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    with tempfile.TemporaryDirectory() as folder:
        return _session(_exported(network, batches, Path(folder)))


def onnx_int8(network: nn.Module, batches: Sequence[Tensor]) -> Network:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: images.numpy()} for images in batches])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        path = _exported(network, batches, Path(folder))
        prepared, result = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        import onnxruntime

        name = onnxruntime.InferenceSession(str(prepared)).get_inputs()[0].name
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_static(
            str(prepared), str(result), Reader(name), quant_format=QuantFormat.QDQ,
            extra_options={"ActivationSymmetric": False}, reduce_range=True, **kinds,
        )  # fmt: skip
        return _session(result)


def _exported(network: nn.Module, batches: Sequence[Tensor], folder: Path) -> Path:
    path = folder / "network.onnx"
    if hasattr(network, "report"):
        fxzip.export(network, path, batches[0][:4])
    else:
        batch = torch.export.Dim("batch", min=1, max=4096)
        torch.onnx.export(
            network, (batches[0][:4],), str(path), dynamo=True, dynamic_shapes=({0: batch},), external_data=False
        )
    return path


BFLOAT16_UNITS = torch.ops.mkldnn._is_mkldnn_bf16_supported()
FORMS: Mapping[str, tuple[Callable[[nn.Module, Sequence[Tensor]], Network], Sequence[str]]] = {
    "eager float32": (eager, ()),
    "`torch.compile`": (compiled, ()),
    "onnxruntime": (onnx, ("onnx", "onnxscript", "onnxruntime")),
    "onnxruntime, int8": (onnx_int8, ("onnx", "onnxscript", "onnxruntime")),
    "bfloat16": (bfloat16 if BFLOAT16_UNITS else bfloat16_rounded, ()),
} | ({"bfloat16, `torch.compile`": (bfloat16_compiled, ())} if BFLOAT16_UNITS else {})


def least_seconds(networks: Sequence[Network], x: Tensor, rounds: int) -> list[float]:
    """The least time of each network on one batch, run in turn, each time another one first.

    What ran before leaves its weights and values in the caches, so no network may always come behind the same one.
    """
    best = [float("inf")] * len(networks)
    for done in range(rounds + 3):
        for place in random.sample(range(len(networks)), len(networks)):
            start = time.perf_counter()
            networks[place](x)
            if done > 2:
                best[place] = min(best[place], time.perf_counter() - start)
    return best


def rows(settings: argparse.Namespace) -> Iterator[Row]:
    cifar = load_cifar(settings.data, settings.cache)
    calibration, held = holdout_split(cifar.train)
    models = find_models(settings)
    images = cifar.test if settings.split == "test" else held
    if settings.test_images:
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: settings.test_images]]
    drawn = draw_calibration(calibration, [model.classes for model in models], settings.images, settings.seed)
    batches = mixed_batches(drawn, settings.batch_size, settings.seed)
    originals = [model.network for model in models]
    x = torch.cat(drawn)[: settings.latency_batch]
    zipped = fxzip.compile_zip(originals, x, data=batches, hold_out=False, progress=False)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about quantised networks
        for form, (make, needed) in FORMS.items():
            if settings.forms and form.replace("`", "") not in settings.forms:
                continue
            if any(importlib.util.find_spec(package) is None for package in needed):
                print(f"{form}: left out, it needs {' and '.join(needed)}", file=sys.stderr)
                continue
            network, alone = make(zipped, batches), make(originals[0], batches)
            accuracy = accuracy_of(network, models, images)
            if make is bfloat16_rounded:
                yield Row(form, accuracy.per_task, accuracy.joint, None, None)
                continue
            seconds = least_seconds([originals[0], network, alone], x, settings.rounds)
            yield Row(form, accuracy.per_task, accuracy.joint, seconds[1] / seconds[0], seconds[2] / seconds[0])


def accuracy_of(network: Network, models: Sequence[Trained], images: Images) -> Any:
    """With outputs in float32, whatever the form gives."""
    return evaluate(lambda x: [y.float() for y in network(x)], models, images, "cpu")


def main(argv: Sequence[str] | None = None) -> None:
    own = parser()
    own.description = __doc__
    own.add_argument("--rounds", type=int, default=40, help="runs of which the least counts")
    own.add_argument("--test-images", type=int, help="so many of them, drawn at random (default: all)")
    own.add_argument("--forms", nargs="*", metavar="FORM", help="these alone, as the table names them")
    settings = own.parse_args(argv)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    print(
        "| form | per task | mean | joint | latency | latency of one network in that form |\n|---|---|---|---|---|---|"
    )
    for row in rows(settings):
        each = " / ".join(f"{100 * value:.2f}" for value in row.per_task)
        mean = 100 * sum(row.per_task) / len(row.per_task)
        latencies = ("" if value is None else f"{value:.2f}" for value in (row.latency, row.alone))
        cells = (row.form, each, f"{mean:.2f}", f"{100 * row.joint:.2f}", *latencies)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
