"""The tests that are marked `gpu`, in a process of their own, on the stage's device; at toy size a few of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.parts import MISSED, Figures, Part, Place, need

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "test_gpu.py"
DEVICE = "LORA_DA_GPU_TESTS"  # the variable that names the device to the tests

AT_TOY_SIZE = "test_presets"


def parts(place: Place) -> list[Part]:
    return [Part("tests", lambda: _tests(place))]


def _tests(place: Place) -> Figures:
    need("pytest", "bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Warnings are errors for the releases that the project is developed with, not for those of a borrowed machine.
        command = [sys.executable, "-m", "pytest", str(FILE), "-m", "gpu", "-q", "-W", "default", "-rs"]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += ["-k", AT_TOY_SIZE] if place.toy else []
        environment = {**os.environ, DEVICE: place.device.type}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(ended.stdout[-6000:], flush=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = {case.get("name", ""): _message(case) for case in cases if _outcome(case) in ("failure", "error")}
    skipped = {case.get("name", ""): _message(case) for case in cases if _outcome(case) == "skipped"}
    figures: Figures = {
        "passed_tests": len(cases) - len(failures) - len(skipped),
        "failed_tests": len(failures),
        "skipped_tests": len(skipped),
        "failures": failures,
        "skipped": skipped,
    }
    if failures or not figures["passed_tests"]:
        figures[MISSED] = f"{', '.join(failures)} failed" if failures else "no test has run"
    return figures


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def _message(case: ElementTree.Element) -> str:
    found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    return "" if found is None else (found.text or found.get("message") or "")[-1500:]
