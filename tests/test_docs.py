"""What the documentation says is tried out, and compared with the code."""

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.management import BaseCommand, load_command_class
from django.db import connection

from async_queue import (
    callables,
    checks,
    conf,
    context,
    exceptions,
    health,
    retries,
)
from async_queue.db import vendor
from async_queue.management import serving
from async_queue.models import TRANSITIONS, Job
from async_queue.worker import Worker
from benchmarks import __main__ as speed
from benchmarks.chaos import __main__ as chaos
from tests import figures, shop
from tests.stepping import one_pass

ROOT = Path(__file__).parent.parent
DOCS, PACKAGE = ROOT / "docs", ROOT / "async_queue"
PAGES = [ROOT / "README.rst", *sorted(DOCS.rglob("*.rst"))]
SCENARIOS = ROOT / "tests/scenarios"
# Of RunningJob, for the queue's own use.
INNER = {"alias", "args", "kwargs", "meta", "seal", "rank", "control"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str = r"[\w-]+") -> list[str]:
    """Return the page's blocks of code in ``language``, each without its indent."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:[ ]{{4}}.*\n|\n)+)"
    found = re.findall(pattern, page.read_text(), re.M)
    return [textwrap.dedent(block) for block in found]


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a page's ``heading``."""
    text = (DOCS / page).read_text()
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
    "page", [page for page in PAGES if blocks(page, "python")], ids=name_of
)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("shop.examples")
    monkeypatch.setitem(sys.modules, "shop.examples", module)
    vars(module)["INSTALLED_APPS"] = []

    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), vars(module))


@pytest.mark.django_db(transaction=True)
def test_jobs_of_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("shop.examples")
    monkeypatch.setitem(sys.modules, "shop.examples", module)
    for block in blocks(DOCS / "howto/long_jobs.rst", "python"):
        exec(compile(block, "long_jobs.rst", "exec"), vars(module))
    shop.Order.objects.create(total=-1)
    examples: Any = module

    jobs = [
        examples.export.schedule(),
        examples.renumber.schedule(),
        examples.charge.schedule(7),
        examples.load.schedule([1, 2]),
        examples.crawl.schedule([1, 2]),
    ]
    one_pass(threads=1).run()

    ended = dict(Job.objects.values_list("id", "status"))
    assert [ended[job.pk] for job in jobs] == [Job.Status.SUCCESSFUL] * len(jobs)
    assert shop.Order.objects.get().total == 0


def commands(text: str) -> list[list[str]]:
    """Return the queue's commands in a block of whatever language, word by word."""
    words = re.sub(r"[\[\]\",]+", " ", text)  # as JSON and YAML write them
    found = re.findall(r"manage\.py +(\w*_\w+)([^#\n]*)", words)
    return [[name, *options.split()] for name, options in found]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_spelled_as_they_are(page: Path) -> None:
    for name, *options in [call for block in blocks(page) for call in commands(block)]:
        command: Any = load_command_class("async_queue", name)
        command.create_parser("manage.py", name).parse_args(options)


def test_recipes_call_the_workers() -> None:
    page = DOCS / "howto/deploy.rst"
    names = [call[0] for block in blocks(page) for call in commands(block)]

    assert names.count("run_workers") >= 5
    assert names.count("flush_queue") == 1


def options_of(command: BaseCommand) -> set[str]:
    parser = command.create_parser("manage.py", "any")
    options = chain.from_iterable(it.option_strings for it in parser._actions)
    return {option for option in options if option.startswith("--")}


def test_options_are_those_of_the_command() -> None:
    command: Any = load_command_class("async_queue", "run_workers")
    text = section("reference.rst", "Commands").partition("\n``flush_queue``")[0]
    titles = re.findall(r"^    ``--.*``$", text, re.M)
    documented = set(re.findall(r"--[a-z-]+", " ".join(titles)))

    assert documented == options_of(command) - options_of(BaseCommand())


def seconds(text: str) -> float:
    unitless = text.isdigit()
    return conf.parse_duration(int(text) if unitless else text).total_seconds()


@pytest.mark.parametrize(
    ("pattern", "processes"),
    [
        (r"TimeoutStopSec=(\w+)", 2),
        (r"stop_grace_period: (\w+)", 2),
        (r"--stop-timeout (\w+)", 2),
        (r"terminationGracePeriodSeconds: (\w+)", 1),
    ],
)
def test_recipes_leave_the_time_to_stop(pattern: str, processes: int) -> None:
    (given,) = re.findall(pattern, (DOCS / "howto/deploy.rst").read_text())
    timeout = conf.Settings().shutdown_timeout.total_seconds()

    assert seconds(given) > timeout + serving.LEAVING * (1 if processes == 1 else 3)


@pytest.mark.django_db(transaction=True)
def test_a_row_of_another_program_runs(settings: Any) -> None:
    settings.ASYNC_QUEUE = {"UNSEALED": ["shop.tasks.send_receipt"]}
    registration = callables.registry["tests.shop.send_receipt"]
    callables.registry["shop.tasks.send_receipt"] = registration
    (statement,) = blocks(DOCS / "howto/jobs.rst", "sql")
    with connection.cursor() as cursor:
        cursor.execute(statement)

    one_pass(threads=1).run()

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
    text = (DOCS / page).read_text()
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
    text = (DOCS / "reference.rst").read_text()
    found = set(re.findall(r"``((?:queue|workers):[\w-]+)``", text))
    code = (ROOT / "async_queue/monitoring.py").read_text()

    assert found == set(re.findall(r'"((?:queue|workers):[\w-]+)"', code))


