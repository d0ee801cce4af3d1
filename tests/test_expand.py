"""Jobs of a sweep that are composed together come out as if Hydra had composed each by itself."""

import random
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from trace_hydra import entry, expand, schema

CHOICES = [
    "method=seqft", "method=ewc", "method=lwf", "method=olora", "method=agem", "method=l2p", "tuning=lora",
    "tuning=full",
    "seed='0'", "seed='1'", "seed='3'", "model=tiny", "model=smollm2", "debug=smoke", "debug=null", "debug=cost",
    "experiment=trace_seqft_llama2_7b_chat", "task_order=random", "task_order=reversed", "data=smoke", "data=trace",
    "logger=none", "logger=csv", "capability=none", "capability=safety", "protocol=official", "budget=paper", "~logger",
    "~judge=none", "evaluation=all", "+method@spare=ewc",
]  # fmt: skip
VALUES = [
    "seed.train=7", "seed.data=0", "seed.train=${budget.batch_size}", "optim.optimizer.lr=1e-4",
    "optim.warmup_ratio=0.5",
    "optim.optimizer.lr=${budget.lr_adapter}", "budget.batch_size=4", "budget={batch_size:8,micro_batch_size:2}",
    "budget.epochs={FOMC:3}", "budget.epochs.FOMC=2", "++budget.epochs.Py150=5", "+budget.epochs={ScienceQA:1}",
    "task_order.tasks=[FOMC,Py150]", "task_order.name=custom", "protocol.decoding.max_new_tokens=3",
    "protocol.decoding.max_new_tokens=null", "protocol={decoding:{stop:false}}", "paths.runs=/elsewhere/runs",
    "paths.data=${paths.runs}/data", "paths.store=/elsewhere", "+note='a text, quoted: ${seed.train}'",
    "+note=[1,2,{a:b}]",
    "++note.deep.er=1", "~optim.schedule", "~callbacks", "~protocol.name", "trust.targets=[mine.]",
    "cost={device_gb:1}",
    "on_oom=halve", "on_nonfinite=${on_oom}", "sweep.fail_fast=true", "+trainer.max_time=null", "store.keep=last",
    "capability.when=[1,2]", "model.name='with \\'quotes\\''", "method.name=other", "data.name=''", "data=null",
]  # fmt: skip
ALONE = [
    "hydra.sweep.subdir=${hydra.job.num}", "hydra.job.name=other", "hydra/launcher=basic",
    "paths.runs=runs/${hydra.job.num}",
    "+note=${hydra:job.num}", "+note=${hydra:runtime.choices.method}", "paths.runs=${now:%Y}",
]  # fmt: skip
"""What jobs cannot share."""


@pytest.fixture
def hydra():
    """A sweep's own loader and configuration, as on the command line."""
    made = []

    def make(*overrides: str):
        version.setbase("1.3")
        GlobalHydra.instance().clear()
        schema.register()
        entry.register_resolvers()
        one = Hydra.create_main_hydra2("trace_hydra", create_config_search_path(str(ROOT / "conf")))
        made.append(one)
        master = one.compose_config("config", list(overrides), RunMode.MULTIRUN, with_log_configuration=False)
        return one.config_loader, master

    before = HydraConfig.instance().cfg
    yield make
    HydraConfig.instance().cfg = before
    GlobalHydra.instance().clear()


def alone(loader, master: DictConfig, overrides: list[str], number: int) -> DictConfig:
    """Compose a job as Hydra's launcher does."""
    config = loader.load_sweep_config(master, overrides)
    with open_dict(config):
        config.hydra.job.num = number
        config.hydra.job.id = str(number)
    HydraConfig.instance().set_config(config)
    return config


