"""What PEFT lets a user say of a LoRA adapter: each layer is started at its own rank, and nothing else is touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from judge import truth, worst_start
from models import PREFIX, batches, documents, pad, tiny_gpt2, tiny_llama, with_lora
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from picture import content, differences, named_tensors, picture
from settings import as_solved
from tolerances import START
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lora_da import LoraDAError, initialize_lora_da_weights
from trl_integration import LoraDAInitializer

DOCUMENTS = documents(12)
DATA = batches(DOCUMENTS, 4)
CONFIG = as_solved(samples=12)
OF_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def initialize(model, **options):
    return initialize_lora_da_weights(model, DATA, CONFIG, show_progress=False, **options)


def layers(names: list[str], blocks: tuple[int, ...] = (0, 1), path: str = "model.layers") -> set[str]:
    return {f"{PREFIX}{path}.{block}.{name}" for block in blocks for name in names}


@dataclass(frozen=True)
class Feature:
    """An adapter's settings, the layers they mean, and the rank and scaling of those that have others than 4 and 2."""

    lora: dict[str, Any]
    targeted: set[str] = field(default_factory=lambda: layers(OF_ATTENTION + MLP))
    base: Any = tiny_llama
    model: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    scaling: float = 2.0


def by_pattern(values: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in values.items() if name.endswith(key)), default)


