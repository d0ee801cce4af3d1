"""Sequential fine-tuning (Wang et al. 2023, arXiv:2310.06762, section 4.1: SeqFT, and with tuning=lora LoraSeqFT).

Paper -> code:  cross-entropy on the answer, appendix .1 -> `Method.losses`, with nothing against forgetting
Differs from official TRACE: the optimizer is new in every stage (there one lives through all tasks,
    training/main.py:437-461; optim.carry=true does that).
Memory: none.
"""

from types import MappingProxyType

from trace_hydra.methods.base import Method


class SeqFT(Method):
    """Train on each task in turn."""

    sharded = True
    published = MappingProxyType({"full": "SeqFT", "lora": "LoraSeqFT"})
