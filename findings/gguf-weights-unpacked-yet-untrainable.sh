#!/usr/bin/env bash
# Finding:  a GGUF file that transformers has unpacked to plain 16-bit weights can be neither trained nor saved.
# Versions: torch 2.13.0, transformers 5.24.0, peft 0.21.2, accelerate 1.15.0, gguf 0.19.0, numpy 2.4.6
# Expected: without the package `kernels` there is nothing to compute on packed weights with. The model takes 16 bits
#           a weight and is one like any other: a Trainer takes it with an adapter, and save_pretrained() saves it.
# Seen:     every layer is nn.Linear in bfloat16, yet the model says is_quantized. A Trainer refuses it with and
#           without an adapter, and saving is refused as well. With GgufConfig(dequantize=True) the same weights
#           come without the label, train and are saved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python -W ignore - "$work" <<'EOF'
import sys

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments

folder = sys.argv[1]
WIDTH, VOCABULARY = 128, 256
writer = GGUFWriter(f"{folder}/model.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(1)
writer.add_feed_forward_length(WIDTH)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(VOCABULARY)
random = np.random.default_rng(0)
matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
for name in ["token_embd", "output", *(f"blk.0.{matrix}" for matrix in matrices)]:
    rows = WIDTH if name.startswith("blk") else VOCABULARY
    values = random.normal(0, 0.02, (rows, WIDTH)).astype(np.float32)
    packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
    writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def refused(action):
    try:
        action()
    except ValueError as error:
        print(f"  refused: {str(error)[:90]}")
        return True
    return False


seen = []
for config in (None, GgufConfig(dequantize=True)):
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.bfloat16, **options
    )
    layer = model.model.layers[0].mlp.up_proj
    labelled = getattr(model, "is_quantized", False)
    print(f"{options}: {type(layer).__name__} of {layer.weight.dtype}, is_quantized {labelled}")
    saving = refused(lambda: model.save_pretrained(f"{folder}/saved"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    training = refused(lambda: Trainer(adapted, TrainingArguments(f"{folder}/out", use_cpu=True)))
    seen.append((type(layer) is torch.nn.Linear, layer.weight.dtype, labelled, saving, training))
if seen == [(True, torch.bfloat16, True, True, True), (True, torch.bfloat16, False, False, False)]:
    print("ok: unpacked GGUF weights are called quantised, and so neither trained nor saved")
else:
    print("changed: what can be done with an unpacked GGUF file")
    sys.exit(1)
EOF
