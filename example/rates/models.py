"""Exchange rates, kept here because asking for them is slow and may fail."""

from django.db import models


class Rate(models.Model):
    """One row per refresh; the newest of a currency is the one in force."""

    currency = models.CharField(max_length=3)
    per_euro = models.DecimalField(max_digits=12, decimal_places=4)
    fetched_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        get_latest_by = "fetched_at"

    def __str__(self) -> str:
        return f"{self.per_euro} {self.currency}"
