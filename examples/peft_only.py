"""QLoRA with PEFT and a training loop of one's own, the adapter started from data by LoRA-DA; on a GPU or a CPU.

python examples/smollm2.py && python examples/make_instructions.py instructions.jsonl
python examples/peft_only.py --model ~/.cache/lora-da/smollm2-135m --data instructions.jsonl
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from lora_da import LoraDAConfig, initialize_lora_da_weights

Row = tuple[torch.Tensor, torch.Tensor]  # input_ids and labels, (n,) each
IGNORED = -100  # label of what carries no loss


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        device_map="auto" if on_gpu else "cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    lora = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(prepare_model_for_kbit_training(model), lora)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    rows = [tokenize(tokenizer, json.loads(line)["messages"]) for line in lines]
    dataloader = DataLoader(rows, batch_size=arguments.batch_size, shuffle=True, collate_fn=collate)

    # The one line that matters. The samples are the first of the data, whatever order the loader shuffles them into.
    # The learning rate may be left out: with it, lora_A is enlarged where the rate is far too small.
    config = LoraDAConfig(samples=arguments.samples)
    report = initialize_lora_da_weights(peft_model, dataloader, config, learning_rate=arguments.learning_rate)

    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=arguments.learning_rate)
    peft_model.train()
    for step, batch in enumerate(islice(cycle(dataloader), arguments.steps), start=1):
        loss = peft_model(**{name: tensor.to(peft_model.device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}, loss {loss.item():.3f}", flush=True)

    peft_model.save_pretrained(arguments.output)
    print(f"adapter in {arguments.output}, report in {report.save(arguments.output)}")


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_length: int = 96) -> Row:
    """One chat, its answer carrying the loss."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"][:max_length]
    labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
    return torch.tensor(ids), torch.tensor(labels[: len(ids)])


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Right-padded to the longest row, (b, n) each. What pads does not matter: it is neither attended to nor scored."""
    ids, labels = [row[0] for row in rows], [row[1] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="JSON lines with `messages`")
    parser.add_argument("--output", default="outputs/peft_only")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=64, help="rows that LoRA-DA looks at")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
