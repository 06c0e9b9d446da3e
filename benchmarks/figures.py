"""The figures that can be measured, in the order in which they are.

A new one is a module with `measure`, whose docstring begins with its name, a line
here, and a bound in `benchmarks.bounds` if something is required of it.
"""

from collections.abc import Callable

from benchmarks import claims, clients, decay, drain, enqueue, growth, memory, pickup
from benchmarks.run import Run

_MODULES = (drain, enqueue, pickup, clients, claims, decay, growth, memory)
FIGURES: dict[str, Callable[[Run], None]] = {
    module.__name__.rpartition(".")[2]: module.measure for module in _MODULES
}


def described() -> str:
    """Return a line for each figure."""
    lines = [(module.__doc__ or "").splitlines()[0] for module in _MODULES]
    named = [line.replace("``", "").partition(": ") for line in lines]
    return "\n".join(f"  {name:<8} {what}" for name, _, what in named)
