"""The demo: the same QLoRA run through `axolotl train` with LoRA-DA and without, and both loss curves side by side.

    make demo, or: python examples/demo.py

Makes SmolLM2-135M and an instruction set on this machine, trains on a GPU if there is one, and keeps all it makes,
the configs and logs of both runs included, in one folder.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from make_instructions import write_rows
from smollm2 import prepare

CONFIG = Path(__file__).with_name("axolotl_qlora.yml")
REPORT = "lora_da_report.json"
RUNS = {"plain": "QLoRA without LoRA-DA", "lora_da": "QLoRA with LoRA-DA"}
LOSS = re.compile(r"\{'loss': '?([-+.\w]+)")
STEPS_PER_ROW = 5  # of the table: single batches are too small to be compared by eye
LOG_TAIL = 40


def main() -> None:
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M twice, without and with LoRA-DA.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--steps", type=int, help="training steps, if not those of the config")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    print("Preparing SmolLM2-135M-Instruct and the instruction set ...", flush=True)
    model = folder / "smollm2-135m"
    model.unlink(missing_ok=True)
    model.symlink_to(prepare())
    write_rows(folder / "instructions.jsonl", count=3000, seed=0)

    curves, seconds = {}, {}
    for name, title in RUNS.items():
        config = run_config(name, folder, model, arguments.steps)
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        print(f"\n{title}: axolotl train {path}", flush=True)
        started = time.monotonic()
        curves[name] = train(path, folder / f"{name}.log", config["max_steps"])
        seconds[name] = time.monotonic() - started
    if not (folder / "lora_da" / REPORT).exists():  # Axolotl goes on without a plugin that it cannot import
        stop(f"the run with LoRA-DA left no {REPORT}: was the plugin loaded?", folder / "lora_da.log")

    print_curves(curves)
    for name, title in RUNS.items():
        print(f"{title}: {seconds[name] / 60:.1f} min, adapter in {folder / name}, log in {folder / name}.log")
    print(f"What LoRA-DA did, layer by layer: {folder / 'lora_da' / REPORT}")


def run_config(name: str, folder: Path, model: Path, steps: int | None) -> dict[str, Any]:
    """examples/axolotl_qlora.yml with this folder's paths and this machine's device, the plugin dropped for `plain`."""
    import torch

    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["base_model"] = str(model)
    config["datasets"][0]["path"] = str(folder / "instructions.jsonl")
    config["dataset_prepared_path"] = str(folder / "prepared")
    config["output_dir"] = str(folder / name)
    config["max_steps"] = steps or config["max_steps"]
    if name == "plain":
        del config["plugins"], config["lora_da"]
    if torch.cuda.is_available():
        config["bf16"] = "auto"
        for kernel in [key for key in config if re.fullmatch(r"lora_\w+_kernel", key)]:
            del config[kernel]
    return config


def train(config: Path, log: Path, steps: int) -> list[float]:
    """Run `axolotl train`, show its losses as they come, and return them; any failure ends the demo."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),  # accelerate sets 1 otherwise
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are several times slower where another process wants a core
        "CUDA_VISIBLE_DEVICES": "0",  # accelerate would start a process on every GPU
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # axolotl, which starts accelerate
        "PYTHONUNBUFFERED": "1",
    }
    (config.parent / config.stem / REPORT).unlink(missing_ok=True)  # of an earlier demo
    losses: list[float] = []
    command = ["axolotl", "train", str(config)]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:  # universal newlines: a progress bar's carriage returns end lines, too
            file.write(line)
            if found := LOSS.search(line):
                losses.append(float(found[1]))
                print(f"\r  step {len(losses)} of {steps}, loss {losses[-1]:.3f} ", end="", flush=True)
            elif line.lstrip().startswith("LoRA-DA: "):
                print(f"  {line.strip()}", flush=True)
    print()
    if run.returncode != 0:
        stop(f"axolotl train failed with exit code {run.returncode}", log)
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        stop(f"{len(losses)} of {steps} losses found, or one that is no number", log)
    return losses


def stop(reason: str, log: Path) -> None:
    tail = log.read_text(encoding="utf-8").splitlines()[-LOG_TAIL:]
    print("\n".join(tail), file=sys.stderr)
    sys.exit(f"\n{reason}; the end of {log} is above")


def print_curves(curves: dict[str, list[float]]) -> None:
    """Mean training loss over every few steps, plain and LoRA-DA side by side; both saw the same batches."""
    plain, ours = curves["plain"], curves["lora_da"]
    print(f"\n{'training loss':<14}{'plain':>10}{'LoRA-DA':>10}{'difference':>12}")
    for start in range(0, len(plain), STEPS_PER_ROW):
        stop_at = min(start + STEPS_PER_ROW, len(plain))
        print_row(f"steps {start + 1}-{stop_at}", plain[start:stop_at], ours[start:stop_at])
    print_row("all steps", plain, ours)
    print()


def print_row(label: str, plain: list[float], ours: list[float]) -> None:
    before, after = sum(plain) / len(plain), sum(ours) / len(ours)
    print(f"{label:<14}{before:>10.3f}{after:>10.3f}{after - before:>+12.3f}")


if __name__ == "__main__":
    main()
