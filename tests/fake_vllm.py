"""The few classes of vLLM that the engine uses, on transformers: enough to see what it hands over.

Like vLLM it starts without weights, forgets them when it sleeps deeply, keeps answers of prefixes until told otherwise,
and reads an adapter once by its number.
"""

import sys
import types
from pathlib import Path
from typing import Any

import torch


class SamplingParams:
    max_tokens: int
    stop_token_ids: list[int]
    stop: list[str] | None
    temperature: float

    def __init__(self, **settings: Any):
        known = {"max_tokens", "stop_token_ids", "stop", "include_stop_str_in_output", "temperature", "top_p", "seed"}
        assert settings.keys() <= known
        self.__dict__.update(settings)


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str):
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    made: list["LLM"] = []  # noqa: RUF012

    def __init__(self, *, model: str, load_format: str, **settings: Any):
        import os

        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        assert load_format == "dummy" and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert not list(Path(model).glob("*.safetensors"))
        torch.manual_seed(0)  # as vLLM does in this process
        self.settings, self.loads, self.calls = settings, 0, []
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        with torch.random.fork_rng():
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.adapters: dict[int, Any] = {}
        self.prefixes: dict[tuple[Any, ...], list[int]] = {}
        LLM.made.append(self)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights" and "weights" not in self.asleep()
        own = self.model.state_dict()
        weights = dict(kwargs["weights_iterator"])
        assert weights.keys() == own.keys()
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        self.loads += 1

    def asleep(self) -> set[str]:
        tags: set[str] = set()
        for name, value in self.calls:
            tags = {"weights", "kv_cache"} if name == "sleep" else tags - set(value) if name == "wake_up" else tags
        return tags

    def sleep(self, *, level: int) -> None:
        assert level == 2 and self.settings["enable_sleep_mode"] and not self.asleep()
        self.calls.append(("sleep", level))
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(float("nan"))
        self.adapters.clear()
        self.prefixes.clear()

    def wake_up(self, *, tags: list[str]) -> None:
        assert self.asleep() >= set(tags)
        self.calls.append(("wake_up", tags))

    def reset_prefix_cache(self) -> None:
        self.prefixes.clear()

    def generate(self, prompts: list[Any], params: list[SamplingParams], *, use_tqdm: bool, lora_request: Any):
        assert not self.asleep() and len(prompts) == len(params) and not use_tqdm
        return [
            self._answer(one["prompt_token_ids"], own, lora_request) for one, own in zip(prompts, params, strict=True)
        ]

    def _answer(self, ids: list[int], params: SamplingParams, lora: LoRARequest | None) -> Any:
        key = (tuple(ids), lora and lora.lora_int_id, params.max_tokens, tuple(params.stop or ()))
        if key not in self.prefixes:
            self.prefixes[key] = self._tokens(ids, params, lora)
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(self.prefixes[key]))])

    def _tokens(self, ids: list[int], params: SamplingParams, lora: LoRARequest | None) -> list[int]:
        from peft import PeftModel

        assert params.temperature == 0.0
        model = self.model
        if lora is not None:
            assert self.settings["enable_lora"] and self.settings["max_lora_rank"] in (8, 16, 32, 64)
            if lora.lora_int_id not in self.adapters:
                from copy import deepcopy

                self.adapters[lora.lora_int_id] = PeftModel.from_pretrained(deepcopy(model), lora.lora_path).eval()
            model = self.adapters[lora.lora_int_id]
        new: list[int] = []
        while len(new) < params.max_tokens:
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            if new[-1] in params.stop_token_ids or any(one in text for one in params.stop or ()):
                break
        return new


def installed(monkeypatch: Any) -> type[LLM]:
    """Put it where vLLM would be."""
    from trace_hydra.engines import vllm as engine

    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=TokensPrompt)
    request.__dict__.update(LoRARequest=LoRARequest)
    for name, module in (("vllm", package), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine, "find_spec", lambda name: object())
    monkeypatch.setattr(LLM, "made", [])
    return LLM
