"""The jobs as Celery's tasks, and its application."""

import os

import celery
import django

from benchmarks.systems.celery import PREFIX, URL

django.setup()
from benchmarks import work  # noqa: E402  it has a model

app = celery.Celery("benchmarks", broker=URL)
app.conf.task_acks_late = True
app.conf.task_ignore_result = True
app.conf.broker_transport_options = {"global_keyprefix": os.environ[PREFIX]}


@app.task
def noop(number: int) -> None:
    work.noop(number)


@app.task
def insert(number: int) -> None:
    work.insert(number)
