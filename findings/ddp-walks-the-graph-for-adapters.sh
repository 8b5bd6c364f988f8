#!/usr/bin/env bash
# Finding:  transformers' trainer has DDP look for unused parameters in every PEFT run, checkpointed or not, though each
#           adapter takes part in each step; for the same model without PEFT it does not.
# Versions: torch 2.13.0, transformers 5.24.0, peft 0.21.2, accelerate 1.15.0, datasets 5.2.0
# Expected: ddp_find_unused_parameters is documented as false where gradient checkpointing is used, true otherwise.
# Seen:     the trainer asks whether the model is a PreTrainedModel. A PeftModel wraps one and is none, so that with
#           checkpointing DDP is built with find_unused_parameters=True for LoRA and False for full fine-tuning: the
#           graph is walked after each forward pass, and buckets stay as first laid out. With the argument set to False
#           LoRA trains to the same losses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0

cat > "$work/ranks.py" <<'EOF'
import json
import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

shape = LlamaConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, vocab_size=32, num_attention_heads=4,
    pad_token_id=1, eos_token_id=2,
)
rows = Dataset.from_list([{"input_ids": [i % 29 + 3] * 8, "labels": [i % 29 + 3] * 8} for i in range(16)])


class Look(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        ddp = self.trainer.model_wrapped
        assert isinstance(ddp, DistributedDataParallel)
        self.asked = ddp.find_unused_parameters


seen = {}
for name, adapters, told in (("full", False, None), ("LoRA", True, None), ("LoRA, told False", True, False)):
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    if adapters:
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    look = Look()
    look.trainer = trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=sys.argv[1] + "/out", max_steps=3, per_device_train_batch_size=2, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            gradient_checkpointing=True, ddp_find_unused_parameters=told,
        ),
        train_dataset=rows,
        callbacks=[look],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen[name] = (look.asked, losses)
if os.environ["RANK"] == "0":
    for name, (asked, losses) in seen.items():
        print(f"{name}: find_unused_parameters={asked}, losses {losses}")
    asked = [one for one, _ in seen.values()]
    same = seen["LoRA"][1] == seen["LoRA, told False"][1]
    with open(sys.argv[1] + "/verdict.json", "w") as file:
        json.dump(asked == [False, True, False] and same, file)
EOF
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true python -W ignore -m torch.distributed.run --standalone --nproc_per_node 2 \
  "$work/ranks.py" "$work" 2> "$work/errors" || { cat "$work/errors"; exit 2; }
python - "$work" <<'EOF'
import json
import sys

with open(sys.argv[1] + "/verdict.json") as file:
    as_found = json.load(file)
if as_found:
    print("ok: DDP looks for unused parameters with LoRA alone, to the same losses")
else:
    print("changed: what DDP is asked to look for")
    sys.exit(1)
EOF
