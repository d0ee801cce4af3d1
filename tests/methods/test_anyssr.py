"""Any-SSR in runs: routes, a prompt is answered by one adapter alone, earlier adapters stay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_config, run_tiny
from torch import Tensor

from trace_hydra import build, train
from trace_hydra.errors import ConfigError
from trace_hydra.methods.anyssr import AnalyticRouting
from trace_hydra.methods.routing import only_adapters
from trace_hydra.sizes import RunSize
from trace_hydra.stage import StageModule

TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
BASE = ["method=anyssr", "method.expansion=128", f"task_order=[{','.join(TASKS)}]"]
STRONG = [
    *BASE,
    "budget.lr_adapter=0.05",
    "budget.default_epochs=3",
    "data.rows.train=12",
    "protocol.max_prompt_tokens=600",  # nothing is cut
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three stages with adapters that have moved; `starts` tells of the start of each."""
    starts: list[dict[str, Any]] = []
    begin = StageModule.on_train_start

    def watch(module):
        weights = {name: one.clone() for name, one in module.model.state_dict().items()}
        active = list(module.model.base_model.active_adapters)  # type: ignore[union-attr]
        starts.append({"names": set(module.ctx.trainable()), "weights": weights, "active": active})
        begin(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageModule, "on_train_start", watch)
        run = run_tiny(tmp_path_factory.mktemp("anyssr"), STRONG)
    run.starts = starts
    return run


def joint(run) -> tuple[Tensor, Tensor]:
    """R and W of the closed form over the train prompts of all tasks, features taken after the last stage."""
    method = run.method
    parts = [
        method.expand(method.features(run.ctx, [row.prompt for row in run.data.tasks[task].train], ""))
        for task in TASKS
    ]
    rows = torch.cat(parts)
    labels = F.one_hot(torch.repeat_interleave(torch.tensor([len(part) for part in parts])), len(TASKS)).double()
    gram = rows.T @ rows + method.ridge * torch.eye(method.expansion, dtype=torch.float64)
    return torch.linalg.inv(gram), torch.linalg.solve(gram, rows.T @ labels)


def test_the_router_of_a_run_is_the_joint_solution(tiny):
    """After three stages R and W are as if all prompts had been there at once, trained adapters notwithstanding."""
    inverse, weight = joint(tiny)
    assert tiny.method.inverse.dtype == tiny.method.weight.dtype == torch.float64
    assert torch.allclose(tiny.method.inverse, inverse, atol=1e-5)  # features are fp32
    assert torch.allclose(tiny.method.weight, weight, atol=1e-5) and weight.abs().max() > 1e-2


def test_routes_do_not_depend_on_the_order_of_tasks(tiny, tmp_path):
    """Trained the other way round, every prompt goes to the same task."""
    other = run_tiny(tmp_path, [*STRONG, "task_order=[20Minuten,NumGLUE-cm,FOMC]"])
    prompts = [row.prompt for task in TASKS for row in tiny.data.tasks[task].test]
    assert prompts == [row.prompt for task in TASKS for row in other.data.tasks[task].test]
    routes = tiny.method.route(tiny.ctx, prompts, "")
    assert [2 - route for route in other.method.route(other.ctx, prompts, "")] == routes
    assert torch.allclose(other.method.weight.flip(1), tiny.method.weight, atol=1e-6)


def alone(run, adapter: str) -> Any:
    """A new model whose only adapter has the weights that `adapter` has in the run."""
    parts = build.validate(run.config)
    model = parts.tuning.apply(parts.model.load()).eval()
    names = [name for name in run.weights_after if f".{adapter}." in name]
    model.load_state_dict({name.replace(adapter, "default"): run.weights_after[name] for name in names}, strict=False)
    return model


