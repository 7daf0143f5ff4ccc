"""One algorithm a file: statistics of a layer in, LoRA factors out. Pure functions of tensors and numbers.

`lora_da`, `filet`, `cntlora`, `lora_one` and `lora_ga` are methods; they share `common`, `gradient` and `eigen`.
"""