def seen(config: DictConfig) -> tuple:
    """All of a configuration but `hydra`: as written, resolved (or why not), types, and the job's folder."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    raw.pop("hydra")
    whole = config.copy()
    with open_dict(whole):
        del whole["hydra"]
    return list(raw), raw, _or_error(lambda: OmegaConf.to_container(whole, resolve=True)), folder_of(config)


def folder_of(config: DictConfig):
    return _or_error(lambda: [str(OmegaConf.select(config, f"hydra.sweep.{key}")) for key in ("dir", "subdir")])


def _or_error(get):
    try:
        return get()
    except OmegaConfBaseException as error:
        return type(error).__name__


def varied(count: int) -> list[list[str]]:
    """Lists of overrides, the same at every call; groups are chosen from few, so that many jobs share."""
    rng = random.Random(0)
    lists = []
    for _ in range(count):
        one = rng.sample(CHOICES, rng.randint(0, 2)) + rng.sample(VALUES, rng.randint(0, 4))
        one += rng.sample(ALONE, 1) if rng.random() < 0.1 else []
        rng.shuffle(one)
        lists.append(one)
    return lists


def test_jobs_come_out_as_hydra_composes_each(hydra, tmp_path):
    """Some thirty lists of choices and values; those that Hydra refuses are refused with the same words."""
    loader, master = hydra()
    composer = expand.Composer(loader, master)
    refused = fine = 0
    each = [[], *([one] for one in (*CHOICES, *VALUES, *ALONE))][::3]
    for number, overrides in enumerate([*each, *varied(10)]):
        try:
            wanted = seen(alone(loader, master, overrides, number))
        except Exception as error:  # noqa: BLE001 - Hydra raises more than its own
            with pytest.raises(type(error)) as other, composer.job(overrides, number):
                pass
            assert str(other.value) == str(error) and str(other.value.__cause__) == str(error.__cause__), overrides
            refused += 1
            continue
        with composer.job(overrides, number) as config:
            assert seen(config) == wanted, overrides
        fine += 1
    assert fine > 20 and refused > 1


def test_what_outlasts_a_job_is_its_resolved_configuration_and_its_folder(hydra):
    loader, master = hydra()
    lists = [one for one in [*varied(12), [], *([one] for one in ALONE)] if not _refused(loader, master, one)]
    found = expand.Composer(loader, master).jobs(lists)
    compared = 0
    for number, (overrides, one) in enumerate(zip(lists, found, strict=True)):
        keys, raw, resolved, folder = seen(alone(loader, master, overrides, number))
        assert [str(one.folder), one.subdir] == [str(Path(folder[0]).absolute()), folder[1]], overrides
        if isinstance(resolved, dict):
            assert one.config == resolved and list(one.config) == keys, overrides
            compared += 1
        else:
            assert OmegaConf.to_container(one.config, resolve=False) == raw, overrides
    assert compared > 12


def _refused(loader, master, overrides) -> bool:
    try:
        config = alone(loader, master, overrides, 0)
    except Exception:  # noqa: BLE001
        return True
    return isinstance(folder_of(config), str)


def test_overrides_of_hydra_hold_for_every_job(hydra, tmp_path):
    loader, master = hydra(f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=j-${hydra.job.num}-${seed.train}")
    found = expand.Composer(loader, master).jobs([["seed.train=1"], ["seed.train=2"]])
    assert [(one.folder, one.subdir) for one in found] == [(tmp_path, "j-0-1"), (tmp_path, "j-1-2")]


def test_a_job_leaves_nothing_for_the_next(hydra):
    """Values, removed and added keys, values through interpolations: each job is afterwards what it was before."""
    loader, master = hydra()
    composer = expand.Composer(loader, master)
    lists = [[], ["+note.a=1"], ["~optim"], ["seed.train=5"], ["+spare={stop:true}", "protocol.decoding='${spare}'"]]
    lists += [["+spare={stop:true}", "protocol.decoding='${spare}'", "protocol.decoding.stop=false"], []]
    found = []
    for number, overrides in enumerate([*lists, *lists]):
        with composer.job(overrides, number) as config:
            found.append(seen(config))
    assert found[: len(lists)] == found[len(lists) :]
    assert found[0] == seen(alone(loader, master, [], 0))


def parsed_files(monkeypatch, composer, lists) -> list[str]:
    source = SourcesRegistry.instance().resolve("file")
    read, inner = [], source.load_config

    def load(one, config_path):
        read.append(f"{one.path}/{config_path}")
        return inner(one, config_path)

    with monkeypatch.context() as patched:
        patched.setattr(source, "load_config", load)
        composer.jobs(lists)
    return read


def test_files_are_parsed_once_however_many_jobs_there_are(hydra, monkeypatch):
    loader, master = hydra()
    methods = ("seqft", "ewc")
    few = [[f"method={name}", "optim.optimizer.lr=1"] for name in methods]
    many = [[f"method={name}", f"optim.optimizer.lr={rate}"] for name in methods for rate in range(40)]
    files = parsed_files(monkeypatch, expand.Composer(loader, master), few)
    assert len(files) == len(set(files)) > 20
    assert sorted(parsed_files(monkeypatch, expand.Composer(loader, master), many)) == sorted(files)


def test_jobs_that_differ_in_values_share_one_composition(hydra, monkeypatch):
    loader, master = hydra()
    composer = expand.Composer(loader, master)
    made, inner = [], expand._Loader.load_sweep_config
    monkeypatch.setattr(
        expand._Loader, "load_sweep_config", lambda one, *given: made.append(given[1]) or inner(one, *given)
    )
    lists = [[f"seed.train={number % 50}", f"method={'ewc' if number < 100 else 'lwf'}"] for number in range(200)]
    found = composer.jobs(lists)
    assert made == [["method=ewc"], ["method=lwf"]]
    assert [one.config["seed"]["data"] for one in found[:3]] == [0, 1, 2]
