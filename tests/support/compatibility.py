"""What works with what: the rows of docs/compatibility.md, in order. Their states are not written here.

A test that shows a row carries `@pytest.mark.compat("key")`, a test of the sentence that refuses one
`@pytest.mark.refused("key")`; `table.py` reads these markers, and `make table` writes the table.
"""

from __future__ import annotations

from dataclasses import dataclass

BY_HAND = "passed by hand with gptqmodel 7.7's torch kernels, which want another torch than CI has"


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
        Row("newest", "TRL 1.16, PEFT 0.21 and transformers 5.24, the newest when this was written"),
        Row(
            "unsloth",
            "Unsloth 2026.10.9 on its CPU backend, with TRL 1.15, PEFT 0.21 and transformers 5.17: `SFTTrainer`, "
            "unquantised and 4-bit",
        ),
        Row(
            "unsloth-fused",
            "Unsloth's fused functions, tiled MLPs and compiled blocks: put aside for the pass; shown on its own "
            "functions as far as a CPU runs them, else on stand-ins",
        ),
        Row("unsloth-gpu", "training with Unsloth on a GPU", "its code for GPUs was read, and runs in tests in part"),
        Row(
            "llama-factory",
            "LLaMA-Factory 0.9.5 (transformers 5.6, PEFT 0.18, accelerate 1.11): `run_exp(args, callbacks=[…])`",
            "passed by hand, unquantised and in 4 bits: the start is the PEFT call's",
        ),
        Row(
            "floors",
            "the lowest releases admitted: transformers 5.6.0, PEFT 0.18.1, accelerate 1.11.0, TRL 1.8.0, bitsandbytes "
            "0.49.1",
            "`make floors` on 2026-11-26 with torch 2.13 (2.11 was not run): 1813 tests passed, 40 skipped",
        ),
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
        Row("hqq", "HQQ, 2, 3, 4 and 8 bits"),
        Row("torchao-int8", "torchao int8 weights"),
        Row("torchao-float8", "torchao float8 weights"),
        Row("torchao-int4", "torchao int4 weights (`IntxWeightOnlyConfig`)"),
        Row("torchao-int4-tiles", "torchao int4, packed in tiles (`Int4WeightOnlyConfig`)", "needs a library for GPUs"),
        Row("torchao-int8-activations", "torchao int8 weights and activations: no gradient passes through them"),
        Row("gptq", "GPTQ", BY_HAND),
        Row("awq", "AWQ", BY_HAND),
        Row("compressed-tensors", "compressed-tensors", "PEFT cannot wrap the compressed layers"),
        Row("quantised-experts", "experts in one parameter, in bitsandbytes 4 bits as by `quantize_moe_experts`"),
        Row("no-backward", "any layer through which no gradient passes, targeted or not"),
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
        Row("lm-head", "the language-model head as a target, its weight tied to the embeddings or not"),
        Row(
            "ensure-weight-tying",
            "one adapter for embeddings and head (`ensure_weight_tying`): keeps PEFT's init, named in a warning",
        ),
        Row("convolutions", "convolutions as targets: keep PEFT's init, named in a warning"),
        Row("target-parameters", "`target_parameters`: all experts in one parameter, or any one matrix"),
        Row(
            "fused-experts",
            "the same where no product with one matrix is seen (kernels, all experts at once): keep PEFT's init, named "
            "in a warning",
        ),
        Row("layer-replication", "`layer_replication`"),
        Row("lora-bias", "`lora_bias`, `bias`"),
        Row("dora", "DoRA: its magnitudes start with the factors"),
        Row("lora-variants", "variants that compute something else: aLoRA, …"),
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
        Row("mixtral", "Mixtral, its attention and its experts"),
        Row("qwen-moe", "Qwen2-MoE's attention and shared expert, Qwen3-MoE's attention and experts"),
        Row("gpt-oss", "gpt-oss, its experts and attention"),
        Row("deepseek-v3", "DeepSeek-V3, its experts and attention"),
        Row("experts", "experts that are ordinary modules; one that no sample is routed to keeps PEFT's init, named"),
        Row("by-column", "layers that read a batch column by column (Longformer, LED)"),
        Row("unknown-architecture", "an architecture that cannot be cut: in several passes"),
        Row("vision-language", "vision-language models with images (LLaVA, Qwen2-VL), their language layers targeted"),
        Row("vision-tower", "a vision tower as a target (one layer of it among many keeps PEFT's init, named)"),
        Row("images", "images in the batches of a text model"),
        Row("audio", "audio in the batches of an encoder-decoder"),
        Row("audio-language", "decoders that read audio", "no test has such a model"),
        Row(
            "sequence-classification",
            "classifiers of sequences, by one label, several or a number: Llama, GPT-2, BERT, RoBERTa, ModernBERT, "
            "DistilBERT",
        ),
        Row("token-classification", "classifiers of tokens: Llama, GPT-2, BERT, RoBERTa, ModernBERT"),
        Row("reward-model", "reward models, on pairs of rows"),
        Row(
            "every-class",
            "every other causal, image-text and sequence-to-sequence class of transformers, tiny, on text: served, or "
            "refused in a sentence (`make classes` lists them)",
        ),
        Row("unshifted", "causal models whose loss is not shifted: decoders of encoder-decoders alone, XLM, XLNet"),
        Row("encoder-decoder", "encoder-decoders: T5, BART, M2M100 (NLLB), Blenderbot, T5Gemma"),
        Row("speech", "encoder-decoders that read sound or images in the place of tokens (Whisper, Pix2Struct)"),
        Row("encoder-decoder-classifier", "classifiers that are encoder-decoders"),
        Row("two-models", "two models made one (`EncoderDecoderModel`)"),
        Row("masked-lm", "masked language models"),
        Row("question-answering", "question answering by spans"),
    ],
    "trainers and losses": [
        Row("peft-call", "a training loop of your own"),
        Row("trainer", "transformers' `Trainer`"),
        Row("trainer-images", "images in `SFTTrainer`, some rows without one too"),
        Row("seq2seq-trainer", "transformers' `Seq2SeqTrainer`"),
        Row("sft", "TRL's `SFTTrainer`"),
        Row("reward", "TRL's `RewardTrainer`, margins and `center_rewards_coefficient` too"),
        Row("completion-only", "completion-only and assistant-only loss"),
        Row("trl-packing", "TRL's packing and padding-free batches"),
        Row("trl-batches", "TRL's `max_length`, `pad_to_multiple_of`, `group_by_length`"),
        Row("streams", "streamed datasets; without a length `population_size` must be given"),
        Row("checkpointing", "gradient checkpointing off, re-entrant, non-re-entrant"),
        Row("autocast", "bf16 autocast"),
        Row("compile", "`torch_compile`"),
        Row("offload", "activation offloading"),
        Row("liger", "TRL's `use_liger_kernel`, in Triton's interpreter"),
        Row("neftune", "dropout and NEFTune: off in the pass, on again after it"),
        Row("label-smoothing", "label smoothing"),
        Row("other-losses", "TRL's other `loss_type`s than `nll` and `chunked_nll`"),
        Row("preferences", "TRL's DPO, KTO, GRPO, RLOO and all its other trainers"),
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
        Row("axolotl-liger", "its Liger plugin, with the fused head and without, in Triton's interpreter"),
        Row("axolotl-checkpointing", "`gradient_checkpointing`, re-entrant, not and selective"),
        Row("axolotl-offload", "`activation_offloading`, with the CPU as the accelerator"),
        Row("axolotl-batches", "`group_by_length`, `curriculum_sampling`, `dataset_exact_deduplication`"),
        Row(
            "axolotl-training",
            "`loraplus_lr_ratio`, `neftune_noise_alpha`, `lora_dropout`, `torch_compile`, `chunked_cross_entropy`",
        ),
        Row(
            "axolotl-adapter",
            "`lora_target_modules`, `lora_rank_pattern`, `lora_alpha_pattern`, `peft_use_rslora`, "
            "`peft_layers_to_transform`, `peft_layer_replication`, `lora_fan_in_fan_out`, "
            "`peft_init_lora_weights: gaussian`",
        ),
        Row("axolotl-dora", "`peft_use_dora`"),
        Row("axolotl-target-parameters", "`lora_target_parameters`"),
        Row("axolotl-modules-to-save", "`lora_modules_to_save`: untouched by the start"),
        Row("axolotl-streaming", "`streaming` and `pretraining_dataset`, packed too; `population_size` must be given"),
        Row("axolotl-preprocess", "`axolotl preprocess` first"),
        Row("axolotl-datasets", "several datasets in one config"),
        Row("axolotl-validation", "`val_set_size`: what is held back is not read"),
        Row("axolotl-relora", "`relora`: the first adapter only, with a warning"),
        Row("axolotl-model-dir", "`lora_model_dir`: a trained adapter is left alone, an untrained one started"),
        Row("axolotl-resume", "`resume_from_checkpoint`, `auto_resume_from_checkpoints`: left alone"),
        Row("axolotl-find-batch-size", "`auto_find_batch_size`"),
        Row("axolotl-ray", "`use_ray`, one worker: what Ray would run, without Ray"),
        Row("axolotl-ddp", "DDP by its torchrun launcher, 2 CPU processes"),
        Row("axolotl-reward", "`reward_model`, with `bradley_terry.chat_template`"),
        Row("axolotl-images", "images (`processor_type`), some rows without one too"),
        Row("axolotl-rl", "`rl`, `process_reward_model`"),
        Row(
            "axolotl-losses",
            "`tiled_mlp`, `use_eaft`, `use_dft`, `liger_use_token_scaling`, trainers with a loss of their own",
        ),
    ],
    "several processes": [
        Row("ddp-2", "DDP in `Trainer` and `SFTTrainer`, 2 CPU processes"),
        Row("processes-2", "the PEFT call in 2 CPU processes, each with the whole model, in nf4 too"),
        Row("processes-4", "the PEFT call in 4 CPU processes, each with the whole model"),
        Row("fsdp2", "FSDP2, set up by accelerate's own function, on 2 CPU processes"),
        Row("fsdp2-nf4", "the same with an nf4 base, stored as bytes or in bfloat16"),
        Row("fsdp1", "FSDP1"),
        Row("zero-1", "DeepSpeed ZeRO-1 in `Trainer`, 2 processes on its CPU accelerator, float32 and bf16"),
        Row("zero-2", "DeepSpeed ZeRO-2, the same"),
        Row("zero-3", "DeepSpeed ZeRO-3, the same"),
        Row("data-parallel", "one process with several GPUs (`nn.DataParallel`)"),
        Row("device-map", "a model on two GPUs by `device_map`, which the CPU plays"),
        Row("tensor-parallel", "tensor parallelism"),
        Row("context-parallel", "context and sequence parallelism"),
        Row("expert-parallel", "expert parallelism, in Axolotl"),
    ],
    "restarts": [
        Row("resumed", "a resumed run: left alone, with a line that says so"),
        Row("second-train", "a second `train()`: left alone, with a line that says so"),
        Row("trained-adapter", "an adapter with trained weights: left alone, with a line that says so"),
        Row("find-batch-size", "`auto_find_batch_size`"),
        Row("reload", "the saved adapter on a fresh base, quantised or not"),
        Row(
            "first-step",
            "a first step of measured length: LoRA, DoRA, experts, the head, 4-bit and 8-bit, streamed",
        ),
        Row("cache", "`cache_dir`: a start that is kept and used again, unquantised, 4-bit and 8-bit"),
        Row("export", "a start that is exported without training, and loaded by PEFT"),
        Row("command", "`python -m lora_da`, unquantised, 4-bit and 8-bit"),
        Row("command-rows", "its rows: chats, prompt and completion, Alpaca, ShareGPT, question and answer, text"),
        Row("command-files", "its files: `.jsonl`, `.json`, `.parquet`, folders of `datasets`"),
    ],
}
