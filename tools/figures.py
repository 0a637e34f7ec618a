"""Measure the source and hold it to its limits: ``python tools/figures.py``. Standard library alone."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("anemoi_dist", "launch")
MAX_FUNCTION_LINES, MAX_P90_LINES = 60, 24
MIN_COMMENTS, MAX_COMMENTS = 0.04, 0.08
MAX_CONSTRUCTOR_PARAMETERS = 7
MAX_UNTYPED_LINES = 60
MAX_MODULES = {"anemoi_dist": {"__init__.py", "train.py", "errors.py"}, "launch": {"__init__.py", "cli.py"}}
#: Its parameters are those of the optimizer's update and of torch.optim.
EXEMPT_CONSTRUCTORS = {"AdEMAMix"}
#: Other programs' files have no types.
UNTYPED_ALLOWED = "importers"

_UNTYPED = re.compile(r"\b(dict|Mapping)\[str, Any\]")
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|!)")
_BAD_OPENING = re.compile(r"(Of|Where|Those of|What)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Print a table of the figures; return 1 where one is beyond its limit."""
    files = sorted(file for root in ROOTS for file in Path(root).rglob("*.py"))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    num_lines = sum(len(text.splitlines()) for text in texts.values())
    functions = [(file, node) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = sorted(_length(node) for _, node in functions)
    num_comments = sum(_num_comments(text) for text in texts.values())
    untyped = [file for file, text in texts.items() for line in text.splitlines() if _UNTYPED.search(line)]
    rows = [
        ("modules", f"{len(files)}", []),
        ("lines", f"{num_lines}", []),
        ("modules at the top beside the entry points", "", list(_loose(files))),
        (
            "imports of the control side by the package",
            "",
            [str(f) for f in files if _imports_control_side(f, texts[f])],
        ),
        ("functions", f"{len(functions)}, median {lengths[len(lengths) // 2]} lines", []),
        (
            f"longest function (at most {MAX_FUNCTION_LINES})",
            f"{lengths[-1]}",
            [f"{file}:{node.lineno} {node.name}" for file, node in functions if _length(node) > MAX_FUNCTION_LINES],
        ),
        _limit(f"function length, p90 (at most {MAX_P90_LINES})", lengths[int(0.9 * len(lengths))], 0, MAX_P90_LINES),
        ("public things without a docstring", "", [f"{f}: {name}" for f in files for name in _undocumented(trees[f])]),
        ("docstrings that begin badly", "", [f"{f}: {name}" for f in files for name in _badly_opened(trees[f])]),
        _limit("comment lines, %", 100 * num_comments / num_lines, 100 * MIN_COMMENTS, 100 * MAX_COMMENTS),
        (
            f"constructors with more than {MAX_CONSTRUCTOR_PARAMETERS} parameters",
            "",
            [f"{f}: {name}" for f in files for name in _wide_constructors(trees[f])],
        ),
        _limit(
            f"lines with dict[str, Any] (at most {MAX_UNTYPED_LINES})",
            sum(UNTYPED_ALLOWED not in file.parts for file in untyped),
            0,
            MAX_UNTYPED_LINES,
        ),
    ]
    for name, value, faults in rows:
        print(f"{name:<48} {value or len(faults)}")
        for fault in faults:
            print(f"    {fault}")
    return int(any(faults for _, _, faults in rows))


def _limit(name: str, value: float, low: float, high: float) -> tuple[str, str, list[str]]:
    faults = [] if low <= value <= high else [f"must be {low:g} to {high:g}"]
    return name, f"{value:.3g}", faults


def _length(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _loose(files: list[Path]) -> Iterator[str]:
    return (str(f) for f in files if len(f.parts) == 2 and f.name not in MAX_MODULES[f.parts[0]])


def _imports_control_side(file: Path, text: str) -> bool:
    """Whether a worker's module imports ``anemoi_dist.launch``: import-linter knows that folder by another name."""
    return file.parts[0] == "anemoi_dist" and bool(re.search(r"^\s*(from|import) anemoi_dist\.launch\b", text, re.M))


def _num_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not _DIRECTIVE.match(token.string) for token in tokens)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Yield the name, node and parent of what can have a docstring: the module, classes, methods and functions."""
    yield "module", tree, tree
    for parent in ast.walk(tree):
        if isinstance(parent, ast.Module | ast.ClassDef):
            for node in parent.body:
                if isinstance(node, Function | ast.ClassDef):
                    yield node.name, node, parent


def _undocumented(tree: ast.Module) -> Iterator[str]:
    hidden = {id(n) for _, n, _ in _definitions(tree) if isinstance(n, ast.ClassDef) and n.name.startswith("_")}
    for name, node, parent in _definitions(tree):
        is_public = not name.startswith("_") and id(parent) not in hidden
        if is_public and not ast.get_docstring(node) and not _implements(node, parent):  # type: ignore[arg-type]
            yield name


def _implements(node: ast.AST, parent: ast.AST) -> bool:
    """Whether a method without a docstring implements what its class's base documents."""
    return isinstance(node, Function) and isinstance(parent, ast.ClassDef) and bool(parent.bases)


def _badly_opened(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and _BAD_OPENING.match(ast.get_docstring(node) or ""):
            yield f"{getattr(node, 'name', 'module')}: {(ast.get_docstring(node) or '').splitlines()[0]}"


def _wide_constructors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name not in EXEMPT_CONSTRUCTORS:
            for item in node.body:
                if isinstance(item, Function) and item.name == "__init__":
                    count = len(item.args.args) + len(item.args.kwonlyargs) - 1
                    if count > MAX_CONSTRUCTOR_PARAMETERS:
                        yield f"{node.name} ({count})"


if __name__ == "__main__":
    sys.exit(main())
