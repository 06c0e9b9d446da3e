"""The example site, run as a newcomer runs it, in a folder of the test's own."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MANAGE = Path(__file__).resolve().parent.parent / "example" / "manage.py"

pytestmark = pytest.mark.skipif(
    os.environ.get("DB", "sqlite") != "sqlite",
    reason="the example brings its own database; once is enough",
)


def start(var: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command of the site as the first process of a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(MANAGE), *arguments],
        env={**os.environ, "EXAMPLE_VAR": str(var), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(var: Path, *arguments: str) -> tuple[int, str]:
    with start(var, *arguments) as process:
        printed, _ = process.communicate(timeout=80)
    return process.returncode, printed


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the demo was run, twice, and what it printed the second time."""
    var = tmp_path_factory.mktemp("var")
    for _ in range(2):
        code, printed = run(var, "demo")
        assert code == 0, printed
    return var, printed


def test_the_demo_holds_its_claims_and_may_be_repeated(shown: tuple[Path, str]) -> None:
    _, printed = shown

    assert printed.count("✓") == 8
    assert "✗" not in printed
    assert "with SIGKILL while it held job" in printed


def remove_a_mail(var: Path) -> None:
    next((var / "outbox").glob("*.eml")).unlink()


def shrink_a_thumbnail(var: Path) -> None:
    small, *_, large = sorted((var / "media/thumbnails").glob("*.jpg"), key=size)
    shutil.copy(small, large)


def size(path: Path) -> int:
    return path.stat().st_size


def sql(statement: str) -> Callable[[Path], None]:
    def change(var: Path) -> None:
        with sqlite3.connect(var / "db.sqlite3") as database:
            database.execute(statement)
        database.close()

    return change


BREAKAGES = {
    "jobs are SUCCESSFUL": sql("UPDATE async_queue_job SET status='FAILED' WHERE id=1"),
    "none twice": remove_a_mail,
    "rows record them, each mail": sql(
        "INSERT INTO shop_delivery (message_id, email, sent_at)"
        " SELECT message_id, email, sent_at FROM shop_delivery LIMIT 1"
    ),
    "thumbnails of the right size": shrink_a_thumbnail,
    "rows record them, each thumbnail": sql(
        "UPDATE photos_thumbnail SET photo_id = 1 WHERE photo_id = 2"
    ),
    "rates as they were served": sql("UPDATE rates_rate SET per_euro=9 WHERE id=1"),
    "requests were refused": sql("DELETE FROM async_queue_attempt"),
    "held by the killed worker": sql("UPDATE async_queue_job SET attempt = 1"),
}


@pytest.mark.parametrize("claim", BREAKAGES)
def test_a_broken_claim_is_found(
    claim: str, shown: tuple[Path, str], tmp_path: Path
) -> None:
    var = shutil.copytree(shown[0], tmp_path / "var")
    BREAKAGES[claim](var)

    code, printed = run(var, "demo", "--verify")

    assert code == 1
    assert any("✗" in line and claim in line for line in printed.splitlines())


def test_an_interrupted_demo_leaves_nothing_running(
    tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    with start(tmp_path, "demo") as demo:
        wait_until(lambda: any((tmp_path / "outbox").glob("*.eml")))
        demo.send_signal(signal.SIGINT)
        printed, _ = demo.communicate(timeout=30)

    assert demo.returncode == 130, printed
    assert is_gone(demo.pid)


def test_the_site_passes_its_own_tests(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "test", "shop")

    assert code == 0, printed
