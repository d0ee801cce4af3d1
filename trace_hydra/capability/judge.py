"""Pairwise judging of answers, current model against start model (arXiv:2310.06762, section 4.2 and appendix .7).

As in the paper: two requests a prompt with the order swapped, an explanation, verdict tokens [[A]], [[B]], [[C]].
The paper does not say how the two orders are merged, nor what becomes of replies without a verdict: `merge`,
`one_verdict` (conf/capability). The words of the prompts are ours (judge_prompts.py).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trace_hydra.capability import judge_prompts
from trace_hydra.capability.base import CapabilitySet, Pair, Record, paired
from trace_hydra.capability.hhh import AXES, prompts_of, set_problems
from trace_hydra.capability.replies import Conversation, Estimate, OnReply, Reply
from trace_hydra.capability.subject import Subject
from trace_hydra.capability.verdicts import DELTAS, MERGES, judge_summary, merged, parse_verdict
from trace_hydra.errors import CapabilityError
from trace_hydra.keys import digest
from trace_hydra.models.generate import Decoding

log = logging.getLogger(__name__)

_SIDES = ({"A": "before", "B": "after", "C": "tie"}, {"A": "after", "B": "before", "C": "tie"})
"""What a token says in the first request (start model first) and in the second."""


class Chat(Protocol):
    """What judges have in common: `ChatClient` and `LocalChat`."""

    name: str

    def problems(self) -> list[str]:
        """List what is known to be wrong."""
        ...

    def identity(self) -> dict[str, Any]:
        """Say what decides a reply."""
        ...

    def is_model(self, model: Any) -> bool:
        """Whether it is the model given."""
        ...

    def estimate(self, conversations: Sequence[Conversation], *, variant: int = 0) -> Estimate:
        """Say what asking would take."""
        ...

    def ask(
        self, conversations: Sequence[Conversation], on_reply: OnReply | None = None, *, variant: int = 0
    ) -> list[Reply]:
        """Get a reply to each conversation, in order."""
        ...


class Judged(CapabilitySet):
    """Prompts whose answers are compared by a judge; see the module's docstring."""

    def __init__(
        self,
        *,
        area: str,
        axis: str,
        root: str | None,
        sets: Sequence[str],
        limit: int | None,
        prompt: str,
        max_new_tokens: int,
        decoding: str,
        temperature: float,
        top_p: float,
        judge: Chat | None,
        merge: str,
        one_verdict: bool,
        same_answer: str,
        dry_run: bool,
    ):
        """Keep the settings; reads nothing.

        Args:
            area: "instruction" or "safety".
            axis: "helpful" or "harmless": folder of the prompts, and what the judge looks at.
            root: Folder that holds <axis>/<set>/test.json.
            sets: Names of prompt sets.
            limit: Prompts of each set, evenly spaced; null: all.
            prompt: "raw" or "chat".
            max_new_tokens: Limit of an answer.
            decoding: "greedy" or "sampled"; `temperature` and `top_p` count for the latter.
            temperature: Of sampling.
            top_p: Of sampling.
            judge: None: answers are kept, and may be judged later.
            merge: "strict": a side wins if both orders say so, else it is a tie. "points": 1, 0 or -1 an order, and
                the sign of the sum decides, so a win and a tie make a win.
            one_verdict: Whether the verdict of one order counts if the other gave none; false: such a pair is unparsed.
            same_answer: "tie": equal answers are a tie without asking; "ask": the judge is asked about them too.
            dry_run: Say what judging would cost instead of asking.
        """
        self.area = area
        self.axis = axis
        self.root = root
        self.sets = list(sets)
        self.limit = limit
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.decoding = decoding
        self.temperature = temperature
        self.top_p = top_p
        self.judge = judge
        self.merge = merge
        self.one_verdict = one_verdict
        self.same_answer = same_answer
        self.dry_run = dry_run

    def problems(self) -> list[str]:
        """List wrong settings, missing files and unknown sets; asks the judge's endpoint one question."""
        found = []
        options: dict[str, tuple[str, Sequence[str]]] = {
            "axis": (self.axis, AXES),
            "prompt": (self.prompt, ("raw", "chat")),
            "decoding": (self.decoding, ("greedy", "sampled")),
            "merge": (self.merge, MERGES),
            "same_answer": (self.same_answer, ("tie", "ask")),
        }
        for key, (value, allowed) in options.items():
            if value not in allowed:
                found.append(f"capability: {key}={value} must be one of {', '.join(allowed)}.")
        if self.limit is not None and self.limit < 1:
            found.append(f"capability: limit={self.limit} must be at least 1 (null: all prompts).")
        if self.max_new_tokens < 1:
            found.append(f"capability: max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.decoding == "sampled" and self.temperature <= 0:
            found.append(f"capability: temperature={self.temperature} must be above 0 with decoding=sampled.")
        if self.axis in AXES:
            found += set_problems(self.root, self.axis, self.sets)
        return found if self.judge is None or self.dry_run else found + self.judge.problems()

    def warnings(self, model: Any) -> list[str]:
        """Warn of a judge that judges itself."""
        if self.judge is None or not self.judge.is_model(model):
            return []
        return [
            f"the judge {self.judge.name} is the judged model itself ({getattr(model, 'name', model)}): models prefer "
            "their own answers, so its verdicts say little. Choose another one with judge=... or judge.model=..."
        ]

    def notice(self) -> str:
        """Say what judging one stage takes at most."""
        price = self.price()
        if price is None or self.judge is None:
            return ""
        usd = "price unknown" if price.usd is None else f"at most {price.usd:,.2f} USD"
        return (
            f"judge {self.judge.name} ({self.axis}): up to {price.requests:,} requests a measured stage, "
            f"{price.input_tokens:,} tokens in, {price.output_tokens_at_most:,} out, {usd}"
        )

    def answers_identity(self) -> dict[str, Any]:
        """Say what decides the answers; a change of judge leaves them as they are."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.decoding == "sampled" else {}
        items = [[name, text] for name, _, text in self._items()]
        return {
            "items": digest(items),
            "axis": self.axis,
            "sets": self.sets,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "decoding": self.decoding,
            **sampling,
        }

    def identity(self) -> dict[str, Any]:
        """Say what decides answers and verdicts."""
        judging = {
            "judge": self.judge.identity() if self.judge else None,
            "prompt_version": judge_prompts.VERSION,
            "judge_prompt": digest(judge_prompts.judge_conversation(self.axis, "", "", "")),
            "merge": self.merge,
            "one_verdict": self.one_verdict,
            "same_answer": self.same_answer,
        }
        return {**self.answers_identity(), "judging": judging}

    def measure(self, subject: Subject) -> list[Record]:
        """Let the model answer every prompt.

        Raises:
            CapabilityError: If prompts cannot be read or the answer limit fills the model's positions.
        """
        items = self._items()
        texts = [text for _, _, text in items]
        encoder = subject.encoder(self.prompt)
        room = min(encoder.max_prompt_tokens, subject.max_length - self.max_new_tokens)
        if room < 1:
            raise CapabilityError(
                f"capability: max_new_tokens={self.max_new_tokens} leaves no room for a prompt; the model has "
                f"{subject.max_length} positions."
            )
        answers = subject.generate(
            texts,
            self.max_new_tokens,
            ids=encoder.prompts(texts, "", room)[0],
            decoding=Decoding(True, self.temperature, self.top_p)
            if self.decoding == "sampled"
            else Decoding(False, 1.0, 1.0),
        )
        return [
            {
                "area": self.area,
                "set": name,
                "category": name,
                "id": f"{row:04d}",
                "measure": f"judge: {self.axis}",
                "score": None,
                "prompt": text,
                "output": answer.text,
                "num_new": answer.num_new,
                "stopped": answer.stopped,
            }
            for (name, row, text), answer in zip(items, answers, strict=True)
        ]

    def compare(self, before: Sequence[Record], after: Sequence[Record]) -> list[Pair]:
        """Ask the judge about every item in both orders; without a judge, pair the answers only.

        A pair adds `outcome` (of `verdicts.OUTCOMES`), `verdicts` ("before", "after", "tie", or why there is none:
        "none", "contradictory", "refused", "error"; start model first, then swapped) and `explanations` (the replies).

        Raises:
            CapabilityError: If the records differ in their items, or the judge could not be asked.
        """
        pairs = paired(before, after)
        asked = [pair for pair in pairs if not self._is_same(pair)]
        conversations = [one for pair in asked for one in self._conversations(pair)]
        replies: list[Reply] | None = None
        if self.judge is not None and self.dry_run:
            log.info("capability: judging would take %s", self.judge.estimate(conversations))
        elif self.judge is not None:
            replies = self.judge.ask(conversations)
        if replies is None:
            return [{**pair, "outcome": "not judged", "verdicts": [], "explanations": []} for pair in pairs]
        both = {id(pair): replies[2 * at : 2 * at + 2] for at, pair in enumerate(asked)}
        return [self._judged(pair, both.get(id(pair), [])) for pair in pairs]

    def price(self, before: Sequence[Record] = (), after: Sequence[Record] = ()) -> Estimate | None:
        """Say what judging takes, None without a judge; without records at most, with answers up to their limit."""
        if self.judge is None:
            return None
        pairs: list[Pair] = list(paired(before, after))
        if not pairs:
            answers = {
                key: letter * 3 * self.max_new_tokens for key, letter in zip(("before", "after"), "xy", strict=True)
            }
            outputs = {f"output_{key}": text for key, text in answers.items()}
            pairs = [{"prompt": text, **outputs} for _, _, text in self._items()]
        asked = [pair for pair in pairs if not self._is_same(pair)]
        return self.judge.estimate([one for pair in asked for one in self._conversations(pair)])

    def summary(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Shares of outcomes and the judge's bias; see `judge_summary`."""
        return {"judge": self.judge.name if self.judge else None, **judge_summary(pairs)}

    def _items(self) -> list[tuple[str, int, str]]:
        """List (set, row from 1, prompt)."""
        return [
            (name, row, text) for name in self.sets for row, text in prompts_of(self.root, self.axis, name, self.limit)
        ]

    def _is_same(self, pair: Mapping[str, Any]) -> bool:
        return self.same_answer == "tie" and pair["output_before"] == pair["output_after"]

    def _conversations(self, pair: Mapping[str, Any]) -> list[Conversation]:
        first, second = pair["output_before"], pair["output_after"]
        return [
            judge_prompts.judge_conversation(self.axis, pair["prompt"], first, second),
            judge_prompts.judge_conversation(self.axis, pair["prompt"], second, first),
        ]

    def _judged(self, pair: Pair, replies: Sequence[Reply]) -> Pair:
        if not replies:
            return {**pair, "delta": 0.0, "outcome": "tie", "verdicts": [], "explanations": []}
        verdicts = []
        for sides, reply in zip(_SIDES, replies, strict=True):
            token = "error" if reply.text is None else parse_verdict(reply.text)
            verdicts.append(sides.get(token, token))
        outcome = merged(verdicts, self.merge, self.one_verdict)
        explanations = [reply.error if reply.text is None else reply.text for reply in replies]
        return {
            **pair,
            "delta": DELTAS.get(outcome),
            "outcome": outcome,
            "verdicts": verdicts,
            "explanations": explanations,
        }
