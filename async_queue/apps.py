"""The Django app."""

from django.apps import AppConfig
from django.conf import settings as django_settings


class AsyncQueueConfig(AppConfig):
    name = "async_queue"
    verbose_name = "Job queue"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Imported for what they register: the system checks, and the executor, which
        # Job.execute() reaches through `context`.
        from async_queue import checks, executor  # noqa: F401

        settings = getattr(django_settings, "ASYNC_QUEUE", {})
        # What is wrong with them is for the checks to say.
        if isinstance(settings, dict) and settings.get("IN_PROCESS"):
            from async_queue.in_process import serve_with_requests

            serve_with_requests()
