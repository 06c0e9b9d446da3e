"""The admin, through Django's test client."""

import json

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from async_queue.admin import CappedPaginator, JobAdmin
from async_queue.models import Attempt, Job, Status, Worker
from tests.factories import AttemptFactory, JobFactory, WorkerFactory

pytestmark = pytest.mark.django_db

JOBS = "/admin/async_queue/job/"
WORKERS = "/admin/async_queue/worker/"
EVIL = '"><svg onload=alert(1)>'


@pytest.fixture
def client_with():
    """Return a client whose user has just these permissions."""

    def log_in(*codenames: str) -> Client:
        user = User.objects.create_user("operator", is_staff=True)
        user.user_permissions.set(
            Permission.objects.filter(
                content_type__app_label="async_queue", codename__in=codenames
            )
        )
        client = Client()
        client.force_login(user)
        return client

    return log_in


def act(client: Client, action: str, *jobs: Job, url: str = JOBS, **fields: str):
    """Choose an action for the jobs and confirm it."""
    chosen = {"_selected_action": [job.pk for job in jobs], "action": action}
    return client.post(url, chosen | {"confirmed": "yes"} | fields, follow=True)


def text(response) -> str:
    return response.content.decode()


def shown_ids(response) -> list[int]:
    return [job.pk for job in response.context["cl"].result_list]


def test_list_shows_each_job(admin_client):
    job = JobFactory(successful=True, queue="mail", attempt=3)

    page = text(admin_client.get(JOBS))

    assert f"{JOBS}{job.pk}/change/" in page
    assert '<span title="tests.jobs.leave">jobs.leave</span>' in page
    assert "successful" in page
    assert "mail" in page


def test_list_needs_as_many_queries_for_many_jobs_as_for_one(admin_client):
    JobFactory(args='["a long one"]')
    admin_client.get(JOBS)
    with CaptureQueriesContext(connection) as one:
        admin_client.get(JOBS)

    JobFactory.create_batch(5, running=True)
    with CaptureQueriesContext(connection) as many:
        admin_client.get(JOBS)

    assert len(many) == len(one)


def test_list_leaves_arguments_and_results_in_the_database(admin_client):
    JobFactory(successful=True, result='"long"')

    (job,) = admin_client.get(JOBS).context["cl"].result_list

    assert {"args", "kwargs", "meta", "result"} <= job.get_deferred_fields()


@pytest.mark.parametrize(
    ("separators", "shown"), [(False, "3+ jobs"), (True, "3 jobs")]
)
def test_list_stops_counting_at_the_cap(
    admin_client, monkeypatch, settings, separators, shown
):
    settings.USE_THOUSAND_SEPARATOR = separators
    monkeypatch.setattr(CappedPaginator, "cap", 3)
    JobFactory.create_batch(5)

    response = admin_client.get(JOBS)

    assert shown in text(response)
    assert response.context["cl"].result_count == 3


def test_list_counts_exactly_up_to_the_cap(admin_client, monkeypatch):
    monkeypatch.setattr(CappedPaginator, "cap", 3)
    JobFactory.create_batch(3)

    page = text(admin_client.get(JOBS))

    assert "3 jobs" in page
    assert "3+" not in page


def test_page_beyond_the_cap_is_refused(admin_client, monkeypatch):
    monkeypatch.setattr(CappedPaginator, "cap", 2)
    monkeypatch.setattr(JobAdmin, "list_per_page", 1)
    JobFactory.create_batch(4)

    assert admin_client.get(JOBS, {"p": 2}).status_code == 200
    assert admin_client.get(JOBS, {"p": 3}).status_code == 302


def test_status_filters_the_list(admin_client):
    failed = JobFactory(failed=True)
    JobFactory()

    response = admin_client.get(JOBS, {"status__exact": "FAILED"})

    assert shown_ids(response) == [failed.pk]


def test_queue_filters_the_list(admin_client):
    mail = JobFactory(successful=True, queue="mail")
    JobFactory()

    response = admin_client.get(JOBS, {"queue": "mail"})

    assert shown_ids(response) == [mail.pk]


def test_queue_filter_offers_queues_with_ready_jobs_and_the_chosen_one(admin_client):
    JobFactory(queue="ready")
    JobFactory(queue="done", successful=True)
    JobFactory(queue="chosen", successful=True)

    filters = admin_client.get(JOBS, {"queue": "chosen"}).context["cl"].filter_specs

    offered = [
        name for spec in filters for name, _ in getattr(spec, "lookup_choices", [])
    ]
    assert [name for name in offered if name in ("ready", "done", "chosen")] == [
        "chosen",
        "ready",
    ]


def test_digits_find_the_job_of_this_id(admin_client):
    job, _ = JobFactory.create_batch(2)

    assert shown_ids(admin_client.get(JOBS, {"q": f" {job.pk} "})) == [job.pk]


@pytest.mark.parametrize("term", ["9" * 19, "9" * 5000, "²", "%", "'", "é"])
def test_search_for_what_cannot_be_finds_nothing(admin_client, term):
    JobFactory()

    assert shown_ids(admin_client.get(JOBS, {"q": term})) == []


