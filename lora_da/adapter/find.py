"""Find the layers of an adapter in a PEFT model, and refuse what cannot be started by data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from lora_da.adapter.layer import Adapter, AdapterLayer, variance_of_plain
from lora_da.adapter.stacks import name_of, slice_layers, why_left
from lora_da.errors import LoraDAError
from lora_da.model.sharding import NOT_IN_MEMORY, shape
from lora_da.model.weights import is_readable

NAMED = 5  # layers that a sentence names of many


def find_adapter(model: PeftModel, adapter_name: str | None = None) -> Adapter:
    """The adapter to initialise: the named one, or the only active one.

    Raises:
        LoraDAError: no PEFT model or LoRA adapter, an unknown name, an unsupported LoRA variant, no layer to serve,
            a rank above a layer's size, adapters that are merged, weights that are not in memory.
    """
    if not isinstance(model, PeftModel):
        raise LoraDAError(
            f"expected a PEFT model with a LoRA adapter, got {type(model).__name__}; call get_peft_model first"
        )
    name = _adapter_name(model, adapter_name)
    config = model.peft_config[name]
    _check_config(config, name)
    base = model.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    layers: list[AdapterLayer] = []
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.r:
            continue
        absent = next((f"{path}.{name}" for name, p in module.named_parameters() if p.is_meta), None)
        if absent is not None:
            raise LoraDAError(NOT_IN_MEMORY.format(absent))
        if module.merged:
            raise LoraDAError(f"layer {path} has merged adapters; call `unmerge_adapter()` first")
        is_head = head is not None and head in (module, module.get_base_layer())
        reason = _why_left(module, name, is_head and _is_tied(path, config))
        if reason is not None:
            left[_name_of(path, module)] = reason
            continue
        layers += _layers(path, module, name, config, is_head)
    for layer in layers:
        _check_layer(layer)
    if not layers:
        kinds = f": {_listed(left)}" if left else ""
        raise LoraDAError(f"adapter {name!r} targets no layer that LoRA-DA can initialise{kinds}; check target_modules")
    return Adapter(name, layers, left)


def stored_base(model: PeftModel) -> dict[str, Any]:
    """What the base is made of, adapters left out, by name and as it is stored; nothing is copied.

    That is what its `state_dict` holds, a quantised weight's scales included, the same before and after a first
    forward, and the buffers that are not saved.

    Raises:
        LoraDAError: bitsandbytes has repacked a weight for inference.
    """
    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        # Its `state_dict` would unpack the weight, in place; and no gradient passes through a packed one.
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise LoraDAError(f"bitsandbytes has repacked {name} for CPU inference; load the model anew")
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = {id(p) for m in lora for held in m.adapter_layer_names for p in getattr(m, held).parameters()}
    found = {**dict(base.named_buffers()), **base.state_dict(keep_vars=True)}
    return {name: value for name, value in found.items() if id(value) not in factors}


def _adapter_name(model: PeftModel, asked: str | None) -> str:
    known = ", ".join(model.peft_config)
    if asked is None:
        active = model.active_adapters
        if len(active) != 1:
            raise LoraDAError(
                f"{len(active)} adapters are active ({', '.join(active)}); pass `adapter_name`, one of {known}"
            )
        return str(active[0])
    if asked not in model.peft_config:
        raise LoraDAError(f"there is no adapter {asked!r}; set `adapter_name` to one of {known}")
    return asked


def _check_config(config: object, name: str) -> None:
    if not isinstance(config, LoraConfig):
        raise LoraDAError(
            f"adapter {name!r} is {type(config).__name__}; LoRA-DA initialises LoRA adapters (LoraConfig)"
        )
    if config.init_lora_weights is not True and not _is_gaussian(config):
        raise LoraDAError(
            f"init_lora_weights={config.init_lora_weights!r} already chooses the start of the adapter; leave it at "
            "True or 'gaussian' for LoRA-DA (Axolotl: `peft_init_lora_weights`)"
        )


def _is_gaussian(config: LoraConfig) -> bool:
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower() == "gaussian"


def _is_tied(path: str, config: LoraConfig) -> bool:
    """Whether a layer's factors are the embedding's own (`ensure_weight_tying`): one step would be taken twice."""
    return any(path.endswith(tied) for tied in getattr(config, "target_modules_to_tie", None) or ())


def _why_left(module: LoraLayer, name: str, tied: bool) -> str | None:
    if isinstance(module, ParamWrapper):
        return why_left(module)
    if isinstance(module, MultiheadAttention) or name not in module.lora_A:
        return type(module).__name__
    base, pair = module.get_base_layer(), (module.lora_A[name], module.lora_B[name])
    if not all(isinstance(half, nn.Linear) for half in pair):  # whatever the base is, quantised or not
        return type(base).__name__
    if tied:
        return "the language-model head, whose adapter is the embedding's"
    variant = module.lora_variant.get(name)
    return None if variant is None or isinstance(variant, DoraLinearVariant) else type(variant).__name__


def _name_of(path: str, module: LoraLayer) -> str:
    return name_of(path, module) if isinstance(module, ParamWrapper) else path


def _layers(path: str, module: LoraLayer, name: str, config: LoraConfig, is_head: bool) -> Iterator[AdapterLayer]:
    """The layer that PEFT has wrapped, or those that are in the parameter it has."""
    if isinstance(module, ParamWrapper):
        yield from slice_layers(path, module, name, _is_gaussian(config), is_head)
        return
    lora_A, lora_B = module.lora_A[name].weight, module.lora_B[name].weight
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    rank, in_features = shape(lora_A)
    plain_variance = variance_of_plain(rank, in_features, _is_gaussian(config))
    base, scaling = module.get_base_layer(), module.scaling[name]
    yield AdapterLayer(path, base, lora_A, lora_B, scaling, plain_variance, magnitude, is_head)


def _check_layer(layer: AdapterLayer) -> None:
    if layer.rank > min(layer.in_features, layer.out_features):
        raise LoraDAError(
            f"layer {layer.name} is {layer.out_features} × {layer.in_features}, its rank {layer.rank} is above that; "
            "set a smaller `r` (Axolotl: `lora_r`) or a `rank_pattern` for this layer"
        )
    if layer.magnitude is not None and not is_readable(layer.base):
        raise LoraDAError(
            f"layer {layer.name} is under DoRA, and its sharded quantised weight cannot be read; set `use_dora=False` "
            "(Axolotl: `peft_use_dora: false`), or train with DDP or ZeRO-2"
        )


def _listed(left: dict[str, str]) -> str:
    """Names and why, by reason, a few of each: experts may be hundreds."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{_some(names)} ({reason})" for reason, names in by_reason.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def describe_left(left: dict[str, str]) -> str:
    """One sentence naming the layers that keep PEFT's init, by kind; empty where there are none."""
    if not left:
        return ""
    return f"LoRA-DA cannot serve {len(left)} targeted layers, which keep PEFT's init: {_listed(left)}"
