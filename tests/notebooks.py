"""Runs a notebook's cells in this process, as a kernel would: no kernel has to start for a test.

python -m tests.notebooks experiments/query_sweep.ipynb     # writes its outputs anew
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import linecache
import sys
import traceback
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run_cell(code: str, name: str, space: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell and return its outputs: what it prints, its last value, the figures it leaves."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    linecache.cache[name] = (len(code), None, lines(code), name)  # tracebacks show the cell
    outputs: list[dict[str, Any]] = []
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)
    if value is not None and code.rstrip().endswith(";"):
        value = None
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": lines(printed.getvalue())})  # fmt: skip
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = lines(value._repr_html_())
        outputs.append({"output_type": "execute_result", "execution_count": None,
                        "metadata": {}, "data": data})  # fmt: skip
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80, bbox_inches="tight",
                                   metadata={"Software": None})  # fmt: skip
        plt.close(number)
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {
            "image/png": base64.b64encode(picture.getvalue()).decode() + "\n",
            "text/plain": ["<Figure>"]}})  # fmt: skip
    return outputs


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with the outputs of a run; the first cell that raises ends it."""
    space: dict[str, Any] = {"__name__": "__main__"}
    done = json.loads(json.dumps(notebook))
    count = 0
    for number, cell in enumerate(done["cells"]):
        if cell["cell_type"] != "code":
            continue
        count += 1
        try:
            cell["outputs"] = run_cell(source(cell), f"<cell {number}>", space)
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            raise AssertionError(f"cell {number} of the notebook raised:\n{told}") from error
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count
    return done


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(run(json.loads(file.read_text())), indent=1) + "\n")
