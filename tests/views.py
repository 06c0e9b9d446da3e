"""Pages of a site whose server runs its jobs, too."""

import os

from django.http import HttpRequest, HttpResponse

from async_queue import schedule


def number(request: HttpRequest) -> HttpResponse:
    """Tell the number of this process."""
    return HttpResponse(os.getpid())


def schedule_a_job(request: HttpRequest) -> HttpResponse:
    """Do the same, and schedule a job that leaves the number of its own."""
    schedule("tests.jobs.leave_number_of_process")
    return number(request)
