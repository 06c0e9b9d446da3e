"""The site's own tests: `python3 example/manage.py test shop`."""

import io

from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import TestCase, TransactionTestCase
from photos.models import Photo
from PIL import Image

from async_queue.models import Job
from shop.models import Customer, Order, Product


class OrderTests(TestCase):
    def setUp(self) -> None:
        self.umbrella = Product.objects.create(name="Umbrella", stock=3)

    def order(self, quantity: int) -> int:
        order = {
            "product": self.umbrella.pk,
            "quantity": quantity,
            "email": "a@b.example",
        }
        return self.client.post("/order/", order).status_code

    def test_an_order_is_stored_with_its_mail(self) -> None:
        assert self.order(2) == 302

        placed = Order.objects.get()
        assert str(Job.objects.get()) == f"shop.jobs.confirm_order({placed.pk})"

    def test_an_order_that_is_rolled_back_leaves_no_mail(self) -> None:
        assert self.order(4) == 400

        assert not Order.objects.exists()
        assert not Job.objects.exists()


class PageTests(TestCase):
    def test_an_upload_schedules_a_thumbnail(self) -> None:
        written = io.BytesIO()
        Image.new("RGB", (4, 3)).save(written, "PNG")
        image = SimpleUploadedFile("a.png", written.getvalue())

        self.client.post("/upload/", {"image": image})

        photo = Photo.objects.get()
        assert Job.objects.get().args == f"[{photo.pk}]"

    def test_the_admin_sends_newsletters_to_those_selected(self) -> None:
        self.client.force_login(User.objects.create_superuser("admin"))
        chosen, _ = (Customer.objects.create(email=f"{a}@b.example") for a in "ab")

        self.client.post(
            "/admin/shop/customer/",
            {"action": "send_newsletter", "_selected_action": [chosen.pk]},
        )

        assert Job.objects.get().args == f"[{chosen.pk}]"

    def test_healthz_answers_200_while_nothing_is_wrong(self) -> None:
        assert self.client.get("/healthz").status_code == 200


class ReportTests(TransactionTestCase):
    def test_the_report_counts_four_tables(self) -> None:
        Customer.objects.create(email="a@b.example")

        report = self.client.get("/report/").json()

        assert report == {"orders": 0, "deliveries": 0, "photos": 0, "rates": 0}
