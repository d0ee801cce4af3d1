"""Engines against each other, the endpoint being transformers' own server: the same prompts, the same answers."""

import json
from unittest.mock import patch

import pytest
from conftest import run_tiny
from engine_doubles import TEXTS, asked, openai_engine, tiny, with_adapters
from engine_server import MISSING, transformers_serve

from trace_hydra.engines.base import State
from trace_hydra.engines.continuous import Continuous
from trace_hydra.engines.handover import write_model
from trace_hydra.engines.hf import HF
from trace_hydra.models import generate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING, reason="needs pip install 'transformers[serving]'"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with transformers_serve(tmp_path_factory.mktemp("server") / "server.log") as base_url:
        yield base_url


class Fallback(HF):
    """`hf` as it is for models that `decode` does not take: transformers' own generation."""

    def generate(self, *arguments, **keywords):
        with patch.object(generate, "attends_to_all", return_value=False):
            return super().generate(*arguments, **keywords)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("name", ["fallback", "continuous", "openai"])
def test_engines_give_the_same_greedy_answers(name, adapters, url, tmp_path):
    """Float32 on a CPU, eight prompts, answers of twelve tokens: all alike, to the letter and the count. The server
    computes with merged adapters."""
    model, tokenizer = tiny()
    model = with_adapters(model) if adapters else model
    engines = {"fallback": Fallback(), "continuous": Continuous(page_size=16), "openai": openai_engine(url, tmp_path)}
    engine = engines[name]
    engine.at(State("one"))
    wanted = asked(HF(), model, tokenizer)
    assert asked(engine, model, tokenizer) == wanted and len({one.text for one in wanted}) == len(TEXTS)
    stop = wanted[0].text[4]
    assert [cut(one.text, stop) for one in asked(engine, model, tokenizer, stop=[stop])] == [
        cut(one.text, stop) for one in wanted
    ]


def cut(text: str, stop: str) -> str:
    return text.split(stop)[0]


RUN = ["method=seqft", "task_order=[FOMC,Py150]", "data.rows.train=4", "data.rows.test=2", "capability=smoke"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_through_the_server_predicts_what_hf_predicts(tuning, url, tmp_path, own_store):
    """Two stages, each with its own folder; none is left, and no answer is shared."""
    runs = {}
    for engine in (["engine=hf"], ["engine=openai", f"engine.base_url={url}", "engine.backoff_s=0.1"]):
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        run = run_tiny(folder, [*RUN, f"tuning={tuning}", f"paths.store={tmp_path / 'store'}", *engine])
        runs[engine[0]] = run
    texts = {
        name: {
            str(path.relative_to(run.directory)): [json.loads(line)["raw"] for line in path.read_text().splitlines()]
            for path in sorted(run.directory.rglob("predictions/**/*.jsonl"))
        }
        for name, run in runs.items()
    }
    assert texts["engine=hf"] == texts["engine=openai"] and len(texts["engine=hf"]) >= 4
    found, other = (run.results for run in runs.values())
    assert found["stages"][0]["key"] == other["stages"][0]["key"]
    assert other["protocol"]["engine"]["base_url"] == url and found["protocol"]["engine"] == {"name": "hf"}
    assert len(list((tmp_path / "store" / "answers").iterdir())) == 2 * len(texts["engine=hf"])
    assert not list((tmp_path / "store" / "drafts").iterdir())


def test_a_model_that_the_server_has_answers_in_context(url, tmp_path):
    """`engine.model` with a method that trains nothing: its own copy of the start model."""
    from conftest import compose_config

    from trace_hydra.targets import instantiate

    source, folder = instantiate(compose_config(["model=tiny"]).model), tmp_path / "theirs"
    folder.mkdir()
    write_model(source.load(), source.load_tokenizer(), folder)
    own = ["method=icl", "tuning=frozen", "task_order=[FOMC,Py150]", "data.rows.train=4", "data.rows.test=2"]
    op = {}
    for engine in (["engine=hf"], ["engine=openai", f"engine.base_url={url}", f"engine.model={folder}"]):
        place = tmp_path / str(len(op))
        place.mkdir()
        op[engine[0]] = run_tiny(place, [*own, *engine]).results["matrix"]
    assert op["engine=hf"] == op["engine=openai"]
