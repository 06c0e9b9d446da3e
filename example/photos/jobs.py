"""Thumbnails, made after the upload has been answered."""

import os
from pathlib import Path

from django.conf import settings
from PIL import Image

from async_queue import job
from photos.models import Photo, Thumbnail

SIZE = 160


@job(queue="photos")
def make_thumbnail(photo_id: int) -> None:
    photo = Photo.objects.get(pk=photo_id)
    with Image.open(photo.image.path) as image:
        image.thumbnail((SIZE, SIZE))
        path = save(image, f"thumbnails/{photo.pk}.jpg")
    width, height = image.size
    Thumbnail.objects.create(photo=photo, path=path, width=width, height=height)


def save(image: Image.Image, path: str) -> str:
    """Write the whole file or none, under a name that a second run would reuse."""
    target = Path(settings.MEDIA_ROOT) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".draft")
    image.save(draft, "JPEG")
    os.replace(draft, target)
    return path
