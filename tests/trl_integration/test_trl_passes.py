"""The same adapter however TRL would run the forward pass: checkpointing, precision, noise, heads, compilation."""

import contextlib
import importlib.util
import weakref

import pytest
import torch
from datasets import Dataset
from models import IGNORED, VOCABULARY, documents, pad, tiny_llama, with_lora
from tolerances import LOSS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("trl", reason="TRL is not installed")

from exhaustion import Full
from planning import Forced, Way
from settings import as_solved
from trainers import COMPILING, FirstStep, base, by_hand, same_bits, sft, worst_difference

from lora_da.tasks.head import CHUNK
from trl_integration import LoraDAInitializer

CONFIG = as_solved(samples=10)
SELECTIVE = pytest.mark.skipif(
    importlib.util.find_spec("trl.models.selective_activation_checkpointing") is None,
    reason="TRL before selective checkpointing",
)
# TRL's own heads add up the same float32 numbers in another order.
OTHER_HEAD = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def rows():
    return Dataset.from_list(documents(20))


def narrow():
    """Only its logits are as wide as the vocabulary."""
    return tiny_llama(hidden_size=64, intermediate_size=96)


def first_adapter(model, rows, tmp_path, **args):
    first = FirstStep()
    sft(model, rows, tmp_path, LoraDAInitializer(CONFIG), first, **args).train()
    return first.adapter


@pytest.mark.compat("checkpointing")
@pytest.mark.parametrize("kind", ["unquantised", "4-bit"])
@pytest.mark.parametrize(
    "args",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param({"gradient_checkpointing_kwargs": {"use_reentrant": False, "selective": True}}, marks=SELECTIVE),
    ],
    ids=["off", "re-entrant", "non-re-entrant", "selective"],
)
def test_checkpointing_changes_nothing(folder, tmp_path, rows, kind, args):
    found = first_adapter(base(folder, kind), rows, tmp_path, **args)
    assert same_bits(found, by_hand(base(folder, kind), rows, CONFIG))


@pytest.mark.compat("autocast")
def test_the_pass_runs_in_the_trainers_precision(folder, tmp_path, rows, monkeypatch):
    full, mixed = (by_hand(base(folder), rows, CONFIG, bf16=bf16) for bf16 in (False, True))
    assert not same_bits(full, mixed)
    assert same_bits(first_adapter(base(folder), rows, tmp_path, bf16=False), full)
    assert same_bits(first_adapter(base(folder), rows, tmp_path, bf16=True), mixed)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    assert same_bits(first_adapter(base(folder), rows, tmp_path, bf16=False), mixed)


@pytest.mark.compat("neftune")
@pytest.mark.parametrize("alpha", [5, 5.0])
def test_neftune_noise_is_off(folder, tmp_path, rows, alpha):
    found = first_adapter(base(folder), rows, tmp_path, neftune_noise_alpha=alpha)
    assert same_bits(found, by_hand(base(folder), rows, CONFIG))


@pytest.mark.compat("neftune")
def test_dropout_is_off(folder, tmp_path, rows):
    found = first_adapter(base(folder, attention_dropout=0.5), rows, tmp_path)
    assert same_bits(found, by_hand(base(folder), rows, CONFIG))


class Stop(Exception):
    """Raised at the first step, where it would take minutes to compile."""


class StopAtFirstStep(FirstStep):
    def on_step_begin(self, *args, **kwargs):
        super().on_step_begin(*args, **kwargs)
        raise Stop


@pytest.mark.compat("compile")
@pytest.mark.parametrize("backend", ["inductor", "eager"])
@COMPILING
def test_torch_compile_changes_nothing(folder, tmp_path, rows, backend):
    """Compilation waits for the first step: the pass meets the plain model."""
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["frames"]
    compiled.clear()
    first = StopAtFirstStep() if backend == "inductor" else FirstStep()
    args = {"gradient_checkpointing": False, "bf16": False}
    compiling = {"torch_compile": True, "torch_compile_backend": backend}
    trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer(CONFIG), first, **args, **compiling)
    if backend == "inductor":
        with pytest.raises(Stop):
            trainer.train()
        assert not compiled
    else:
        trainer.train()
        assert compiled["ok"] > 0
        plain = sft(base(folder), rows, tmp_path, LoraDAInitializer(CONFIG), **args)
        plain.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=LOSS)
    assert same_bits(first.adapter, by_hand(base(folder), rows, CONFIG, bf16=False))


