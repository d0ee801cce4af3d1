"""Loading models from the Hub: what is asked of it, its cache, and repositories out of reach."""

import shutil
from unittest.mock import Mock

import checkpoint_doubles
import pytest
import torch
from checkpoint_doubles import PRETRAINED, build
from transformers import LlamaConfig

from trace_hydra.errors import ConfigError

checkpoints = checkpoint_doubles.checkpoints


def test_configured_hub_ids_are_accepted_without_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for option in PRETRAINED:
        assert build(option).problems() == []


def test_offline_and_not_cached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (problem,) = build("vicuna7b", path="nobody-at-all/nothing").problems()
    assert "is not in the local Hub cache and HF_HUB_OFFLINE forbids" in problem


def test_unreachable_hub_is_asked_once(monkeypatch):
    """from_pretrained would retry for 23 s on each file; ours asks once, with a time limit, then takes the cache."""
    from huggingface_hub import HfApi

    calls = []

    def refuse(self, *args, timeout=None, **kwargs):
        calls.append(timeout)
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    source = build("vicuna7b", path="nobody-at-all/nothing")
    with pytest.raises(ConfigError, match="nobody-at-all/nothing: the Hugging Face Hub cannot be reached"):
        source.load_tokenizer()
    assert calls == [15]


def test_repository_that_is_not_there(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_, **__):
        raise RepositoryNotFoundError("401 Client Error.\n\nRepository Not Found.", response=Mock())

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(ConfigError, match=r"could not load nobody-at-all/nothing: 401 Client Error\. Set model\.path"):
        build("vicuna7b", path="nobody-at-all/nothing").load()


@pytest.mark.parametrize(
    ("held", "fetched"),
    [
        (["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors"], "model*.safetensors"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model*.bin"),
    ],
)
def test_one_format_of_weights_is_downloaded(held, fetched, checkpoints, monkeypatch):
    import huggingface_hub

    asked = []

    def download(path, **settings):
        asked.append((path, settings))
        return str(checkpoints[LlamaConfig])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files = Mock(siblings=[Mock(rfilename=name) for name in held])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    build("vicuna7b", revision="v2").load()
    (path, settings), (_, for_tokenizer) = asked
    assert (path, settings["revision"], settings["local_files_only"]) == ("lmsys/vicuna-7b-v1.5", "v2", False)
    assert {"model*.safetensors", "pytorch_model*.bin"} & set(settings["allow_patterns"]) == {fetched}
    assert not {"model*.safetensors", "pytorch_model*.bin", "*.py"} & set(for_tokenizer["allow_patterns"])


@pytest.mark.parametrize("option", ["llama2_7b_chat", "baichuan2_7b_chat"])
def test_cached_repository_is_loaded_without_network(option, checkpoints, tmp_path, monkeypatch):
    """The Hub client's cache: <cache>/models--owner--name/{refs/main, snapshots/<commit>/<file>}."""
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--name"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoints[LlamaConfig], repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = build(option, path="owner/name")
    assert source.problems() == []
    if option == "baichuan2_7b_chat":  # reads the snapshot, which here is none of its kind
        with pytest.raises(ConfigError, match="holds model_type='llama', not 'baichuan'"):
            source.load()
        return
    assert source.load_tokenizer().pad_token == "<unk>"
    assert source.load().dtype == torch.float32
