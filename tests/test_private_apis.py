"""Every private name of another library that velora/ uses stands in docs/private_apis.md, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = [ast.parse(path.read_text()) for path in sorted((ROOT / "velora").rglob("*.py"))]
ROWS = [line.split("|")[1:-1] for line in (ROOT / "docs" / "private_apis.md").read_text().splitlines() if "`" in line]
ROWS = [row for row in ROWS if len(row) == 4]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables and attributes that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names that a module reads and this package has not made; `super()` is another library's class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or ast.unparse(node.value) == "super()":
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            ours = (node.module or "").startswith("velora")
            names = [] if ours else [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))


def listed() -> set[str]:
    return {part for row in ROWS for part in re.findall(r"\w+", row[0]) if is_private(part)}


def test_no_private_name_that_is_not_listed() -> None:
    own = {name for tree in TREES for name in defined(tree)}
    assert {name for tree in TREES for name in used(tree, own)} <= listed()


def test_every_listed_name_is_used() -> None:
    words = {word for path in (ROOT / "velora").rglob("*.py") for word in re.findall(r"\w+", path.read_text())}
    assert listed() <= words


def test_the_tests_that_are_named_exist() -> None:
    assert ROWS
    for row in ROWS:
        path, _, test = row[3].strip(" `").partition("::")
        assert f"def {test}" in (ROOT / path).read_text() if test else (ROOT / path).is_file(), row[3]


def test_the_search_finds_what_is_private() -> None:
    source = (
        "from a._b import c\nimport d._e\nx._f\nself._g = 1\nself._g\nsuper()._g()\ny.__dict__\nfrom velora._h import i"
    )
    tree = ast.parse(source)
    assert set(used(tree, set(defined(tree)))) == {"_b", "_e", "_f", "_g"}
    assert set(used(ast.parse("self._g = 1\nself._g"), {"_g"})) == set()
