"""What the jobs of the benchmarks leave behind."""

from django.db import models


class Effect(models.Model):
    """One call of `benchmarks.work.insert` that has committed.

    No constraint makes it unique: so that a job that ran twice is seen.
    """

    number = models.IntegerField()

    def __str__(self) -> str:
        return str(self.number)
