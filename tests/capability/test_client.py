"""The chat client against an endpoint of the test's own: order, cache, faults, key."""

import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from chat_server import client, completion, failure, question, serving
from conftest import ROOT

from trace_hydra.capability import asking as module
from trace_hydra.capability.endpoint import _retry_after
from trace_hydra.errors import CapabilityError

KEY = "sk-secret-0123456789"


def echo(number, body):
    return completion("re: " + body["messages"][-1]["content"])


def once(*first):
    """Answer the first requests as given, later ones with an echo."""
    return lambda number, body: first[number] if number < len(first) else echo(number, body)


def asked(count):
    return [question(f"question {number}") for number in range(count)]


def test_replies_come_in_order_whatever_the_order_of_answers(tmp_path):
    """Four at a time; the first question is answered only after the replies to the others were heard of."""
    others = threading.Event()

    def script(number, body):
        if body["messages"][0]["content"] == "question 0":
            others.wait(10)
        return echo(number, body)

    heard = []

    def hear(index, reply):
        heard.append(index)
        if len(heard) == 3:
            others.set()

    with serving(script) as server:
        replies = client(server.url, tmp_path, concurrency=4).ask(asked(4), hear)
        sent = {(body["model"], body["temperature"], body["max_tokens"]) for body in server.requests}
    assert sent == {("some-model", 0.0, 10)}
    assert [reply.text for reply in replies] == [f"re: question {number}" for number in range(4)]
    assert sorted(heard) == [0, 1, 2, 3] and heard[3] == 0
    assert [(reply.input_tokens, reply.output_tokens, reply.cached) for reply in replies] == [(100, 10, False)] * 4


def test_concurrency_bounds_the_requests_at_a_time(tmp_path):
    pair = threading.Barrier(2)

    def script(number, body):
        pair.wait(10)
        return echo(number, body)

    with serving(script) as server:
        client(server.url, tmp_path, concurrency=2).ask(asked(6))
        assert server.most_at_once == 2


def test_a_second_ask_sends_nothing(tmp_path):
    with serving(echo) as server:
        first = client(server.url, tmp_path).ask(asked(3))
        again = client(server.url, tmp_path, concurrency=3, retries=0, requests_per_minute=99.0).ask(asked(4))
        assert len(server.requests) == 4
    assert [reply.text for reply in again[:3]] == [reply.text for reply in first]
    assert [reply.cached for reply in again] == [True, True, True, False]


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 11}])
def test_judge_and_parameters_are_part_of_the_cache(tmp_path, change):
    with serving(echo) as server:
        client(server.url, tmp_path).ask(asked(1))
        client(server.url, tmp_path, **change).ask(asked(1))
        assert len(server.requests) == 2


def test_equal_questions_are_asked_once_and_a_variant_anew(tmp_path):
    with serving(echo) as server:
        chat = client(server.url, tmp_path)
        heard = []
        replies = chat.ask([question("a"), question("b"), question("a")], lambda *one: heard.append(one[0]))
        assert [reply.text for reply in replies] == ["re: a", "re: b", "re: a"] and sorted(heard) == [0, 1, 2]
        assert len(server.requests) == 2
        chat.ask([question("a")], variant=1)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"request": {}, "reply": {"text": "wrong", "input_tokens": 1, "output_tokens": 1}}']
)
def test_a_damaged_entry_is_asked_anew(tmp_path, damage):
    with serving(echo) as server:
        client(server.url, tmp_path).ask(asked(1))
        (entry,) = tmp_path.rglob("*.json")
        entry.write_bytes(damage)
        assert client(server.url, tmp_path).ask(asked(1))[0].text == "re: question 0"
        assert len(server.requests) == 2
        assert client(server.url, tmp_path).ask(asked(1))[0].cached


TRUNCATED = (200, {}, b'{"id": "1", "choices": [{"index": 0, "mess')
SHORT_OF_ITS_LENGTH = (200, {"Content-Length": "5000", "Connection": "close"}, b'{"choices": [')
ERROR_IN_A_REPLY = (200, {}, b'{"error": {"message": "overloaded"}}')


@pytest.mark.parametrize(
    "fault",
    [failure(429), failure(500), failure(503), TRUNCATED, SHORT_OF_ITS_LENGTH, ERROR_IN_A_REPLY, (200, {}, b"<html>")],
    ids=["429", "500", "503", "truncated", "cut off", "error in a reply", "html"],
)
def test_faults_that_pass_are_retried(tmp_path, fault):
    with serving(once(fault, fault)) as server:
        (reply,) = client(server.url, tmp_path).ask(asked(1))
        assert reply.text == "re: question 0" and len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "part"),
    [(failure(500, "broken"), "500: .*broken"), (TRUNCATED, "no chat completion"), (failure(429), "answers with 429")],
    ids=["500", "truncated", "429"],
)
def test_a_fault_that_stays_loses_the_reply_but_not_the_others(tmp_path, fault, part, caplog):
    def script(number, body):
        return fault if body["messages"][0]["content"] == "question 1" else echo(number, body)

    with serving(script) as server:
        replies = client(server.url, tmp_path).ask(asked(3))
        assert len(server.requests) == 5  # two good ones, and one with two retries
    assert [reply.text for reply in replies] == ["re: question 0", None, "re: question 2"]
    assert re.search(part, str(replies[1].error))
    assert "1 of 3 replies were lost" in caplog.text
    assert len(list(tmp_path.rglob("*.json"))) == 2  # a lost reply is asked anew next time


