import os

from django.apps import AppConfig

from tests import dying


class TestsConfig(AppConfig):
    name = "tests"

    def ready(self) -> None:
        dying.arrange(os.environ)
        if seconds := os.environ.get("AQ_GRACE"):
            from async_queue import peers

            peers.GRACE = float(seconds)
