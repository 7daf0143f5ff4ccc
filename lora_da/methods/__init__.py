"""One algorithm a file: statistics of a layer in, LoRA factors out. Pure functions of tensors and numbers.

A method is a file here and an entry of `METHODS`; the command, the config, the planner and the solver read the entry.
What methods share is in `common`, `gradient` and `linalg`. Standard library only, as far as this file goes: a config is
loaded without torch, and a method's file is imported when one of its functions is first called.
"""

from __future__ import annotations

import math

from lora_da.methods.method import Method, Numbers, function_of
from lora_da.methods.presets import PRESETS
from lora_da.needs import Needs, Sums

METHODS: dict[str, Method] = {
    "lora_da": Method(
        "lora_da",
        # the factor of Z, and D with the basis of a few dozen vectors and their images
        Needs(
            Sums(),
            solving=lambda i, o: 4 * (i**2 + 4 * i * o),
            # its factor in float64, and a few columns of the inverse
            solving_fisher=lambda o: 8 * o * (o + 3 * min(o, 512)),
        ),
        PRESETS,
        function_of("lora_da", "lora_da"),
        prepare=function_of("lora_da", "damp_input"),
        population=True,
        float32_up_to=function_of("lora_da", "float32_up_to"),
    ),
    "filet": Method(
        "filet",
        Needs(Sums(grad=False), solving=function_of("filet", "solving"), weight=True, full_fisher_up_to=math.inf),
        {"default": Numbers(averaging="tokens")},
        function_of("filet", "filet"),
    ),
    "cntlora": Method(
        "cntlora",
        # Z's copy, its eigenvectors and their workspace, W dequantised, scaled and turned, and the residual in float64
        Needs(Sums(grad=False, output_fisher=False), solving=lambda i, o: 4 * (5 * i**2 + 7 * i * o), weight=True),
        {"default": Numbers(damping=0.1)},  # as in LoRA-DA's default: the same Z is damped
        function_of("cntlora", "cntlora"),
        prepare=function_of("cntlora", "find_shift"),
    ),
    "lora_one": Method(
        "lora_one",
        # G scaled, the basis and its images, and the last of them in float64
        Needs(Sums(input_cov=False, output_fisher=False), solving=lambda i, o: 4 * (3 * i * o + 128 * (i + o))),
        {"default": Numbers(averaging="tokens", gamma=128.0, first_step="gamma")},  # the paper's
        function_of("lora_one", "lora_one"),
    ),
    "lora_ga": Method(
        "lora_ga",
        Needs(
            Sums(input_cov=False, output_fisher=False), solving=lambda i, o: 4 * (3 * i * o + 128 * (i + o))
        ),  # as above
        {"default": Numbers(averaging="tokens", gamma=16.0)},  # PEFT's default
        function_of("lora_ga", "lora_ga"),
    ),
}
