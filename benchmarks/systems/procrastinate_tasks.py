"""The jobs as procrastinate's tasks."""

from procrastinate.contrib.django import app

from benchmarks import work


@app.task
def noop(number: int) -> None:
    work.noop(number)


@app.task
def insert(number: int) -> None:
    work.insert(number)
