"""What commands show while they work: lines, and how far they are."""

from threading import Lock
from typing import IO, cast

from django.core.management.base import OutputWrapper


class Lines:
    """Lines on ``stdout``, if any, and how far the pass is if ``total`` is known."""

    def __init__(self, stdout: OutputWrapper | None, total: int | None = None) -> None:
        self._stdout = stdout
        self._total = total
        self._done = 0
        self._lock = Lock()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._write("", state="")

    def show(self, text: str) -> None:
        self._write(f"{text}\n", self._state())

    def advance(self) -> None:
        self._done += 1
        if self._total is not None:
            self._write("", self._state())

    def _state(self) -> str:
        return "" if self._total is None else f"{self._done} of {self._total} jobs"

    def _write(self, text: str, state: str) -> None:
        if self._stdout is None:
            return
        wipe = "" if self._total is None else f"\r{' ' * len(self._state())}\r"
        with self._lock:
            line = encodable(self._stdout, f"{wipe}{text}{state}")
            self._stdout.write(line, ending="")
            self._stdout.flush()


class Bar:
    """The same with a bar of rich; ImportError where that is not installed."""

    def __init__(self, stdout: OutputWrapper, total: int, *, no_color: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._stdout = stdout
        # Without an opinion of ours, rich looks at NO_COLOR.
        self._console = Console(file=cast(IO[str], stdout), no_color=no_color or None)
        self._progress = Progress(console=self._console)
        self._task = self._progress.add_task("jobs", total=total)

    def __enter__(self) -> None:
        self._ending, self._stdout.ending = self._stdout.ending, ""
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._stdout.ending = self._ending

    def show(self, text: str) -> None:
        text = encodable(self._stdout, text)
        self._console.out(text, highlight=False)

    def advance(self) -> None:
        self._progress.advance(self._task)


def encodable(stream: OutputWrapper, text: str) -> str:
    """Return ``text`` as the stream can write it: no argument may end a pass."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
