"""Photos and their thumbnails."""

from django.db import models


class Photo(models.Model):
    image = models.ImageField(upload_to="photos")

    def __str__(self) -> str:
        return self.image.name


class Thumbnail(models.Model):
    """One row per thumbnail made; nothing is unique, so a second run would show."""

    photo = models.ForeignKey(Photo, on_delete=models.CASCADE)
    path = models.CharField(max_length=200)
    width = models.PositiveIntegerField()
    height = models.PositiveIntegerField()

    def __str__(self) -> str:
        return f"{self.path} ({self.width} x {self.height})"
