#!/usr/bin/env bash
# Finding:  torch's FLOP counter counts none of a 4-bit layer's forward pass, but all of its backward pass.
# Versions: torch 2.13.0, bitsandbytes 0.50.2, numpy 2.4.6
# Expected: 2 x rows x inputs x outputs for the product, as for nn.Linear of the same shape: the arithmetic is the
#           same once the weight is dequantised.
# Seen:     0. The product is one operator of bitsandbytes, for which FlopCounterMode has no formula, and what has
#           none counts nothing and is not reported. The gradient of the input goes through torch.matmul and counts.
#           Of a QLoRA step without checkpointing that is half of the base's arithmetic, of inference none of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet bitsandbytes==0.50.2 numpy==2.4.6

python -W ignore - <<'EOF'
import sys

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROWS, INPUTS, OUTPUTS = 128, 256, 512


def counted(layer):
    x = torch.randn(ROWS, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops(), y.detach()


torch.manual_seed(0)
plain = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
packed = Linear4bit(INPUTS, OUTPUTS, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
packed.load_state_dict(plain.state_dict())
packed = packed.to("cpu")

due = 2 * ROWS * INPUTS * OUTPUTS
seen = {}
for name, layer in (("nn.Linear", plain), ("Linear4bit", packed)):
    forward, backward, y = counted(layer)
    seen[name] = forward, backward
    print(f"{name}: forward {forward:,}, backward {backward:,} of {due:,} each; output's norm {y.norm():.1f}")
if seen == {"nn.Linear": (due, due), "Linear4bit": (0, due)}:
    print("ok: a 4-bit layer's forward product is not counted")
else:
    print("changed: what the FLOP counter sees of a 4-bit layer")
    sys.exit(1)
EOF
