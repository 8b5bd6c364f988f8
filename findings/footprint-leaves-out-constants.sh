#!/usr/bin/env bash
# Finding:  get_memory_footprint() of a 4-bit model leaves the quantisation constants out.
# Versions: torch 2.13.0, transformers 5.24.0, bitsandbytes 0.50.2, accelerate 1.15.0, safetensors 0.8.0
# Expected: the bytes of everything that loading the model put into memory.
# Seen:     it adds up parameters and buffers. The scales and code tables of 4-bit weights are attributes of theirs
#           and neither: an eighth of the packed weights, a thirty-second or so with double quantisation. The size is
#           the same with and without double quantisation, though that is what double quantisation is for. What
#           save_pretrained() writes has them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0 safetensors==0.8.0

HF_HUB_OFFLINE=1 python -W ignore - "$work" <<'EOF'
import sys

import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1] + "/model"
shape = LlamaConfig(
    num_hidden_layers=2, hidden_size=512, intermediate_size=1024, vocab_size=256, num_attention_heads=4
)
LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)

told, scales, written = {}, {}, {}
for double in (False, True):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    packed = [p for p in model.parameters() if isinstance(p, Params4bit)]
    states = [s for p in packed for s in (p.quant_state, p.quant_state.state2) if s is not None]
    told[double] = model.get_memory_footprint()
    scales[double] = sum(state.absmax.nbytes for state in states)
    share = scales[double] / sum(p.nbytes for p in packed)
    model.save_pretrained(f"{folder}-{double}")
    saved = load_file(f"{folder}-{double}/model.safetensors")
    written[double] = sum(tensor.nbytes for tensor in saved.values())
    print(
        f"double quantisation {double}: footprint {told[double]:,} bytes; scales {scales[double]:,} bytes, "
        f"{share:.4f} of the packed weights; {written[double]:,} bytes of tensors saved"
    )
if told[False] == told[True] and scales[False] > 3 * scales[True] and written[False] > written[True] > told[True]:
    print("ok: the footprint has no quantisation constants in it")
else:
    print("changed: what the footprint of a 4-bit model counts")
    sys.exit(1)
EOF
