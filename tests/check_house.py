"""Checks the shape of the house: lengths, imports, and what each file does when it is run. No file is imported.

    python tests/check_house.py            exit status 1, and a line for each finding

A file of the root has at most 400 lines, a function 60, `train()` 100. Imports run one way: there is no circle, nothing
imports train.py, and a room does not reach what it does not know. Every file says something when it is run. What a file
imports from elsewhere stands in requirements.txt. No page holds marks of a merge.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES, MOST_FUNCTION_LINES, MOST_TRAIN_LINES = 400, 60, 100
UNKNOWN = {  # what a file must not import, neither itself nor through other files
    "loss": {"model", "files", "config", "hardware"},
    "model": {"files", "config", "hardware", "checkpoints", "tokenizer", "shards"},
    "tokenizer": {"model", "shards", "torch"},
    "shards": {"sources", "workers", "model", "torch"},
    "rows": {"sources", "hub", "tokenizer", "shards"},
    "sources": {"tokenizer", "shards", "torch"},
    "dataloaders": {"model", "sources", "workers"},
    "hardware": {"config", "model", "model_utils"},
    "generate": {"sources", "workers", "preparation"},
    "sampling": {"files", "config", "tokenizer"},
    "hellaswag_utils": {"sources", "workers", "preparation"},
    **{name: {"torch"} for name in ("load_fineweb_dataset", "load_hellaswag_dataset", "threads", "files", "report")},
}


def imported(tree: ast.Module, names: set[str], *, everywhere: bool = False) -> set[str]:
    """Those of `names` that a file imports at its top, or `everywhere` in it."""
    nodes = list(ast.walk(tree) if everywhere else tree.body)
    found = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return found & names


def reached(name: str, imports: dict[str, set[str]], seen: frozenset[str] = frozenset()) -> set[str]:
    """All that a file imports, directly and through others."""
    further = imports.get(name, set()) - seen
    return further.union(*(reached(other, imports, seen | further | {name}) for other in further))


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The files of a circle of imports, in order; empty where there is none."""

    def search(path: list[str]) -> list[str]:
        for other in sorted(imports[path[-1]]):
            if other in path:
                return [*path[path.index(other) :], other]
            if found := search([*path, other]):
                return found
        return []

    return next((found for name in imports if (found := search([name]))), [])


def unnamed_packages(root: Path, trees: dict[str, ast.Module]) -> Iterator[str]:
    """A sentence for each package that a file imports and requirements.txt does not name.

    The tests' own packages bring many others, so the tests would not notice.
    """
    requirements = root / "requirements.txt"
    text = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    named = set(re.findall(r"^[\w-]+", text, flags=re.MULTILINE))
    for name, tree in trees.items():
        nodes = list(ast.walk(tree))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        for package in sorted({module.split(".")[0] for module in found} - set(sys.stdlib_module_names) - set(trees)):
            if package not in named:
                yield f"{name}.py imports {package}, which requirements.txt does not name"


def findings(root: Path = ROOT) -> Iterator[str]:
    """A sentence for each thing that is not as it should be."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.glob("*.py"))}
    for name, tree in trees.items():
        lines = len((root / f"{name}.py").read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            yield f"{name}.py has {lines} lines; at most {MOST_LINES}: split it along its seams"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                most = MOST_TRAIN_LINES if (name, node.name) == ("train", "train") else MOST_FUNCTION_LINES
                if (length := node.end_lineno - node.lineno + 1) > most:
                    yield f"{name}.py: {node.name}() has {length} lines; at most {most}"
        if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            yield f'{name}.py says nothing when it is run; end it with `if __name__ == "__main__":`'
    for page in sorted([*root.glob("*.md"), *root.glob("*/*.md")]):
        if re.search(r"^(<{7}|>{7}) ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            yield f"{page.relative_to(root)} holds marks of a merge that is not finished"
    files = set(trees)
    yield from unnamed_packages(root, trees)
    if way := circle({name: imported(tree, files, everywhere=True) for name, tree in trees.items()}):
        yield f"imports run in a circle: {' -> '.join(way)}"
    for name, tree in trees.items():
        if imported(tree, {"train"}, everywhere=True):
            yield f"{name}.py imports train.py, which nothing may import"
    imports = {name: imported(tree, files | {"torch"}) for name, tree in trees.items()}
    for name, unknown in UNKNOWN.items():
        for other in sorted(reached(name, imports) & unknown):
            yield f"{name}.py imports {other}, itself or through another file"


def main() -> int:
    found = list(findings())
    print("\n".join(found) or "The house is in order.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
