"""What works with what: the rows of the README's table, in order. Their states are not written here.

A test that shows a row carries `@pytest.mark.compat("key")`, a test of the sentence that refuses one
`@pytest.mark.refused("key")`; `table.py` reads these markers, and `make table` writes the table.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_TEST = "no test yet"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        key: what tests call it.
        text: what a reader sees.
        untested: why no test shows it; not shown once one does.
    """

    key: str
    text: str
    untested: str = ""


ROWS: dict[str, list[Row]] = {
    "hosts": [
        Row("axolotl-0.19", "Axolotl 0.19 with the TRL 1.9, PEFT 0.20 and transformers 5.16 that it pins"),
        Row("axolotl-0.21-loader", "the bare plugin name under Axolotl 0.21's loader, as a stand-in"),
        Row(
            "axolotl-0.18",
            "Axolotl 0.18 (TRL 1.8, PEFT 0.19, transformers 5.14)",
            "`axolotl train` in 4-bit, packed and not, and `merge-lora` passed when tried by hand",
        ),
        Row(
            "axolotl-0.20",
            "Axolotl 0.20",
            "plugin, config and kernel tests passed by hand against its source; no training run",
        ),
        Row(
            "axolotl-0.21",
            "training in Axolotl 0.21 (Python ≥ 3.12)",
            "plugin, config and kernel tests passed by hand against its source; no training run",
        ),
        Row("newest", "TRL 1.16, PEFT 0.21 and transformers 5.23, the newest when this was written"),
        Row("cuda", "CUDA", "all tests run on CPUs"),
    ],
    "base formats": [
        Row("float32", "float32"),
        Row("bfloat16", "bfloat16"),
        Row("float16", "float16"),
        Row("nf4", "bitsandbytes nf4"),
        Row("fp4", "bitsandbytes fp4"),
        Row("double-quantisation", "bitsandbytes nf4, double quantisation"),
        Row("quant-storage", "bitsandbytes nf4, float `quant_storage`"),
        Row("int8", "bitsandbytes int8"),
        Row("hqq", "HQQ", NO_TEST),
        Row("torchao-int4", "torchao int4", NO_TEST),
        Row("torchao-int8", "torchao int8", NO_TEST),
        Row("torchao-float8", "torchao float8", NO_TEST),
        Row("gptq", "GPTQ", NO_TEST),
        Row("awq", "AWQ", NO_TEST),
        Row("compressed-tensors", "compressed-tensors", NO_TEST),
    ],
    "adapters": [
        Row("lora", "LoRA on `nn.Linear`"),
        Row("conv1d", "LoRA on GPT-2's `Conv1D`"),
        Row("gaussian", "`init_lora_weights: gaussian`"),
        Row("rslora", "rsLoRA"),
        Row("rank-pattern", "`rank_pattern`"),
        Row("alpha-pattern", "`alpha_pattern`"),
        Row("target-modules", "`target_modules` as a list, a regular expression or `all-linear`"),
        Row("exclude-modules", "`exclude_modules`, `layers_to_transform`, `layers_pattern`"),
        Row("modules-to-save", "`modules_to_save`: untouched by the start"),
        Row("trainable-tokens", "`trainable_token_indices`: untouched"),
        Row("several-adapters", "several adapters: only the chosen one is written"),
        Row("tied-weights", "tied embeddings and head: untouched"),
        Row("lora-plus", "LoRA+: the optimiser's rates are untouched"),
        Row("lora-fa", "LoRA-FA: A stays what was written, B is trained"),
        Row("embeddings", "embeddings as targets: keep PEFT's init, named in a warning"),
        Row("lm-head", "the language-model head as a target: keeps PEFT's init, named in a warning"),
        Row("convolutions", "convolutions as targets: keep PEFT's init, named in a warning"),
        Row("target-parameters", "`target_parameters`: keep PEFT's init, named in a warning"),
        Row("layer-replication", "`layer_replication`"),
        Row("lora-bias", "`lora_bias`, `bias`"),
        Row("dora", "DoRA"),
        Row("lora-variants", "other variants that compute something else: aLoRA, …"),
        Row("other-init", "any other `init_lora_weights`: PiSSA, OLoRA, EVA, CorDA, LoftQ, LoRA-GA, orthogonal, …"),
        Row("other-adapters", "other PEFT methods: IA³, prompt tuning, …"),
        Row("merged", "an adapter that is merged into the base"),
        Row("wide-rank", "a rank above a layer's size"),
    ],
    "models": [
        Row("llama", "Llama"),
        Row("mistral", "Mistral"),
        Row("qwen2", "Qwen2"),
        Row("qwen3", "Qwen3"),
        Row("gemma2", "Gemma 2"),
        Row("gemma3", "Gemma 3"),
        Row("phi3", "Phi-3"),
        Row("gpt2", "GPT-2"),
        Row("gpt-neox", "GPT-NeoX"),
        Row("mixtral", "Mixtral, its attention"),
        Row("qwen-moe", "Qwen2-MoE with its shared expert, Qwen3-MoE's attention"),
        Row("experts", "experts that are ordinary modules; one that no sample is routed to keeps PEFT's init, named"),
        Row("unknown-architecture", "an architecture that cannot be cut: in several passes"),
        Row("vision-language", "a vision-language model on text rows", NO_TEST),
        Row("images", "images or audio in the batches"),
        Row("sequence-classification", "sequence classification"),
        Row("token-classification", "token classification", NO_TEST),
        Row("encoder-decoder", "encoder-decoders"),
        Row("masked-lm", "masked language models"),
    ],
    "trainers and losses": [
        Row("peft-call", "a training loop of your own"),
        Row("trainer", "transformers' `Trainer`"),
        Row("sft", "TRL's `SFTTrainer`"),
        Row("completion-only", "completion-only and assistant-only loss"),
        Row("trl-packing", "TRL's packing and padding-free batches"),
        Row("streams", "streamed datasets; without a length `population_size` must be given"),
        Row("checkpointing", "gradient checkpointing off, re-entrant, non-re-entrant"),
        Row("autocast", "bf16 autocast"),
        Row("compile", "`torch_compile`"),
        Row("offload", "activation offloading"),
        Row("neftune", "dropout and NEFTune: off in the pass, on again after it"),
        Row("label-smoothing", "label smoothing"),
        Row("other-losses", "TRL's other `loss_type`s than `nll`"),
        Row("preferences", "TRL's DPO, KTO, GRPO and RLOO trainers"),
        Row("reward", "TRL's `RewardTrainer`"),
        Row(
            "own-loss",
            "a `compute_loss` of your own in TRL or transformers",
            "a callback cannot see it, and the model's own loss is used",
        ),
    ],
    "Axolotl's features": [
        Row("axolotl-qlora", "`adapter: qlora` and `lora`, `load_in_4bit`, `merge-lora`"),
        Row("axolotl-packing", "`sample_packing`"),
        Row("axolotl-kernels", "fused LoRA kernels: lifted for the pass (on a CPU, as far as they install there)"),
        Row("axolotl-offload", "`activation_offloading`"),
        Row("axolotl-streaming", "`streaming` datasets", NO_TEST),
        Row("axolotl-preprocess", "`axolotl preprocess` first", NO_TEST),
        Row("axolotl-datasets", "several datasets in one config", NO_TEST),
        Row(
            "axolotl-relora",
            "`relora`: the first adapter only, with a warning",
            "that it warns is tested, a run is not",
        ),
        Row("axolotl-model-dir", "`lora_model_dir`", NO_TEST),
        Row("axolotl-resume", "`resume_from_checkpoint`", NO_TEST),
        Row("axolotl-find-batch-size", "`auto_find_batch_size`", NO_TEST),
        Row("axolotl-ray", "`use_ray`", NO_TEST),
        Row("axolotl-rl", "`rl`, `reward_model`, `process_reward_model`"),
        Row("axolotl-losses", "`tiled_mlp`, `use_eaft`, trainers with a loss of their own"),
    ],
    "several processes": [
        Row("ddp-2", "DDP, 2 processes"),
        Row("ddp-4", "DDP, 4 processes"),
        Row("axolotl-ddp", "DDP in Axolotl, 2 processes"),
        Row("fsdp2", "FSDP2"),
        Row("fsdp1", "FSDP1"),
        Row("zero-1", "DeepSpeed ZeRO-1"),
        Row("zero-2", "DeepSpeed ZeRO-2"),
        Row("zero-3", "DeepSpeed ZeRO-3"),
        Row("data-parallel", "one process with several GPUs (`nn.DataParallel`)"),
        Row("tensor-parallel", "tensor parallelism", NO_TEST),
        Row("context-parallel", "context and sequence parallelism", NO_TEST),
    ],
    "restarts": [
        Row("resumed", "a resumed run: left alone, with a line that says so"),
        Row("second-train", "a second `train()`: left alone, with a line that says so"),
        Row("trained-adapter", "an adapter with trained weights: left alone, with a line that says so"),
        Row("find-batch-size", "`auto_find_batch_size`"),
        Row("reload", "the saved adapter on a fresh base, quantised or not"),
        Row("cache", "a start that is kept and used again", NO_TEST),
        Row("export", "a start that is exported without training", NO_TEST),
    ],
}