def test_silence_is_cut_off_and_retried(tmp_path):
    with serving(once(None)) as server:
        (reply,) = client(server.url, tmp_path, timeout_s=0.3).ask(asked(1))
        assert reply.text == "re: question 0" and len(server.requests) == 2
    with serving(lambda *_: None) as server:
        (reply,) = client(server.url, tmp_path / "other", timeout_s=0.1, retries=1).ask(asked(1))
        assert reply.text is None and "judge.timeout_s=0.1" in str(reply.error) and len(server.requests) == 2


def test_retry_after_is_waited_for(tmp_path):
    """The second request must not come before the second the endpoint asked for; backoff alone is 0.01 s."""
    arrivals = []

    def script(number, body):
        arrivals.append(time.monotonic())
        return failure(429, headers={"Retry-After": "1"}) if number == 0 else echo(number, body)

    with serving(script) as server:
        assert client(server.url, tmp_path).ask(asked(1))[0].text
    assert arrivals[1] - arrivals[0] >= 0.99


def test_retry_after_is_read_as_seconds_or_date_and_a_day_is_too_long(tmp_path):
    assert _retry_after({"retry-after": "2.5"}) == 2.5
    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert _retry_after({"retry-after": "soon"}) is None and _retry_after({}) is None
    with serving(lambda *_: failure(429, "daily quota", {"Retry-After": "86400"})) as server:
        assert "daily quota" in str(client(server.url, tmp_path).ask(asked(1))[0].error)
        assert len(server.requests) == 1


def test_backoff_doubles(tmp_path, monkeypatch):
    """0.05 s times 1, 2, 4, 8 without jitter: the fifth request comes at least 0.75 s after the first."""
    monkeypatch.setattr(module._JITTER, "uniform", lambda low, high: 1.0)
    arrivals = []

    def script(number, body):
        arrivals.append(time.monotonic())
        return failure(500) if number < 4 else echo(number, body)

    with serving(script) as server:
        client(server.url, tmp_path, retries=4, backoff_s=0.05).ask(asked(1))
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert all(gap >= 0.05 * 2**place for place, gap in enumerate(gaps)) and len(gaps) == 4


def test_pace_spreads_requests_and_a_wait_holds_for_all(monkeypatch):
    """600 a minute are 0.1 s apart; behind a Retry-After of 5 s the next comes then, the one after it 0.1 s
    later. The clock stands still at 100 s."""
    waits = []
    session = module.Session("test", retries=2, backoff_s=0.01, requests_per_minute=600)
    monkeypatch.setattr(module.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(session.halted, "wait", lambda seconds: waits.append(round(seconds, 6)))
    assert all(session._wait_turn() for _ in range(4))
    assert waits == [0.0, 0.1, 0.2, 0.3]
    session._back_off(0, module.Fault("retry", "busy", wait_s=5.0))
    assert all(session._wait_turn() for _ in range(2))
    assert waits[4:] == [5.0, 5.0, 5.1]


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (failure(401, "bad key"), ["refuses", "JUDGE_KEY", "401", "bad key"]),
        (failure(403, "not yours"), ["refuses", "403"]),
        (failure(404, "no such model"), ["judge.model=some-model", "judge.base_url=http://127.0.0.1", "404"]),
        (failure(429, "pay", code="insufficient_quota"), ["quota", "429"]),
    ],
    ids=["401", "403", "404", "quota"],
)
def test_refusals_stop_all_and_keep_what_was_answered(tmp_path, monkeypatch, fault, parts):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda number, body: echo(number, body) if number < 2 else fault) as server:
        chat = client(server.url, tmp_path, api_key_env="JUDGE_KEY")
        with pytest.raises(CapabilityError) as caught:
            chat.ask(asked(9))
        assert len(server.requests) == 3  # not retried, nothing asked after it
        (problem,) = client(server.url, tmp_path, api_key_env="JUDGE_KEY").problems()
    for part in [*parts, "2 of 9 requests were answered", str(tmp_path)]:
        assert part in str(caught.value)
    assert all(part in problem for part in parts)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_bad_request_loses_one_conversation_without_retries(tmp_path):
    with serving(once(failure(400, "too long"))) as server:
        replies = client(server.url, tmp_path).ask(asked(2))
        assert len(server.requests) == 2
    assert replies[0].text is None and "too long" in str(replies[0].error) and replies[1].text


