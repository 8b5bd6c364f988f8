#!/usr/bin/env bash
# Finding:  TRL adds a mixture's loss for balanced experts though the model's config does not ask for it.
# Versions: torch 2.13.0, transformers 5.24.0, trl 1.16.0, accelerate 1.15.0, datasets 5.2.0
# Expected: `output_router_logits: false`, which Mixtral's and Qwen3-MoE's published configs have, means that no
#           load-balancing loss is added, as in transformers' own Trainer.
# Seen:     SFTTrainer sets it to true wherever the config has a `router_aux_loss_coef` other than 0, logs an
#           `aux_loss`, and adds it to the loss. `SFTConfig(router_aux_loss_coef=0.0)` leaves it out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python - "$work" <<'EOF'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")),
    pad_token="t0", eos_token="t1",
)
data = Dataset.from_dict({"input_ids": [[i % 64 for i in range(128)]]})
seen = {}
for name, knobs in (("by default", {}), ("with a coefficient of 0", {"router_aux_loss_coef": 0.0})):
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=2, hidden_size=32, intermediate_size=16, vocab_size=64, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.001,
        )
    )
    asked = model.config.output_router_logits
    arguments = SFTConfig(
        output_dir=sys.argv[1], use_cpu=True, bf16=False, max_steps=1, max_length=128, report_to=[],
        per_device_train_batch_size=1, save_strategy="no", disable_tqdm=True, logging_steps=1, **knobs,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logged = any("aux_loss" in row for row in trainer.state.log_history)
    seen[name] = asked, trainer.model.config.output_router_logits, logged
    print(f"{name}: asked for {asked}, taken {seen[name][1]}, aux_loss logged {logged}")
if seen == {"by default": (False, True, True), "with a coefficient of 0": (False, False, False)}:
    print("ok: the loss for balanced experts is added though the config does not ask for it")
else:
    print("changed: whether the loss for balanced experts is added")
    sys.exit(1)
EOF
