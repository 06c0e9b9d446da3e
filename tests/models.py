"""What the jobs of the tests leave behind."""

from django.db import models


class Effect(models.Model):
    """One effect of one run; no constraint, so that a second one would show."""

    label = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.label


class Order(models.Model):
    """What the examples of the documentation sell."""

    total = models.IntegerField()

    def __str__(self) -> str:
        return f"order {self.pk}"

    @classmethod
    def count_by_month(cls, month: int) -> int:
        return cls.objects.count()
