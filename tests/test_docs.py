"""What the documentation says is tried out, and compared with the code."""

import ast
import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.management import load_command_class
from django.db import connection

from async_queue import callables, checks, conf, retries
from async_queue.models import TRANSITIONS, Job
from async_queue.worker import Flush
from tests import shop

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's blocks of code in ``language``, each without its indent."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:[ ]{{4}}.*\n|\n)+)"
    found = re.findall(pattern, page.read_text(), re.M)
    return [textwrap.dedent(block) for block in found]


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a page's ``heading``."""
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(f"\n{heading}\n") :].splitlines()
    borders = [n for n, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)]
    has_header = all(lines[borders[0] : borders[2]])
    body = lines[borders[has_header] + 1 : borders[1 + has_header]]
    starts = [match.start() for match in re.finditer(r"=+", lines[borders[0]])]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for line in body
    ]
    return [row for row in cells if row[0]]


@pytest.fixture(autouse=True)
def a_shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the examples import ``shop.models`` and ``shop.tasks``."""
    package = ModuleType("shop")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "shop", package)
    monkeypatch.setitem(sys.modules, "shop.models", shop)
    monkeypatch.setitem(sys.modules, "shop.tasks", shop)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda p: p.name
)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("shop.examples")
    monkeypatch.setitem(sys.modules, "shop.examples", module)
    vars(module)["INSTALLED_APPS"] = []

    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_spelled_as_they_are(page: Path) -> None:
    for block in blocks(page, "console"):
        for name, options in re.findall(r"manage\.py (\w*_\w+)([^#\n]*)", block):
            command: Any = load_command_class("async_queue", name)
            parser = command.create_parser("manage.py", name)
            parser.parse_args(options.split())


@pytest.mark.django_db(transaction=True)
def test_a_row_of_another_program_runs(settings: Any) -> None:
    settings.ASYNC_QUEUE = {"UNSEALED": ["shop.tasks.send_receipt"]}
    registration = callables.registry["tests.shop.send_receipt"]
    callables.registry["shop.tasks.send_receipt"] = registration
    (statement,) = blocks(ROOT / "docs/howto.rst", "sql")
    with connection.cursor() as cursor:
        cursor.execute(statement)

    Flush("default", threads=1).run()

    assert Job.objects.get().status == Job.Status.SUCCESSFUL


def test_transitions_are_those_of_the_code() -> None:
    documented = {
        action: (set(sources.replace(",", " ").split()), target)
        for action, sources, target, _ in rows("guarantee.rst", "A job's life")
    }

    assert documented == {
        action: ({str(source) for source in move.sources}, str(move.target))
        for action, move in TRANSITIONS.items()
    }


def section(page: str, heading: str) -> str:
    """Return what stands under ``heading``, up to the next one."""
    text = (ROOT / "docs" / page).read_text()
    body = text[text.index(f"\n{heading}\n") + 1 :].split("\n", 2)[2]
    return re.split(r"^.+\n-+$", body, flags=re.M)[0]


def idle_settings() -> dict[str, str]:
    """Return the settings that are said to have no effect, with their defaults."""
    text = section("reference.rst", "Settings")
    (sentence,) = re.findall(r"have no effect yet: ([^.]*)\.", text)
    return dict(re.findall(r"``([A-Z_]+)``\s\(([^)]*)\)", sentence))


def value(cell: str) -> Any:
    """Return what a cell of the table says, if need be in its footnote."""
    if footnote := re.fullmatch(r"\[(\d)\]_", cell):
        text = section("reference.rst", "Settings")
        (cell,) = re.findall(rf"^\.\. \[{footnote[1]}\] (.*)$", text, re.M)
    try:
        return ast.literal_eval(cell.strip("`"))
    except ValueError:  # a name
        return cell


def test_settings_are_those_of_the_code() -> None:
    documented = {row[0].strip("`") for row in rows("reference.rst", "Settings")}

    assert documented.isdisjoint(idle_settings())
    assert documented.union(idle_settings()) == set(conf.KEYS)


def test_settings_without_effect_are_those_of_the_code() -> None:
    assert idle_settings().keys() == checks.WITHOUT_EFFECT


def test_defaults_are_those_of_the_code() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("reference.rst", "Settings")}
    cells = table | idle_settings()
    assert cells.pop("RETENTION") == "7d, failed 30d"  # in words

    for field in dataclasses.fields(conf.Settings):
        if cell := cells.pop(field.name.upper(), None):
            default = field.metadata["default"]
            assert field.metadata["parse"](value(cell)) == default, field.name
    assert not cells


def test_checks_are_those_of_the_code() -> None:
    code = (ROOT / "async_queue/checks.py").read_text()
    documented = {row[0].strip("`") for row in rows("reference.rst", "System checks")}

    assert {name.rpartition(".")[2] for name in documented} == set(
        re.findall(r"\b[EW]\d{3}\b", code)
    )


def test_checks_of_health_are_those_of_the_code() -> None:
    text = (ROOT / "docs/reference.rst").read_text()
    found = set(re.findall(r"``((?:queue|workers):[\w-]+)``", text))
    code = (ROOT / "async_queue/monitoring.py").read_text()

    assert found == set(re.findall(r'"((?:queue|workers):[\w-]+)"', code))


def test_keys_of_meta_are_those_of_the_code() -> None:
    documented = [row[0].strip("`") for row in rows("reference.rst", "Meta")]

    assert documented == list(retries.KEYS)


def test_backoffs_are_those_of_the_code() -> None:
    documented = [row[0] for row in rows("howto.rst", "Retry, put off, give up")]

    assert documented == list(retries.NAMED)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.rst").read_text().splitlines()) <= 150
