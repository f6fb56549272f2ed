"""The house rules that a machine can check, read from the source with ``ast``: layers, heavy imports, printing, size."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "hubtool"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import only rooms of a smaller level, and itself; the entry files may import anything.
LEVELS = {
    "errors": 0, "types": 0, "version": 0,
    "resources": 1,
    "tensors": 2,
    "formats": 3, "adapters": 3,
    "layouts": 4, "registry": 4,
    "ops": 5, "hub": 5, "pipelines": 5,
    "training": 6,
    "actions": 7,
    "cli": 8, "web": 8,
}  # fmt: skip
ENTRIES = {"__init__", "__main__"}

# Modules that cost start-up time, and the rooms that own them (and may import them at module level).
HEAVY = {
    "torch": {"pipelines"},
    "diffusers": {"pipelines"},
    "peft": {"pipelines"},
    "transformers": {"pipelines"},
    "accelerate": set(),
    "safetensors": set(),
    "numpy": set(),
    "PIL": set(),
    "huggingface_hub": set(),
    "blake3": set(),
    "rich": set(),
    "jsonschema": set(),
    "sqlalchemy": {"registry"},
    "alembic": {"registry"},
}
MAX_FUNCTION = 60
MAX_FILE = 450


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "hubtool":
            yield from ((node.lineno, f"hubtool.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "."


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those of functions, not those under TYPE_CHECKING."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import_time(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(node, field, []))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(CHECKOUT)}:{line}"


def test_every_room_has_a_level() -> None:
    assert {room(path) for path in FILES} - ENTRIES <= set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    own = room(path)
    if own in ENTRIES:
        return
    wrong = []
    for line, name in imported(ast.walk(tree(path))):
        other = name.split(".")[1] if name.startswith("hubtool.") else None
        if other and other not in ("__version__", own) and LEVELS[other] >= LEVELS[own]:
            wrong.append(f"{where(path, line)} {own} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_modules_are_imported_where_they_are_used(path: Path) -> None:
    found = imported(list(at_import_time(tree(path).body)))
    wrong = [
        f"{where(path, line)} {name}"
        for line, name in found
        if room(path) not in HEAVY.get(name.split(".")[0], {room(path)})
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also through functions: the order in which the parts can be understood exists."""
    modules = {
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    graph = {name: set(_named(path, modules)) - {name, "hubtool"} for name, path in modules.items()}
    assert list(_circles(graph)) == []


def _named(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in names)


def _circles(graph: dict[str, set[str]]) -> Iterator[tuple[str, ...]]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield tuple(error.args[1])


def test_imports_are_absolute() -> None:
    wrong = [where(path, line) for path in FILES for line, name in imported(ast.walk(tree(path))) if name == "."]
    assert not wrong


def test_only_the_command_line_prints() -> None:
    wrong = [
        where(path, node.lineno)
        for path in FILES
        if room(path) != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_no_exception_is_swallowed_unnamed() -> None:
    blind = {"Exception", "BaseException"}
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = (
                {"Exception"} if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            )
            unwinds = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # clean up, then raise again
            if names & blind and not unwinds:
                wrong.append(where(path, node.lineno))
    assert not wrong


def test_functions_are_short() -> None:
    wrong = [
        f"{where(path, node.lineno)} {node.name}: {length} lines"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    ]
    assert not wrong


def test_files_are_small() -> None:
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {str(path.relative_to(CHECKOUT)): size for path, size in sizes.items() if size > MAX_FILE}


def test_every_file_says_what_it_is() -> None:
    assert not [str(path) for path in FILES if not ast.get_docstring(tree(path))]


def test_annotations_are_never_evaluated() -> None:
    """Every file with code postpones annotations, so that types cost nothing at start-up."""
    wrong = []
    for path in FILES:
        body = tree(path).body
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)
        postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body)
        if defines and not postponed:
            wrong.append(str(path))
    assert not wrong


def test_nothing_maps_files_or_evaluates_text() -> None:
    """Files on disk are read with pread: a mapped file that shrinks kills the process. Nothing unpickles, evaluates or shells out."""
    forbidden = {"mmap", "pickle", "marshal", "shelve", "dill"}
    calls = {"eval", "exec", "compile", "__import__"}
    wrong = []
    for path in FILES:
        nodes = list(ast.walk(tree(path)))
        wrong += [where(path, line) for line, name in imported(iter(nodes)) if name.split(".")[0] in forbidden]
        wrong += [
            where(path, node.lineno)
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls
        ]
    assert not wrong


def test_no_file_names_a_machine() -> None:
    """No absolute path of the machine somebody worked on, in code, tables, tests or documents."""
    people = "alice|bob|me"  # who stands in the examples of what must not be published
    marks = re.compile(f"/{'work'}/|/{'home'}/(?!{people})|/{'Users'}/(?!{people})")
    folders = ("hubtool", "schemas", "migrations", "tests")
    files = [
        path
        for name in folders
        for path in (CHECKOUT / name).rglob("*")
        if path.suffix in {".py", ".toml", ".json", ".md"}
    ]
    files += [
        path for name in ("README.md", "Makefile", "pyproject.toml", ".ci/run") if (path := CHECKOUT / name).exists()
    ]
    assert not [str(path) for path in files if marks.search(path.read_text("utf-8"))]
