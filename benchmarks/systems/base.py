"""What the benchmarks ask of a system that runs jobs."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from benchmarks.places import Place

# The functions of `benchmarks.work`.
KINDS = ("noop", "insert")


class System:
    """A queue, with the worker that its documentation recommends.

    `prepare` and `enqueue` are called in a process of their own, where Django is set
    up with ``wanted``; all else where it is not.
    """

    name: ClassVar[str]
    package: ClassVar[str]  # that has to be installed
    vendors: ClassVar[Sequence[str]] = ("sqlite", "postgres", "mariadb")
    note: ClassVar[str] = ""  # what to know when it is compared

    @property
    def is_installed(self) -> bool:
        try:
            version(self.package)
        except PackageNotFoundError:
            return False
        return True

    def wanted(self, place: Place, threads: int, processes: int) -> Mapping[str, Any]:
        """Return settings for Django."""
        return {}

    def variables(self, place: Place) -> dict[str, str]:
        """Return what the processes need to have in their environment."""
        return {}

    def prepare(self) -> None:
        """Make the tables."""
        from django.core.management import call_command

        call_command("migrate", run_syncdb=True, verbosity=0)

    def enqueue(self, kind: str, numbers: range) -> None:
        """Enqueue the job of this kind of `benchmarks.work` for each number."""
        raise NotImplementedError

    def enqueue_one(self, kind: str, number: int) -> None:
        """Do the same for one number, as a web request would."""
        self.enqueue(kind, range(number, number + 1))

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        """Return the commands that run jobs."""
        raise NotImplementedError

    def remaining(self, place: Place, connection: Any) -> int:
        """Return how many jobs have not finished; ``connection`` is the driver's."""
        raise NotImplementedError

    def finished(self, connection: Any) -> int | None:
        """Return how many jobs have succeeded; None where no trace is kept of them."""
        raise NotImplementedError

    def cleanup(self, place: Place) -> None:
        """Remove what is not in the database."""


def scalar(connection: Any, sql: str) -> int:
    """Return the one number that ``sql`` selects."""
    cursor = connection.cursor()
    cursor.execute(sql)
    (value,) = cursor.fetchone()
    return int(value)
