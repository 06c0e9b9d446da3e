"""Upload a photo; its thumbnail is scheduled in the same transaction."""

from django import forms
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from async_queue import schedule
from photos.jobs import make_thumbnail
from photos.models import Photo


class PhotoForm(forms.ModelForm):
    class Meta:
        model = Photo
        fields = ("image",)


@require_POST
def upload(request: HttpRequest) -> HttpResponse:
    form = PhotoForm(request.POST, request.FILES)
    if not form.is_valid():
        return JsonResponse(form.errors, status=400)
    with transaction.atomic():
        photo = form.save()
        schedule(make_thumbnail, [photo.pk])
    return redirect("index")
