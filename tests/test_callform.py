import sys

import pytest

from async_queue.callform import call_form
from tests import jobs

ESCAPE, ESCAPED = "a\n\x1b[2Jb", r"a\n\x1b[2Jb"


def test_call_is_shown_as_it_would_be_written():
    assert call_form("shop.pay", "[3]", '{"to":"x"}') == "shop.pay(3, to='x')"


@pytest.mark.parametrize("args", ["[]", "nonsense"])
def test_function_is_shown_on_one_line(args):
    shown = call_form(ESCAPE, args, "{}")

    assert shown.startswith(f"{ESCAPED}(")
    assert shown.isprintable()


def test_names_of_keywords_are_shown_on_one_line():
    shown = call_form("shop.pay", "[]", r'{"a\n\u001b[2Jb":"\n\u001b"}')

    assert shown == rf"shop.pay({ESCAPED}='\n\x1b')"


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ('["ann","1234"]', "{}", "'ann', ***"),
        ('["ann"]', '{"password":"1234"}', "'ann', password=***"),
        ('["ann","1234","more"]', "{}", "'ann', ***, 'more'"),
        ('[{"password":"1234"}]', "{}", "{'password': ***}"),
    ],
)
def test_secrets_of_a_job_function_are_hidden_wherever_they_stand(
    args, kwargs, expected
):
    function = f"{jobs.__name__}.login"

    assert call_form(function, args, kwargs) == f"{function}({expected})"


def test_nothing_is_imported_for_a_function_that_is_not_registered(
    tmp_path, monkeypatch
):
    (tmp_path / "callform_canary.py").write_text("def sing(password): ...\n")
    monkeypatch.syspath_prepend(tmp_path)

    shown = call_form("callform_canary.sing", '["1234"]', "{}")

    assert shown == "callform_canary.sing('1234')"
    assert "callform_canary" not in sys.modules