def test_search_finds_functions_by_their_beginning(admin_client):
    job = JobFactory(function="shop.jobs.pay")
    JobFactory(function="my.shop.jobs.pay", args='["shop.jobs"]')

    assert shown_ids(admin_client.get(JOBS, {"q": "shop.jobs"})) == [job.pk]


def test_detail_shows_attempts_with_tracebacks(admin_client):
    attempt = AttemptFactory(traceback="Traceback:\n  <module>")

    page = text(admin_client.get(f"{JOBS}{attempt.job_id}/change/"))

    assert "<pre>Traceback:\n  &lt;module&gt;</pre>" in page
    assert "builtins.ValueError" in page


def test_detail_shows_attempts_to_whoever_may_see_jobs(client_with):
    attempt = AttemptFactory(traceback="the traceback")

    page = text(client_with("view_job").get(f"{JOBS}{attempt.job_id}/change/"))

    assert "the traceback" in page


def test_detail_hides_secrets(admin_client):
    kwargs = {"customer": "Ada", "api_token": "s3cret", "PASSWORD": "s3cret"}
    job = JobFactory(kwargs=json.dumps(kwargs))

    page = text(admin_client.get(f"{JOBS}{job.pk}/change/"))

    assert "Ada" in page
    assert "s3cret" not in page


def test_detail_of_corrupt_arguments_opens(admin_client):
    job = JobFactory(args="{", meta="]")

    page = text(admin_client.get(f"{JOBS}{job.pk}/change/"))

    assert "tests.jobs.leave(?)" in page


def test_function_and_arguments_are_never_editable(admin_client):
    job = JobFactory()
    before = Job.objects.values().get()

    page = admin_client.get(f"{JOBS}{job.pk}/change/")
    forged = {"function": "os.system", "args": '["id"]', "status": "FAILED"}
    posted = admin_client.post(f"{JOBS}{job.pk}/change/", forged | INLINES)

    assert not page.context["adminform"].form.fields
    assert posted.status_code == 403
    assert Job.objects.values().get() == before


INLINES = {
    "attempts-TOTAL_FORMS": "1",
    "attempts-INITIAL_FORMS": "0",
    "attempts-0-number": "7",
    "attempts-0-traceback": "forged",
}


def test_attempts_are_never_editable(admin_client):
    attempt = AttemptFactory()
    forged = INLINES | {
        "attempts-INITIAL_FORMS": "1",
        "attempts-0-id": str(attempt.pk),
        "attempts-0-job": str(attempt.job_id),
    }

    admin_client.post(f"{JOBS}{attempt.job_id}/change/", forged)

    assert Attempt.objects.get().traceback == attempt.traceback


def test_nobody_adds_jobs_or_workers(admin_client):
    assert admin_client.get(f"{JOBS}add/").status_code == 403
    assert admin_client.post(f"{JOBS}add/", {"function": "a.b"}).status_code == 403
    assert admin_client.get(f"{WORKERS}add/").status_code == 403
    assert not Job.objects.exists()


def test_run_again_makes_finished_jobs_ready(admin_client):
    failed, done = JobFactory(failed=True), JobFactory(successful=True)
    waiting = JobFactory(waiting=True)

    page = text(act(admin_client, "run_again", failed, done, waiting))

    assert "2 of 3 jobs will run again." in page
    assert statuses(failed, done, waiting) == ["READY", "READY", "WAITING"]


def test_cancel_cancels_unfinished_jobs(admin_client):
    ready, running = JobFactory(), JobFactory(running=True)
    done = JobFactory(successful=True)

    page = text(act(admin_client, "cancel", ready, running, done))

    assert "2 of 3 jobs are cancelled." in page
    assert statuses(ready, running, done) == ["CANCELLED", "CANCELLED", "SUCCESSFUL"]
    assert "by admin in the admin" in Attempt.objects.filter(job=running).get().message


def test_actions_log_what_really_changed(admin_client):
    failed, ready = JobFactory(failed=True, args='["private"]'), JobFactory()

    act(admin_client, "run_again", failed, ready)
    act(admin_client, "cancel", failed)

    logged = LogEntry.objects.order_by("pk").values_list("object_id", "change_message")
    assert list(logged) == [
        (str(failed.pk), "Run again."),
        (str(failed.pk), "Cancelled."),
    ]
    assert "private" not in LogEntry.objects.first().object_repr


@pytest.mark.parametrize("action", ["run_again", "cancel"])
def test_actions_ask_first(admin_client, action):
    failed, ready = JobFactory(failed=True), JobFactory()
    chosen = {"_selected_action": [failed.pk, ready.pk], "action": action, "index": "0"}

    page = text(admin_client.post(JOBS, chosen))

    assert "2 jobs?" in page
    assert f'name="_selected_action" value="{failed.pk}"' in page
    assert statuses(failed, ready) == ["FAILED", "READY"]
    assert not LogEntry.objects.exists()


def test_actions_do_no_more_than_fits_into_one_request(admin_client, monkeypatch):
    monkeypatch.setattr(JobAdmin, "most_at_once", 2)
    jobs = JobFactory.create_batch(3, failed=True)

    page = text(act(admin_client, "run_again", jobs[0], select_across="1"))

    assert "2 of 2 jobs" in page
    assert sorted(statuses(*jobs)) == ["FAILED", "READY", "READY"]


