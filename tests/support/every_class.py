"""Every language model of transformers, tiny and random: served, refused, or one that cannot be run here.

`make classes` lists them for each stack, with why they are refused or cannot be run.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import translators
from collecting import distance
from models import IGNORED, documents, pad, seeded
from peft import LoraConfig, get_peft_model
from planning import recorded
from settings import as_solved
from tiny_configs import tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.tasks import find_task

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
NAMED = re.compile(
    r"(?!Auto)\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel|ForTextToText|ForSpeechToText|DoubleHeadsModel)"
)
ROWS, PAIRS = documents((9, 14, 6)), translators.pairs(3)
SETTINGS = as_solved(samples=3, averaging="tokens")
# Whose code computes in float32 whatever its weights are, and fails where float64 meets it.
FLOAT32_ONLY = re.compile("FSMT|Inkling2|Kosmos2For|XGLM")
# Layers that PEFT refuses, by the models it names.
REFUSED_BY_PEFT = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj",))


class NotRun(Exception):
    """A class that cannot be built, or whose own forward fails; the message says why."""


@dataclass(frozen=True)
class Own:
    """A model's own loss and gradients, all rows at once, in float64.

    Args:
        loss: the mean over the loss tokens.
        gradients: of it in the weights (o, i) of the linear layers that were called, where it has one.
        inputs: (rows, columns, i) of those among them that were called once.
        calls: how often they were called.
        of_experts: gradients in the matrices (o, i) of experts that share a parameter.
    """

    loss: float
    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]
    calls: Counter[str]
    of_experts: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of a class.

    Args:
        kind: `served` or `refused`.
        sentence: that refuses it.
        loss_off: how far the product's loss is from the model's own, relative.
        off: how far G and Z are from the model's own, relative, by layer.
        failed: layers that keep PEFT's init, with the reason.
    """

    kind: str
    sentence: str = ""
    loss_off: float = 0.0
    off: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """Names of the classes, found without importing them."""
    listed: set[str] = set()
    for mapping in MAPPINGS:
        for found in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            listed.update([found] if isinstance(found, str) else found)
    return sorted(listed | {name for name in dir(transformers) if NAMED.fullmatch(name)})


def built(name: str) -> PreTrainedModel:
    """A tiny one.

    Raises:
        NotRun: not by the rules of `tiny_configs`.
    """
    kind = getattr(transformers, name)
    try:
        return seeded(kind, tiny_config(kind.config_class))
    except Exception as error:  # whatever it is that a class of the library raises, it is the reason to be listed
        raise NotRun(f"cannot be built: {_in_a_line(error)}") from error


def batch_for(base: PreTrainedModel) -> dict[str, Tensor]:
    """Padded rows, with what else its forward cannot do without."""
    batch = translators.pad(PAIRS) if base.config.is_encoder_decoder else pad(ROWS)
    batch["input_ids"] = batch["input_ids"].clamp_max(99)  # above are the tokens that stand for images and sounds
    shape, name = batch["input_ids"].shape, type(base).__name__
    if name.startswith("Udop"):
        batch["bbox"] = torch.zeros(*shape, 4)
    if name == "Kosmos2ForConditionalGeneration":
        batch["image_embeds_position_mask"] = (torch.arange(shape[1]) < base.config.latent_query_num).expand(shape)
        batch["pixel_values"] = torch.randn(len(ROWS), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if name.startswith("UMT5"):  # in transformers 5.16 its decoder sees what comes later, padding too
        return translators.pad(translators.of_one_length(3))
    if name.startswith("FSMT"):  # which does not make them of the labels
        labels = batch["labels"].clamp_min(0)
        batch["decoder_input_ids"] = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1]], 1)
    return batch


