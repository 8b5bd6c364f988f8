#!/usr/bin/env bash
# Finding:  PEFT puts no adapter on experts that bitsandbytes holds in 4 bits, and the run trains the rest.
# Versions: torch 2.13.0, transformers 5.24.0, peft 0.21.2, bitsandbytes 0.50.2, accelerate 1.15.0
# Expected: `target_parameters`, which is made for experts in 3-D tensors, finds them by the names that they have in
#           the model, whether bitsandbytes' `replace_parameter_4bit` has quantised them or not.
# Seen:     in 16 bits each of two layers' two stacks gets its pair of adapter weights, 8 tensors beside attention's 8.
#           Quantised, a stack is a parametrised tensor, whose name in `named_parameters` ends in
#           `parametrizations.gate_up_proj.original`; nothing matches, a warning says so, and attention's 8 are trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python - <<'EOF'
import sys
import warnings

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

STACKS = ("gate_up_proj", "down_proj")
shape = MixtralConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=64, vocab_size=64, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
lora = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], target_parameters=[f"mlp.experts.{name}" for name in STACKS]
)

seen = {}
for kind in ("16 bits", "4 bits"):
    torch.manual_seed(0)
    model = MixtralForCausalLM(shape).to(torch.bfloat16)
    if kind == "4 bits":
        for layer in model.model.layers:
            for name in STACKS:
                replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=False, quant_type="nf4")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = get_peft_model(model, lora)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    experts = sum(".experts." in name for name in trained)
    warned = any("no parameter was matched" in str(one.message) for one in told)
    held = [name for name, _ in model.named_parameters() if "gate_up_proj" in name and "lora" not in name]
    seen[kind] = len(trained) - experts, experts, warned
    print(f"{kind}: {experts} tensors of adapters on experts, {len(trained) - experts} others, warned: {warned}")
    print(f"  a stack is called {held[0]}")
if seen == {"16 bits": (8, 8, False), "4 bits": (8, 0, True)}:
    print("ok: experts in 4 bits get no adapter, and attention's are trained")
else:
    print("changed: which experts get an adapter")
    sys.exit(1)
EOF