FEATURES = {
    "list": Feature({"target_modules": ["q_proj", "down_proj"]}, layers(["self_attn.q_proj", "mlp.down_proj"])),
    "regular expression": Feature(
        {"target_modules": r"model\.layers\.1\..*(q|gate)_proj"}, layers([OF_ATTENTION[0], MLP[0]], (1,))
    ),
    "all linear": Feature({"target_modules": "all-linear"}),
    "exclude_modules": Feature(
        {"exclude_modules": ["k_proj", "mlp.up_proj"]},
        layers(["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
    ),
    "layers_to_transform": Feature(
        {"target_modules": ["v_proj"], "layers_to_transform": [1]}, layers(["self_attn.v_proj"], (1,))
    ),
    "layers_pattern": Feature(
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        layers(["self_attn.v_proj"], (0,)),
    ),
    "rank_pattern": Feature(
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        ranks={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        scalings={"q_proj": 4.0, "layers.1.mlp.up_proj": 8 / 7},
    ),
    "alpha_pattern": Feature(
        {"alpha_pattern": {"k_proj": 2, "^model.layers.0.mlp.gate_proj": 32}},
        scalings={"k_proj": 0.5, "layers.0.mlp.gate_proj": 8.0},
    ),
    "both patterns": Feature(
        {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 16, "o_proj": 1}},
        ranks={"v_proj": 8},
        scalings={"o_proj": 0.25},
    ),
    "rsLoRA": Feature({"use_rslora": True}, scaling=4.0),
    "gaussian": Feature({"init_lora_weights": "gaussian"}),
    "gaussian, rank_pattern": Feature(
        {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 8}}, ranks={"q_proj": 8}, scalings={"q_proj": 1.0}
    ),
    "lora_bias": Feature(
        {"lora_bias": True, "target_modules": ["q_proj"]}, layers(OF_ATTENTION[:1]), model={"attention_bias": True}
    ),
    "bias": Feature({"bias": "lora_only"}, model={"attention_bias": True}),
    "Conv1D": Feature({"fan_in_fan_out": True}, layers(GPT2, path="transformer.h"), tiny_gpt2),
    "modules_to_save": Feature({"modules_to_save": ["lm_head"]}),
    "modules_to_save, embeddings too": Feature({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "trainable_token_indices": Feature({"trainable_token_indices": [3, 5]}),
    "trainable_token_indices, tied": Feature({"trainable_token_indices": [3, 5]}, model={"tie_word_embeddings": True}),
    "tied": Feature({}, model={"tie_word_embeddings": True}),
    "layer_replication": Feature({"layer_replication": [(0, 2), (1, 2)]}, layers(OF_ATTENTION + MLP, (0, 1, 2))),
}


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")  # PEFT's; untrained, it is the same
@pytest.mark.compat(
    "target-modules", "exclude-modules", "rank-pattern", "alpha-pattern", "rslora", "gaussian", "conv1d"
)
@pytest.mark.compat("modules-to-save", "trainable-tokens", "tied-weights", "lora-bias", "layer-replication")
@pytest.mark.parametrize("kind", FEATURES)
def test_each_layer_starts_where_the_oracle_says(kind: str) -> None:
    """At its own rank; the report's step carries its own scaling; no other bit, flag or object changes."""
    feature = FEATURES[kind]
    base = feature.base(**feature.model)
    twin = copy.deepcopy(base)
    if "layer_replication" in feature.lora:
        twin.model.layers.append(copy.deepcopy(twin.model.layers[1]))
        twin.config.num_hidden_layers = twin.model.config.num_hidden_layers = 3
    model = with_lora(base, **feature.lora)
    with model.disable_adapter():
        pass  # PEFT sets flags of trainable tokens to what they were, where they were not set at all
    before = picture(model)
    report = initialize(model)
    assert set(report.layers) == feature.targeted and report.left == report.failed == {}
    written = [f"{name}.lora_{half}.default.weight: bits" for name in report.layers for half in "AB"]
    assert differences(before, picture(model)) == sorted(written)
    gaussian = feature.lora.get("init_lora_weights") == "gaussian"
    assert worst_start(model, report, truth(twin, DOCUMENTS, report.layers), 12, gaussian=gaussian) <= START
    for name, layer in report.layers.items():
        assert layer.rank == by_pattern(feature.ranks, name, 4)
        module = model.get_submodule(name)
        step = module.lora_B["default"].weight @ module.lora_A["default"].weight
        relative = step.norm() / module.base_layer.weight.norm()
        assert layer.relative_step == pytest.approx(
            by_pattern(feature.scalings, name, feature.scaling) * relative.item(), rel=1e-4
        )


def test_a_start_of_another_rank_shows() -> None:
    """Negative control of the judge: one direction fewer, or one of another layer's."""
    base = tiny_llama()
    model = with_lora(copy.deepcopy(base), target_modules=["q_proj", "k_proj"])
    report = initialize(model)
    statistics = truth(base, DOCUMENTS, report.layers)
    assert worst_start(model, report, statistics, 12) <= START
    q, k = (model.get_submodule(f"{PREFIX}model.layers.0.self_attn.{n}_proj").lora_A["default"].weight for n in "qk")
    with torch.no_grad():
        q[1] = k[0]  # of those that are solved for
    assert worst_start(model, report, statistics, 12) > 100 * START


@pytest.mark.compat("several-adapters")
def test_only_the_chosen_adapter_is_written() -> None:
    """Adapters of different ranks lie on overlapping layers."""
    base = tiny_llama()
    model = with_lora(copy.deepcopy(base))
    model.add_adapter("small", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("large", LoraConfig(r=8, target_modules=["q_proj"]))
    statistics = None
    for adapter, count in (("small", 4), ("large", 2), ("default", 14)):
        before = picture(model)
        report = initialize(model, adapter_name=adapter)
        changed = differences(before, picture(model))
        assert len(changed) == 2 * count and all(name.endswith(f".{adapter}.weight: bits") for name in changed)
        statistics = truth(base, DOCUMENTS, report.layers)
        assert worst_start(model, report, statistics, 12, adapter) <= START


def tensors_of(model, excluding: str) -> dict[str, str]:
    return {name: content(tensor) for name, tensor in named_tensors(model) if excluding not in name}


OTHER_INITS = ["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal", "lora_ga", "mica"]


@pytest.mark.refused("other-init")
@pytest.mark.parametrize("name", [*OTHER_INITS, False])
def test_another_start_is_refused_by_its_name(name: str | bool) -> None:
    """The adapter's config says it; some starts want data before PEFT builds them."""
    model = with_lora(tiny_llama())
    model.peft_config["default"].init_lora_weights = name
    before = picture(model)
    with pytest.raises(LoraDAError, match=rf"^init_lora_weights={name!r} already chooses .* leave it at True or 'gau"):
        initialize(model)
    assert differences(before, picture(model)) == []


@pytest.mark.refused("lora-variants")
def test_a_variant_that_computes_something_else_is_refused_by_its_name() -> None:
    model = with_lora(tiny_llama(), alora_invocation_tokens=[5], target_modules=["q_proj"])
    with pytest.raises(LoraDAError, match=r"targets no layer .*q_proj \(ALoraLinearVariant\).*check target_modules"):
        initialize(model)


def factors(model, half: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f"lora_{half}" in name}


def train(model, optimizer, steps: int, tmp_path) -> None:
    args = TrainingArguments(
        tmp_path,
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    Trainer(model, args, pad, DOCUMENTS, optimizers=(optimizer, None), callbacks=[LoraDAInitializer(CONFIG)]).train()


@pytest.mark.compat("lora-fa")
@pytest.mark.parametrize("first", ["the optimiser", "the start"])
def test_lora_fa_trains_b_on_the_a_that_was_written(first: str, tmp_path) -> None:
    """Whether PEFT has frozen A before the start or freezes it after it."""
    base = tiny_llama()
    model = with_lora(copy.deepcopy(base))
    expected = with_lora(copy.deepcopy(base))
    loader = DataLoader(DOCUMENTS, 4, collate_fn=pad)  # batched as from the trainer's
    report = initialize_lora_da_weights(expected, loader, CONFIG, show_progress=False)
    assert worst_start(expected, report, truth(base, DOCUMENTS, report.layers), 12) <= START
    if first == "the start":
        initialize_lora_da_weights(model, loader, CONFIG, show_progress=False)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    train(model, optimizer, 3, tmp_path)
    a, b = factors(model, "A"), factors(model, "B")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    for name, value in factors(expected, "A").items():
        assert torch.equal(a[name], value)
    assert all((b[name] - value).abs().max() > 1e-4 for name, value in factors(expected, "B").items())


@pytest.mark.compat("lora-plus")
def test_lora_plus_keeps_its_rates(tmp_path) -> None:
    """Adam's first step is the rate of each parameter times a sign: B's is that many times larger than A's."""
    rate, ratio = 1e-4, 16
    expected = with_lora(tiny_llama())
    initialize(expected)
    model = with_lora(tiny_llama())
    optimizer = create_loraplus_optimizer(
        model, torch.optim.Adam, lr=rate, loraplus_lr_ratio=ratio, eps=1e-30, weight_decay=0.0
    )
    groups = [(group["lr"], [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    train(model, optimizer, 1, tmp_path)
    assert [(group["lr"], [id(p) for p in group["params"]]) for group in optimizer.param_groups] == groups
    for half, size in (("A", rate), ("B", ratio * rate)):
        for name, start in factors(expected, half).items():
            step = (factors(model, half)[name] - start).abs()
            if half == "A":  # a row without lora_B has no gradient yet
                step = step[factors(expected, "B")[name.replace("lora_A", "lora_B")].any(0)]
            assert step.median().item() == pytest.approx(size, rel=0.01), name
