"""Baichuan 2 7B (arXiv:2309.10305) converted to the Llama architecture while it is loaded.

Its checkpoint brings Python code that current transformers cannot run, but holds a Llama with three differences:

- `W_pack`, one (3 * hidden, hidden) matrix, is q, k and v on top of each other: cut apart.
- NormHead: the rows of `lm_head` are scaled to length 1 before use (paper, section 2.3): scaled once here.
- the tokenizer is a bare SentencePiece model: built from its own settings (prefix, white space, byte fallback).

Differs from the original in training: there the rows are rescaled in every forward pass, so that their length never
matters; here they start at length 1 and move freely, as the head of any Llama. Inference is the same.
Baichuan 1 7B (`BaiChuanForCausalLM`) has no NormHead and loads too. The 13B models have ALiBi in place of rotary
positions and are refused.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_hydra.errors import ConfigError
from trace_hydra.models import checkpoint
from trace_hydra.models.load import Pretrained, architecture_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ALIBI_HIDDEN_SIZE = 5120
BYTE, CONTROL, USER_DEFINED = 6, 3, 4
"""Kinds of SentencePiece pieces (sentencepiece_model.proto, ModelProto.SentencePiece.Type)."""
PROBES = ("判断以下文本，A.支持。", "  x = 1\n\n\treturn 12.50 # €", "Größe: „Straße“", " 🤗 a  b ")


class Baichuan(Pretrained):
    """A Baichuan 7B checkpoint, from a folder or the Hub; executes none of its code."""

    def _format_problems(self, folder: Path) -> list[str]:
        try:
            return config_problems(checkpoint.read_json(folder / "config.json"), folder)
        except ValueError as error:
            return [f"{folder / 'config.json'} is no JSON ({error})."]

    def _skeleton_config(self) -> "PretrainedConfig":
        if self.folder is not None and (self.folder / "config.json").is_file():
            return llama_config(checkpoint.read_json(self.folder / "config.json"))
        return architecture_config(self.name, self.architecture)

    def _read_tokenizer(self) -> "PreTrainedTokenizerBase":
        return spm_tokenizer(self._files(weights=False) / "tokenizer.model")

    def _read_model(self) -> "PreTrainedModel":
        import torch
        from transformers import LlamaForCausalLM

        folder = self._files(weights=True)
        source = checkpoint.read_json(folder / "config.json")
        config = llama_config(source)
        state = dict(llama_weights(folder, has_norm_head(source), getattr(torch, self.dtype)))
        loaded: Any = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attn_implementation,
            output_loading_info=True,
        )
        model, report = loaded
        if wrong := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
            raise ConfigError(
                f"model={self.name}: {len(wrong)} weights of {folder} are missing or unknown, {wrong[0]} among them. "
                "It needs the original weights of Baichuan2-7B (neither quantized nor of another size)."
            )
        return model


def config_problems(source: dict[str, Any], folder: Path) -> list[str]:
    """Say why a configuration cannot be converted; empty if it can."""
    if source.get("model_type") != "baichuan":
        return [
            f"model.path={folder} holds model_type={source.get('model_type')!r}, not 'baichuan'. "
            "Choose the model option that fits it."
        ]
    # The 7B models state how many rotary positions they have; the 13B ones, with ALiBi, only model_max_length.
    if source.get("hidden_size") == ALIBI_HIDDEN_SIZE or "max_position_embeddings" not in source:
        return [
            f"model.path={folder} is a 13B Baichuan: it marks positions by ALiBi, which the Llama architecture lacks. "
            "Only the 7B models can be converted."
        ]
    if source.get("quantization_config"):
        return [f"model.path={folder} is quantized; its weights cannot be trained. Use Baichuan2-7B-Chat itself."]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if key not in source]:
        return [f"{folder / 'config.json'} has no {', '.join(missing)}."]
    if source.get("hidden_act", "silu") != "silu":
        return [f"{folder / 'config.json'}: hidden_act={source['hidden_act']!r} is not the silu of Baichuan."]
    return []


def has_norm_head(source: dict[str, Any]) -> bool:
    """Tell Baichuan 2 from Baichuan 1 7B, which spells its class differently and has an ordinary head."""
    return source.get("architectures") != ["BaiChuanForCausalLM"]


def llama_config(source: dict[str, Any]) -> Any:
    """Translate a Baichuan configuration to a `LlamaConfig`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        intermediate_size=source["intermediate_size"],
        num_hidden_layers=source["num_hidden_layers"],
        num_attention_heads=source["num_attention_heads"],
        num_key_value_heads=source["num_attention_heads"],
        max_position_embeddings=source["max_position_embeddings"],
        rms_norm_eps=source.get("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": source.get("rope_theta", 10000.0)},
        tie_word_embeddings=source.get("tie_word_embeddings", False),
        initializer_range=source.get("initializer_range", 0.02),
        pad_token_id=source.get("pad_token_id", 0),
        bos_token_id=source.get("bos_token_id", 1),
        eos_token_id=source.get("eos_token_id", 2),
    )