def test_a_routed_prompt_is_answered_by_its_adapter_alone(tiny):
    """Mixed prompts of three tasks: each answer is that of a model with that one adapter, and stands in its place."""
    view = tiny.views["FOMC"]
    prompts = [
        row.prompt for group in zip(*(tiny.data.tasks[task].test for task in TASKS), strict=True) for row in group
    ]
    tiny.ctx.generated.clear()
    answers = tiny.method.answer(tiny.ctx, prompts, view)
    made = [one.text for one in tiny.ctx.generated]
    routes = tiny.method.route(tiny.ctx, prompts, view.instruction)
    assert routes == [0, 1, 2] * 3 and made == answers
    trained, expected = tiny.ctx.model, {}
    try:
        for place, adapter in enumerate(tiny.method.adapters):
            tiny.ctx.model = alone(tiny, adapter)
            expected[place] = tiny.ctx.generate(prompts, view.max_new_tokens, instruction=view.instruction)
    finally:
        tiny.ctx.model = trained
    assert answers == [expected[route][index] for index, route in enumerate(routes)]
    assert len({tuple(one) for one in expected.values()}) == 3  # the adapters do answer differently


def test_before_the_first_task_the_base_model_answers(tiny):
    """Nothing learned: answers are the plain model's, whatever the adapters hold."""
    view, prompts = tiny.views["FOMC"], [row.prompt for row in tiny.data.tasks["FOMC"].test]
    untrained = build.validate(tiny.config)
    answers = untrained.method.answer(tiny.ctx, prompts, view)
    trained, tiny.ctx.model = tiny.ctx.model, untrained.model.load()
    try:
        assert answers == tiny.ctx.generate(prompts, view.max_new_tokens, instruction=view.instruction)
    finally:
        tiny.ctx.model = trained


def test_unseen_text_and_no_text_are_answered(tiny):
    """Each prompt goes to one of the learned tasks; none gives none."""
    prompts = ["", "x", "¿Qué hora es? " * 300, "\U0001f600"]
    assert all(route in range(3) for route in tiny.method.route(tiny.ctx, prompts, ""))
    assert len(tiny.method.answer(tiny.ctx, prompts, tiny.views["FOMC"])) == 4
    assert tiny.method.answer(tiny.ctx, [], tiny.views["FOMC"]) == []


def test_one_new_adapter_is_active_in_each_stage_above_the_frozen_layers(tiny):
    """L_f = ceil(0.125 * 2) = 1: A and B of q_proj and v_proj of layer 1, and B starts at 0."""
    for start, new in zip(tiny.starts, ["default", "stage_2", "stage_3"], strict=True):
        assert start["active"] == [new] and len(start["names"]) == 4
        for name in start["names"]:
            assert ".layers.1." in name and name.endswith(f".{new}.weight")
            assert bool(start["weights"][name].any()) == (".lora_A." in name)
    below = [name for name in tiny.weights_after if ".layers.0." in name and ".lora_" in name]
    assert below and all(".default." in name for name in below)
    assert not any(tiny.weights_after[name].any() for name in below if ".lora_B." in name)


def test_earlier_adapters_and_the_base_stay_bit_identical(tiny):
    """What a stage left is there after all later ones, and it did move."""
    last = tiny.weights_after
    for start, frozen in ((tiny.starts[1], ("default",)), (tiny.starts[2], ("default", "stage_2"))):
        names = [name for name in start["weights"] if name.split(".")[-2] in frozen]
        assert names and all(torch.equal(last[name], start["weights"][name]) for name in names)
    for start, after in zip(tiny.starts, [*(one["weights"] for one in tiny.starts[1:]), last], strict=True):
        assert all(not torch.equal(start["weights"][name], after[name]) for name in start["names"])
    base = [name for name in tiny.weights_before if "lora_" not in name]
    assert base and all(torch.equal(last[name], tiny.weights_before[name]) for name in base)


def reference(run, prompt: str) -> Tensor:
    """Features from all hidden states of the plain model, one prompt without padding."""
    (ids,), _ = run.ctx.encoder.prompts([prompt], "")
    with torch.no_grad():
        states = build.validate(run.config).model.load()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return (states[1] / states[1].square().mean(-1, keepdim=True).sqrt()).mean(1)[0]


