"""The product on GPUs that are not there: the CPU's numbers, no mix of devices, and few places where the host waits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import distance, needs
from dequantized import four_bit
from fake_cuda import fake_gpus
from fake_gpu import FakeGpus, MixedDevices
from models import WIDE, adapter_weights, batches, documents, pad, tiny_llama, with_lora
from peft import PeftModel
from planning import ONE, WAYS, Forced, Way
from settings import as_solved
from stacks import stacked, with_experts
from tolerances import REBATCHED, REORDERED
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights, products
from lora_da.collect.plan import Plan, make_plan
from lora_da.first_step import MOST_TRIALS
from lora_da.memory import GIB
from lora_da.needs import Sums
from lora_da.products import SYMMETRIC_FROM, adds_float32, product_itemsize, returns_float32
from lora_da.report import InitReport
from lora_da.statistics import InputSums, LayerSums

GPU = "cuda:0"
BLOCKS, SAMPLES, ROWS_IN_A_BATCH = 4, 12, 4
ROWS = documents(40)  # more than the samples: the first step is measured on others
# Of 16-bit products the GPU adds up in float32 what the CPU multiplies in float32: rounding in another order.
HALF = {torch.bfloat16, torch.float16}

Made = tuple[dict[str, torch.Tensor], InitReport]


def dense(dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    return with_lora(tiny_llama(num_hidden_layers=BLOCKS, **config).to(dtype))


def initialised(model: PeftModel, way: Way | None = ONE, rows: Any = ROWS, **settings: Any) -> Made:
    """The adapter that it is given, copied to the CPU, and the report; where no way is forced, the product plans."""
    population = 1000 if settings.get("method", "lora_da") == "lora_da" else None
    config = LoraDAConfig(**{"samples": SAMPLES, "population_size": population, **settings})
    plan = {} if way is None else {"plan": Forced(way)}
    report = initialize_lora_da_weights(model, batches(rows, ROWS_IN_A_BATCH), config, show_progress=False, **plan)
    return {name: value.cpu() for name, value in adapter_weights(model).items()}, report


def check_same(ours: Made, cpus: Made, tolerance: float = 0.0) -> None:
    assert ours[0].keys() == cpus[0].keys()
    for name, value in cpus[0].items():
        off = 0.0 if torch.equal(ours[0][name], value) else distance(ours[0][name], value)
        assert off <= tolerance, name
    assert ours[1].loss == pytest.approx(cpus[1].loss, rel=tolerance, abs=0)
    assert ours[1].initialized == cpus[1].initialized == ours[1].targeted


def check_on_a_gpu(make: Callable[[], PeftModel], tolerance: float = 0.0, **settings: Any) -> None:
    """The CPU's adapter, from a model on a GPU, of whose memory nothing stays taken."""
    expected = initialised(make(), **settings)
    with fake_gpus() as gpus:
        model = make().to("cuda")
        held = gpus.live.total()
        ours = initialised(model, **settings)
        assert gpus.live.total() == held
    check_same(ours, expected, tolerance)
    assert ours[1].memory_of == "GPU" and 0 < ours[1].peak_memory_gib == gpus.peak.total() / 2**30


@pytest.mark.parametrize("way", WAYS)
def test_every_plan(way: str) -> None:
    check_on_a_gpu(dense, way=WAYS[way], first_step="gamma")


@pytest.mark.parametrize("way", ["one pass", "2 segments in 3 parts"])
def test_experts_in_one_parameter(way: str) -> None:
    check_on_a_gpu(lambda: with_experts(stacked("GptOss")), way=WAYS[way])


@pytest.mark.parametrize("preset", ["default", "reference", "paper"])
def test_every_preset(preset: str) -> None:
    """The first step is measured where the preset says so."""
    check_on_a_gpu(dense, preset=preset)


@pytest.mark.parametrize("method", ["filet", "cntlora", "lora_one", "lora_ga"])
def test_every_method(method: str) -> None:
    check_on_a_gpu(dense, method=method)


def test_the_full_fisher_of_wide_layers() -> None:
    """Wide enough that eigenpairs are iterated on and inputs summed block by block."""
    check_on_a_gpu(
        lambda: dense(hidden_size=528, intermediate_size=160, head_dim=24), full_fisher_up_to=200, first_step="gamma"
    )


@pytest.mark.parametrize("way", ["one pass", "2 segments"])
@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=str)
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    """Under the host's products of 16 bit with float32 sums."""
    check_on_a_gpu(lambda: dense(dtype), REORDERED, way=WAYS[way], first_step="gamma")


@pytest.fixture
def unasked():
    """Nobody has asked the GPUs yet what they can do, nor knows it afterwards."""
    for ask in (returns_float32, adds_float32):
        ask.cache_clear()
    yield
    for ask in (returns_float32, adds_float32):
        ask.cache_clear()


