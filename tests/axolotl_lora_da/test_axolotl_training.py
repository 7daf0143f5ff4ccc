"""What the plugin asks of a run before it hands its adapter to LoRA-DA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl.cli.config import prepare_plugins
from axolotl_host import callbacks, fresh_manager, load, raw  # noqa: F401

from lora_da.callback import LoraDACallback
from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError

pytestmark = [
    pytest.mark.axolotl,
    pytest.mark.usefixtures("fresh_manager"),
    pytest.mark.filterwarnings("default"),  # Axolotl's imports warn of much
]


def test_the_callback_gets_the_settings():
    (callback,) = callbacks(load(lora_da={"preset": "paper", "samples": 7, "damping": "1e-3"}))
    assert isinstance(callback, LoraDACallback)
    assert callback.config == LoraDAConfig(preset="paper", samples=7, damping=1e-3)
    (callback,) = callbacks(load())
    assert callback.config == LoraDAConfig()


@pytest.mark.compat("axolotl-offload")
def test_passes_are_given_the_trainers_activation_offload():
    import torch

    entered = []

    class Offload:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    (callback,) = callbacks(load(), SimpleNamespace(activation_offload_context=Offload()))
    for _ in range(2):  # entered at every step, and for every pass
        with callback.offloading(None, torch.nn.Linear(1, 1)):
            assert entered[-1] == "in"
    assert entered == ["in", "out"] * 2


@pytest.mark.refused("axolotl-rl", "axolotl-losses", "other-init")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter": None}, "^adapter is None; LoRA-DA initialises LoRA adapters: set adapter: lora, or qlora"),
        ({"adapter": "llama-adapter"}, "^adapter is 'llama-adapter'"),
        ({"rl": "dpo"}, "^rl is set, .* fine-tune first"),
        ({"process_reward_model": True}, "^process_reward_model is set"),
        ({"peft_init_lora_weights": "pissa"}, "^peft_init_lora_weights is 'pissa'"),
        ({"peft_init_lora_weights": False}, "^peft_init_lora_weights is False"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, r"^peft\.loftq_config is set"),
        ({"tiled_mlp": True}, "^tiled_mlp is set"),
        ({"use_eaft": True}, "^use_eaft is set, .* another loss"),
    ],
)
def test_what_cannot_be_served_is_refused_in_training_only(keys, message):
    cfg = raw(**keys)
    prepare_plugins(cfg)  # a merge or a chat goes on
    with pytest.raises(LoraDAError, match=message):
        callbacks(cfg)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_plain_inits_are_served(init):
    assert len(callbacks(load(peft_init_lora_weights=init))) == 1


def test_dora_is_served():
    assert len(callbacks(load(peft_use_dora=True))) == 1


@pytest.mark.refused("axolotl-losses")
def test_a_loss_of_the_trainers_own_is_refused():
    from axolotl.core.trainers.base import AxolotlTrainer

    class Distilling(AxolotlTrainer):
        def compute_loss(self, *args, **kwargs): ...

    cfg = load()
    assert len(callbacks(cfg, AxolotlTrainer.__new__(AxolotlTrainer))) == 1
    with pytest.raises(LoraDAError, match="^Distilling computes a loss of its own"):
        callbacks(cfg, Distilling.__new__(Distilling))
    with pytest.raises(LoraDAError, match="^the trainer has a compute_loss_func of its own"):
        callbacks(cfg, SimpleNamespace(compute_loss_func=max))


def test_relora_warns(caplog):
    cfg = raw(relora=True)
    prepare_plugins(cfg)
    assert len(callbacks(cfg)) == 1
    assert "relora" in caplog.text
