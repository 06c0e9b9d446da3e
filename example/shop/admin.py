from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from shop.jobs import schedule_newsletters
from shop.models import Customer, Delivery, Order, Product

admin.site.register([Product, Order, Delivery])


@admin.register(Customer)
class CustomerAdmin(admin.ModelAdmin):
    actions = ("send_newsletter",)

    @admin.action(description="Send newsletter to selected")
    def send_newsletter(
        self, request: HttpRequest, customers: QuerySet[Customer]
    ) -> None:
        scheduled = schedule_newsletters(customers)
        self.message_user(request, f"{len(scheduled)} newsletters scheduled.")
