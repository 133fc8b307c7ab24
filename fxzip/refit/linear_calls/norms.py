"""The normalisations with statistics that a zipped network calls, inside leaf modules too."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _NormBase

from ...rewriting.module import ZippedModule, part_of


def norms_of(network: ZippedModule) -> dict[_NormBase, str]:
    """Those of trunk and heads by their paths, in order; stems are the models' own, and stay as they were."""
    result: dict[_NormBase, str] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and not part_of(node).startswith("stem "):
            for path, module in network.get_submodule(str(node.target)).named_modules():
                if isinstance(module, _NormBase) and module.running_mean is not None:
                    result.setdefault(module, f"{node.target}.{path}".rstrip("."))
    return result
