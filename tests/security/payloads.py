"""Hostile configurations: where they stand, what they say, and whether plain "import and call" would run them.

`CANARY` in a text stands for a path that must not come to exist; `PICKLE` for a pickle that would make it.
"""

from dataclasses import dataclass
from typing import Any

COMMAND = "touch CANARY"
SYSTEM = {"_target_": "os.system", "command": COMMAND}
SEQFT = "trace_hydra.methods.seqft.SeqFT"


@dataclass(frozen=True)
class Payload:
    """A node to put at a key.

    Args:
        place: Key in the configuration.
        node: Its value.
        says: Key path that the refusal must name; "": `place`.
        live: Whether a naive instantiation makes the canary, which is tested.
        options: Overrides before.
    """

    place: str
    node: Any
    says: str = ""
    live: bool = False
    options: tuple[str, ...] = ()


def named(target: Any, /, **keywords: Any) -> dict[str, Any]:
    return {"_target_": target, **keywords}


def args(target: str, /, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    return {"_target_": target, "_args_": list(arguments), **keywords}


X = "callbacks.extra"
JUDGED = ("capability=instruction",)

PAYLOADS: dict[str, Payload] = {
    # the standard library
    "system": Payload(X, SYSTEM, live=True),
    "system by its other name": Payload(X, named("posix.system", command=COMMAND), live=True),
    "run": Payload(X, named("subprocess.run", args=["touch", "CANARY"]), live=True),
    "popen": Payload(X, named("subprocess.check_call", args=["touch", "CANARY"]), live=True),
    "eval": Payload(X, args("builtins.eval", "open('CANARY', 'w')"), live=True),
    "exec": Payload(X, args("builtins.exec", "open('CANARY', 'w')"), live=True),
    "open": Payload(X, named("builtins.open", file="CANARY", mode="w"), live=True),
    "io": Payload(X, named("io.open", file="CANARY", mode="w"), live=True),
    "mkdir": Payload(X, named("os.mkdir", path="CANARY"), live=True),
    "symlink": Payload(X, named("os.symlink", src="/etc", dst="CANARY"), live=True),
    "copy": Payload(X, named("shutil.copyfile", src="PICKLE", dst="CANARY"), live=True),
    "write_text": Payload(X, args("pathlib.Path.write_text", named("pathlib.Path", _args_=["CANARY"]), "x"), live=True),
    "runpy": Payload(X, named("runpy.run_path", path_name="CANARY")),
    "import_module": Payload(X, named("importlib.import_module", name="antigravity")),
    "logging config": Payload(X, named("logging.config.dictConfig", config={"version": 1})),
    "timeit": Payload(X, named("timeit.timeit", stmt="open('CANARY', 'w')", number=1), live=True),
    # pickles
    "pickle": Payload(X, args("pickle.load", named("builtins.open", file="PICKLE", mode="rb")), live=True),
    "torch.load": Payload(X, named("torch.load", f="PICKLE", weights_only=False), live=True),
    "numpy.load": Payload(X, named("numpy.load", file="PICKLE", allow_pickle=True), live=True),
    # allowed packages that hold what can do harm
    "lightning's own instantiation": Payload(
        X,
        named(
            "lightning.pytorch.cli.instantiate_class",
            args=COMMAND,
            init={"class_path": "os.system"},
        ),
        live=True,
    ),
    "lightning checkpoint": Payload(X, named("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="CANARY")),
    "lightning lambda": Payload(X, named("lightning.pytorch.callbacks.LambdaCallback", setup={**SYSTEM})),
    "lightning progress": Payload(X, named("lightning.pytorch.callbacks.TQDMProgressBar")),
    "lightning logger": Payload("logger.x", named("lightning.pytorch.loggers.CSVLogger", save_dir="CANARY")),
    "lightning profiler": Payload(
        "trainer.profiler", named("lightning.pytorch.profilers.AdvancedProfiler", dirpath="CANARY")
    ),
    "lightning loads": Payload("trainer", named("lightning.pytorch.LightningModule.load_from_checkpoint")),
    "lightning seeds": Payload("trainer", named("lightning.pytorch.seed_everything", _partial_=True)),
    "trainer's globals": Payload("trainer", named("lightning.pytorch.Trainer.fit.__globals__", _partial_=True)),
    "base optimizer": Payload("optim.optimizer", named("torch.optim.Optimizer", _partial_=True)),
    "scheduler": Payload("optim.optimizer", named("torch.optim.lr_scheduler.LambdaLR", _partial_=True)),
    "module in optim": Payload("optim.optimizer", named("torch.optim.swa_utils.torch.load", _partial_=True)),
    "locate": Payload(X, named("trace_hydra.targets.locate", target="os.system")),
    "our instantiation": Payload(X, named("trace_hydra.targets.instantiate", node={**SYSTEM}), live=True),
    "our files": Payload(X, named("trace_hydra.files.write_json", content={}, path="CANARY")),
    "our report": Payload(X, named("trace_hydra.report.results.clear", directory="CANARY")),
    "our run": Payload("method", named("trace_hydra.run.run")),
    "our download": Payload("model", named("trace_hydra.models.checkpoint.fetch", path="x/y")),
    "our command line": Payload("judge", named("trace_hydra.capability.__main__.main", arguments=[])),
    "re-exported Path": Payload("model", named("trace_hydra.models.load.Path")),
    "module in a model": Payload("model", named("trace_hydra.models.checkpoint.os.system", command=COMMAND), live=True),
    "module in files": Payload(X, named("trace_hydra.files.os.system", command=COMMAND), live=True),
    "module in loggers": Payload("logger.x", named("trace_hydra.loggers.os.system", command=COMMAND), live=True),
    "module in callbacks": Payload(X, named("trace_hydra.callbacks.matrix.io.open", file="CANARY", mode="w")),
    "helper in loggers": Payload("logger.x", named("trace_hydra.loggers.open_loggers", _partial_=True)),
    "method's globals": Payload("method", named(f"{SEQFT}.__init__.__globals__")),
    "method's class": Payload("method", named(f"{SEQFT}.__class__")),
    "method's subclasses": Payload("method", named(f"{SEQFT}.__subclasses__")),
    "private function": Payload("logger.x", named("trace_hydra.loggers._remove", folders=["CANARY"])),
    # a thing of ours in another thing's place
    "method as callback": Payload(X, named(SEQFT)),
    "data as model": Payload("model", named("trace_hydra.data.mini.MiniData")),
    "model as data": Payload("data", named("trace_hydra.models.tiny.Tiny")),
    "protocol as judge": Payload("judge", named("trace_hydra.capability.judge.Chat")),
    "set as judge": Payload("judge", named("trace_hydra.capability.mini.Mini")),
    "base method": Payload("method", named("trace_hydra.methods.base.Method")),
    # names that only look like names
    "Cyrillic o": Payload(X, named("\u043es.system", command=COMMAND)),
    "Cyrillic a": Payload("method", named("trace_hydr\u0430.methods.seqft.SeqFT")),
    "full width": Payload(X, named("\uff4fs.system", command=COMMAND)),
    "zero width": Payload("method", named(f"trace_hydra\u200b{SEQFT.removeprefix('trace_hydra')}")),
    "space before": Payload("method", named(f" {SEQFT}")),
    "space behind": Payload("method", named(f"{SEQFT} ")),
    "line end": Payload("method", named(f"{SEQFT}\n")),
    "dot before": Payload(X, named(".os.system", command=COMMAND)),
    "two dots": Payload("method", named("trace_hydra..methods.seqft.SeqFT")),
    "colon": Payload(X, named("os:system", command=COMMAND)),
    "NUL": Payload("method", named(f"{SEQFT}\0")),
    "path": Payload(X, named("../os.system", command=COMMAND)),
    "call": Payload("method", named(f"{SEQFT}()")),
    "prefix alone": Payload("method", named("trace_hydra.methods.")),
    "longer package": Payload("method", named("trace_hydra_evil.methods.X")),
    "empty": Payload(X, named("")),
    "null": Payload(X, named(None)),
    "number": Payload(X, named(7)),
    "list": Payload(X, named(["os", "system"])),
    "target in target": Payload(X, named({**SYSTEM})),
    # places inside other things
    "trainer.callbacks": Payload("trainer.callbacks", [SYSTEM], "trainer.callbacks[0]", live=True),
    "trainer.plugins": Payload("trainer.plugins", [[SYSTEM]], "trainer.plugins[0][0]", live=True),
    "trainer.strategy": Payload("trainer.strategy", SYSTEM, live=True),
    "trainer.logger": Payload("trainer.logger", SYSTEM, live=True),
    "in settings": Payload("logger.wandb.settings", {"a": {"b": SYSTEM}}, "logger.wandb.settings.a.b", live=True),
    "in tags": Payload("logger.wandb.tags", ["x", SYSTEM], "logger.wandb.tags[1]", live=True),
    "in a set": Payload("capability.sets.mini.kinds", [SYSTEM], "capability.sets.mini.kinds[0]", live=True),
    "a set": Payload("capability.sets.own", SYSTEM, live=True),
    "a set's judge": Payload("capability.sets.helpful.judge", SYSTEM, live=True, options=JUDGED),
    "the judge": Payload("judge", SYSTEM, live=True),
    "the judge's model": Payload("judge.model", SYSTEM, live=True, options=("judge=local",)),
    "the judge's model, through a set": Payload(
        "judge.model", SYSTEM, "capability.sets.helpful.judge.model", options=("judge=local", *JUDGED)
    ),
    "architecture": Payload("model.architecture", SYSTEM, live=True, options=("model=vicuna7b",)),
    "task facts": Payload("data.tasks.Own", SYSTEM, live=True),
    "betas": Payload("optim.optimizer.betas", [0.9, SYSTEM], "optim.optimizer.betas[1]", live=True),
    "tasks": Payload("task_order.tasks", ["FOMC", SYSTEM], "task_order.tasks[1]", live=True),
    "adapter's modules": Payload(
        "tuning.target_modules", [SYSTEM], "tuning.target_modules[0]", options=("tuning=lora",)
    ),
    # names that are not there yet
    "interpolation": Payload("callbacks", {"a": "os.system", "extra": named("${callbacks.a}")}, X),
    "pieces": Payload("callbacks", {"a": "os", "extra": named("${callbacks.a}.system", command=COMMAND)}, X),
    "environment": Payload(X, named("${oc.env:HOSTILE_TARGET}", command=COMMAND)),
    "default of the environment": Payload(X, named("${oc.env:NOT_THERE,os.system}", command=COMMAND)),
    "decoded": Payload("callbacks.extra", "${oc.decode:'{_target_: os.system, command: touch CANARY}'}"),
    "created": Payload("callbacks.extra", "${oc.create:{_target_: os.system, command: touch CANARY}}"),
    "values": Payload("trainer.callbacks", "${oc.dict.values:hidden}", "trainer.callbacks[0]"),
    # switches
    "partial": Payload(X, {**SYSTEM, "_partial_": True}),
    "partial text": Payload("method", named(SEQFT, _partial_="yes")),
    "partial method": Payload("method", named(SEQFT, _partial_=True)),
    "whole logger": Payload("logger.x", named("trace_hydra.loggers.csv_logger", run="x")),
    "positional": Payload("method", args(SEQFT, 1)),
    "not recursive": Payload("method", named(SEQFT, _recursive_=False)),
    "convert": Payload("method", named(SEQFT, _convert_="object")),
    "dunder argument": Payload("method", named(SEQFT, __class__="x")),
}
