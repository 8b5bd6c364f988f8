#!/usr/bin/env bash
# Finding:  naming one module to keep in 16 bits puts the output head, which was in 16 bits, into 4.
# Versions: torch 2.13.0, transformers 5.24.0, bitsandbytes 0.50.2, accelerate 1.15.0
# Expected: llm_int8_skip_modules adds to what is left alone. Its documentation says that the head of a causal
#           language model keeps its dtype; naming one more module makes the model larger.
# Seen:     the list takes the place of the one that transformers makes itself. With q_proj on it the head becomes
#           a Linear4bit and the model takes fewer bytes than with no list at all; "lm_head" has to be named as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0

HF_HUB_OFFLINE=1 python -W ignore - "$work" <<'EOF'
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1] + "/model"
shape = LlamaConfig(
    num_hidden_layers=2, hidden_size=256, intermediate_size=512, vocab_size=4096, num_attention_heads=4
)
LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)

seen = {}
for skipped in (None, ["q_proj"], ["q_proj", "lm_head"]):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    head = type(model.lm_head).__name__
    query = type(model.model.layers[0].self_attn.q_proj).__name__
    stored = sum(parameter.nbytes for parameter in model.parameters())
    seen[str(skipped)] = head, query, stored
    print(f"skip {skipped}: head {head}, q_proj {query}, {stored:,} bytes")
none, one, both = seen.values()
if (
    none[:2] == ("Linear", "Linear4bit")
    and one[:2] == ("Linear4bit", "Linear")
    and both[:2] == ("Linear", "Linear")
    and one[2] < none[2] < both[2]
):
    print("ok: a list of modules to keep replaces the one that keeps the head")
else:
    print("changed: which modules are kept beside those that are named")
    sys.exit(1)
EOF
