"""A random Llama of a few thousand weights with a byte tokenizer: needs no files, for tests and trying things out."""

from typing import TYPE_CHECKING, Any

from trace_hydra.errors import ConfigError, problem_list
from trace_hydra.models.load import finish_model, meta_model, prepare_tokenizer, setting_problems

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

SPECIALS = ("<|pad|>", "<|begin|>", "<|end|>")
"""Ids 0, 1, 2; the 256 bytes follow."""


class Tiny:
    """The model `tiny`: the same weights for the same seed and sizes, everywhere."""

    def __init__(
        self,
        *,
        name: str,
        seed: int,
        dtype: str,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        attn_implementation: str,
        gradient_checkpointing: bool,
        context_length: int,
        parameters: int,
        published: str | None,
        kernels: str = "torch",
    ):
        """Keep the settings; `hidden_size` must be an even multiple of `num_heads`. The others: `load.Pretrained`."""
        self.name = name
        self.seed = seed
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.context_length = context_length
        self.parameters = parameters
        self.published = published
        self.kernels = kernels

    def problems(self) -> list[str]:
        """List settings that make no model."""
        found = setting_problems(self.dtype, self.attn_implementation)
        if self.num_heads < 1 or self.hidden_size < 1 or self.hidden_size % (2 * self.num_heads):
            found.append(
                f"model.hidden_size={self.hidden_size} must be a multiple of twice model.num_heads={self.num_heads}."
            )
        if self.num_layers < 1:
            found.append(f"model.num_layers={self.num_layers} must be at least 1.")
        return found

    def identity(self) -> dict[str, Any]:
        """Say which weights and tokenizer these are, for the keys of stored results."""
        sizes = (self.hidden_size, self.num_layers, self.num_heads, self.context_length)
        return {"tiny": [self.seed, *sizes], "dtype": self.dtype, "loader": "Tiny"}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Build the tokenizer: one token per UTF-8 byte, so every text comes back exactly.

        Special tokens are never read from a text; a prompt that spells one out stays a string of bytes.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: number for number, token in enumerate([*SPECIALS, *letters])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        pad, begin, end = (AddedToken(token, special=True, normalized=False) for token in SPECIALS)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=pad,
            bos_token=begin,
            eos_token=end,
            split_special_tokens=True,
            model_max_length=self.context_length,
        )
        return prepare_tokenizer(tokenizer, None, self.name)

    def load(self) -> "PreTrainedModel":
        """Build the model on the CPU, in eval mode; the global random state stays as it was."""
        import torch
        from transformers import AutoModelForCausalLM

        if found := self.problems():
            raise ConfigError(problem_list(found))
        tokenizer = self.load_tokenizer()
        config = self._config(len(tokenizer))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also seed every CUDA device.
            torch.default_generator.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=self.attn_implementation)
        model = model.to(getattr(torch, self.dtype))
        return finish_model(model, tokenizer, self.gradient_checkpointing, self.name)

    def skeleton(self) -> "PreTrainedModel":
        """Build the model on torch's meta device: shapes and types without weights."""
        if found := self.problems():
            raise ConfigError(problem_list(found))
        return meta_model(self._config(len(self.load_tokenizer())), self.dtype)

    def local_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Build the tokenizer; it is always at hand."""
        return self.load_tokenizer()

    def _config(self, vocabulary: int) -> "LlamaConfig":
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
