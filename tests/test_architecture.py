"""What holds between the files, read from their syntax trees."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from tomllib import loads

import async_queue

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "async_queue"
TESTS = ROOT / "tests"
MIGRATIONS = PACKAGE / "migrations"
COMMANDS = PACKAGE / "management" / "commands"
LONGEST_FILE = 400
LONGEST_FUNCTION = 40


def test_every_import_in_the_package_points_to_a_lower_layer():
    layer = _layers()

    upward = [
        f"{_place(path, node)} imports {target}"
        for path in _sources(PACKAGE)
        if (origin := _module_of(path)) in layer
        for node, target in _imports(path)
        if target != origin and layer.get(target, -1) >= layer[origin]
    ]

    assert upward == []


def test_every_module_of_the_package_has_a_layer():
    modules = {_module_of(path) for path in _sources(PACKAGE)}

    assert modules - set(_layers()) == {"__init__"}


def test_vendor_facts_stay_in_db_and_statements():
    found = [
        _place(path, node)
        for path in _sources(PACKAGE)
        if _module_of(path) not in ("db", "statements")
        for node in ast.walk(_tree(path))
        if _is_vendor_fact(node)
    ]

    assert found == []


def test_status_changes_only_in_models_and_statements():
    found = [
        _place(path, node)
        for path in _sources(PACKAGE)
        if _module_of(path) not in ("models", "statements")
        for node in ast.walk(_tree(path))
        if _sets_status(node)
    ]

    assert found == []


def test_no_public_name_equals_a_module_name():
    modules = {_module_of(path) for path in _sources(PACKAGE)} | {"migrations"}

    assert set(async_queue.__all__) & modules == set()


def test_every_public_name_can_be_imported():
    for name in async_queue.__all__:
        assert getattr(async_queue, name) is not None


def test_no_test_sleeps():
    found = [
        _place(path, node)
        for path in _sources(TESTS)
        if path.name != "hanging.py"  # whose jobs are there to be ended in their sleep
        for node in ast.walk(_tree(path))
        if _is_sleep(node)
    ]

    assert found == []


def test_the_package_prints_only_in_commands():
    found = [
        _place(path, node)
        for path in _sources(PACKAGE)
        if COMMANDS not in path.parents
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]

    assert found == []


def test_a_file_can_be_read_in_one_sitting():
    found = [
        (path.name, length)
        for path in _sources(PACKAGE)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    ]

    assert found == []


def test_no_function_is_long():
    found = [
        f"{_place(path, node)} {node.name}"
        for path in _sources(PACKAGE)
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]

    assert found == []


def test_the_public_surface_imports_modules_only_when_asked():
    assert list(_imports(PACKAGE / "__init__.py")) == []


@cache
def _layers() -> dict[str, int]:
    """Return the height of each module, as pyproject.toml has it for import-linter."""
    settings = loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return {
        name.strip(" ()"): height
        for height, line in enumerate(reversed(contract["layers"]))
        for name in line.split("|")
    }


def _sources(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if MIGRATIONS not in path.parents)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _module_of(path: Path) -> str:
    """Return the name, directly under the package, of the module a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def _imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Yield what a file imports from the package, as names directly under it."""
    for node in _running(_tree(path)):
        for name in _imported_names(node):
            parts = name.split(".")
            if parts[0] == "async_queue" and len(parts) > 1:
                yield node, parts[1]


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and what is below it, without what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and _mentions(child.test, "TYPE_CHECKING")):
            yield from _running(child)


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), "async_queue")
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def _mentions(node: ast.AST, wanted: str) -> bool:
    """Whether the node is this name, ends in it, or imports it."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name == wanted
    return False


def _is_vendor_fact(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _mentions(node.func, "cursor") or _mentions(node.func, "raw")
    if isinstance(node, ast.Attribute) and node.attr == "vendor":
        return True
    return _mentions(node, "RawSQL")


def _is_sleep(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
            return True
        case ast.ImportFrom(module="time", names=names):
            return any(_mentions(alias, "sleep") for alias in names)
    return False


def _sets_status(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr="status", ctx=ast.Store()):
            return True
        case ast.Call(func=ast.Attribute(attr="update"), keywords=keywords):
            return any(keyword.arg == "status" for keyword in keywords)
    return False