def test_actions_on_all_that_matches_keep_to_the_filter(admin_client):
    mail, other = JobFactory(queue="mail"), JobFactory()

    act(admin_client, "cancel", mail, url=f"{JOBS}?queue=mail", select_across="1")

    assert statuses(mail, other) == ["CANCELLED", "READY"]


@pytest.mark.parametrize(
    ("permission", "offered"),
    [("view_job", set()), ("retry_job", {"run_again"}), ("cancel_job", {"cancel"})],
)
def test_actions_need_their_permission(client_with, permission, offered):
    job, failed = JobFactory(), JobFactory(failed=True)
    client = client_with("view_job", permission)

    act(client, "run_again", job, failed)
    act(client, "cancel", job, failed)

    expected = [
        "CANCELLED" if "cancel" in offered else "READY",
        "READY" if "run_again" in offered else "FAILED",
    ]
    assert statuses(job, failed) == expected


@pytest.mark.parametrize("permission", ["retry_job", "cancel_job"])
def test_actions_need_the_permission_to_see_jobs(client_with, permission):
    job = JobFactory(failed=permission == "retry_job")

    response = act(client_with(permission), "cancel", job)

    assert response.status_code == 403
    assert statuses(job) == [job.status]


def test_actions_need_a_token_against_forgery(admin_user):
    job = JobFactory()
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)

    response = act(client, "cancel", job)

    assert response.status_code == 403
    assert statuses(job) == ["READY"]


@pytest.mark.parametrize("url", [JOBS, WORKERS])
def test_strangers_see_nothing(client, client_with, url):
    assert client.get(url).status_code == 302
    assert client_with().get(url).status_code == 403


def test_detail_offers_the_permitted_actions(client_with):
    job = JobFactory(failed=True)

    page = text(client_with("view_job", "retry_job").get(f"{JOBS}{job.pk}/change/"))

    assert '<button type="submit" name="action" value="run_again"' in page
    assert 'name="action" value="cancel"' not in page


def test_actions_of_the_detail_page_go_through_the_list(admin_client):
    job = JobFactory(failed=True)
    fields = {"_selected_action": job.pk, "action": "run_again"}

    assert "1 jobs?" in text(admin_client.post(JOBS, fields))


def test_delete_needs_its_permission(client_with):
    attempt = AttemptFactory()
    url = f"{JOBS}{attempt.job_id}/delete/"

    assert client_with("view_job").post(url, {"post": "yes"}).status_code == 403

    assert Job.objects.exists()


def test_delete_takes_the_attempts_along(admin_client):
    attempt = AttemptFactory(job__args='["private"]')

    admin_client.post(f"{JOBS}{attempt.job_id}/delete/", {"post": "yes"})

    assert not Job.objects.exists()
    assert not Attempt.objects.exists()
    assert "private" not in LogEntry.objects.get().object_repr


def test_jobs_cannot_be_deleted_in_bulk(admin_client):
    job = JobFactory()

    act(admin_client, "delete_selected", job, post="yes")

    assert Job.objects.exists()


def test_workers_are_listed_and_read_only(admin_client):
    worker = WorkerFactory(host="machine", dead=True)

    page = text(admin_client.get(WORKERS))
    posted = admin_client.post(f"{WORKERS}{worker.pk}/change/", {"host": "other"})

    assert "machine" in page
    assert posted.status_code == 403
    assert admin_client.get(f"{WORKERS}{worker.pk}/delete/").status_code == 403
    assert Worker.objects.get().host == "machine"


def test_rows_that_hold_markup_are_inert(admin_client):
    arguments = json.dumps([EVIL]), json.dumps({EVIL: EVIL})
    job = JobFactory(
        function=EVIL, queue=EVIL, args=arguments[0], kwargs=arguments[1], meta=EVIL
    )
    AttemptFactory(job=job, exception=EVIL, message=EVIL, traceback=EVIL)
    worker = WorkerFactory(host=EVIL, version=EVIL, queues=EVIL)
    detail, machine = f"{JOBS}{job.pk}/", f"{WORKERS}{worker.pk}/change/"

    pages = [
        *(
            admin_client.get(url)
            for url in (JOBS, WORKERS, f"{detail}change/", machine)
        ),
        admin_client.get(JOBS, {"queue": EVIL}),
        admin_client.get(JOBS, {"q": EVIL}),
        admin_client.post(JOBS, {"_selected_action": job.pk, "action": "cancel"}),
        act(admin_client, "cancel", job),
        admin_client.get(f"{detail}history/"),
        admin_client.get(f"{detail}delete/"),
        admin_client.get(reverse("admin:index")),
    ]

    assert [page.status_code for page in pages] == [200] * len(pages)
    assert not any("<svg onload" in text(page) for page in pages)


def statuses(*jobs: Job) -> list[str]:
    found = Job.objects.in_bulk([job.pk for job in jobs])
    return [str(Status(found[job.pk].status)) for job in jobs]
