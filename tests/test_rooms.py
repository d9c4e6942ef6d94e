"""The house: what imports what."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import of ours, but those for the sake of types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and str(child.module).startswith("orpo_lab"):
            yield from ((str(child.module), alias.name) for alias in child.names)
        yield from imports(child)


def test_no_module_needs_a_module_that_needs_it() -> None:
    files = sorted((ROOT / "orpo_lab").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    modules = dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        found = imports(ast.parse(file.read_text()))
        needed = {f"{home}.{name}" if f"{home}.{name}" in modules else home for home, name in found}
        graph[module] = needed - {module}
    assert len(graph) > 60
    assert {"orpo_lab.engine", "orpo_lab.config"} <= graph["orpo_lab.training.trainer"]
    TopologicalSorter(graph).prepare()
