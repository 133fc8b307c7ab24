"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import fxzip

ROOT = Path(fxzip.__file__).parent
LAYERS = [  # a stage sees its own layer and those further down
    ["cli", "__main__", "demo", "evaluation"],
    ["__init__"],
    ["compare", "interpolation"],
    ["compiler", "side_by_side", "soup"],
    ["frontier", "widths", "by_need", "joint"],
    ["branches", "soundness"],
    ["elastic", "losses", "selfzip"],
    ["inspection", "report", "refit", "rewrite"],
    ["entering", "mixing", "handing"],
    ["zipped", "aligned", "basis", "parts"],
    ["plan", "weights"],
    ["matching"],
    ["agreement", "cuts"],
    ["shapes", "observe", "places", "readers", "calibration", "sources", "arguments"],
    ["trunk", "folding", "endings", "lifting"],
    ["unmatched", "pairing"],
    ["own"],
    ["align", "analysis", "stems", "own_inputs", "flops"],
    ["ops"],
    ["rules", "tracing"],
    ["batches"],
    [
        "moments",
        "inputs",
        "allowed",
        "naming",
        "containers",
        "structure",
        "table",
        "sizes",
        "shifts",
        "cholesky",
    ],
    ["figures"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Absolute names of the modules that a file imports."""
    here = ("fxzip", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield name if node.module or not node.level else base
            yield from (f"{name}.{alias.name}" for alias in node.names)


def stage(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "fxzip" and len(parts) > 1 and parts[1] in LEVEL else None


FILES = {path: path.relative_to(ROOT).with_suffix("").parts[0] for path in sorted(ROOT.rglob("*.py"))}


def test_every_stage_has_a_layer():
    assert set(FILES.values()) <= set(LEVEL)


def test_imports_go_one_way():
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path, own in FILES.items()
        for name in imports(path)
        if (other := stage(name)) is not None and LEVEL[other] < LEVEL[own]
    }
    assert not wrong


def test_matching_sees_moments_and_algebra_only():
    seen = {stage(n) for path, own in FILES.items() if own == "matching" for n in imports(path)} - {None}
    assert seen == {"matching", "moments", "cholesky", "errors"}


def users(library):
    return {own for path, own in FILES.items() if any(f"{n}.".startswith(f"{library}.") for n in imports(path))}


def test_libraries_stay_in_their_stages():
    assert users("networkx") <= {"analysis", "stems", "trunk", "cuts", "plan", "inspection", "matching"}
    assert users("scipy") <= {"matching", "analysis", "plan"}
    assert "rules" not in users("torch.fx")
    assert users("torchvision") | users("timm") | users("sklearn") <= {"demo", "evaluation"}
    assert users("matplotlib") == {"figures"}


def test_import_is_light():
    heavy = "{'torchvision', 'timm', 'matplotlib', 'sklearn', 'transformers'}"
    code = f"import sys, fxzip; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
