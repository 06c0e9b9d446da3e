"""``@job``: a function that knows how its jobs are run, and schedules them itself."""

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar, overload

from async_queue import callables, retries
from async_queue.api import RunAfter, check_priority, check_queue, schedule
from async_queue.callables import Registration
from async_queue.exceptions import InvalidArguments, InvalidOption
from async_queue.models import Job
from async_queue.retries import checked_meta

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS = {"run_after", "meta", "queue", "priority", "using"}


class JobFunction(Generic[P, R]):
    """A function with ``@job``: calling it still calls it, here and now."""

    def __init__(
        self, registration: Registration, options: Mapping[str, Any] | None = None
    ) -> None:
        self.registration = registration
        self._options = options or {}
        update_wrapper(self, registration.function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self.registration.function(*args, **kwargs)
        return result

    def __repr__(self) -> str:
        return f"<job {callables.written_path(self.registration.function)}>"

    def schedule(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Schedule a call with these arguments; see `schedule`."""
        try:
            return schedule(self.registration.function, args, kwargs, **self._options)
        except InvalidArguments as error:
            if misplaced := kwargs.keys() & _OPTIONS:
                name = min(misplaced)
                raise InvalidArguments(
                    f"{error} Options come first: .using({name}=...).schedule(...)."
                ) from error
            raise

    def using(
        self,
        *,
        run_after: RunAfter = None,
        meta: Mapping[str, Any] | None = None,
        queue: str | None = None,
        priority: int | None = None,
        using: str | None = None,
    ) -> "JobFunction[P, R]":
        """Return the same function with these options for its jobs."""
        given = {
            "run_after": run_after,
            "meta": meta,
            "queue": queue,
            "priority": priority,
            "using": using,
        }
        changed = {key: value for key, value in given.items() if value is not None}
        return JobFunction(self.registration, {**self._options, **changed})


@overload
def job(function: Callable[P, R], /) -> JobFunction[P, R]: ...
@overload
def job(
    *,
    queue: str = ...,
    priority: int = ...,
    max_attempts: int | None = ...,
    backoff: str | retries.Backoff = ...,
    discard_on: Any = ...,
    retry_on: Any = ...,
    expires_after: Any = ...,
    timeout: Any = ...,
    atomic: bool = ...,
) -> Callable[[Callable[P, R]], JobFunction[P, R]]: ...
def job(
    function: Callable[..., Any] | None = None,
    /,
    *,
    queue: str = "default",
    priority: int = 0,
    **meta: Any,
) -> Any:
    """Make a module's function a job: ``function.schedule(...)`` schedules a call.

    The options are the defaults of its jobs, however they are scheduled: ``queue``,
    ``priority`` and the keys of `schedule`'s meta.
    """

    if isinstance(function, str):
        raise InvalidOption(f"write @job(queue={function!r}).")

    def decorate(function: Callable[..., Any]) -> JobFunction[..., Any]:
        path = callables.written_path(function)
        check_queue(queue)
        check_priority(priority)
        checked = checked_meta(meta, f"@job of {path}")
        registration = Registration(function, queue, priority, checked)
        callables.registry[path] = registration
        return JobFunction(registration)

    return decorate if function is None else decorate(function)