def llama_weights(folder: Path, norm_head: bool, dtype: Any) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name, weight) under Llama's names, one shard in memory at a time."""
    from torch.nn import functional

    for name, weight in _stored_weights(folder):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a constant that old versions saved
        if name.endswith("self_attn.W_pack.weight"):
            stem = name.removesuffix("W_pack.weight")
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                yield f"{stem}{part}_proj.weight", rows.to(dtype, copy=True)  # copy: else the pack stays in memory
        elif name == "lm_head.weight" and norm_head:
            yield name, functional.normalize(weight.float(), dim=1).to(dtype)
        else:
            yield name, weight.to(dtype)


def _stored_weights(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    import torch
    from safetensors.torch import load_file

    for file in checkpoint.weight_files(folder):
        if file.suffix == ".safetensors":
            shard = load_file(file)
        else:
            shard = torch.load(file, map_location="cpu", weights_only=True)
        yield from shard.items()


def spm_tokenizer(file: Path) -> "PreTrainedTokenizerBase":
    """Build a fast tokenizer from a byte-pair SentencePiece model, following the settings stored in it.

    The result is compared with SentencePiece itself on a few texts; a difference is logged as a warning. With the
    settings of Baichuan 2 (byte fallback, no prefix, white space kept as it is) there is none.

    Raises:
        ConfigError: If the file is missing or of another kind (unigram).
    """
    from transformers import PreTrainedTokenizerFast

    if not file.is_file():
        raise ConfigError(f"{file} does not exist; Baichuan's tokenizer is that file.")
    proto = _read_proto(file)
    if proto.trainer_spec.model_type != 2:
        raise ConfigError(f"{file} is not a byte-pair SentencePiece model, so it is not Baichuan's.")
    tokenizer_config = checkpoint.read_json(file.parent / "tokenizer_config.json")
    pieces = [piece.piece for piece in proto.pieces]
    spec = proto.trainer_spec
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(proto),
        unk_token=pieces[spec.unk_id],
        bos_token=pieces[spec.bos_id],
        eos_token=pieces[spec.eos_id],
        pad_token=pieces[spec.unk_id],
        model_max_length=tokenizer_config.get("model_max_length", 4096),
        chat_template=tokenizer_config.get("chat_template"),
    )
    _warn_if_different(tokenizer, file)
    return tokenizer


def _read_proto(file: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    # The module is made at run time from the message definitions, so type checkers do not see its classes.
    proto = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    proto.ParseFromString(file.read_bytes())
    return proto


def _backend(proto: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    spec, rules = proto.trainer_spec, proto.normalizer_spec
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(proto, vocab),
            unk_token=proto.pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=any(piece.type == BYTE for piece in proto.pieces),
        )
    )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece in proto.pieces:
        if piece.type == CONTROL:
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:  # one with a blank is found only after blanks became "▁"
            backend.add_tokens([AddedToken(piece.piece, normalized="▁" in piece.piece, special=False)])
    return backend


def _merges(proto: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """List the merges that the pieces' scores stand for, best score first.

    SentencePiece joins the neighbours whose union has the best score; a pair is therefore ranked by its union, and
    for one union, pairs of earlier pieces come first.
    """
    ranked = []
    for piece in proto.pieces:
        if piece.type in (BYTE, CONTROL, USER_DEFINED):
            continue
        text = piece.piece
        for cut in range(1, len(text)):
            left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-piece.score, left, right, text[:cut], text[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _warn_if_different(tokenizer: "PreTrainedTokenizerBase", file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(file))
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False).input_ids != original.encode(text):
            log.warning("The tokenizer built from %s cuts %s differently than SentencePiece.", file, json.dumps(text))
