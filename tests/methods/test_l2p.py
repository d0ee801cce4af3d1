"""L2P: keys learn, the nearest are chosen by cosine, and the chosen prompts stand before the row in generation."""

from unittest.mock import patch

import pytest
import torch
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.context import StageContext, batch_of
from trace_hydra.errors import ConfigError
from trace_hydra.methods.l2p import L2P
from trace_hydra.models.forward import lm_loss
from trace_hydra.models.prompts import virtual_tokens, with_prefix

TASKS = "task_order=[FOMC,NumGLUE-cm]"
GOOD = {
    "pool_size": 10, "prompt_length": 5, "top_k": 3, "strength": 0.5, "query": "hidden", "query_rows": 8,
}  # fmt: skip


@pytest.fixture(scope="module", params=["hidden", "embedding"])
def run(request, tmp_path_factory):
    return run_tiny(tmp_path_factory.mktemp("l2p"), ["method=l2p", TASKS, f"method.query={request.param}"])


def test_the_nearest_keys_are_chosen_by_cosine(run):
    """Reference: cosine by its definition, sorted; directions count, lengths do not."""
    keys = virtual_tokens(run.ctx.model).others["pool_keys"].detach()
    queries = torch.randn(7, keys.shape[1], generator=torch.Generator().manual_seed(0))
    chosen, best = run.method.select(run.ctx, queries)
    for row, query in enumerate(queries):
        cosine = [float(query @ key / (query.norm() * key.norm())) for key in keys]
        wanted = sorted(range(len(keys)), key=lambda number: -cosine[number])[:3]
        assert chosen[row].tolist() == wanted
        assert best[row].tolist() == pytest.approx([cosine[number] for number in wanted], abs=1e-6)
    assert run.method.select(run.ctx, queries * 5)[0].tolist() == chosen.tolist()


def test_keys_learn(run):
    """The keys that were chosen have come nearer to the rows' queries than they began."""
    assert run.terms[1]["keys"] > 0
    view = run.views["NumGLUE-cm"]
    rows = batch_of(run.ctx.encode(view.train), "cpu")
    mask = rows["attention_mask"] * (rows["labels"] == -100)
    queries = run.method.queries(run.ctx, rows["input_ids"], mask)
    tokens = virtual_tokens(run.ctx.model)
    _, best_after = run.method.select(run.ctx, queries)
    fresh = run_fresh_keys(run)
    with patch.dict(tokens.others._parameters, {"pool_keys": fresh}):
        _, best_before = run.method.select(run.ctx, queries)
    assert float(best_after.detach().mean()) > float(best_before.detach().mean())


def run_fresh_keys(run):
    """The keys as `setup` draws them, in a model loaded anew."""
    from trace_hydra.live import reseed

    model = build.validate(run.config).tuning.apply(build.validate(run.config).model.load())
    reseed(run.config.seed.train, 0)
    context = type("Context", (), {"model": model, "tuning": run.parts.tuning, "device": torch.device("cpu")})()
    L2P(**GOOD).setup(context)  # type: ignore[arg-type]
    return virtual_tokens(model).others["pool_keys"]


def test_the_distance_is_summed_over_the_chosen_and_weighted(run):
    """Eq. 5 by hand: strength x mean over rows of the sum over top_k of 1 - cosine; its gradient moves keys only."""
    rows = batch_of(run.ctx.encode(run.views["FOMC"].train[:3]), "cpu")
    terms = run.method.losses(run.ctx, rows)
    mask = rows["attention_mask"] * (rows["labels"] == -100)
    queries = run.method.queries(run.ctx, rows["input_ids"], mask)
    keys = virtual_tokens(run.ctx.model).others["pool_keys"]
    cosine = (queries / queries.norm(dim=1, keepdim=True)) @ (keys / keys.norm(dim=1, keepdim=True)).T
    wanted = 0.5 * (1 - cosine.sort(descending=True).values[:, :3]).sum(1).mean()
    assert float(terms["keys"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    terms["keys"].backward()
    tokens = virtual_tokens(run.ctx.model)
    assert tokens.tables["pool"].grad is None and bool((keys.grad != 0).any())
    keys.grad = None


def test_only_chosen_prompts_get_a_gradient_and_stand_in_order(run):
    """The loss is that of the row behind the chosen prompts, best first."""
    row = batch_of(run.ctx.encode(run.views["FOMC"].train[:1]), "cpu")
    tokens = virtual_tokens(run.ctx.model)
    terms = run.method.losses(run.ctx, row)
    mask = row["attention_mask"] * (row["labels"] == -100)
    chosen, _ = run.method.select(run.ctx, run.method.queries(run.ctx, row["input_ids"], mask))
    ids = [tokens.first + 5 * number + place for number in chosen[0].tolist() for place in range(5)]
    wanted = lm_loss(run.ctx.model, with_prefix(row, torch.tensor(ids)))
    assert float(terms["lm"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    terms["lm"].backward()
    moved = (tokens.tables["pool"].grad.view(10, 5, -1) != 0).flatten(1).any(1)
    assert moved.nonzero()[:, 0].tolist() == sorted(chosen[0].tolist())
    tokens.tables["pool"].grad = tokens.others["pool_keys"].grad = None


def test_chosen_prompts_reach_generation(run):
    """`answer` hands to `generate` the ids of the prompts that a row alone would choose, however rows are batched."""
    view, given = run.views["FOMC"], {}
    prompts = [example.prompt for example in view.train] + ["", "x"]
    original = StageContext.generate

    def watch(self, prompts, *arguments, **keywords):
        given[len(prompts)] = [*given.get(len(prompts), []), keywords["prefixes"]]
        return original(self, prompts, *arguments, **keywords)

    with patch.object(StageContext, "generate", watch):
        run.method.answer(run.ctx, prompts, view)
        for prompt in prompts:
            run.method.answer(run.ctx, [prompt], view)
    together, alone = given[len(prompts)][0], [one[0] for one in given[1]]
    assert together == alone and all(len(ids) == 15 for ids in together)


def test_the_query_is_of_the_frozen_model(run):
    """Training moved prompts and keys; queries are those of the start model."""
    model = build.validate(run.config).model.load()
    rows = batch_of(run.ctx.encode(run.views["FOMC"].train[:2]), "cpu")
    mask = rows["attention_mask"] * (rows["labels"] == -100)
    found = run.method.queries(run.ctx, rows["input_ids"], mask)
    for row in range(2):
        ids = rows["input_ids"][row, : int(mask[row].sum())].unsqueeze(0)
        if run.method.query == "hidden":
            wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        else:
            wanted = model.get_input_embeddings()(ids)[0].mean(0)
        assert torch.allclose(found[row], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("pool_size", 0), ("prompt_length", 0), ("top_k", 0), ("top_k", 11), ("strength", -0.1), ("query_rows", 0)],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}"):
        L2P(**{**GOOD, key: value})


def test_other_tunings_are_refused_before_loading():
    problems = build.problems_of(compose_config(["method=l2p", "tuning=full", "model=tiny"]))
    assert any("tuning=full" in one and "Use tuning=prompt" in one for one in problems)