def own_of(base: PreTrainedModel, batch: dict[str, Tensor]) -> Own:
    """Run its own loss.

    Raises:
        NotRun: it fails.
    """
    dtype = torch.float32 if FLOAT32_ONLY.match(type(base).__name__) else torch.float64
    twin, head = copy.deepcopy(base).to(dtype), base.get_output_embeddings()
    linear = {path for path, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    layers = {path: twin.get_submodule(path) for path in linear}
    calls: Counter[str] = Counter()
    seen: dict[str, Tensor] = {}

    def note(path: str, x: Tensor, output: Any) -> None:
        if isinstance(output, Tensor):  # PEFT adds nothing to a tuple
            calls[path] += 1
            seen[path] = x.detach()

    for path, layer in layers.items():
        layer.weight = nn.Parameter(layer.weight.detach().clone())  # shared ones too have an adapter each
        layer.register_forward_hook(lambda _layer, args, output, path=path: note(path, args[0], output))
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    try:
        loss = twin(**cast, use_cache=False).loss
        loss.backward()
    except Exception as error:  # as above
        raise NotRun(f"its own forward fails on these rows: {_in_a_line(error)}") from error
    gradients = {path: layers[path].weight.grad for path in calls if layers[path].weight.grad is not None}
    return Own(
        loss.item(),
        {p: g.T if isinstance(layers[p], Conv1D) else g for p, g in gradients.items() if bool(g.any())},
        {path: x for path, x in seen.items() if calls[path] == 1 and x.dim() == 3},
        calls,
        dict(_of_experts(twin)),
    )


def _of_experts(twin: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The gradient of each matrix (o, i) in the parameters that hold those of all experts, by parameter and number."""
    for path, module in twin.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.grad is not None:
                grad = parameter.grad.mT if getattr(module, "is_transposed", False) else parameter.grad
                yield from ((f"{path}.{name}.{number}", matrix) for number, matrix in enumerate(grad))


def outcome_of(name: str) -> Outcome:
    """Let the product start an adapter on all layers that a model trains.

    Raises:
        NotRun: the class cannot be built, or its own forward fails.
    """
    base = built(name)
    try:
        find_task(base)
    except LoraDAError as error:
        return Outcome("refused", str(error))
    batch = batch_for(base)
    own = own_of(base, batch)
    without = REFUSED_BY_PEFT.get(base.config.model_type, ())
    targets = [path for path in own.gradients if path.rpartition(".")[2] not in without]
    model = get_peft_model(base, LoraConfig(r=1, target_modules=targets))
    try:
        with recorded() as statistics:
            report = initialize_lora_da_weights(model, [batch], SETTINGS, show_progress=False)
    except LoraDAError as error:
        return Outcome("refused", str(error))
    off, shifted = {}, 0 if base.config.is_encoder_decoder else 1
    for path, found in statistics.items():
        off[f"{path}, G"] = distance(found.grad, (own.gradients | own.of_experts)[path])
        covariance = _covariance(own.inputs.get(path), batch, found.n_tokens, shifted)
        if covariance is not None:
            off[f"{path}, Z"] = distance(found.input_cov, covariance)
    return Outcome("served", loss_off=abs(report.loss - own.loss) / abs(own.loss), off=off, failed=report.failed)


def _covariance(x: Tensor | None, batch: dict[str, Tensor], n: int, shifted: int) -> Tensor | None:
    """Z over those of the source's or the loss's tokens that are `n`; None where x (rows, columns, i) is of neither's
    shape."""
    carries_loss = torch.nn.functional.pad(batch["labels"], (0, shifted), value=IGNORED)[:, shifted:] != IGNORED
    for counted in (batch["attention_mask"] > 0, carries_loss):
        if x is not None and x.shape[:2] == counted.shape and int(counted.sum()) == n:
            rows = x[counted]
            return rows.T @ rows / n
    return None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _listed(only: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in filter(re.compile(only).match, names()):
        try:
            outcome = outcome_of(name)
            kind = outcome.kind
            said = outcome.sentence or f"loss off by {outcome.loss_off:.0e}, G and Z by {max(outcome.off.values()):.0e}"
        except NotRun as reason:
            kind, said = "not run", str(reason)
        counts[kind] += 1
        print(f"{kind}: {name}: {said}", flush=True)
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()))


if __name__ == "__main__":
    _listed(sys.argv[1] if len(sys.argv) > 1 else "")
