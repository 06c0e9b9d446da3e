"""Runs Python's own tests of threads and pools against ours: `-m tests.stdlib_threads`.

Arguments: the modules of Python's `test` package to run. Ours stand in the places of
the standard classes, also in the subprocesses that the tests start. The last line
printed is JSON: how many tests ran, and the names of those that failed.
"""

import concurrent.futures.thread
import json
import sys
import threading
import unittest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from django.conf import settings

from async_queue.threads import Thread, ThreadPoolExecutor

ROOT = str(Path(__file__).parent.parent)
IN_SUBPROCESS = f"""\
import sys; sys.path.insert(0, {ROOT!r})
from tests import stdlib_threads; stdlib_threads.put_ours_in_place()
"""
# The classes of test_threading that are about Thread; the others are about locks,
# timers and signals, or start their threads inside a second interpreter.
THREAD_CLASSES = {
    "ThreadTests",
    "ThreadJoinOnShutdown",
    "ThreadingExceptionTests",
    "ExceptHookTests",
}
NOT_APPLICABLE = {
    "ThreadTests.test_import_from_another_thread": (
        "is about a process that has not imported threading; ours always has"
    ),
}


def put_ours_in_place() -> None:
    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3"}})
    threading.Thread = Thread  # type: ignore[misc]
    concurrent.futures.ThreadPoolExecutor = ThreadPoolExecutor  # type: ignore[misc]
    concurrent.futures.thread.ThreadPoolExecutor = ThreadPoolExecutor  # type: ignore


def put_ours_into_subprocesses() -> None:
    from test.support import script_helper

    run = script_helper.run_python_until_end

    def run_with_ours(*arguments: str, **environment: str) -> Any:
        if "-c" in arguments:
            at = arguments.index("-c") + 1
            code = IN_SUBPROCESS + arguments[at]
            arguments = (*arguments[:at], code, *arguments[at + 1 :])
        return run(*arguments, **environment)

    script_helper.run_python_until_end = run_with_ours


def applicable(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from applicable(test)
        elif is_about_ours(type(test)) and short_name(test) not in NOT_APPLICABLE:
            yield test


def is_about_ours(case: type) -> bool:
    is_pool = getattr(case, "executor_type", None) is ThreadPoolExecutor
    return is_pool or case.__name__ in THREAD_CLASSES


def short_name(test: Any) -> str:
    return ".".join(test.id().split(".")[-2:])


def main(names: list[str]) -> None:
    put_ours_in_place()
    put_ours_into_subprocesses()
    load = unittest.defaultTestLoader.loadTestsFromModule
    tests = applicable(unittest.TestSuite(load(import_module(n)) for n in names))

    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(tests))

    failed = [short_name(test) for test, _ in result.failures + result.errors]
    ran = result.testsRun - len(result.skipped)
    print()  # some tests print without ending their line
    print(json.dumps({"ran": ran, "skipped": len(result.skipped), "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1:])
