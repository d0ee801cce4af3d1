"""The engine behind an endpoint: what is sent, what replies mean, faults; the server is the tests' own."""

import json
import re
import socket
from typing import Any

import pytest
from chat_server import completion, failure, serving
from engine_doubles import TEXTS, asked, ids_of, openai_engine, tiny
from transformers import PreTrainedTokenizerFast

from trace_hydra.engines.base import ADAPTERS, SOFT_PROMPTS, WEIGHTS, Needs, State
from trace_hydra.engines.openai import text_of
from trace_hydra.errors import EngineError
from trace_hydra.models.generate import Decoding

KEY = "sk-secret-0123456789"
NOTHING = Needs((), "icl-like")


@pytest.fixture(scope="module")
def model():
    return tiny()


def said(text, finish="stop", usage=True):
    """How an endpoint answers a request for a completion."""
    content = {"id": "1", "object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if usage:
        content["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return 200, {}, json.dumps(content).encode()


def echo(number, body):
    return said(f"re: {body['prompt']}")


def once(*first):
    return lambda number, body: first[number] if number < len(first) else echo(number, body)


def test_what_is_sent_and_what_comes_back(model, tmp_path):
    heard = []
    with serving(echo) as server:
        engine = openai_engine(server.url, tmp_path, concurrency=3)
        made = asked(engine, *model, stop=["\n"], on_batch=lambda *numbers: heard.append(numbers))
        bodies = {body["prompt"]: body for body in server.requests}
    assert [one.text for one in made] == [f"re: {text}" for text in TEXTS]
    assert [one.num_prompt for one in made] == [len(ids) for ids in ids_of(model[1])]
    assert {(one.num_new, one.stopped) for one in made} == {(3, True)}
    assert heard and sum(numbers[0] for numbers in heard) == len(TEXTS)
    body = bodies[TEXTS[0]]
    assert body.keys() == {"model", "prompt", "max_tokens", "temperature", "stop"}
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (12, 0.0, ["\n"])
    assert len({one["model"] for one in server.requests}) == 1 and body["model"].startswith(str(tmp_path))


def test_sampling_has_a_seed_for_each_prompt(model, tmp_path):
    seeds = []
    for seed in (1, 1, 2):
        with serving(echo) as server:
            asked(openai_engine(server.url, tmp_path), *model, decoding=Decoding(True, 0.7, 0.9), seed=seed)
            assert {(body["temperature"], body["top_p"]) for body in server.requests} == {(0.7, 0.9)}
            seeds.append({body["prompt"]: body["seed"] for body in server.requests})
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0].values())) == len(TEXTS)


def test_prompts_as_ids_or_in_a_chat(model, tmp_path):
    with serving(lambda number, body: said("yes")) as server:
        asked(openai_engine(server.url, tmp_path, prompts="ids"), *model)
        assert sorted(body["prompt"] for body in server.requests) == sorted(ids_of(model[1]))
    with serving(lambda number, body: completion("yes")) as server:
        made = asked(openai_engine(server.url, tmp_path, prompts="chat"), *model)
        sent = sorted(body["messages"][0]["content"] for body in server.requests)
        assert sent == sorted(TEXTS) and {one.text for one in made} == {"yes"}


def test_limits_and_endpoints_that_do_not_count(model, tmp_path):
    """A length finish is no stop, unless a stop string is there; tokens (bytes here) are counted if nobody says."""
    with serving(lambda number, body: said("abcd", "length", usage=False)) as server:
        engine = openai_engine(server.url, tmp_path)
        assert {(one.num_new, one.stopped) for one in asked(engine, *model)} == {(4, False)}
        assert {one.stopped for one in asked(engine, *model, stop=["c"])} == {True}


TRUNCATED = (200, {}, b'{"id": "1", "choices": [{"index": 0, "te')
SHORT_OF_ITS_LENGTH = (200, {"Content-Length": "5000", "Connection": "close"}, b'{"choices": [')
WITHOUT_TEXT = (200, {}, b'{"choices": [{"index": 0, "finish_reason": "stop"}]}')


@pytest.mark.parametrize(
    "fault",
    [failure(429), failure(500), failure(503), TRUNCATED, SHORT_OF_ITS_LENGTH, WITHOUT_TEXT],
    ids=["429", "500", "503", "truncated", "cut off", "no text"],
)
def test_faults_that_pass_are_retried(model, tmp_path, fault):
    with serving(once(fault, fault)) as server:
        assert len(asked(openai_engine(server.url, tmp_path, concurrency=1), *model)) == len(TEXTS)
        assert len(server.requests) == len(TEXTS) + 2


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (failure(401, "bad key"), ["refuses", "401", "bad key"]),
        (failure(404, "no such model"), ["404", "no such model"]),
        (failure(400, "too long"), ["prompt [0-9] of 8 got no answer", "400", "too long"]),
        (failure(500, "broken"), ["prompt [0-9] of 8 got no answer", "500", "broken"]),
        (TRUNCATED, ["prompt [0-9] of 8 got no answer", "no completion"]),
    ],
    ids=["401", "404", "400", "500", "half an answer"],
)
def test_faults_that_stay_give_no_answers_at_all(model, tmp_path, fault, parts):
    """Seven good replies and one that never comes: nothing is scored."""

    def script(number, body):
        return fault if body["prompt"] == TEXTS[3] else echo(number, body)

    with serving(script) as server, pytest.raises(EngineError) as caught:
        asked(openai_engine(server.url, tmp_path), *model)
    assert all(re.search(part, str(caught.value)) for part in parts)


