"""The queue in Django's admin: jobs to look at, run again and cancel; workers.

Nothing is editable, for a row is code that runs. No page counts or sorts all rows,
so that a million jobs open about as fast as a few.
"""

# Django's classes take their parameters for type checkers only, not at runtime.
# mypy: disallow-any-generics=False

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from django.conf import settings as django_settings
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.functional import cached_property
from django.utils.html import format_html
from django.utils.http import urlencode

from async_queue import api, conf, statements
from async_queue.callform import call_form
from async_queue.models import Attempt, Job, JobQuerySet, Worker

# As many digits as the largest id may have.
_DIGITS = 19
# What may be long, and a list does not show.
_LONG = ("args", "kwargs", "meta", "result")


def _never(self: Any, request: HttpRequest, obj: Any = None) -> bool:
    return False


class CappedPaginator(Paginator):
    """Counts no further than ``cap`` rows, which also bounds the deepest page."""

    cap = 10_000

    @cached_property
    def count(self) -> int:
        rows = cast(QuerySet[Any], self.object_list)
        counted = rows.order_by()[: self.cap + 1].count()
        return counted if counted <= self.cap else _AtLeast(self.cap)


class _AtLeast(int):
    """A count that stopped there; templates show it with a plus."""

    def __str__(self) -> str:
        # Django would group the plus together with the digits.
        if django_settings.USE_THOUSAND_SEPARATOR:
            return int.__repr__(self)
        return f"{int(self):,}+"


class JobChangeList(ChangeList):
    """The list of jobs, without their arguments and results."""

    def get_queryset(
        self, request: HttpRequest, exclude_parameters: Any = None
    ) -> QuerySet[Any]:
        return super().get_queryset(request, exclude_parameters).defer(*_LONG)


class QueueFilter(admin.SimpleListFilter):
    """By queue. Offers those with ready jobs, which an index tells, and the chosen."""

    title = "queue"
    parameter_name = "queue"

    def lookups(
        self, request: HttpRequest, model_admin: Any
    ) -> Iterable[tuple[str, str]]:
        chosen = request.GET.get(self.parameter_name)
        ready = statements.heads(connections[conf.settings().database])
        return [(name, name) for name in sorted({*ready, *filter(None, [chosen])})]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[Any]
    ) -> QuerySet[Any] | None:
        name = self.value()
        return queryset if name is None else queryset.filter(queue=name)


class AttemptInline(admin.StackedInline):
    """The failed and lost attempts of a job, with their tracebacks."""

    model = Attempt
    extra = 0
    can_delete = False
    fields = (
        "number",
        "exception",
        "message",
        "started_at",
        "finished_at",
        "worker_id",
        "stack",
    )
    readonly_fields = fields

    has_add_permission = _never
    has_change_permission = _never

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return True  # whoever may see the job

    @admin.display(description="traceback")
    def stack(self, attempt: Attempt) -> str:
        return format_html("<pre>{}</pre>", attempt.traceback)


class _Verb(NamedTuple):
    """What an action asks before and says after."""

    name: str
    label: str
    question: str
    done: str
    logged: str


_RUN_AGAIN = _Verb(
    "run_again",
    "Run again",
    "Run again what is finished of {} jobs? What they did before is not undone.",
    "{} of {} jobs will run again. The others are not finished.",
    "Run again.",
)
_CANCEL = _Verb(
    "cancel",
    "Cancel",
    "Cancel what is not finished of {} jobs? What running ones did is rolled back.",
    "{} of {} jobs are cancelled. The others were finished before.",
    "Cancelled.",
)


