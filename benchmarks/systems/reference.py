"""The references of `benchmarks.references` as systems, measured as they are."""

from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.ours import AsyncQueue


class Reference(AsyncQueue):
    """One of them, on the rows that async_queue has made."""

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        command = python("-m", "benchmarks.references", self.name)
        options = [f"--db={place.vendor}", f"--threads={threads}", place.name]
        return [command + options] * processes