def test_the_limit_is_renamed_for_models_that_want_it(tmp_path):
    def script(number, body):
        if "max_tokens" in body:
            return failure(400, "Use 'max_completion_tokens' instead.")
        return echo(number, body)

    with serving(script) as server:
        chat = client(server.url, tmp_path, retries=0)
        assert chat.ask(asked(2))[1].text == "re: question 1"
        assert ["max_completion_tokens" in body for body in server.requests] == [False, True, True]
        assert client(server.url, tmp_path, temperature=None).problems() == []
        assert "temperature" not in server.requests[-1]


def test_a_refusal_is_a_reply(tmp_path):
    with serving(lambda *_: completion(None, refusal="I will not judge this.")) as server:
        assert client(server.url, tmp_path).ask(asked(1))[0].text == "I will not judge this."


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_endpoint_that_is_down_stops_soon(tmp_path):
    """Eight conversations lost in a row, not all thirty with all their retries."""
    chat = client(f"http://127.0.0.1:{closed_port()}/v1", tmp_path, retries=1)
    assert "cannot be reached" in chat.problems()[0] and "judge.base_url" in chat.problems()[0]
    lost = []
    with pytest.raises(CapabilityError, match=r"8 requests in a row were lost.*cannot be reached"):
        chat.ask(asked(30), lambda index, reply: lost.append(reply.text))
    assert lost == [None] * 8
    (reply,) = chat.ask(asked(1))
    assert reply.text is None and "cannot be reached" in str(reply.error)


def test_a_question_is_asked_before_the_run_and_only_once(tmp_path):
    with serving(echo) as server:
        chat = client(server.url, tmp_path)
        assert chat.problems() == [] and chat.problems() == []
        assert len(server.requests) == 1 and not list(tmp_path.rglob("*.json"))


def test_wrong_settings_are_named_and_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serving(echo) as server:
        chat = client(
            server.url,
            tmp_path,
            api_key_env="JUDGE_KEY",
            retries=-1,
            concurrency=0,
            timeout_s=0,
            backoff_s=-1,
            requests_per_minute=0,
            max_usd=1.0,
            usd_per_million_input=3.0,
        )
        found = "\n".join(chat.problems())
        with pytest.raises(CapabilityError, match="retries=-1"):
            chat.ask(asked(1))
        assert server.requests == []
    for part in ("retries=-1", "concurrency=0", "timeout_s=0", "backoff_s=-1", "requests_per_minute=0", "JUDGE_KEY"):
        assert part in found
    assert "max_usd=1 needs judge.usd_per_million_input and judge.usd_per_million_output" in found


def test_missing_package_is_named(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openai" else real(name, *rest)
    )
    (problem,) = client("http://127.0.0.1:1/v1", tmp_path).problems()
    assert "pip install 'trace-hydra[judge]'" in problem


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host:80", "http://me:pass@host/v1", "http://host/v1?key=pass", "http://"]
)
def test_addresses_are_plain(tmp_path, url):
    (problem,) = client(url, tmp_path).problems()
    assert "base_url" in problem and "pass" not in problem.replace("password", "")


def test_the_key_is_sent_and_shows_up_nowhere(tmp_path, monkeypatch, caplog):
    """An endpoint that repeats the key in errors and in replies."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def script(number, body):
        if number == 0:
            return failure(500, f"cannot use {KEY}")
        return completion(f"your key is {KEY}") if number < 3 else failure(401, f"wrong key: {KEY}")

    with serving(script) as server:
        chat = client(server.url, tmp_path, api_key_env="JUDGE_KEY")
        replies = chat.ask(asked(2))
        with pytest.raises(CapabilityError) as caught:
            chat.ask(asked(4))
        problems = chat.problems()
        assert set(server.keys) == {f"Bearer {KEY}"}
    seen = [caplog.text, str(caught.value), repr(replies), *problems, json.dumps(chat.identity()), repr(vars(chat))]
    seen += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert "cannot use <api key>" in caplog.text and "wrong key: <api key>" in problems[0]
    assert len(seen) == 8 and not any(KEY in text for text in seen)


def test_without_a_key_variable_no_key_of_the_environment_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(echo) as server:
        client(server.url, tmp_path).ask(asked(1))
        assert server.keys == ["Bearer none"]


SCRIPT = """
import sys
sys.path.insert(0, "tests")
from chat_server import client, question
client(sys.argv[1], sys.argv[2]).ask([question(f"question {number}") for number in range(6)])
"""


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """Killed while the fourth of six requests is under way: three replies are kept, three are asked."""
    fourth = threading.Event()

    def script(number, body):
        if number == 3:
            fourth.set()
            return None
        return echo(number, body)

    with serving(script) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, server.url, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert fourth.wait(60)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        replies = client(server.url, tmp_path).ask(asked(6))
        assert len(server.requests) == 4 + 3
    assert [reply.cached for reply in replies] == [True] * 3 + [False] * 3
    assert [reply.text for reply in replies] == [f"re: question {number}" for number in range(6)]
