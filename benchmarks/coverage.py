"""Is the analysis exact on other people's models, and how much of them may be zipped?

    python benchmarks/coverage.py                         # all zoos; resumable; writes docs/coverage.md
    python benchmarks/coverage.py --zoo transformers home-made --only 'BERT|GPT'

Every model runs in a process of its own, with a time and a memory limit, on random weights. Exact means that a random
legal relabelling of all spaces leaves the output as it is, in float64 unless the model is too large. Results are kept
as JSON, one file a model; a model that has one is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def measure(zoo: str, name: str) -> dict[str, Any]:
    """Trace, label, solve and check one model; shares of FLOPs and parameters by legality."""
    import torch
    from coverage_models import ZOOS

    import fxzip
    from fxzip.tracing import quiet_execution

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, sample = ZOOS[zoo]()[name]()
    moved_off(model)
    row: dict[str, Any] = {"zoo": zoo, "name": name, "parameters": sum(p.numel() for p in model.parameters())}
    row["variant"] = getattr(model, "variant", name)
    clock = time.process_time()
    try:
        program = fxzip.tracing.trace(model, sample)
    except fxzip.FxzipError as error:
        return {**row, "exact": False, "error": f"{type(error).__name__}: {error}"}
    row |= {"rung": program.rung, "trace_s": time.process_time() - clock, "nodes": len(program.module.graph.nodes)}
    row["failures"] = program.failures
    gc.collect()  # what tracing has left would else be looked at by the first stage that is timed
    with quiet_execution():
        seconds = []
        for _ in range(2):
            clock = time.process_time()
            program.module(*program.call.args, **program.call.kwargs)
            seconds.append(time.process_time() - clock)
        row["forward_s"] = min(seconds)
    clock = time.process_time()
    labelling = fxzip.analysis.label(program, fxzip.RULES)
    row["label_s"] = time.process_time() - clock
    clock = time.process_time()
    found = fxzip.analysis.solve(labelling)
    row["solve_s"] = time.process_time() - clock
    passes = Passes()
    clock = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, gap, pinned = fxzip.analysis.self_check(labelling)
            row |= {"exact": not pinned, "gap": gap}
        except fxzip.FxzipError as error:
            row |= {"exact": False, "error": str(error)}
    row |= {"check_s": time.process_time() - clock, "passes_s": passes.seconds}
    row["warnings"] = [str(w.message) for w in caught if issubclass(w.category, fxzip.FxzipWarning)]
    row["barriers"] = list(dict.fromkeys(b.reason for b in labelling.barriers))
    row["probed"] = list(dict.fromkeys(p.reason for p in labelling.probed))
    row |= {"labels": labelling.size, "behind": behind_barriers(program, labelling)}
    return {**row, **shares(program, labelling, found)}


def behind_barriers(program: Any, labelling: Any) -> float:
    """Share of FLOPs in calls without a rule and in what is computed from them."""
    import networkx as nx

    from fxzip.analysis.flops import flops_of
    from fxzip.partition.dependencies import dependencies

    graph, flops = dependencies(program), flops_of(program).by_node
    nodes = {b.node for b in labelling.barriers}
    nodes |= {other for node in nodes for other in nx.descendants(graph, node)}
    return sum(flops[node] for node in nodes) / max(sum(flops.values()), 1)


def moved_off(model: Any) -> None:
    """Parameters and normalisation statistics off their initial values, so that no branch is idle; eval mode."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def uniform(tensor: Any, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.is_floating_point():
                width = (3 / max(tensor[0].numel(), 1)) ** 0.5 if tensor.ndim > 1 else 0.3
                centre = 1 if tensor.ndim < 2 and not name.endswith("bias") else 0
                uniform(tensor, centre - width, centre + width)
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                uniform(tensor, 0.5, 1.5)
            elif name.endswith("running_mean"):
                uniform(tensor, -0.3, 0.3)
    model.eval()


class Passes:
    """CPU seconds of the forward passes inside the self-check."""

    def __init__(self) -> None:
        import torch

        self.seconds, original = 0.0, torch.func.functional_call

        def timed(*args: Any) -> Any:
            clock = time.process_time()
            try:
                return original(*args)
            finally:
                self.seconds += time.process_time() - clock

        torch.func.functional_call = timed


