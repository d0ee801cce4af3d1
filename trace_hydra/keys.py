"""Hashes that say whether two numbers, stages or runs answer the same question."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

# Nodes that change neither weights nor scores, so they stay out of the run key.
NOT_IN_RUN_KEY = (
    "paths", "logger", "callbacks", "hydra", "trust", "progress", "cost", "store", "checkpoint", "sweep",
)  # fmt: skip


def digest(value: Any, length: int = 16) -> str:
    """Hash a JSON value: the first `length` hex digits of the SHA-256 of its canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def name_of(config: DictConfig, node: str) -> str:
    """Name a part of the configuration: its `name`, else the class it builds."""
    return str(OmegaConf.select(config, f"{node}.name") or OmegaConf.select(config, f"{node}._target_")).split(".")[-1]


def run_key(config: DictConfig, known: Mapping[str, Any] | None = None) -> str:
    """Hash the resolved configuration without what only says where things lie: 8 hex digits.

    Args:
        config: The run's.
        known: Nodes that hold no interpolation, as plain values, if the caller has them.
    """
    nodes = [str(key) for key in config if key not in NOT_IN_RUN_KEY]
    return digest({key: known[key] if known and key in known else _plain(config, key) for key in nodes}, 8)


def resolved_node(config: DictConfig, key: str) -> Any:
    """Turn a node at the root into plain values; one without a value is "???"."""
    if OmegaConf.is_missing(config, key):
        return MISSING
    found = OmegaConf.select(config, key)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _plain(config: DictConfig, key: str) -> Any:
    # Paths (data.root, model.cache_dir) are interpolations into `paths`; only what they point to matters, and the
    # rows themselves are part of the stage keys. So interpolations into `paths` are kept as they are written.
    node: Any = config._get_node(key)
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()
    resolved = OmegaConf.select(config, key)
    if isinstance(resolved, DictConfig):
        resolved = OmegaConf.to_container(resolved, resolve=True)
    return _keep_paths(raw, resolved)


def _keep_paths(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, str) and "${paths." in raw:
        return raw
    if isinstance(raw, Mapping) and isinstance(resolved, Mapping):
        return {key: _keep_paths(raw.get(key), value) for key, value in resolved.items()}
    return resolved


def protocol_fingerprint(
    protocol: Mapping[str, Any], data: Mapping[str, str], tasks: Mapping[str, Any], template: str
) -> str:
    """Hash how rows become tokens and outputs become scores: 12 hex digits.

    Args:
        protocol: The whole `protocol` node but its name.
        data: Task name -> hash of its test rows (after limits).
        tasks: Task name -> its facts (metric, answer limit, stop strings).
        template: The chat template, "" where prompts are used as they are.
    """
    # Generating is what runs did before there was a choice; their fingerprints stay.
    left_out = [("name", protocol.get("name")), ("closed_answers", "generate")]
    parts = {key: value for key, value in protocol.items() if (key, value) not in left_out}
    return digest({"protocol": parts, "data": dict(data), "tasks": dict(tasks), "template": template}, 12)
