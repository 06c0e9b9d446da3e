import os
import sys
from functools import partial
from os import path as re_exported

import pytest

from async_queue.callables import check_arguments, path_of, resolve
from async_queue.exceptions import (
    FunctionUnavailable,
    InvalidArguments,
    InvalidFunction,
)
from tests import jobs


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that can be imported, and forget it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]
    resolve.cache_clear()


@pytest.mark.parametrize(
    ("function", "path"),
    [
        (jobs.add, "tests.jobs.add"),
        (jobs.leave_asynchronously, "tests.jobs.leave_asynchronously"),
        (jobs.Shop.open, "tests.jobs.Shop.open"),
        (jobs.Shop.name, "tests.jobs.Shop.name"),
        (jobs.Branch.name, "tests.jobs.Branch.name"),
        (jobs.send, "tests.jobs.send"),
        ("tests.jobs.add", "tests.jobs.add"),
        ("tests.jobs.Branch.open", "tests.jobs.Branch.open"),
        ("tests.jobs.send", "tests.jobs.send"),
        # What the project's own code names may be scheduled, wherever it is from.
        ("tests.jobs.shortcut", "tests.jobs.shortcut"),
        (len, "builtins.len"),
        (re_exported.join, f"{os.path.__name__}.join"),
    ],
)
def test_path_of_names_what_a_worker_can_import(function, path):
    assert path_of(function) == path
    assert callable(resolve(path))


def test_resolve_binds_an_inherited_class_method_to_the_class_of_the_path():
    assert resolve("tests.jobs.Shop.name")() == "Shop"
    assert resolve("tests.jobs.Branch.name")() == "Branch"


def test_resolve_returns_the_bare_function_of_a_job():
    assert resolve("tests.jobs.send") is jobs.send.registration.function


def nested():
    def inner(): ...

    return inner


def moved(): ...


moved.__qualname__ = "path_of"


class Callable:
    def __call__(self): ...


@pytest.mark.parametrize(
    ("function", "reason", "remedy"),
    [
        (lambda: None, "is a lambda", "define it at the top of a module"),
        (nested(), "inside another function", "define it at the top of a module"),
        (jobs.Shop().close, "bound to an instance", "pass it the instance's primary"),
        (jobs.Shop, "a class", "pass a module's function"),
        (Callable(), "a Callable", "pass a module's function"),
        (partial(jobs.add, 1), "a partial", "pass a module's function"),
        (None, "function is None", "pass a module's function"),
        (3, "function is 3, a int", "pass a module's function"),
        (moved, "names something else now", "Schedule it by the path"),
        ("", "'' is not a dotted path", "such as"),
        ("add", "'add' is not a dotted path", "such as"),
        ("tests..jobs", "is not a dotted path", "such as"),
        ("tests.jobs.add()", "is not a dotted path", "such as"),
        ("tests.jobs.add ", "is not a dotted path", "such as"),
        ("tests/jobs.add", "is not a dotted path", "such as"),
        ("tests.jobs.\ud800", "is not a dotted path", "such as"),
        ("tests.jobs.missing", "does not exist", "has no attribute 'missing'"),
        ("tests.missing.add", "cannot be imported", "ModuleNotFoundError"),
        ("missing_package.add", "cannot be imported", "ModuleNotFoundError"),
        ("tests.jobs.Shop.missing", "does not exist", "has no attribute"),
        ("tests.jobs.Shop", "is a class", "static or class method"),
        ("tests.jobs.half", "is a partial", "static or class method"),
        ("tests.jobs.begun", "is a Event", "static or class method"),
        ("tests.jobs", "is a module", "static or class method"),
        ("tests.jobs.add.__call__", "private to Python", ""),
        ("tests.jobs.__builtins__.eval", "private to Python", ""),
        ("__main__.main", "private to Python", ""),
        ("tests." + "x" * 250, "more than 255 characters", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_path_of_refuses_what_no_worker_could_call(function, reason, remedy):
    with pytest.raises(InvalidFunction, match=r"^function ") as refusal:
        path_of(function)

    assert reason in str(refusal.value)
    assert remedy in str(refusal.value)


def test_path_of_refuses_a_function_of_main(monkeypatch):
    monkeypatch.setattr(nested, "__module__", "__main__")

    with pytest.raises(InvalidFunction, match="move it to a module"):
        path_of(nested)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("import missing_package", "ModuleNotFoundError: No module named"),
        ("from os import missing_name", "ImportError: cannot import name"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_resolve_tells_why_a_module_cannot_be_imported(source, reason, module):
    module("broken_module", source)

    with pytest.raises(FunctionUnavailable, match="broken_module.f.*" + reason):
        resolve("broken_module.f")


def test_resolve_finds_what_a_later_release_brings(module):
    with pytest.raises(FunctionUnavailable):
        resolve("late_module.f")

    module("late_module", "def f(): return 'here'")

    assert resolve("late_module.f")() == "here"


def test_resolve_imports_a_submodule_that_its_package_does_not(module, tmp_path):
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").touch()
    (tmp_path / "late_package" / "inner.py").write_text("def f(): return 1")

    assert resolve("late_package.inner.f")() == 1


@pytest.mark.parametrize(
    ("path", "args", "kwargs"),
    [
        ("tests.jobs.add", (1, 2), {}),
        ("tests.jobs.add", (1,), {"b": 2}),
        ("tests.jobs.Branch.name", (), {}),
        ("tests.jobs.send", ("a",), {"subject": "b"}),
        ("builtins.max", (1, 2, 3), {}),  # does not tell its signature
    ],
)
def test_check_arguments_lets_pass_what_the_function_takes(path, args, kwargs):
    check_arguments(path, args, kwargs)


@pytest.mark.parametrize(
    ("path", "args", "kwargs", "reason"),
    [
        ("tests.jobs.add", (1,), {}, "missing a required argument: 'b'"),
        ("tests.jobs.add", (1, 2, 3), {}, "too many positional arguments"),
        ("tests.jobs.add", (1,), {"c": 2}, "missing a required argument: 'b'"),
        ("tests.jobs.add", (1, 2), {"c": 2}, "unexpected keyword argument 'c'"),
        ("tests.jobs.Shop.name", ("cls",), {}, "too many positional arguments"),
        ("tests.jobs.Shop.close", (), {}, "missing a required argument: 'self'"),
        ("tests.jobs.send", (), {}, "missing a required argument: 'address'"),
    ],
)
def test_check_arguments_refuses_what_the_function_does_not_take(
    path, args, kwargs, reason
):
    with pytest.raises(InvalidArguments) as refusal:
        check_arguments(path, args, kwargs)

    assert str(refusal.value).startswith(path + "(")
    assert reason in str(refusal.value)
