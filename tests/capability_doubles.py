"""A capability set of the tests' own."""

from trace_hydra.capability.base import CapabilitySet
from trace_hydra.errors import CapabilityError


class Lengths(CapabilitySet):
    """Scores the number of generated characters, modulo 101; two categories."""

    def __init__(self, *, prompts: list, area: str = "general", broken: str = ""):
        self.prompts, self.area, self.broken, self.measured = prompts, area, broken, 0

    def identity(self):
        return {"prompts": self.prompts, "area": self.area}

    def problems(self):
        return ["made to be refused."] if self.broken == "problems" else []

    def measure(self, subject):
        self.measured += 1
        if self.broken == "crash" and self.measured > 1:
            raise RuntimeError("out of memory")
        answers = subject.generate(self.prompts, 4)
        return [
            {
                "area": self.area,
                "set": f"lengths_{self.area}",
                "category": str(index % 2),
                "id": str(index),
                "measure": "characters",
                "score": float(sum(map(ord, answer.text)) % 101),
                "prompt": prompt,
                "output": answer.text,
            }
            for index, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True))
        ]

    def compare(self, before, after):
        if self.broken == "judge":
            raise CapabilityError("the judge is down.")
        return super().compare(before, after)
