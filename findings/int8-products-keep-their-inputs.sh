#!/usr/bin/env bash
# Finding:  checkpointing saves little of a base in 8 bits: each linear layer of bitsandbytes keeps its input all the same.
# Versions: torch 2.13.0, bitsandbytes 0.50.2, numpy 2.4.6
# Expected: a checkpointed block keeps its own input, and what its layers read is made again in the backward pass, as it
#           is with nn.Linear and with Linear4bit.
# Seen:     the autograd function of Linear8bitLt keeps its input as an attribute of its node, which torch's hooks for
#           saved tensors do not see. Of a checkpointed block of four layers the three inputs that are made inside are
#           all alive after the forward pass, 3,145,728 bytes; of the same block in 4 bits none is. Its only reader
#           would be the gradient of the weight, which is frozen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet bitsandbytes==0.50.2 numpy==2.4.6

python -W ignore - <<'EOF'
import gc
import weakref

import bitsandbytes as bnb
import torch
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS = 256, 1024


def frozen(kind):
    """A linear layer of random weights, held as the kind holds them."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH)
    if kind == "8 bits":
        layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu").train()


def alive_after_forward(kind):
    """Bytes of what a checkpointed block's later layers read that its forward pass leaves behind."""
    layers = [frozen(kind) for _ in range(4)]
    made = []

    def block(x):
        for layer in layers:
            x = torch.sin(layer(x))
            made.append(weakref.ref(x.untyped_storage()))
        return x

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    result = checkpoint(block, x, use_reentrant=False)
    gc.collect()
    *inner, _ = made  # the last one is the block's result
    alive = sum(one().nbytes() for one in inner if one() is not None)
    result.sum().backward()
    return alive


each = TOKENS * WIDTH * 4
eight, four = alive_after_forward("8 bits"), alive_after_forward("4 bits")
print(f"kept of what three inner layers read: in 8 bits {eight:,} bytes, in 4 bits {four:,}")
if (eight, four) == (3 * each, 0):
    print("ok: layers in 8 bits keep their inputs beyond a checkpoint")
else:
    print("changed: they keep what layers in 4 bits do")
    raise SystemExit(1)
EOF
