"""What asking costs: the estimate before, and the limit that is never passed."""

import pytest
from chat_server import client, completion, question, serving

from trace_hydra.capability.client import Estimate
from trace_hydra.capability.replies import num_tokens
from trace_hydra.errors import CapabilityError

PRICES = {"usd_per_million_input": 10_000.0, "usd_per_million_output": 20_000.0}
"""0.01 USD a token of input, 0.02 a token of output."""


def answer(number, body):
    return completion("fine", num_in=6, num_out=2)


def test_tokens_are_a_third_of_the_bytes_and_four_a_message():
    """9 bytes: 3 + 4; 10 bytes: 4 + 4; one Chinese character has three bytes: 1 + 4."""
    assert num_tokens(question("a" * 9)) == 7
    assert num_tokens(question("a" * 10)) == 8
    assert num_tokens([*question("判"), *question("a")]) == 10


def test_estimate_by_hand(tmp_path):
    """Three questions of 9 bytes, one of them twice, one in the cache: one request of 7 tokens and at most 10 back,
    7 * 0.01 + 10 * 0.02 = 0.27 USD."""
    texts = ["a" * 9, "b" * 9, "b" * 9]
    with serving(answer) as server:
        chat = client(server.url, tmp_path, **PRICES)
        chat.ask([question("a" * 9)])
        found = chat.estimate([question(text) for text in texts])
        assert len(server.requests) == 1
    assert found.usd == pytest.approx(0.27)
    assert (found.requests, found.cached, found.input_tokens, found.output_tokens_at_most) == (1, 2, 7, 10)
    free = client("http://127.0.0.1:1/v1", tmp_path / "empty").estimate([question(text) for text in texts])
    assert free == Estimate(requests=2, cached=1, input_tokens=14, output_tokens_at_most=20, usd=None)


@pytest.mark.parametrize(("limit", "sent"), [(0.57, 4), (0.56, 3), (0.27, 1), (0.26, 0), (0.0, 0)])
def test_asking_stops_before_the_limit_would_be_passed(tmp_path, limit, sent):
    """A request may cost 7 * 0.01 + 10 * 0.02 = 0.27 and costs 6 * 0.01 + 2 * 0.02 = 0.10, so the n-th is sent if
    0.1 (n - 1) + 0.27 <= limit: n = 4 for 0.57, 3 for 0.56."""
    with serving(answer) as server:
        chat = client(server.url, tmp_path, max_usd=limit + 1e-9, **PRICES)
        with pytest.raises(CapabilityError, match=rf"judge\.max_usd.*{sent} of 9 requests were answered") as caught:
            chat.ask([question(str(number) * 9) for number in range(9)])
        assert len(server.requests) == sent and len(list(tmp_path.rglob("*.json"))) == sent
        assert chat.budget.spent == pytest.approx(0.1 * sent) and f"{0.1 * sent:.4f} USD are spent" in str(caught.value)


def test_threads_share_the_limit_and_use_it_up(tmp_path):
    """Four at a time and a limit of 1.00: as one at a time, 0.1 (n - 1) + 0.27 <= 1 lets eight through, as a thread
    waits for what the others leave over."""
    with serving(answer) as server:
        chat = client(server.url, tmp_path, max_usd=1.0 + 1e-9, concurrency=4, **PRICES)
        with pytest.raises(CapabilityError, match="max_usd"):
            chat.ask([question(chr(97 + number) * 9) for number in range(12)])
        assert len(server.requests) == 8 and chat.budget.spent == pytest.approx(0.8)


def test_a_larger_limit_goes_on_from_the_cache(tmp_path):
    with serving(answer) as server:
        questions = [question(str(number) * 9) for number in range(3)]
        with pytest.raises(CapabilityError):
            client(server.url, tmp_path, max_usd=0.3, **PRICES).ask(questions)
        replies = client(server.url, tmp_path, max_usd=1.0, **PRICES).ask(questions)
        assert len(server.requests) == 3 and [reply.cached for reply in replies] == [True, False, False]


def test_an_unreadable_reply_counts_as_paid(tmp_path):
    """The whole 0.27, twice; 500 s cost nothing."""
    faults = [(200, {}, b"{"), (200, {}, b"{"), (500, {}, b"{}")]
    with serving(lambda number, body: faults[number] if number < 3 else answer(number, body)) as server:
        chat = client(server.url, tmp_path, max_usd=5.0, retries=3, **PRICES)
        assert chat.ask([question("a" * 9)])[0].text == "fine"
    assert chat.budget.spent == pytest.approx(2 * 0.27 + 0.10)


def test_usage_that_is_missing_is_estimated(tmp_path):
    """7 tokens in, "fine" is 2 + 4 tokens out: 0.07 + 0.12 USD."""
    with serving(lambda *_: (200, {}, b'{"choices": [{"message": {"content": "fine"}}]}')) as server:
        chat = client(server.url, tmp_path, max_usd=5.0, **PRICES)
        (reply,) = chat.ask([question("a" * 9)])
    assert (reply.input_tokens, reply.output_tokens) == (7, 6) and chat.budget.spent == pytest.approx(0.19)
