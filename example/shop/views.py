"""The shop's pages: order, report, health, and a button for a job that fails."""

from django import forms
from django.db import IntegrityError, transaction
from django.db.models import F, Model
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST
from photos.models import Photo
from rates.models import Rate

from async_queue import health, schedule
from async_queue.threads import ThreadPoolExecutor
from shop.jobs import boom, confirm_order
from shop.models import Delivery, Order, Product


class OrderForm(forms.ModelForm):
    class Meta:
        model = Order
        fields = ("product", "quantity", "email")


def index(request: HttpRequest) -> HttpResponse:
    return render(request, "shop/index.html", {"form": OrderForm()})


@require_POST
def order(request: HttpRequest) -> HttpResponse:
    form = OrderForm(request.POST)
    if form.is_valid() and place(form):
        return redirect("index")
    return render(request, "shop/index.html", {"form": form}, status=400)


def place(form: OrderForm) -> bool:
    """Order, mail and stock commit together; when the stock says no, none of them."""
    try:
        with transaction.atomic():
            placed = form.save()
            schedule(confirm_order, [placed.pk])
            products = Product.objects.filter(pk=placed.product_id)
            products.update(stock=F("stock") - placed.quantity)
    except IntegrityError:
        form.add_error("quantity", "There are not that many left.")
        return False
    return True


def report(request: HttpRequest) -> HttpResponse:
    """Count four tables at once; the pool closes its threads' connections."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        counts = pool.map(count, [Order, Delivery, Photo, Rate])
        return JsonResponse(dict(counts))


def count(model: type[Model]) -> tuple[str, int]:
    return str(model._meta.verbose_name_plural), model._default_manager.count()


def healthz(request: HttpRequest) -> HttpResponse:
    found = health()
    return JsonResponse(found, status=503 if found["status"] == "fail" else 200)


@require_POST
def explode(request: HttpRequest) -> HttpResponse:
    schedule(boom)
    return redirect("index")