def shares(program: Any, labelling: Any, found: Any) -> dict[str, Any]:
    """Shares of parameters and FLOPs that may be zipped, may only be relabelled, or are pinned.

    A parameter counts by the features that it writes, a node's FLOPs by its parameters. FLOPs of nodes without
    parameters (products of activations) count by the features of their result.
    """
    from fxzip.analysis.flops import flops_of

    tensors = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    kinds = {name: _kinds(found, labelling.params[name].fields, name) for name in labelling.params}
    parameters = {name: p.numel() for name, p in program.module.named_parameters()}
    flops = {node: n for node, n in flops_of(program).by_node.items() if n}
    by_params, by_flops = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for name, count in parameters.items():
        _add(by_params, kinds.get(name, (0, 0, 1)), count)
    for node, count in flops.items():
        held = {name: tensors[name].numel() for name in labelling.touches[node] if tensors[name].ndim > 1}
        if held:
            for name, size in held.items():
                _add(by_flops, kinds[name], count * size / sum(held.values()))
        else:
            _add(by_flops, _kinds(found, labelling.fields.get(node, ()), None), count)
    names = ("zippable", "relabel", "pinned")
    return {
        "flops": dict(zip(names, _normed(by_flops), strict=True)),
        "params": dict(zip(names, _normed(by_params), strict=True)),
    }


def _kinds(found: Any, fields: Any, name: str | None) -> tuple[float, float, float]:
    """Shares of (zippable, relabel only, pinned) places among what a parameter writes, or a value holds."""
    runs = [labels for place, labels in enumerate(fields) if name is None or (name, place) not in found.consumed]
    best = (0.0, 0.0, 1.0)
    for labels in runs:
        space = found.layout(labels).space
        relabel = sum(int((space == s).sum()) for s in space.unique().tolist() if _only_relabelled(found, s))
        free = int((space >= 0).sum()) - relabel
        share = (free / len(space), relabel / len(space), 1 - (free + relabel) / len(space))
        best = min(best, share, key=lambda s: (s[2], s[1]))
    return best


def _only_relabelled(found: Any, space: int) -> bool:
    return space >= 0 and found.spaces[space].legality == "relabel only"


def _add(total: list[float], share: tuple[float, float, float], count: float) -> None:
    for i in range(3):
        total[i] += share[i] * count


def _normed(total: list[float]) -> list[float]:
    whole = sum(total)
    return [value / whole if whole else 0.0 for value in total]


def run_one(zoo: str, name: str, out: Path, seconds: int, gigabytes: int) -> dict[str, Any]:
    """One model in a process of its own; what goes wrong there is the result."""
    command = [sys.executable, __file__, "--measure", zoo, name]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30, gigabytes << 30))

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            row = json.loads(lines[-1])
        else:
            tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
            row = {"zoo": zoo, "name": name, "exact": False, "error": tail[0][:500]}
    except subprocess.TimeoutExpired:
        row = {"zoo": zoo, "name": name, "exact": False, "error": f"took more than {seconds} s"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(row, indent=1))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", nargs="+", default=["torchvision", "timm", "transformers", "home-made"])
    parser.add_argument("--only", default="", help="regular expression on the models' names")
    parser.add_argument("--again", action="store_true", help="run models that have a result, too")
    parser.add_argument("--results", type=Path, default=Path("results/coverage"))
    parser.add_argument("--table", type=Path, default=HERE.parent / "docs" / "coverage.md")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--gigabytes", type=int, default=12)
    parser.add_argument("--measure", nargs=2, metavar=("ZOO", "NAME"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        print(json.dumps(measure(*settings.measure)))
        return 0
    from coverage_models import ZOOS
    from coverage_page import page

    rows = []
    for zoo in settings.zoo:
        for name in ZOOS[zoo]():
            out = settings.results / zoo / f"{name}.json"
            if re.search(settings.only, name) and (settings.again or not out.exists()):
                row = run_one(zoo, name, out, settings.seconds, settings.gigabytes)
                state = f"{row['gap']:.0e}" if row.get("exact") else row.get("error", "inexact")[:150]
                print(f"{zoo:12} {name:40} {row.get('rung', ''):12} {state}", flush=True)
            if out.exists():
                rows.append(json.loads(out.read_text()))
    growth = settings.results / "growth.json"
    settings.table.write_text(page(rows, json.loads(growth.read_text()) if growth.exists() else ()))
    inexact = [row["name"] for row in rows if not row.get("exact")]
    print(f"{len(rows) - len(inexact)} of {len(rows)} exact; not: {', '.join(inexact) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
