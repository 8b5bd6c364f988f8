#!/usr/bin/env bash
# Finding:  BOFT, a parameter-efficient method, holds a float32 matrix of in_features x in_features for every layer.
# Versions: torch 2.13.0, transformers 5.24.0, peft 0.21.2, accelerate 1.15.0
# Expected: an adapter of 80 KiB takes 80 KiB, and gradients and optimizer states in proportion.
# Seen:     each adapted layer keeps its permutation as a dense float32 buffer: for a width of 4,096, 64 MiB, twice
#           the layer's own 16-bit weight and 819 times the adapter. With the default number of factors it is the
#           identity. print_trainable_parameters() and the adapter's file show none of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet peft==0.21.2 transformers==5.24.0 accelerate==1.15.0

HF_HUB_OFFLINE=1 python -W ignore - <<'EOF'
import sys

import torch
from peft import BOFTConfig, get_peft_model, get_peft_model_state_dict
from torch import nn


class OneLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.proj(x)


as_seen = True
for width in (1024, 4096):
    model = get_peft_model(OneLayer(width), BOFTConfig(target_modules=["proj"]))
    weight = model.base_model.model.proj.base_layer.weight
    trained, every = model.get_nb_trainable_parameters()
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    buffers = dict(model.named_buffers())
    held = sum(buffer.nbytes for buffer in buffers.values())
    saved = sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values())
    identity = all(b.shape == (1, width, width) and torch.equal(b[0], torch.eye(width)) for b in buffers.values())
    print(
        f"width {width}: weight {weight.nbytes:,} bytes, adapter {adapter:,} (saved {saved:,}), "
        f"buffers {held:,}, the identity: {identity}; {trained:,} of {every:,} parameters"
    )
    as_seen &= held == 4 * width**2 and held == 2 * weight.nbytes and identity and saved == adapter
    as_seen &= every == weight.numel() + trained
if as_seen:
    print("ok: BOFT holds a dense float32 identity for each layer")
else:
    print("changed: what BOFT holds beside its parameters")
    sys.exit(1)
EOF
