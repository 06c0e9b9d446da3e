from django.contrib import admin
from django.urls import path
from photos.views import upload
from shop.views import explode, healthz, index, order, report

urlpatterns = [
    path("", index, name="index"),
    path("order/", order, name="order"),
    path("upload/", upload, name="upload"),
    path("report/", report, name="report"),
    path("boom/", explode, name="boom"),
    path("healthz", healthz, name="healthz"),
    path("admin/", admin.site.urls),
]