class WidestLogits(TorchDispatchMode):
    """The largest number of rows of any tensor as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return found


@pytest.mark.parametrize("loss_type", [None, "nll"], ids=["the default", "nll"])
def test_full_logits_are_never_built(tmp_path, loss_type):
    long = documents(8, shortest=64, longest=64)
    seen, initializer = (
        WidestLogits(),
        LoraDAInitializer(as_solved(samples=8), during=lambda model: seen),
    )
    first = FirstStep()
    args = {} if loss_type is None else {"loss_type": loss_type}
    trainer = sft(
        narrow(), Dataset.from_list(long), tmp_path, initializer, first, per_device_train_batch_size=8, **args
    )
    trainer.train()
    assert CHUNK // 2 < seen.rows <= CHUNK + 1

    with WidestLogits() as control:
        with_lora(narrow())(**pad(long)).loss.backward()
    assert control.rows == 8 * 64


def test_trls_default_head_gives_the_same_loss_and_adapter(folder, tmp_path, rows):
    from trl import SFTConfig

    default = SFTConfig(output_dir=str(tmp_path), use_cpu=True).loss_type
    initializer, first = LoraDAInitializer(CONFIG), FirstStep()
    sft(base(folder), rows, tmp_path, initializer, first, loss_type=default, bf16=False).train()
    assert worst_difference(first.adapter, by_hand(base(folder), rows, CONFIG, bf16=False)) < OTHER_HEAD

    losses = []
    for row in list(rows)[:10]:
        with torch.no_grad():
            logits = base(folder)(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses += nn.functional.cross_entropy(logits, labels, reduction="none")[labels != IGNORED].tolist()
    assert initializer.report.loss == pytest.approx(sum(losses) / len(losses), rel=LOSS)


class Context:
    """What is seen of one offloading context, which this does not keep alive.

    Args:
        context: TRL's own.
        others_alive: how many contexts made before for a pass were still there when it was made.

    Attributes:
        shapes: of the tensors that were handed to it.
        left: how many it still held when it was left last.
    """

    def __init__(self, context, others_alive):
        self.is_alive = weakref.ref(context)
        self.others_alive, self.shapes, self.left = others_alive, [], None


@pytest.fixture
def contexts(monkeypatch):
    """TRL's own contexts as they are made, the trainer's first. The CPU plays the accelerator they need."""
    from trl.models import activation_offloading as trl_offloading

    made = []

    class Offloading(trl_offloading.OffloadActivations):
        def __init__(self, **settings):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
                super().__init__(use_pin_memory=False, use_streams=False)
            pack, seen = self.pack_hook, Context(self, sum(c.is_alive() is not None for c in made[1:]))

            def noted(tensor):
                seen.shapes.append(tensor.shape)
                return pack(tensor)

            self.pack_hook, self.seen = noted, seen
            made.append(seen)

        def __exit__(self, *args):
            self.seen.left = len(self.tracker)
            return super().__exit__(*args)

    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(trl_offloading, "OffloadActivations", Offloading)
    return made


OFFLOADING = {"activation_offloading": True, "gradient_checkpointing": False}


def offloaded(rows, tmp_path, model=None, **settings):
    """The adapter that training starts with."""
    first = FirstStep()
    sft(model or narrow(), rows, tmp_path, LoraDAInitializer(CONFIG, **settings), first, **OFFLOADING).train()
    return first.adapter


@pytest.mark.compat("offload")
def test_a_pass_that_the_model_keeps_activations_for_runs_under_trls_offloading(tmp_path, rows, contexts):
    """TRL's own context refuses a pass that leaves something behind."""
    found = offloaded(rows, tmp_path, plan=Forced(Way(parts=2, cut=False)))
    assert same_bits(found, by_hand(narrow(), rows, CONFIG))
    trainers, *ours = contexts
    assert len(ours) == 2 and len(trainers.shapes) > 0
    for context in ours:
        assert len(context.shapes) > 0 and context.left == 0
        assert not any(s and s[-1] == VOCABULARY for s in context.shapes), "logits, needed at once, were moved"


@pytest.mark.parametrize("way", [None, Way(), Way(cuts=2)], ids=["planned", "one pass", "2 segments"])
def test_plans_that_keep_their_own_activations_offload_none(tmp_path, rows, contexts, way):
    found = offloaded(rows, tmp_path, **({} if way is None else {"plan": Forced(way)}))
    assert worst_difference(found, by_hand(narrow(), rows, CONFIG)) < OTHER_HEAD
    assert len(contexts) == 1 and len(contexts[0].shapes) > 0


def test_after_an_out_of_memory_the_context_is_another(tmp_path, rows, contexts, monkeypatch):
    """The first holds the failed graph's tensors; it is gone when the second is made."""
    full, model = Full(monkeypatch, at=2), narrow()
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _module, _args: full.used())
    found = offloaded(rows, tmp_path, model, plan=Forced(Way(cut=False)))
    _trainers, failed, again = contexts
    assert failed.left > 0 == again.left == again.others_alive
    assert worst_difference(found, by_hand(narrow(), rows, CONFIG)) < OTHER_HEAD
