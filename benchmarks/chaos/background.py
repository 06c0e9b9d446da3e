"""What goes on in a thread of its own while a chaos run lasts."""

from abc import ABC, abstractmethod
from threading import Event, Thread


class Background(ABC):
    """Does `run` in a thread, from `start` until ``is_over``, which `stop` sets."""

    def __init__(self) -> None:
        self.is_over = Event()
        self._thread = Thread(target=self.run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let it end, and wait for that."""
        self.is_over.set()
        self._thread.join()

    @abstractmethod
    def run(self) -> None:
        """Go on until it is over."""
