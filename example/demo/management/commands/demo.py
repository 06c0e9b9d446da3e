"""The README's first command: real jobs, a worker killed in the middle, and the proof.

Prepares the site's own var/, works through 120 jobs in child processes, then asks
`demo.claims` whether all that was claimed holds.
"""

import io
import json
import shutil
import signal
import sys
import time
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import connections
from photos.jobs import make_thumbnail
from photos.models import Photo
from PIL import Image
from rates.jobs import refresh
from shop.jobs import schedule_newsletters
from shop.models import Customer, Product

from async_queue import health, schedule_many
from async_queue.models import Job
from demo.claims import claims
from demo.processes import LOGS, Recovery, Workers
from demo.rates_server import RATES, RatesServer

FACTS = settings.VAR / "facts.json"
JOBS = 120
KILL_AFTER = 40
GIVE_UP_AFTER = 60


class Command(BaseCommand):
    help = "Run 120 real jobs, kill a worker in the middle, and check what is claimed."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--verify", action="store_true", help="check the last demo's claims again"
        )
        parser.add_argument(
            "--serve", action="store_true", help="serve the site afterwards"
        )

    def handle(self, *, verify: bool, serve: bool, **options: object) -> None:
        # However it is asked to stop, the demo ends its processes first; also where
        # a shell that put it in the background made it deaf to Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            if not verify:
                self.prepare()
                self.run_jobs()
            self.check_claims()
            if serve:
                self.serve()
        except KeyboardInterrupt:
            self.stderr.write("\ninterrupted; nothing is left running")
            sys.exit(130)

    def prepare(self) -> None:
        clear_var()
        call_command("migrate", verbosity=0)
        self.say(f"migrated {settings.DATABASES['default']['NAME']}")
        Product.objects.create(name="Umbrella", stock=3)
        jobs = [*schedule_mails(), *schedule_thumbnails(), *schedule_refreshes()]
        self.say(f"scheduled {len(jobs)} jobs: 60 mails, 40 thumbnails, 20 rates")

    def run_jobs(self) -> None:
        recovery = Recovery()
        with RatesServer() as server, Workers(RATES_URL=server.url) as processes:
            self.work(processes, recovery)
        self.say(
            "the other worker found out: the first of its jobs ran again "
            f"{recovery.first_after:.2f} s after the kill, all were done after "
            f"{recovery.all_after:.2f} s"
        )
        facts = {"requests": server.requests, "refused": server.refused}
        FACTS.write_text(json.dumps({**facts, "killed": recovery.attempts}))

    def work(self, processes: Workers, recovery: Recovery) -> None:
        """Run two workers, and kill one; the other does what is left."""
        self.say("running them with two workers: manage.py run_workers")
        processes.start()
        processes.start()
        give_up_at = time.monotonic() + GIVE_UP_AFTER
        while unfinished := self.show_progress():
            if time.monotonic() > give_up_at:
                raise CommandError(f"{unfinished} left over\n{processes.last_words()}")
            if not recovery.attempts and JOBS - unfinished >= KILL_AFTER:
                self.kill_one(processes, recovery)
            elif not processes.running():
                processes.start()
            recovery.look()
            time.sleep(0.02)
        recovery.look()

    def kill_one(self, processes: Workers, recovery: Recovery) -> None:
        if pid := recovery.kill_one(processes):
            jobs = " and ".join(f"job {pk}" for pk in recovery.attempts)
            self.clear_line()
            self.say(f"killed worker {pid} with SIGKILL while it held {jobs}")

    def show_progress(self) -> int:
        """Return how many jobs are not finished yet; draw the bar on a terminal."""
        unfinished = Job.objects.live().count()
        if self.stdout.isatty():
            done = JOBS - unfinished
            bar = ("#" * (done // 3)).ljust(JOBS // 3, ".")
            self.stdout.write(f"\r  [{bar}] {done}/{JOBS}", ending="")
            self.stdout.flush()
            if not unfinished:
                self.stdout.write("")
        return unfinished

    def clear_line(self) -> None:
        if self.stdout.isatty():
            self.stdout.write("\r".ljust(JOBS // 3 + 14) + "\r", ending="")

    def check_claims(self) -> None:
        if not FACTS.exists():
            raise CommandError("there is nothing to check: no demo has come to its end")
        broken = 0
        for text, holds in claims(json.loads(FACTS.read_text())):
            self.stdout.write(f"  {mark(holds)} {text}")
            broken += not holds
        self.say("health(): " + summary(health()))
        if broken:
            raise CommandError(f"{broken} of the claims did not hold")

    def serve(self) -> None:
        if not User.objects.filter(username="admin").exists():
            User.objects.create_superuser("admin", password="admin")
        self.say("the admin at /admin/ knows a user admin with the password admin")
        call_command("runserver", use_reloader=False)

    def say(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()


def clear_var() -> None:
    """Remove what an earlier demo left, and nothing else that may lie there."""
    connections.close_all()
    for path in (*settings.VAR.glob("db.sqlite3*"), FACTS):
        path.unlink(missing_ok=True)
    for folder in (settings.OUTBOX, settings.MEDIA_ROOT, LOGS):
        shutil.rmtree(folder, ignore_errors=True)
    LOGS.mkdir()


def schedule_mails() -> list[Job]:
    addresses = (f"customer{number}@shop.example" for number in range(60))
    Customer.objects.bulk_create(Customer(email=address) for address in addresses)
    return schedule_newsletters(Customer.objects.all())


def schedule_thumbnails() -> list[Job]:
    photos = [Photo(image=draw_photo(number)) for number in range(40)]
    for photo in photos:
        photo.save()
    return schedule_many([(make_thumbnail, [photo.pk], {}) for photo in photos])


def draw_photo(number: int) -> ContentFile:
    """Draw two gradients across each other, each photo in a size of its own."""
    size = (1200 + 16 * number, 1200)
    across = Image.linear_gradient("L").resize(size)
    bands = (across.rotate(90).resize(size), across, Image.new("L", size, 6 * number))
    written = io.BytesIO()
    Image.merge("RGB", bands).save(written, "JPEG")
    return ContentFile(written.getvalue(), name=f"{number}.jpg")


def schedule_refreshes() -> list[Job]:
    return schedule_many([(refresh, [currency], {}) for currency in RATES])


def mark(holds: bool) -> str:
    marks = "✓✗" if "utf" in (sys.stdout.encoding or "").lower() else "+-"
    return marks[0 if holds else 1]


def summary(found: dict[str, Any]) -> str:
    queue, errors = found["queue"], found["errors"]
    checks = [check for (check,) in found["checks"].values()]
    reasons = [check["output"] for check in checks if check["status"] != "pass"]
    counts = (
        f"{found['status']}; {queue['executed']} of {queue['all-jobs']} jobs executed,"
        f" {queue['remaining']} remaining, {errors['number']} failed attempts"
    )
    return "\n  ".join([counts, *reasons])
