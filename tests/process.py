"""Real processes of the project on the database of the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db import connection

ROOT = Path(__file__).parent.parent


@contextmanager
def started(
    *command: str, environment: dict[str, str] | None = None, **database: Any
) -> Iterator[subprocess.Popen[str]]:
    """Start ``python -m django command``; kill it where the block leaves it running.

    ``database`` changes the settings of its database, such as CONN_MAX_AGE=60.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "django", *command],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "AQ_TEST_DATABASE": str(connection.settings_dict["NAME"]),
            "AQ_TEST_OPTIONS": json.dumps(database),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(
    *command: str, environment: dict[str, str] | None = None, **database: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with started(*command, environment=environment, **database) as process:
        stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(
        command, process.returncode, stdout=stdout, stderr=stderr
    )
