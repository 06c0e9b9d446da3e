"""The shop that the examples of the documentation speak of."""

from async_queue import job
from tests.models import Order

__all__ = ["Order", "refresh", "send_receipt", "ship"]


@job(queue="mail", max_attempts=3)
def send_receipt(order_id: int) -> None: ...


def ship(order_id: int) -> None: ...


def refresh(rate: str) -> None: ...