def test_features_are_the_base_models_behind_layer_one(tiny):
    """Against output_hidden_states of a model without adapters; a short prompt beside a long one: padding is out."""
    prompts = [tiny.data.tasks["20Minuten"].test[0].prompt, "ab", "", tiny.data.tasks["FOMC"].test[0].prompt]
    found = tiny.method.features(tiny.ctx, prompts, "")
    assert found.dtype == torch.float32
    for prompt, row in zip(prompts, found, strict=True):
        assert torch.allclose(row, reference(tiny, prompt), atol=1e-4)
        assert torch.allclose(row, tiny.method.features(tiny.ctx, [prompt], "")[0], atol=1e-5)


def test_features_ignore_adapters_and_leave_everything_as_it_was(tiny):
    """Blown-up adapters and dropout do not count; random state, mode, what trains, what is active, hooks stay."""
    prompts, model = [row.prompt for row in tiny.data.tasks["FOMC"].test], tiny.ctx.model
    before = tiny.method.features(tiny.ctx, prompts, "")
    trains, active, state = set(tiny.ctx.trainable()), list(model.base_model.active_adapters), torch.get_rng_state()
    weights = [one for name, one in model.named_parameters() if ".lora_B." in name]
    copies = [one.detach().clone() for one in weights]
    ran = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.base_model.model.model.layers)
    ]
    attention = model.base_model.model.model.layers[0].self_attn
    model.train()
    attention.attention_dropout = 0.5
    try:
        with torch.no_grad():
            for one in weights:
                one.fill_(100.0)
        with only_adapters(model, ["default"]):  # the one that has weights in layer 0
            assert torch.equal(tiny.method.features(tiny.ctx, prompts, ""), before)
        assert model.training and set(ran) == {0}  # the layers behind L_f do not run
    finally:
        model.eval()
        attention.attention_dropout = 0.0
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for one, copy in zip(weights, copies, strict=True):
                one.copy_(copy)
    assert torch.equal(torch.get_rng_state(), state) and set(tiny.ctx.trainable()) == trains
    assert list(model.base_model.active_adapters) == active
    assert not any(module._forward_hooks for module in model.base_model.model.model.layers)


def test_what_was_active_comes_back_after_an_error(tiny):
    """Also if an answer fails in the middle; the start adapter's weights below L_f do not begin to train."""
    model = tiny.ctx.model
    for adapter in ("default", "stage_3"):
        tiny.method._activate(model, adapter)
        trains = set(tiny.ctx.trainable())
        assert len(trains) == 4
        with pytest.raises(RuntimeError), only_adapters(model, ["stage_2"]):
            assert list(model.base_model.active_adapters) == ["stage_2"]
            raise RuntimeError
        assert set(tiny.ctx.trainable()) == trains and list(model.base_model.active_adapters) == [adapter]


def test_features_under_bf16_autocast(tiny):
    """Layers in bf16 (8 bits, about 0.4 %), everything behind them in fp32 and fp64: the same routes."""
    prompts = [row.prompt for task in TASKS for row in tiny.data.tasks[task].test]
    exact, routes = tiny.method.features(tiny.ctx, prompts, ""), tiny.method.route(tiny.ctx, prompts, "")
    plain = tiny.ctx.autocast
    tiny.ctx.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    try:
        rough = tiny.method.features(tiny.ctx, prompts, "")
        assert tiny.method.route(tiny.ctx, prompts, "") == routes
    finally:
        tiny.ctx.autocast = plain
    assert rough.dtype == torch.float32 and tiny.method.expand(rough).dtype == torch.float64
    assert 0 < (rough - exact).abs().max() < 0.02


def test_the_expansion_is_drawn_once_for_all(tiny):
    """From the data seed: the same in a new method, another with another seed, never from the global generator."""
    features = torch.eye(32)
    state = torch.get_rng_state()
    fresh = build.validate(tiny.config).method
    assert isinstance(fresh, AnalyticRouting)
    fresh.setup(tiny.ctx)
    assert torch.equal(fresh.expand(features), tiny.method.expand(features))
    assert torch.equal(torch.get_rng_state(), state)
    linear = features @ tiny.method._projection
    assert torch.equal(tiny.method.expand(features), linear.clamp_min(0).double()) and (linear < 0).any()
    fresh.load_state_dict({"adapters": [], "seed": 1})
    assert not torch.equal(fresh.expand(features), tiny.method.expand(features))
    assert float((tiny.method._projection * 32**0.5).std()) == pytest.approx(1, abs=0.05)  # 4096 normal draws


