"""The Django app."""

from django.apps import AppConfig


class AsyncQueueConfig(AppConfig):
    name = "async_queue"
    verbose_name = "Job queue"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Imported for what they register: the system checks, and the executor, which
        # Job.execute() reaches through `context`.
        from async_queue import checks, executor  # noqa: F401
