"""Base weights in 4 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

KINDS = ("nf4",)


def quantization_problems(quantization: str | None) -> list[str]:
    """List why weights cannot be quantized here."""
    if quantization is None:
        return []
    if quantization not in KINDS:
        return [f"model.quantization={quantization!r} is none of null, {', '.join(KINDS)}."]
    if find_spec("bitsandbytes") is None:
        return [f"model.quantization={quantization} needs bitsandbytes: pip install 'trace-hydra[qlora]'."]
    import torch

    if not torch.cuda.is_available():  # on a CPU its layers, once they answered, pass no gradient on
        return [f"model.quantization={quantization} needs a GPU, and there is none. Set model.quantization=null."]
    return []


def quantization_arguments(quantization: str | None, dtype: str) -> dict[str, Any]:
    """Give what `from_pretrained` takes: NormalFloat with quantized constants (section 3), computing in `dtype`."""
    if quantization is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": settings}