@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_run_continues_to_the_same_matrix(tiny, tmp_path, cut):
    """After stage 2 the method's state and those weights go on that a new model has, after stage 1 the state alone.

    Dropout 0.1 is on, so a moved random state would show.
    """
    weights, *state = tiny.snapshots[cut]
    continued = run_tiny(tmp_path, STRONG, cut=(cut, ({} if cut == 1 else weights, *state)))
    assert tiny.weights_after.keys() == continued.weights_after.keys()
    assert all(torch.equal(one, continued.weights_after[name]) for name, one in tiny.weights_after.items())
    assert tiny.results["matrix"][cut:] == continued.results["matrix"][cut:]
    assert torch.equal(tiny.method.weight, continued.method.weight)


def test_a_restored_run_answers_alike_and_moves_no_randomness(tiny):
    """A new model gets all adapters from the method's state alone; drawing them leaves the random state."""
    view, prompts = tiny.views["FOMC"], [row.prompt for task in TASKS for row in tiny.data.tasks[task].test]
    answers = tiny.method.answer(tiny.ctx, prompts, view)
    fresh = build.validate(tiny.config)
    fresh.method.load_state_dict(tiny.method.state_dict())
    trained, tiny.ctx.model = tiny.ctx.model, fresh.tuning.apply(fresh.model.load()).eval()
    state = torch.get_rng_state()
    try:
        assert fresh.method.answer(tiny.ctx, prompts, view) == answers
        assert torch.equal(torch.get_rng_state(), state)
        weights = tiny.ctx.model.state_dict()
        assert weights.keys() == tiny.weights_after.keys()
        assert all(torch.equal(weights[name], one) for name, one in tiny.method.kept.items())
        assert set(tiny.ctx.trainable()) == tiny.starts[2]["names"]
    finally:
        tiny.ctx.model = trained


def test_state_size_is_what_is_stored(tiny):
    """R 128 x 128 and W 128 x 3 in fp64, 3 adapters of 4 factors 8 x 32 in fp32: 8 * (16384 + 384) + 4 * 3 * 1024."""
    weights = {name: tuple(one.shape) for name, one in tiny.weights_before.items()}
    names = frozenset(name for name in weights if ".lora_" in name)
    zeros = dict.fromkeys(RunSize.__dataclass_fields__, 0)
    size = RunSize(
        **{
            **zeros,
            "weights": weights,
            "trainable": names,
            "rows": [6] * 3,
            "layers": 2,
            "width": 32,
            "weight_bytes": 4,
        }  # type: ignore[arg-type]
    )
    found = tiny.method.state_size(size)
    assert found.stored == 8 * (16384 + 384) + 4 * 3 * 1024
    assert found.device == 4 * 2 * 1024 and found.host == 8 * 16384 + 4 * 128 * 32
    assert found.trained == sum(one.numel() for one in tiny.ctx.trainable().values()) == 1024
    assert found.stored == pytest.approx(1e6 * train.state_mb(tiny.method.state_dict()), rel=0.03)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.frozen_share=0", "method.frozen_share=0"),
        ("method.frozen_share=1", "method.frozen_share=1"),
        ("method.expansion=0", "method.expansion=0"),
        ("method.ridge=0", "method.ridge=0"),
        ("tuning=full", "Use tuning=lora"),
    ],
)
def test_wrong_settings_are_refused(override, message):
    config = compose_config(["model=tiny", "method=anyssr", override])
    assert any(message in problem for problem in build.problems_of(config))


def test_no_layer_left_to_adapt_is_refused(tmp_path):
    """ceil(0.9 * 2) = 2 of 2 layers frozen."""
    with pytest.raises(ConfigError, match=r"freezes 2 of the model's 2 layers.*at most 0\.5"):
        run_tiny(tmp_path, [*BASE, "method.frozen_share=0.9"])
