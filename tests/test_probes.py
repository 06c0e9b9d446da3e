import os
import time
from http.client import HTTPConnection

import pytest

from async_queue import probes


class Probed:
    def __init__(self, live=True, ready=True):
        self.live, self.ready = live, ready

    def is_live(self):
        return self.live

    def is_ready(self):
        return self.ready


def ask(port, path, method="GET"):
    client = HTTPConnection("127.0.0.1", port, timeout=10)
    client.request(method, path)
    answer = client.getresponse()
    body = answer.read().decode()
    client.close()
    return answer, body


@pytest.mark.parametrize(
    ("path", "live", "ready", "code", "text"),
    [
        ("/live", True, True, 200, "live\n"),
        ("/live", True, False, 200, "live\n"),
        ("/live", False, True, 503, "not live\n"),
        ("/ready", True, True, 200, "ready\n"),
        ("/ready", True, False, 503, "not ready\n"),
        ("/ready", False, True, 503, "not ready\n"),
        ("/ready/?verbose", True, True, 200, "ready\n"),
        ("/", True, True, 404, "ask for /live or /ready\n"),
    ],
)
def test_port_tells_how_the_worker_is(path, live, ready, code, text, capfd):
    with probes.health_port("127.0.0.1", 0, Probed(live, ready)) as port:
        answer, body = ask(port, path)
        head, nothing = ask(port, path, "HEAD")

    assert (answer.status, body) == (code, text)
    assert (head.status, nothing) == (code, "")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "ython" not in answer.headers["Server"]
    assert capfd.readouterr() == ("", "")


def test_port_is_free_again_afterwards():
    with probes.health_port("127.0.0.1", 0, Probed()) as port:
        ask(port, "/live")

    with probes.health_port("127.0.0.1", port, Probed()) as again:
        assert ask(again, "/live")[0].status == 200


def test_port_that_is_taken_is_an_error():
    with (
        probes.health_port("127.0.0.1", 0, Probed()) as port,
        pytest.raises(OSError, match="in use"),
        probes.health_port("127.0.0.1", port, Probed()),
    ):
        pass


def test_client_that_says_nothing_keeps_nobody_waiting():
    with probes.health_port("127.0.0.1", 0, Probed()) as port:
        silent = HTTPConnection("127.0.0.1", port, timeout=10)
        silent.connect()

        assert ask(port, "/live")[0].status == 200

        silent.close()


def test_file_is_touched_and_tells_how_the_worker_is(tmp_path, wait_until):
    path, probed = tmp_path / "heart", Probed(ready=False)
    path.write_text("left over by another program")

    with probes.heartbeat(path, probed, 0.01):
        assert probes.is_live(path, 0.01)
        assert not probes.is_ready(path, 0.01)
        os.utime(path, (0, 0))
        wait_until(lambda: probes.is_live(path, 0.01))
        probed.ready = True
        wait_until(lambda: probes.is_ready(path, 0.01))
        assert path.read_text() == "ready"

    assert not path.exists()
    assert not probes.is_live(path, 0.01)
    assert not probes.is_ready(path, 0.01)


def test_file_of_a_worker_whose_loop_stands_is_left_to_age(tmp_path, wait_until):
    path, probed = tmp_path / "heart", Probed()

    with probes.heartbeat(path, probed, 0.01):
        wait_until(lambda: probes.is_ready(path, 0.01))
        probed.live = False
        wait_until(lambda: not _is_touched(path))

        assert not probes.is_live(path, 0.01)


def _is_touched(path):
    """Whether somebody touches the file while we look twice."""
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    for _ in range(20):
        if probes.is_live(path, 0.01):
            return True
        probes.Event().wait(0.01)
    return False


def test_file_that_cannot_be_written_is_an_error_at_first(tmp_path):
    path = tmp_path / "no" / "heart"

    with pytest.raises(FileNotFoundError), probes.heartbeat(path, Probed(), 0.01):
        pass


def test_file_that_cannot_be_written_later_is_told_of_once(
    tmp_path, wait_until, caplog
):
    folder = tmp_path / "folder"
    folder.mkdir()
    probed = Probed()

    with probes.heartbeat(folder / "heart", probed, 0.01):
        folder.rename(tmp_path / "elsewhere")
        wait_until(lambda: caplog.records)
        folder.mkdir()
        wait_until(lambda: probes.is_ready(folder / "heart", 0.01))

    assert len(caplog.records) == 1
    assert "cannot write the heartbeat file" in caplog.text
