"""`python -m lora_da`: the initial adapter for any trainer that starts from a saved one.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lora_da.config import METHODS, PRESETS, SAMPLES, TOKENS, LoraDAConfig, check_number
from lora_da.errors import LoraDAError
from lora_da.export.files import load_rows
from lora_da.needs import FirstStep

DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if it did what it is for, 1 after a sentence that says why not."""
    asked = _parse(arguments)
    try:
        config = _config(asked)
        if asked.check:
            _check(asked)
        else:
            _export(asked, config)
    except LoraDAError as error:
        print(f"lora_da: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m lora_da",
        description="Start a LoRA adapter from data (LoRA-DA, arXiv 2510.24561) and save it as an ordinary PEFT "
        "adapter, to be trained by any trainer that starts from a saved one; or look for faults in the data.",
        epilog="Rows hold `messages` (or ShareGPT's `conversations`), `prompt` and `completion`, `instruction` "
        "(`input`) and `output`, `question` and `answer`, or `text`. Loss is on the answers, on all of a `text`.",
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument(
        "--data", required=True, type=Path, help=".json, .jsonl or .parquet file, or a folder of datasets.save_to_disk"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write no adapter, but look at all rows for what trains nothing, repeats, is cut off or stands out",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the adapter and lora_da_report.json; of a check, for lora_da_check.json and .png "
        "(default: the present one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--rank", type=int, default=16, help="r of the adapter (default: %(default)s)")
    parser.add_argument("--alpha", type=int, help="lora_alpha (default: twice the rank)")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="names of layers (default: all linear ones but the head)"
    )
    parser.add_argument(
        "--target-parameters",
        nargs="+",
        metavar="NAME",
        help="names of parameters that hold the matrices of all experts, like mlp.experts.gate_up_proj (default: none)",
    )
    quantised = parser.add_mutually_exclusive_group()
    quantised.add_argument("--load-in-4bit", action="store_true", help="bitsandbytes nf4, double quantisation (QLoRA)")
    quantised.add_argument("--load-in-8bit", action="store_true", help="bitsandbytes LLM.int8")
    parser.add_argument(
        "--samples",
        type=int,
        help=f"rows to estimate on (default: {SAMPLES}, or fewer where these hold more than {TOKENS:,} tokens)",
    )
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row at most (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="lora_da", help="default: %(default)s")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="of method lora_da (default: default)")
    parser.add_argument(
        "--first-step",
        choices=get_args(FirstStep),
        help="how far from the base training starts; `none`, lora_B = 0, for trainers that take the base as their "
        "reference (default: by preset)",
    )
    parser.add_argument("--gamma", type=float, help="divisor of the first step, in the place of measuring it")
    parser.add_argument(
        "--chosen-rows",
        type=float,
        help="share of lora_A's rows that are solved for, the others being random (default: by preset)",
    )
    parser.add_argument(
        "--learning-rate", type=float, help="of the training to come: lora_A is enlarged where it is far too small"
    )
    parser.add_argument("--cache-dir", help="folder for solved factors: the same command then starts from them")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, xpu, mps … (default: a GPU of CUDA's or XPU's, or cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (default: as it is stored)")
    asked = parser.parse_args(arguments)
    if asked.output is None and not asked.check:
        parser.error("the following arguments are required: --output")
    return asked


def _config(asked: argparse.Namespace) -> LoraDAConfig:
    """The settings, and everything about the command that can be judged without a model.

    Raises:
        LoraDAError: a number is out of its range, a package is missing.
    """
    for name in ("rank", "alpha", "max_length", "samples"):
        if getattr(asked, name) is not None and getattr(asked, name) < 1:
            raise LoraDAError(f"--{name.replace('_', '-')} is {getattr(asked, name)}; set at least 1")
    check_number("--learning-rate", asked.learning_rate, 0, exclusive=True)
    if (asked.load_in_4bit or asked.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise LoraDAError("--load-in-4bit and --load-in-8bit need bitsandbytes; run: pip install bitsandbytes")
    names = ("method", "preset", "samples", "first_step", "gamma", "chosen_rows", "cache_dir")
    return LoraDAConfig(**{name: getattr(asked, name) for name in names})


def _export(asked: argparse.Namespace, config: LoraDAConfig) -> None:
    data, _, model = _loaded(asked)
    import torch
    from torch.utils.data import DataLoader

    from lora_da.export.folder import export_initial_adapter
    from lora_da.samples.rows import collate

    torch.manual_seed(0)  # what keeps PEFT's random init is the same every time
    parameters = ["--target-parameters", *asked.target_parameters] if asked.target_parameters else []
    with _naming("--target-modules", " ".join([*(asked.target_modules or ["all-linear"]), *parameters])):
        peft_model = _with_adapter(model, asked)
    loader = DataLoader(data, collate_fn=collate)
    export_initial_adapter(
        peft_model, loader, asked.output, config, overwrite=asked.overwrite, learning_rate=asked.learning_rate
    )
    _tell(f"saved in {asked.output}")


def _check(asked: argparse.Namespace) -> None:
    data, tokenizer, model = _loaded(asked)
    from lora_da.doctor.check import check, check_and_save, ends_of

    look = partial(check, model, data, asked.max_length, ends_of(tokenizer, model), tokenizer.decode)
    for line in check_and_save(look, asked.output or Path(), model.device):
        print(line)


def _loaded(asked: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Rows, tokenizer and model; what can be wrong is looked at before the next slow step."""
    rows = load_rows(asked.data)
    _tell(f"{len(rows):,} rows; loading torch and transformers")
    from transformers import AutoTokenizer

    from lora_da.export.folder import check_output
    from lora_da.export.rows import TokenizedRows

    device = _device(asked.device)
    if not asked.check:
        check_output(asked.output, asked.overwrite)
    with _naming("--model", asked.model):
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
    data = TokenizedRows(rows, tokenizer, asked.max_length)
    _tell(f"loading {asked.model} on {device}")
    with _naming("--model", asked.model):
        return data, tokenizer, _model(asked, device)


@contextlib.contextmanager
def _naming(option: str, value: str) -> Iterator[None]:
    """What transformers and PEFT raise for a wrong value, with the option that it was given by."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise LoraDAError(f"{option} {value}: {error}") from error


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return next((kind for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available()), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoraDAError(f"--device is {name!r}; set cpu, cuda, or cuda:1 for the second GPU") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} CUDA GPUs" if torch.cuda.is_available() else "no CUDA GPU"
        raise LoraDAError(f"--device is {name!r}, and torch {torch.__version__} sees {there} here; set another, or cpu")
    return name


def _model(asked: argparse.Namespace, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": {"": device}, "dtype": asked.dtype}
    if asked.load_in_4bit:
        stored = AutoConfig.from_pretrained(asked.model).dtype or torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=stored if asked.dtype == "auto" else getattr(torch, asked.dtype),
        )
    if asked.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(asked.model, **options)


def _with_adapter(model: Any, asked: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=asked.rank,
        lora_alpha=2 * asked.rank if asked.alpha is None else asked.alpha,
        target_modules=asked.target_modules or "all-linear",
        target_parameters=asked.target_parameters,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, lora)
    found = [f".{name}" for name in peft_model.base_model.targeted_parameter_names]
    for name in asked.target_parameters or ():
        if not any(key.endswith(f".{name}") for key in found):
            raise ValueError(f"the model has no parameter {name}")
    return peft_model


def _tell(what: str) -> None:
    print(f"lora_da: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