@admin.register(Job)
class JobAdmin(admin.ModelAdmin):
    """Jobs: to look at, run again, cancel and delete."""

    # As many as one action changes in the time of one request.
    most_at_once = 1_000

    list_display = (
        "id",
        "status",
        "short_function",
        "linked_queue",
        "attempt",
        "run_after",
        "enqueued_at",
        "started_at",
        "finished_at",
    )
    list_filter = ("status", QueueFilter)
    ordering = ("-id",)
    sortable_by = ("id",)
    search_fields = ("function",)
    search_help_text = "The id of a job, or how the path of its function begins."
    paginator = CappedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = ("run_again", "cancel")
    inlines = (AttemptInline,)
    fields = (
        "id",
        "status",
        "call",
        "queue",
        "priority",
        "attempt",
        "failures",
        "run_after",
        "enqueued_at",
        "started_at",
        "finished_at",
        "worker_id",
        "meta",
    )
    readonly_fields = fields

    has_add_permission = _never
    has_change_permission = _never

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # One by one: the bulk action would read each job whole, and all tracebacks.
        return obj is not None and super().has_delete_permission(request, obj)

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("async_queue.retry_job"))

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("async_queue.cancel_job"))

    @admin.action(description=_RUN_AGAIN.label, permissions=["retry"])
    def run_again(
        self, request: HttpRequest, queryset: JobQuerySet
    ) -> HttpResponse | None:
        if "confirmed" not in request.POST:
            return self._ask(request, queryset, _RUN_AGAIN)
        jobs = self._chosen(queryset)
        changed = [job for job in jobs if _row(job).transition("run again")]
        self._tell(request, _RUN_AGAIN, jobs, changed)
        return None

    @admin.action(description=_CANCEL.label, permissions=["cancel"])
    def cancel(
        self, request: HttpRequest, queryset: JobQuerySet
    ) -> HttpResponse | None:
        if "confirmed" not in request.POST:
            return self._ask(request, queryset, _CANCEL)
        jobs = self._chosen(queryset)
        reason = f"by {request.user} in the admin"
        changed = [job for job in jobs if api.cancel(_row(job), reason)]
        self._tell(request, _CANCEL, jobs, changed)
        return None

    def _permitted(self, request: HttpRequest) -> Iterator[_Verb]:
        if self.has_retry_permission(request):
            yield _RUN_AGAIN
        if self.has_cancel_permission(request):
            yield _CANCEL

    def _ask(
        self, request: HttpRequest, queryset: JobQuerySet, verb: _Verb
    ) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": "Are you sure?",
            "question": verb.question.format(CappedPaginator(queryset, 1).count),
            "most_at_once": self.most_at_once,
            "action": verb.name,
            "select_across": request.POST.get("select_across", "0"),
            "checkbox": ACTION_CHECKBOX_NAME,
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
        }
        template = "admin/async_queue/job/confirm_action.html"
        return TemplateResponse(request, template, context)

    def _chosen(self, queryset: JobQuerySet) -> list[Job]:
        return list(queryset.only("function")[: self.most_at_once])

    def _tell(
        self, request: HttpRequest, verb: _Verb, jobs: list[Job], changed: list[Job]
    ) -> None:
        for job in changed:
            self.log_change(request, _without_arguments(job), verb.logged)
        level = messages.SUCCESS if changed else messages.WARNING
        said = verb.done.format(f"{len(changed):,}", f"{len(jobs):,}")
        self.message_user(request, said, level)

    def log_deletions(self, request: HttpRequest, queryset: Any) -> Any:
        logged: Any = [_without_arguments(job) for job in queryset]
        return super().log_deletions(request, logged)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(conf.settings().database)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return JobChangeList

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        term = search_term.strip()
        if term.isdecimal() and len(term) <= _DIGITS:
            return queryset.filter(pk=int(term)), False
        return queryset.filter(function__startswith=term), False

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        context = {
            **(extra_context or {}),
            "checkbox": ACTION_CHECKBOX_NAME,
            "verbs": list(self._permitted(request)),
        }
        return super().change_view(request, object_id, form_url, context)

    def action_checkbox(self, obj: Job) -> Any:
        # Its label names the job, and would read the arguments of each, one by one.
        return super().action_checkbox(_without_arguments(obj))

    @admin.display(description="function")
    def short_function(self, job: Job) -> str:
        short = ".".join(job.function.split(".")[-2:])
        return format_html('<span title="{}">{}</span>', job.function, short)

    @admin.display(description="queue")
    def linked_queue(self, job: Job) -> str:
        query = urlencode({"queue": job.queue})
        return format_html('<a href="?{}">{}</a>', query, job.queue)

    @admin.display(description="call")
    def call(self, job: Job) -> str:
        shown = call_form(job.function, job.args, job.kwargs)
        return format_html("<pre>{}</pre>", shown)


@admin.register(Worker)
class WorkerAdmin(admin.ModelAdmin):
    """Workers, living and dead."""

    list_display = (
        "id",
        "host",
        "pid",
        "version",
        "threads",
        "queues",
        "seen_at",
        "dead_at",
    )
    ordering = ("-id",)
    sortable_by = ("id",)
    paginator = CappedPaginator
    show_full_result_count = False

    has_add_permission = _never
    has_change_permission = _never
    has_delete_permission = _never

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(conf.settings().database)


def _row(job: Job) -> JobQuerySet:
    return Job.objects.using(conf.settings().database).filter(pk=job.pk)


def _without_arguments(job: Job) -> Job:
    """Return what names the job where arguments must not be kept or need not be."""
    return Job(pk=job.pk, function=job.function)
