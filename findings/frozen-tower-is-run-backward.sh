#!/usr/bin/env bash
# Finding:  with gradient checkpointing and LoRA on the language model alone, transformers runs a frozen vision tower again
#           and backward.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, numpy 2.4.6
# Expected: a vision tower without a trainable parameter, given pixels that want no gradient, keeps nothing for a backward
#           pass: what runs backward is the language model, which has the adapters.
# Seen:     enable_input_require_grads() puts its hook on the input embeddings of every part that has some, and a tower's
#           are its patches. gradient_checkpointing_enable() calls it where there is an adapter, so both layers of the tower
#           are run again and backward in every step. With the hook on the token embeddings alone none is, and the adapter's
#           gradients are equal to the last bit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6

python -W ignore - <<'EOF'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64,
          "fullatt_block_indexes": [1]}
IDS = torch.tensor([[1, 2, 60, 60, 60, 60, 3, 4]])


def step(tokens_alone):
    """A step; how often each layer of the tower ran forward, and backward; the adapters' gradients."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2_5_vl", text_config=TEXT, vision_config=VISION, image_token_id=60)
    config.text_config.bos_token_id = config.text_config.eos_token_id = 0
    model = AutoModelForImageTextToText.from_config(config)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=r"model\.visual\..*"))
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if tokens_alone:
        base.disable_input_require_grads()
        base.get_input_embeddings().register_forward_hook(lambda module, given, made: made.requires_grad_(True))
    counts = {"forward": 0, "backward": 0}
    for block in base.model.visual.blocks:
        block.norm1.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
        block.mlp.register_full_backward_hook(lambda *_: counts.update(backward=counts["backward"] + 1))
    model.train()
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), mm_token_type_ids=(IDS == 60).long(),
                   pixel_values=torch.randn(16, 1176, generator=torch.Generator().manual_seed(1)),
                   image_grid_thw=torch.tensor([[1, 4, 4]])).logits
    logits.float().square().mean().backward()
    return counts, [one.grad for one in model.parameters() if one.grad is not None]


everywhere, found = step(tokens_alone=False)
alone, same = step(tokens_alone=True)
equal = len(found) == len(same) and all(torch.equal(a, b) for a, b in zip(found, same))
print(f"two layers of a frozen tower, as transformers asks for gradients: {everywhere}")
print(f"with the hook on the token embeddings alone: {alone}, adapters' gradients equal: {equal}")
if everywhere["backward"] == 2 and alone["backward"] == 0 and equal:
    print("ok: a frozen vision tower is run again and backward, to no effect")
else:
    print("changed: what transformers does to a frozen vision tower")
    sys.exit(1)
EOF
