"""The rules of the layout, read off the source: who may import what, and that importing is free.

Everything is found by walking the tree, so files that appear later are covered.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rayx"
SOURCES = sorted(PACKAGE.rglob("*.py"))
WRITTEN = [  # every text file of the repository that a person wrote
    path
    for path in sorted(ROOT.rglob("*"))
    if path.is_file()
    and path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".html", ""}
    and not any(
        part.startswith(".") and part != ".ci" or part in {"__pycache__", "build", "dist"}
        for part in path.relative_to(ROOT).parts
    )
    and not any(part.endswith(".egg-info") for part in path.parts)
    and path.relative_to(ROOT).parts[0] not in {"data", "runs", "results", "out"}
]

SIBLINGS = ("rayx.proxy", "rayx.sweep", "rayx.fit")  # import the spine, never each other
ABOVE = (  # wire others; nobody below imports them
    "rayx.cli",
    "rayx.report",
    "rayx.plots",
    "rayx.law_plots",
    "rayx.split.plots",
    "rayx.methods",
)
ONLY = {  # a library -> the parts that may import it
    "torch": ["rayx.proxy"],
    "ray.tune": ["rayx.sweep"],
    "ray.train": ["rayx.sweep"],
    "ray": ["rayx.sweep", "rayx.corpus"],
    "lightgbm": ["rayx.fit"],
    "matplotlib": ["rayx.plots", "rayx.law_plots", "rayx.split.plots", "rayx.report"],
    "typer": ["rayx.cli"],
}
FREE = {  # importing the key, in a fresh interpreter, loads none of these
    "rayx": ["torch", "ray", "lightgbm", "matplotlib", "pandas", "duckdb"],
    "rayx.store": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.corpus": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.choose": ["torch", "ray", "matplotlib"],
    "rayx.split": ["torch", "ray", "matplotlib"],
    "rayx.candidates": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.fit": ["torch", "ray", "matplotlib"],
    "rayx.policies": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.steering": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.likelihoods": ["torch", "ray", "lightgbm", "matplotlib"],
    "rayx.proxy": ["ray", "lightgbm", "matplotlib"],
    "rayx.cli": ["torch", "ray", "matplotlib"],
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that a source imports, at the top or inside functions, relative ones resolved.

    `from a import b` counts as `a.b`, since b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:  # importlib.import_module("...")
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """The rules of imports that a module breaks."""
    found = []
    for part in SIBLINGS:
        others = [other for other in SIBLINGS if other != part]
        if within(module, part):
            found += [
                f"{module} (in {part}) imports {name}"
                for name in imported
                if any(within(name, other) for other in (*others, *ABOVE))
            ]
    for library, allowed in ONLY.items():
        if not any(within(module, part) for part in allowed):
            found += [
                f"{module} imports {name}; only {', '.join(allowed)} may import {library}"
                for name in imported
                if within(name, library)
            ]
    return sorted(found)


def top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that an import runs: also inside if, try, with and class bodies."""
    result = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        result.append(node)
        for field in ("body", "orelse", "finalbody"):
            result += top_level(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            result += top_level(handler.body)
    return result


def effects(source: str) -> list[str]:
    """Statements at the top level that do something: bare calls, and changes of other modules."""
    found = []
    for node in top_level(ast.parse(source).body):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
            found.append(ast.unparse(node))
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [
            ast.unparse(node)
            for target in targets
            if isinstance(target, (ast.Attribute, ast.Subscript))
        ]
    return found


def test_tree_is_found():
    assert len(SOURCES) > 20
    assert PACKAGE / "sweep" / "run.py" in SOURCES
    assert ROOT / "pyproject.toml" in WRITTEN and Path(__file__) in WRITTEN


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_follow_the_layout(path):
    module = module_name(path)
    imported = imports(path.read_text(), module, is_package=path.name == "__init__.py")
    assert not violations(module, imported)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_has_no_effects(path):
    assert not effects(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_file_is_short(path):
    assert len(path.read_text().splitlines()) < 350, "split the file: one part, one file"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_the_command_line_prints(path):
    if within(module_name(path), "rayx.cli"):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if ast.unparse(c.func) == "print"], "use logging"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_module_has_a_name_and_a_docstring(path):
    banned = {"utils", "util", "common", "helpers", "helper", "core", "misc", "base"}
    assert not banned & set(path.relative_to(ROOT).with_suffix("").parts)
    source = path.read_text()
    assert not source or ast.get_docstring(ast.parse(source)), "say what the module is for"


@pytest.mark.parametrize("module", FREE)
def test_import_in_a_fresh_interpreter_loads_only_what_it_needs(module):
    path = ROOT.joinpath(*module.split("."))
    if not path.is_dir() and not path.with_suffix(".py").exists():
        pytest.fail(f"{module} is gone: take it out of FREE, or name what replaced it")
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not set(FREE[module]) & set(done.stdout.split())
    assert not done.stderr


def test_no_file_names_a_package_index():
    hosts = re.compile("|".join([r"pypi\." + "org", "python" + r"hosted\.org", "index" + "-url"]))
    assert not [path for path in WRITTEN if hosts.search(path.read_text(errors="replace"))]


# The checks themselves can fail --------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rayx.fit.laws", "import torch"),
        ("rayx.fit.laws", "from rayx.proxy.train import train_pack"),
        ("rayx.fit.laws", "from rayx import sweep"),
        ("rayx.fit", "from ..proxy import model"),
        ("rayx.sweep.run", "def f():\n    from rayx.proxy import train_pack"),
        ("rayx.proxy.train", "import importlib\nimportlib.import_module('rayx.sweep')"),
        ("rayx.proxy.train", "from ray import train"),
        ("rayx.corpus.build", "from ray import tune"),
        ("rayx.store", "import ray"),
        ("rayx.choose", "import torch.nn as nn"),
        ("rayx.choose", "import lightgbm"),
        ("rayx.fit.table", "from rayx import plots"),
    ],
)
def test_layering_violation_is_found(module, source):
    assert violations(module, imports(source, module, is_package=module == "rayx.fit"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rayx.sweep.run", "from ray import tune\nfrom rayx.store import Store"),
        ("rayx.corpus.build", "import ray\nimport ray.data"),
        ("rayx.proxy.train", "import torch\nfrom rayx.proxy import model"),
        ("rayx.fit.laws", "from . import table\nimport lightgbm"),
        ("rayx.training", "from rayx.sweepstakes import x\nimport raycast"),
    ],
)
def test_layering_what_is_allowed_passes(module, source):
    assert not violations(module, imports(source, module))


@pytest.mark.parametrize(
    "source",
    [
        "import logging\nlogging.basicConfig()",
        "import random\nrandom.seed(1)",
        "import os\nos.environ['A'] = 'b'",
        "import torch\ntorch.backends.x = True",
        "if True:\n    print(1)",
        "try:\n    f()\nexcept E:\n    pass",
        "class A:\n    print(1)",
    ],
)
def test_effect_of_import_is_found(source):
    assert effects(source)


def test_definitions_are_no_effect_of_import():
    assert not effects(
        "'''doc'''\nx = f(1)\ndef g():\n    h()\nclass A:\n    y = 1\n    @p\n    def z(self): q()"
    )