def test_keys_of_meta_are_those_of_the_code() -> None:
    documented = [row[0].strip("`") for row in rows("reference.rst", "Meta")]

    assert documented == list(retries.KEYS)


def test_backoffs_are_those_of_the_code() -> None:
    documented = [row[0] for row in rows("howto/jobs.rst", "Retry, put off, give up")]

    assert documented == list(retries.NAMED)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.rst").read_text().splitlines()) <= 150


def quoted(text: str) -> set[str]:
    return set(re.findall(r"``(\w+)``", text))


def test_errors_are_those_of_the_code() -> None:
    classes = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }

    assert classes <= quoted(section("reference.rst", "Errors"))


def test_what_a_job_knows_is_documented() -> None:
    text = section("reference.rst", "Verbs")
    start = text.index("``current_job()``")
    documented = text[start : text.index("``health(", start)]
    known = {name for name in dir(context.RunningJob) if not name.startswith("_")}

    assert known - INNER <= set(re.findall(r"``(\w+)(?:\(.*\))?``", documented))


def test_parameters_of_a_worker_are_those_of_the_code() -> None:
    text = section("reference.rst", "Worker")
    (given,) = re.findall(r"Worker\((.*)\)``", text)
    known = inspect.signature(Worker).parameters

    for name in re.findall(r"(\w+)=", given):
        assert name in known
    for name in re.findall(r"^    ``(\w+)\(", text, re.M):
        assert callable(getattr(Worker, name))


@pytest.mark.django_db
def test_fields_of_health_are_those_of_the_code() -> None:
    text = section("reference.rst", "Health")

    assert {*health()} - {"queue", "errors"} <= quoted(text)


@pytest.mark.django_db
def test_settings_of_postgresql_are_those_of_the_server() -> None:
    if not vendor(connection).listens:
        pytest.skip("another database has other settings")
    page = DOCS / "howto/machines.rst"
    (lines,) = blocks(page, "ini")
    with connection.cursor() as cursor:
        for name, setting in re.findall(r"^(\w+) = (\w+)$", lines, re.M):
            cursor.execute("SELECT set_config(%s, %s, true)", [name, setting])
        for statement in blocks(page, "postgresql"):
            cursor.execute(statement)
        cursor.execute("SELECT name FROM pg_settings")
        known = {name for (name,) in cursor.fetchall()}
    for name, *_ in rows("howto/machines.rst", "Settings of PostgreSQL"):
        if "later" not in name:
            assert quoted(name) <= known


def faults() -> dict[int, str]:
    """Return the tests in the matrix by the numbers of the faults."""
    text = (DOCS / "reliability.rst").read_text()
    found = re.findall(r"^   \* - (\d+)\n(.*?)(?=^   \* -|^\S)", text, re.M | re.S)
    return {int(number): row.rpartition("\n     - ")[2] for number, row in found}


def test_every_fault_has_its_test() -> None:
    assert list(faults()) == list(range(1, 51))
    for cell in faults().values():
        named = re.findall(r"``([\w/]+\.py)``", cell)
        assert named
        for name in named:
            assert ((ROOT if "/" in name else SCENARIOS) / name).exists(), name


def test_figures_become_a_table() -> None:
    figure = {"value": 0.5, "unit": "s", "database": "SQLite"}
    lines = [
        json.dumps({**figure, "name": name, "test": f"tests/scenarios/{file}"})
        for file, name in [
            ("test_claims.py", "claims"),
            ("test_timeouts.py", "34 hung"),
            ("test_killed_workers.py", "recovery"),
        ]
    ]

    header, *found = figures.table(lines)

    assert header == figures.HEADER
    assert found == [
        [fault, name, "", "", "0.5 s"]
        for fault, name in [("1-4", "recovery"), ("34", "hung"), ("", "claims")]
    ]


@pytest.mark.parametrize("program", [chaos, speed], ids=["chaos", "speed"])
def test_benchmarks_are_called_as_they_are(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "".join(blocks(DOCS / "reliability.rst", "console"))
    name = program.__name__.removesuffix(".__main__")
    calls = re.findall(rf"-m {name} (.*)", shown)

    assert calls
    for call in calls:
        monkeypatch.setattr(sys, "argv", [program.__name__, *call.split()])
        program._options()


def texts_of_the_code() -> list[str]:
    """Return all texts in the package, each in one piece."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = chain.from_iterable(map(ast.walk, trees))
    return [str(node.value) for node in nodes if isinstance(node, ast.Constant)]


def test_lines_of_the_log_are_those_of_the_code() -> None:
    known = texts_of_the_code()
    lines = re.findall(
        r"^``(?:INFO|WARNING|ERROR) (.*)``$", section("reference.rst", "Log"), re.M
    )

    assert len(lines) > 20
    for line in lines:
        for words in line.split("..."):
            assert any(words.strip(" ,:;()") in text for text in known), words
