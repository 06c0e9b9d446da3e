"""The jobs as tasks of Django's own, for the backends of that framework."""

from django.tasks import task

from benchmarks import work


@task
def noop(number: int) -> None:
    work.noop(number)


@task
def insert(number: int) -> None:
    work.insert(number)
