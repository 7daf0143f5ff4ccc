"""Medians over the repeats, and the ratios the project has set itself, within one run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.entries import LORA_GA, ONE_PASS, PLAIN_PASS, PRODUCTS, PUBLISHED, step, streamed
from lora_da.memory import GIB


@dataclass(frozen=True)
class Target:
    """One ratio (or number of `unit`) with its limits: `cpu` and `gpu`, such as `≤ 1.3`; empty where none is set."""

    name: str
    cpu: str
    gpu: str
    value: float | None
    unit: str = ""

    def met(self, device: str) -> bool | None:
        """Whether the value is within the limit of the device; None without a value or a limit."""
        limit = self.gpu if device == "cuda" else self.cpu
        if self.value is None or not limit:
            return None
        bound = float(limit.split()[1])
        return self.value <= bound if limit.startswith("≤") else self.value >= bound


def medians(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Take each number's median over the repeats, by (entry, base), with `repeats` and the range of seconds; `error`
    where no repeat ran."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for measurement in result["measurements"]:
        runs[measurement["row"], measurement["base"]].append(measurement)
    return {name: _median_of(repeats) for name, repeats in runs.items()}


def _median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    done = [run for run in runs if "cost" in run]
    if not done:
        return {"error": runs[-1]["error"]}
    numbers: dict[str, Any] = {
        name: None if value is None else median(run["cost"][name] for run in done)
        for name, value in done[0]["cost"].items()
    }
    seconds = [run["cost"]["seconds"] for run in done]
    timings = [run["details"].get("timings") or {} for run in done]
    numbers["timings"] = {name: median(t[name] for t in timings) for name in timings[0]}
    numbers["note"] = done[-1]["details"].get("plan") or done[-1]["details"].get("note")
    return {**numbers, "repeats": len(done), "fastest": min(seconds), "slowest": max(seconds)}


def targets(result: dict[str, Any]) -> list[Target]:
    """Hold one run against the targets; a value is None where an entry it needs was not run."""
    found, judged = medians(result), result["judged"]

    def of(entry: str, base: str, what: str) -> float | None:
        return found.get((entry, base), {}).get(what)

    seconds = of(judged, "nf4", "seconds")
    timings = found.get((judged, "nf4"), {}).get("timings", {})
    solve, first_step = timings.get("solve"), timings.get("first step")
    unstepped = None if seconds is None or first_step is None else seconds - first_step
    plain = of(PLAIN_PASS, "nf4", "seconds")
    floor = _sum(plain, of(PRODUCTS, "nf4", "seconds"))
    one_pass = of(ONE_PASS, "nf4", "seconds")
    on_bf16, published = of(judged, "bf16", "seconds"), of(PUBLISHED, "bf16", "seconds")
    memory = "gpu_peak" if result["device"] == "cuda" else "cpu_peak"
    peak, length = of(judged, "nf4", memory), result["length"]
    absolute = None if peak is None else peak / GIB
    limit = "≤ 10" if result["model"] == "llama-2-7b" else ""
    return [
        Target("time, ours ÷ (plain pass + products alone)", "≤ 1.0", "≤ 1.0", _over(seconds, floor)),
        Target("time, ours without its first step ÷ (plain pass + products alone)", "", "", _over(unstepped, floor)),
        Target("time, ours ÷ plain pass alone", _of_pass(result), _of_pass(result), _over(seconds, plain)),
        Target("time, ours without its first step ÷ plain pass alone", "", "", _over(unstepped, plain)),
        Target("time, solve ÷ ours", "≤ 0.08", "≤ 0.08", _over(solve, seconds)),
        Target("time, first step ÷ ours", "", "", _over(first_step, seconds)),
        Target("time, published procedure ÷ ours, both on bf16", "≥ 4", "≥ 8", _over(published, on_bf16)),
        Target("time, published procedure on bf16 ÷ ours on nf4", "", "", _over(published, seconds)),
        Target(
            "time, streamed in 8 ÷ one pass", "≤ 1.35", "≤ 1.25", _over(of(streamed(8), "nf4", "seconds"), one_pass)
        ),
        Target(
            "peak memory, ours ÷ training step 1 × 2048", "", "≤ 1.05", _over(peak, of(step(1, 2048), "nf4", memory))
        ),
        Target(
            f"peak memory, ours ÷ training step 1 × {length}",
            "",
            "≤ 1.3",
            _over(peak, of(step(1, length), "nf4", memory)),
        ),
        Target("peak memory, ours", "", limit, absolute, "GiB"),
        Target(
            "peak memory, LoRA-GA ÷ ours, both on bf16",
            "",
            "",
            _over(of(LORA_GA, "bf16", memory), of(judged, "bf16", memory)),
        ),
        Target(
            "peak memory, published procedure ÷ ours, both on bf16",
            "",
            "",
            _over(of(PUBLISHED, "bf16", memory), of(judged, "bf16", memory)),
        ),
    ]


def _of_pass(result: dict[str, Any]) -> str:
    """How many plain passes an initialisation may take: where the pass is short, what a layer costs weighs more."""
    return "≤ 2.2" if result["data"]["samples"] <= 16 else "≤ 1.6"


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
