"""What the demo claims, looked up afterwards in the tables and in the files.

The rows prove "exactly once": each job inserts one, and nothing else prevents a second.
"""

import email
import email.policy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from django.conf import settings
from photos.jobs import SIZE
from photos.models import Photo, Thumbnail
from PIL import Image
from rates.models import Rate
from shop.models import Customer, Delivery

from async_queue.models import Attempt, Job
from demo.rates_server import RATES

Claim = tuple[str, bool]


def claims(facts: dict[str, Any]) -> Iterator[Claim]:
    """Yield each claim and whether it holds; `facts` is what no table remembers."""
    yield jobs_succeeded()
    yield from mails_were_sent_once()
    yield from photos_have_thumbnails()
    yield rates_were_fetched_once()
    yield refusals_were_retried(facts)
    yield killed_jobs_ran_again(facts)


def jobs_succeeded() -> Claim:
    statuses = list(Job.objects.values_list("status", flat=True))
    successful = statuses.count(Job.Status.SUCCESSFUL)
    text = f"{successful} of {len(statuses)} jobs are SUCCESSFUL"
    return text, successful == len(statuses) == 120


def mails_were_sent_once() -> Iterator[Claim]:
    customers = sorted(Customer.objects.values_list("email", flat=True))
    recipients = [recipient(path) for path in settings.OUTBOX.glob("*.eml")]
    text = f"{len(recipients)} mails for {len(set(recipients))} addresses, none twice"
    yield text, len(customers) == 60 and sorted(recipients) == customers
    recorded = sorted(Delivery.objects.values_list("email", flat=True))
    text = f"{len(recorded)} rows record them, each mail once"
    yield text, recorded == customers


def recipient(path: Path) -> str:
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    return message["To"]


def photos_have_thumbnails() -> Iterator[Claim]:
    photos = sorted(Photo.objects.values_list("pk", flat=True))
    thumbnails = Thumbnail.objects.select_related("photo")
    right = sum(has_right_size(thumbnail) for thumbnail in thumbnails)
    yield f"{right} thumbnails of the right size", len(photos) == right == 40
    recorded = sorted(thumbnails.values_list("photo_id", flat=True))
    text = f"{len(recorded)} rows record them, each thumbnail once"
    yield text, recorded == photos


def has_right_size(thumbnail: Thumbnail) -> bool:
    """The longer side is SIZE, the other keeps the proportion to within a pixel."""
    path = settings.MEDIA_ROOT / thumbnail.path
    if not path.exists():
        return False
    with Image.open(path) as small, Image.open(thumbnail.photo.image.path) as image:
        scale = SIZE / max(image.size)
        expected = [side * scale for side in image.size]
        is_near = all(abs(a - b) < 1 for a, b in zip(small.size, expected, strict=True))
        return is_near and small.size == (thumbnail.width, thumbnail.height)


def rates_were_fetched_once() -> Claim:
    served = sorted((currency, Decimal(text)) for currency, text in RATES.items())
    cached = sorted(Rate.objects.values_list("currency", "per_euro"))
    return f"{len(cached)} rates as they were served, each once", cached == served


def refusals_were_retried(facts: dict[str, Any]) -> Claim:
    requests, refused = facts["requests"], facts["refused"]
    recorded = Attempt.objects.filter(
        job__queue="rates", exception="urllib.error.HTTPError"
    )
    unrecorded = Counter(refused)
    unrecorded.subtract(currencies(recorded.values_list("job_id", flat=True)))
    # A refusal that only the killed worker heard of is on no record.
    unheard = Counter(currencies(map(int, facts["killed"])))
    text = f"{len(refused)} of {requests} requests were refused, and tried again later"
    is_recorded = all(0 <= unrecorded[it] <= unheard[it] for it in unrecorded)
    return text, len(refused) == requests // 4 > 0 and is_recorded


def currencies(ids: Iterable[int]) -> list[str]:
    """Return what each of these jobs asks for; nothing for those of other queues."""
    args = dict(Job.objects.filter(queue="rates").values_list("pk", "args"))
    return [json.loads(args[pk])[0] for pk in ids if pk in args]


def killed_jobs_ran_again(facts: dict[str, Any]) -> Claim:
    killed = {int(pk): attempt for pk, attempt in facts["killed"].items()}
    jobs = Job.objects.filter(pk__in=killed, status=Job.Status.SUCCESSFUL)
    again = [job.pk for job in jobs if job.attempt > killed[job.pk]]
    text = f"{len(again)} of {len(killed)} jobs held by the killed worker ran again"
    return text, len(again) == len(killed) > 0
