"""Share of the machine's limit: FLOP/s of training and of reading prompts over the rate of a plain matrix product.

    python -m benchmarks.limit --data FOLDER --rows 4 --tuning full [--compile]

The limit is measured: the fastest of some bf16 products of large square matrices. Counted are the products of the model
that the result needs, at tokens without padding: 2 a weight and token forward, 4 more for training all weights (2 more
for an adapter), and causal attention, 2 s h a token and layer forward (`trace_hydra/cost_model.py`).
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Stopwatch, machine, options
from benchmarks.training import Bench, ours
from trace_hydra.models.forward import label_logits
from trace_hydra.models.precision import cast_once
from trace_hydra.run import quiet

SIZES = (1024, 2048, 4096)


def matrix_rate(device: str, seconds: float = 2.0) -> float:
    """Measure FLOP/s of a bf16 matrix product, the best of some sizes."""
    best = 0.0
    for size in SIZES if device == "cpu" else (4096, 8192):
        one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        other = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        torch.matmul(one, other.T)
        count, begun = 0, time.perf_counter()
        with Stopwatch() as watch:
            while time.perf_counter() - begun < seconds / len(SIZES):
                for _ in range(1 if device == "cpu" else 50):
                    torch.matmul(one, other.T)
                    count += 1
                if device != "cpu":
                    torch.cuda.synchronize()
        best = max(best, 2 * size**3 * count / watch.seconds)
    return best


def useful_flops(bench: Bench, *, training: bool) -> float:
    """Count the products that one pass over the rows needs."""
    model = bench.model()
    head = model.get_output_embeddings().weight.numel()
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    weights = sum(one.weight.numel() for one in layers) - head
    trained = sum(one.weight.numel() for one in layers if one.weight.requires_grad)
    config = model.config.get_text_config()
    total = 0.0
    for row in bench.rows:
        tokens, labels = len(row.ids), row.num_labels
        attention = 2 * config.num_hidden_layers * config.hidden_size * tokens**2
        forward = 2 * weights * tokens + attention + 2 * head * labels
        inputs = forward if training else 0  # gradients of what goes into the products
        own = 2 * (trained - head) * tokens + 2 * head * labels if trained > head else 2 * trained * tokens
        total += forward + inputs + (own + attention * (trained > 0) if training else 0)
    return total


def read(bench: Bench) -> float:
    """Read all prompts once, in the batches of training; returns seconds."""
    from trace_hydra.data.batches import TrainBatches, to_device

    model = bench.model(ours=True).eval()
    batches = list(TrainBatches(bench.rows, batch_size=8, micro_batch_size=8, seed="0"))
    with torch.inference_mode(), torch.autocast(bench.device, torch.bfloat16), cast_once(model), Stopwatch() as watch:
        for step in batches:
            for batch in step:
                label_logits(model, to_device(batch, bench.device))
    return watch.seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the limit before and after, and the work in between."""
    with quiet():
        bench = Bench(arguments)
        limits = [matrix_rate(bench.device)]
        ours(bench, bench.rows, compile=arguments.compile)  # warm
        turns = [ours(bench, bench.rows, compile=arguments.compile)["seconds"] for _ in range(arguments.repeats)]
        training = [useful_flops(bench, training=True) / seconds for seconds in turns]
        reading = [useful_flops(bench, training=False) / read(bench) for _ in range(arguments.repeats)]
        limits.append(matrix_rate(bench.device))
    limit = max(limits)
    return {
        "limit_gflops": limit / 1e9,
        "training_gflops": max(training) / 1e9,
        "reading_gflops": max(reading) / 1e9,
        "training_share": max(training) / limit,
        "reading_share": max(reading) / limit,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = options(__doc__ or "")
    parser.add_argument("--tuning", default="full", help="full or lora")
    parser.add_argument("--compile", action="store_true", help="train with compiled decoder layers")
    arguments = parser.parse_args(argv)
    found = measure(arguments)
    table = Table(title=f"share of the limit, {found['limit_gflops']:.0f} GFLOP/s bf16", title_justify="left")
    for column in ("", "GFLOP/s", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("training", "reading"):
        table.add_row(name, f"{found[f'{name}_gflops']:.0f}", f"{100 * found[f'{name}_share']:.0f} %")
    Console(width=100).print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**found, "machine": machine()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
