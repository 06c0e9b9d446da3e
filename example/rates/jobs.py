"""Refresh a rate from its server; when that fails, the job is retried."""

import json
from datetime import timedelta
from decimal import Decimal
from urllib.request import ProxyHandler, build_opener

from django.conf import settings

from async_queue import job
from rates.models import Rate

# A proxy named in the environment would not find a server on this machine.
OPENER = build_opener(ProxyHandler({}))


def soon(failures: int) -> timedelta:
    return timedelta(seconds=0.3)


@job(queue="rates", max_attempts=10, backoff=soon)
def refresh(currency: str) -> None:
    with OPENER.open(settings.RATES_URL + currency, timeout=5) as answer:
        per_euro = Decimal(json.load(answer)["per_euro"])
    Rate.objects.create(currency=currency, per_euro=per_euro)
