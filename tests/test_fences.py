"""Who may import whom."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import fxzip

ROOT = Path(fxzip.__file__).parent
FLOORS = [  # a package sees those further down
    ["__main__"],
    ["__init__"],
    ["tools"],
    ["compiler"],
    ["widths", "refit"],
    ["calibration", "rewriting"],
    ["partition"],
    ["analysis", "ops"],
    ["tracing", "matching"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
PACKAGES = set(LEVEL) - {"__init__", "__main__", "ops", "errors"}


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


def package(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "fxzip" and len(parts) > 1 and parts[1] in LEVEL else None


FILES = {path: path.relative_to(ROOT).with_suffix("").parts[0] for path in sorted(ROOT.rglob("*.py"))}


def test_the_root_holds_packages_and_little_else():
    found = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert found == PACKAGES | {"errors.py", "ops.py", "__init__.py", "__main__.py", "py.typed"}
    assert len(found - {"py.typed"}) <= 14


def test_imports_go_down():
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path, own in FILES.items()
        for name in imports(path)
        if (other := package(name)) is not None and other != own and LEVEL[other] <= LEVEL[own]
    }
    assert not wrong


def test_there_are_no_more_floors_than_nine():
    """The longest chain of packages of which each imports the next."""
    seen = {own: {package(n) for path, o in FILES.items() if o == own for n in imports(path)} for own in PACKAGES}

    def height(name):
        return 1 + max((height(other) for other in seen[name] & PACKAGES - {name}), default=0)

    assert max(map(height, PACKAGES)) <= 9


def test_no_function_shadows_its_module():
    shadowed = set()
    for info in pkgutil.walk_packages(fxzip.__path__, "fxzip."):
        above, _, name = info.name.rpartition(".")
        if info.name != "fxzip.__main__":
            importlib.import_module(info.name)
            shadowed |= {info.name} - {getattr(getattr(sys.modules[above], name), "__name__", "")}
    assert not shadowed


def test_no_file_has_the_name_of_a_standard_module():
    assert not {path.stem for path in FILES} & sys.stdlib_module_names


def test_matching_sees_no_graphs():
    seen = {package(n) for path, own in FILES.items() if own == "matching" for n in imports(path)} - {None}
    assert seen == {"matching", "errors"}
    assert "matching" not in users("torch.fx")


def users(library):
    return {own for path, own in FILES.items() if any(f"{n}.".startswith(f"{library}.") for n in imports(path))}


def test_libraries_stay_in_their_packages():
    assert users("networkx") <= {"partition", "rewriting", "tools", "matching"}
    assert users("scipy") <= {"matching", "analysis", "partition"}
    assert users("torchvision") | users("timm") | users("sklearn") <= {"tools"}
    assert users("jsonargparse") | users("yaml") == {"tools"}
    assert users("matplotlib") == {"tools"}


def test_import_is_light():
    heavy = "{'torchvision', 'timm', 'matplotlib', 'sklearn', 'transformers', 'jsonargparse', 'datasets'}"
    code = f"import sys, fxzip; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_a_compile_leaves_the_compiler_of_pytorch_alone():
    """Its import takes seconds, and dispatch modes and torch.fx's own stack traces import it."""
    code = """if True:
        import sys, torch, fxzip
        from torch import nn
        a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
        fxzip.compile_zip(a, b, torch.randn(16, 4), data=[torch.randn(64, 4)] * 3, progress=False)
        print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


PUBLIC = {  # what users call by hand may take many options, all but the first few by keyword
    "compiler.pipeline.compile_zip",
    "tools.comparison.compare",
    "tools.comparison.sweep",
    "tools.interpolation.barrier",
    "tools.narrowing.narrow",
}


def crowded(path):
    """Names of functions of seven or more parameters, `self` and `cls` not counted."""

    def visit(node, above):
        for inner in ast.iter_child_nodes(node):
            name = [*above, inner.name] if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) else above
            if isinstance(inner, ast.FunctionDef):
                own = inner.args
                names = [arg.arg for arg in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
                names = names[1:] if names[:1] in (["self"], ["cls"]) else names
                if len(names) >= 7:
                    yield ".".join(name)
            yield from visit(inner, name)

    yield from visit(ast.parse(path.read_text()), path.relative_to(ROOT).with_suffix("").parts)


def test_only_public_entry_points_take_seven_parameters_or_more():
    found = {name for path in FILES for name in crowded(path)}
    assert found == PUBLIC
