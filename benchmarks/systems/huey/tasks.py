"""The jobs as huey's tasks; of this name, so that ``run_huey`` finds them."""

from huey.contrib.djhuey import db_task

from benchmarks import work


@db_task()
def noop(number: int) -> None:
    work.noop(number)


@db_task()
def insert(number: int) -> None:
    work.insert(number)
