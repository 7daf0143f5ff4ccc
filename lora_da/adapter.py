"""Everything PEFT: find the layers of an adapter, refuse what cannot be started by data, write the factors in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_da.errors import LoraDAError
from lora_da.model.sharding import NOT_IN_MEMORY, copied, is_zero3, shape, shard_of, whole
from lora_da.model.weights import is_readable, row_norms, weight_norm

SMALLEST = torch.finfo(torch.float32).tiny  # in the place of the norm of an all-zero weight


@dataclass(frozen=True)
class AdapterLayer:
    """One layer an adapter targets: `y = W x + scaling · lora_B lora_A x`.

    Args:
        name: of the PEFT layer in the PEFT model.
        base: the wrapped layer, quantised or not.
        lora_A: (r, i) parameter. lora_B: (o, r) parameter.
        scaling: s.
        plain_variance: variance of an entry of the lora_A that PEFT draws for this layer.
        magnitude: DoRA's (o,) parameter m, `y = m ∘ (W + scaling · lora_B lora_A) x / ‖row of that sum‖`; None in LoRA.
        is_head: whether it is the language-model head, which sees the tokens that carry loss alone.
    """

    name: str
    base: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    plain_variance: float
    magnitude: nn.Parameter | None = None
    is_head: bool = False

    @property
    def rank(self) -> int:
        return shape(self.lora_A)[0]

    @property
    def in_features(self) -> int:
        return shape(self.lora_A)[1]

    @property
    def out_features(self) -> int:
        return shape(self.lora_B)[0]

    def is_trained(self) -> bool:
        """Whether lora_B is no longer zero, as PEFT starts it."""
        with whole(self.lora_B) as lora_B:
            return bool(lora_B.any())

    def can_hold(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """Whether the factors stay finite in the parameters' dtypes."""
        pairs = ((lora_A, self.lora_A), (lora_B, self.lora_B))
        return all(bool(torch.isfinite(value.to(parameter.dtype)).all()) for value, parameter in pairs)

    @torch.no_grad()
    def relative_step(self, lora_A: Tensor, lora_B: Tensor) -> float | None:
        """‖s·lora_B·lora_A‖_F / ‖W‖_F of factors for this layer; None where W cannot be read.

        A quantised W is dequantised on its device for the moment this takes; the product is not formed.
        """
        norm = weight_norm(self.base)
        a, b = lora_A.cpu().double(), lora_B.cpu().double()
        step = abs(self.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt().item()
        return None if norm is None else step / max(norm, SMALLEST)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an initialisation writes."""
        return [self.lora_A, self.lora_B] + ([] if self.magnitude is None else [self.magnitude])

    def write(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put the factors into the parameters; DoRA's magnitude so that the layer starts at W + scaling·lora_B·lora_A,
        as plain LoRA does from the same factors."""
        _put(self.lora_A, lora_A)
        _put(self.lora_B, lora_B)
        if self.magnitude is not None:
            _put(self.magnitude, row_norms(self.base, copied(self.lora_A), copied(self.lora_B), self.scaling))


@dataclass(frozen=True)
class Adapter:
    """The layers of one adapter: `layers` can be served, `left` (name → why) keep PEFT's init."""

    name: str
    layers: list[AdapterLayer]
    left: dict[str, str]

    def is_untrained(self) -> bool:
        """True while every lora_B is zero, as PEFT starts it."""
        return not any(layer.is_trained() for layer in self.layers)

    @torch.no_grad()
    def write(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Put (lora_A, lora_B) of the named layers into the parameters: in place, in their dtype, all or none.

        Args:
            factors: by layer.
            together: a context that is left by all processes or raises in all.
        """
        chosen = [layer for layer in self.layers if layer.name in factors]
        before = [(p, copied(p)) for layer in chosen for p in layer.parameters]
        try:
            with together():
                for layer in chosen:
                    layer.write(*factors[layer.name])
        except BaseException:  # an interrupt too
            _put_all(before)
            raise

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """The parameters of its layers are as they were when the context is left, also after an error."""
        with torch.no_grad():
            before = [(p, copied(p)) for layer in self.layers for p in layer.parameters]
        try:
            yield
        finally:
            _put_all(before)


def _put_all(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        _put(parameter, value)


@torch.no_grad()
def _put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value that all processes have into a parameter, in place, whatever holds its numbers.

    DeepSpeed trains copies in float32 and writes them over the parameters at each step: they get the value too.
    """
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(shard_of(value, parameter) if isinstance(parameter, DTensor) else value)
    if is_zero3(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


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
    layers, left = [], {}
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
            left[path] = reason
            continue
        layer = _adapter_layer(path, module, name, config, is_head)
        if layer.rank > min(layer.in_features, layer.out_features):
            raise LoraDAError(
                f"layer {path} is {layer.out_features} × {layer.in_features}, its rank {layer.rank} is above that; "
                "set a smaller `r` (Axolotl: `lora_r`) or a `rank_pattern` for this layer"
            )
        if layer.magnitude is not None and not is_readable(layer.base):
            raise LoraDAError(
                f"layer {path} is under DoRA, and its sharded quantised weight cannot be read; set `use_dora=False` "
                "(Axolotl: `peft_use_dora: false`), or train with DDP or ZeRO-2"
            )
        layers.append(layer)
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
        return "a parameter tensor (target_parameters)"
    if isinstance(module, MultiheadAttention) or name not in module.lora_A:
        return type(module).__name__
    base, pair = module.get_base_layer(), (module.lora_A[name], module.lora_B[name])
    if not all(isinstance(half, nn.Linear) for half in pair):  # whatever the base is, quantised or not
        return type(base).__name__
    if tied:
        return "the language-model head, whose adapter is the embedding's"
    variant = module.lora_variant.get(name)
    return None if variant is None or isinstance(variant, DoraLinearVariant) else type(variant).__name__


def _adapter_layer(path: str, module: LoraLayer, name: str, config: LoraConfig, is_head: bool) -> AdapterLayer:
    lora_A, lora_B = module.lora_A[name].weight, module.lora_B[name].weight
    rank, in_features = shape(lora_A)
    # kaiming_uniform(a=√5) draws from ±1/√i, the gaussian init with standard deviation 1/r
    plain_variance = 1 / rank**2 if _is_gaussian(config) else 1 / (3 * in_features)
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    base, scaling = module.get_base_layer(), module.scaling[name]
    return AdapterLayer(path, base, lora_A, lora_B, scaling, plain_variance, magnitude, is_head)


def _listed(left: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left.items())[:5]]
    return ", ".join(shown) + (f" and {len(left) - 5} more" if len(left) > 5 else "")


def describe_left(left: dict[str, str]) -> str:
    """One sentence naming the layers that keep PEFT's init, by kind; empty where there are none."""
    if not left:
        return ""
    return f"LoRA-DA cannot serve {len(left)} targeted layers, which keep PEFT's init: {_listed(left)}"
