"""The shop's jobs: mails, and one that always fails."""

from collections.abc import Iterable

from django.core.mail import EmailMessage

from async_queue import job, schedule_many
from async_queue.models import Job
from shop.models import Customer, Delivery, Order


@job(queue="mail")
def confirm_order(order_id: int) -> None:
    order = Order.objects.select_related("product").get(pk=order_id)
    send(f"order-{order.pk}", order.email, "Thank you for your order", str(order))


@job(queue="mail")
def send_newsletter(customer_id: int) -> None:
    customer = Customer.objects.get(pk=customer_id)
    body = "Dear customer,\n\nthis month everything is the same as ever.\n"
    send(f"newsletter-{customer.pk}", customer.email, "News from the shop", body)


def schedule_newsletters(customers: Iterable[Customer]) -> list[Job]:
    return schedule_many([(send_newsletter, [each.pk], {}) for each in customers])


def send(name: str, email: str, subject: str, body: str) -> None:
    """Send one mail and record it; the name makes a repetition harmless (outbox)."""
    headers = {"Message-ID": f"<{name}@shop.example>"}
    EmailMessage(subject, body, "shop@shop.example", [email], headers=headers).send()
    Delivery.objects.create(message_id=name, email=email)


@job(max_attempts=1)
def boom() -> None:
    raise RuntimeError("boom: this job always fails; look at it in the admin")