def test_a_server_that_is_gone_or_silent(model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(EngineError, match=r"engine.base_url=.*cannot be reached"):
        asked(openai_engine(url, tmp_path, retries=0), *model)
    with (
        serving(lambda number, body: None) as server,
        pytest.raises(EngineError, match=r"no reply within engine.timeout_s=0.2 s"),
    ):
        asked(openai_engine(server.url, tmp_path, retries=0, timeout_s=0.2), *model)


def test_the_key_is_sent_and_never_shown(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", KEY)
    with serving(lambda number, body: failure(401, f"wrong key {KEY}")) as server:
        engine = openai_engine(server.url, tmp_path, api_key_env="ENGINE_KEY")
        with pytest.raises(EngineError) as caught:
            asked(engine, *model)
        assert server.keys[0] == f"Bearer {KEY}" and KEY not in str(caught.value)
    assert KEY not in json.dumps(engine.identity())


def test_a_fixed_model_takes_untrained_weights_only(model, tmp_path):
    with serving(echo) as server:
        engine = openai_engine(server.url, tmp_path, model="theirs")
        engine.at(State("start"))
        assert len(asked(engine, *model)) == len(TEXTS) and server.requests[0]["model"] == "theirs"
        for state in (State("stage", frozenset({"lm_head.weight"})), None):
            engine.at(state)
            with pytest.raises(EngineError, match=r"engine.model=theirs .*trained"):
                asked(engine, *model)
    assert not (tmp_path / "drafts").exists()


def test_the_folder_goes_with_the_state(model, tmp_path):
    with serving(echo) as server:
        engine = openai_engine(server.url, tmp_path)
        for state in (State("a"), State("a"), State("b")):
            engine.at(state)
            asked(engine, *model)
        assert len({body["model"] for body in server.requests}) == 2
        engine.at(None)
        assert list((tmp_path / "drafts").iterdir()) == []


def test_problems_are_named_before_anything_is_asked(tmp_path):
    settings = {
        "prompts": "tokens", "retries": -1, "concurrency": 0, "timeout_s": 0.0, "backoff_s": 0.0,
        "api_key_env": "ENGINE_KEY_ABSENT",
    }  # fmt: skip
    found = openai_engine(None, tmp_path / "a@b", **settings).problems(NOTHING)
    named = ["prompts", "retries", "concurrency", "timeout_s", "backoff_s", "base_url", "folder", "api_key_env"]
    assert all(any(f"engine.{key}" in problem for problem in found) for key in named), found
    trained = Needs({WEIGHTS, ADAPTERS}, "ewc-like")
    (problem,) = openai_engine("http://127.0.0.1:9/v1", tmp_path, model="theirs").problems(trained)
    assert "engine.model=theirs" in problem and "method=ewc-like trains" in problem
    (problem,) = openai_engine("http://127.0.0.1:9/v1", tmp_path).problems(Needs({SOFT_PROMPTS}, "pp-like"))
    assert problem.startswith("engine=openai cannot serve method=pp-like, whose answers need soft prompts")
    chat = Needs((), "m", "chat")
    (problem,) = openai_engine("http://127.0.0.1:9/v1", tmp_path, prompts="chat").problems(chat)
    assert "two chat templates" in problem


def test_the_server_is_asked_whether_it_is_there(tmp_path):
    """Nobody there, a key that is refused; a server without a list of models is there."""
    (problem,) = openai_engine("http://127.0.0.1:9/v1", tmp_path).problems(NOTHING)
    assert "engine.base_url=http://127.0.0.1:9/v1 cannot be reached" in problem
    with serving(echo) as server:  # answers GET with 501
        assert openai_engine(server.url, tmp_path).problems(NOTHING) == [] and not server.requests


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    found = openai_engine("http://127.0.0.1:9/v1", tmp_path).problems(NOTHING)
    assert found == ["engine needs the package openai: pip install 'trace-hydra[judge]' (or engine=hf)."]


def test_texts_give_the_same_tokens_again():
    """A tokenizer that adds a beginning token, as Llama's does, and the tiny one, which adds none."""
    from tokenizers.processors import TemplateProcessing

    _, plain = tiny()
    adding = PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    backend: Any = adding._tokenizer
    backend.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    ids = adding("Dogs bark.")["input_ids"]
    assert ids[0] == 1 and text_of(adding, ids) == ("Dogs bark.", True)
    assert text_of(adding, ids[1:]) == ("Dogs bark.", False)  # no text leaves the beginning out


def test_texts_that_do_not_are_counted(model, tmp_path, caplog):
    """The tiny tokenizer never reads special tokens from a text, and half a character is no text."""
    _, tokenizer = model
    half = [tokenizer("ö", add_special_tokens=False)["input_ids"][0]]
    with serving(echo) as server:
        asked(openai_engine(server.url, tmp_path), *model, prompts=[half, *ids_of(tokenizer, ("a", "b"))])
    assert "1 of 3 prompts reach the server as other tokens" in caplog.text