# What GPUs can do with products of 16 bit, and how many they are asked for then: ROCm's and old CUDA's refuse a float32
# result and are asked once; those that cannot add one to a sum in its memory are asked once for that.
CAN = {"widen and add": (True, True), "widen": (True, False), "neither": (False, False)}


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("can", CAN)
def test_products_of_16_bit(can: str) -> None:
    expected = initialised(dense(torch.bfloat16), first_step="gamma")
    with fake_gpus() as gpus:
        gpus.widens, gpus.adds_widened = CAN[can]
        found = initialised(dense(torch.bfloat16).to("cuda"), first_step="gamma")
    check_same(found, expected, REORDERED)
    assert gpus.wide_products > 2 * 7 * BLOCKS if gpus.widens else gpus.wide_products == 1


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("adds_widened", [True, False])
@pytest.mark.parametrize("i", [SYMMETRIC_FROM - 8, SYMMETRIC_FROM])
def test_a_product_is_added_where_its_sum_is(adds_widened: bool, i: int) -> None:
    """Beside the sums nothing as large as one of them is made, in block rows or not; else the largest product is."""
    g, o = torch.Generator().manual_seed(0), 320
    x, d = (torch.randn(16, k, generator=g).bfloat16() for k in (i, o))
    with fake_gpus() as gpus:
        gpus.adds_widened = adds_widened
        assert product_itemsize(torch.device(GPU), torch.bfloat16) == 4 * (not adds_widened)
        assert product_itemsize(torch.device(GPU), torch.float32) == 0
        sums = LayerSums(InputSums(Sums()), needs(full=True))
        rows = x.to(GPU), d.to(GPU)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(GPU)
            before = gpus.live.total()
            sums.inputs.add(rows[0])
            sums.add(*rows)
        beside = gpus.peak.total() - before
        means = sums.take_means(1.0, 1.0).to(torch.device("cpu"))
    assert beside == (0 if adds_widened else 4 * max(i * i // (4 if i >= SYMMETRIC_FROM else 1), i * o))
    wide_x, wide_d = x.double(), d.double()
    truth = 2 * wide_d.T @ wide_x, wide_x.T @ wide_x / 16, wide_d.T @ wide_d / 16
    for found, expected in zip((means.grad, means.input_cov, means.output_fisher), truth, strict=True):
        assert distance(found, expected) <= REORDERED


@pytest.mark.usefixtures("unasked")
def test_an_addition_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device answers is looked at: one that forgets what was there adds nothing."""
    right = products._add_widened
    monkeypatch.setattr(products, "_add_widened", lambda sum_, a, b: right(sum_.zero_(), a, b))
    with fake_gpus():
        assert not adds_float32(torch.device(GPU), torch.bfloat16)


@pytest.mark.usefixtures("unasked")
def test_a_full_gpu_does_not_count_as_one_that_refuses() -> None:
    with fake_gpus(memory=2**20):
        held = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
        for ask in (returns_float32, adds_float32):
            with pytest.raises(torch.OutOfMemoryError):
                ask(held.device, torch.bfloat16)
        del held
        assert returns_float32(torch.device(GPU), torch.bfloat16) and adds_float32(torch.device(GPU), torch.bfloat16)


@pytest.mark.parametrize("method", ["lora_da", "filet"])
def test_four_bit(tmp_path: Path, method: str) -> None:
    """bitsandbytes's own kernels run, those for the CPU; `filet` has the weights dequantised.

    A GPU squares d of 16 bit as it reads it, and rounds otherwise than the CPU; the solver makes more of that.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = four_bit(tiny_llama(num_hidden_layers=2, **WIDE), tmp_path, "double-quantisation", torch.bfloat16)
    check_on_a_gpu(lambda: with_lora(copy.deepcopy(base)), REBATCHED, method=method, way=WAYS["2 segments"])


def test_a_second_run_takes_the_firsts_solution(tmp_path: Path) -> None:
    with fake_gpus():
        first, second = (initialised(dense().to("cuda"), cache_dir=str(tmp_path)) for _ in "ab")
    check_same(second, first)
    assert second[1].from_cache and not first[1].from_cache
    check_same(initialised(dense(), cache_dir=str(tmp_path / "other")), first)


def test_a_card_that_is_too_small_for_one_pass() -> None:
    """The product plans by what the card says it has; the fake raises where that is passed."""
    expected = initialised(dense(), first_step="gamma")
    with fake_gpus() as gpus:
        one = initialised(dense().to("cuda"), None, first_step="gamma")
    assert one[1].plan.startswith("one pass")
    with fake_gpus(memory=int(1.2 * gpus.peak.total())):  # the forecast is above the peak, and leaves a margin
        several = initialised(dense().to("cuda"), None, first_step="gamma")
    assert several[1].plan.startswith("streamed")
    check_same(several, expected, REBATCHED)


def test_large_batches_where_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of 8,192 tokens, chunks of 2,048, while that leaves the plan as cheap as small ones do; results change
    by rounding, and no more is taken than was forecast. On the CPU all is as it was."""
    rows, sizes = documents([64] * 160), {"num_hidden_layers": 2, "vocab_size": 1024}
    plans: list[Plan] = []
    base = tiny_llama(**sizes)

    def started(model: PeftModel, budget: float | None = None) -> Made:
        config = as_solved(samples=160, memory_budget=budget)
        loader, planner = DataLoader(rows, 4, collate_fn=pad), lambda *args: plans.append(make_plan(*args)) or plans[-1]
        report = initialize_lora_da_weights(model, loader, config, show_progress=False, plan=planner)
        return {name: value.cpu() for name, value in adapter_weights(model).items()}, report

    expected = started(with_lora(copy.deepcopy(base)))
    assert (plans[-1].batch_tokens, plans[-1].chunk) == (2048, 256)
    sizes_planned = []
    for share in (None, 0.999, 0.5, 0.3):
        with fake_gpus() as gpus:
            model = with_lora(copy.deepcopy(base)).to("cuda")
            before, budget = gpus.live.total(), None if share is None else share * plans[1].device_bytes / GIB
            found = started(model, budget)
        check_same(found, expected, REBATCHED)
        sizes_planned.append((plans[-1].batch_tokens, plans[-1].chunk))
        assert plans[-1].line().startswith("one pass")
        assert gpus.peak.total() - before <= plans[-1].device_bytes <= plans[-1].budget
    assert sizes_planned[:2] == [(8192, 2048), (8192, 1024)]
    assert [tokens for tokens, _ in sizes_planned[2:]] == [4096, 2048]
    assert "out of memory" not in caplog.text


def waits(gpus: FakeGpus, *rooms: str) -> int:
    """How often the host has waited in these parts of the core; anywhere in it if none are named."""
    parts = tuple(f"lora_da/{room}" for room in rooms) or ("lora_da/",)
    return sum(n for wait, n in gpus.waits.items() if wait.ours and wait.line.startswith(parts))


def waited(blocks: int = 2, samples: int = SAMPLES, **settings: Any) -> FakeGpus:
    """What an initialisation has waited for, the model's way to the GPU left out."""
    model = with_lora(tiny_llama(num_hidden_layers=blocks))
    with fake_gpus() as gpus:
        model.to("cuda")
        gpus.waits.clear()
        initialised(model, samples=samples, **{"first_step": "gamma", "rows": documents(80), **settings})
    return gpus


WAITS_OF_A_LAYER = 60  # the solver's, with those of its checks and of the write; tiny layers are solved densely
PASS = (
    "collect",
    "tasks",
    "model",
    "statistics",
    "products",
)  # what runs batches; the solver waits as often as it iterates
WAITS_OF_A_TRIAL = 2  # of the first step, for each layer, whose two factors are sent
WAITS_OF_A_RUN = 20  # the survey's, the loss's and the watch's


@pytest.mark.parametrize("way", ["one pass", "2 segments", "3 passes"])
def test_no_batch_waits(way: str) -> None:
    """Batches run without the host waiting for the GPU: the passes wait as often for many as for few."""
    few, many = (waited(samples=n, way=WAYS[way]) for n in (8, 40))
    assert waits(few, *PASS) == waits(many, *PASS)
    assert waits(many, "collect", "tasks", "model/blocks") <= WAITS_OF_A_RUN


def test_layers_wait_in_the_solver_alone() -> None:
    two, four = waited(2), waited(4)
    assert waits(four, "collect", "tasks") == waits(two, "collect", "tasks")
    assert waits(four) - waits(two) <= 2 * 7 * WAITS_OF_A_LAYER


def test_batches_of_the_first_step_do_not_wait() -> None:
    measured, without = waited(first_step="measured"), waited()
    trials = MOST_TRIALS + 1  # 0 among them; then the parameters are put back
    assert waits(measured) - waits(without) <= trials * (14 * WAITS_OF_A_TRIAL + 1) + 14 * WAITS_OF_A_TRIAL


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LayerSums.add
    monkeypatch.setattr(LayerSums, "add", lambda sums, x, d: add(sums, x.cpu(), d))
    with fake_gpus(), pytest.raises(MixedDevices, match=r"aten\.addmm_\.default at lora_da/products\.py:\d+ of "):
        initialised(dense().to("cuda"))


def test_a_number_asked_of_every_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LayerSums.add

    def asking(sums: LayerSums, x: torch.Tensor, d: torch.Tensor) -> None:
        assert d.abs().max().item() < 1e9
        add(sums, x, d)

    monkeypatch.setattr(LayerSums, "add", asking)
    few, many = (waited(samples=n) for n in (8, 40))
    asked = [sum(n for wait, n in gpus.waits.items() if "test_on_gpus" in wait.line) for gpus in (few, many)]
    assert asked[1] - asked[0] == 14 * 8  # 14 layers, and 8 batches more
