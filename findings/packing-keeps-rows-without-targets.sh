#!/usr/bin/env bash
# Finding:  rows whose prompt fills max_length are left out by SFTTrainer, but kept and trained for nothing if packed.
# Versions: torch 2.13.0, transformers 5.24.0, trl 1.16.0, accelerate 1.15.0, datasets 5.2.0
# Expected: packing changes how rows are laid out, not which of them are trained on.
# Seen:     cut at max_length such a row has no target left. Without packing it is dropped: three of eight, told by
#           a progress bar's name and no warning. Packed, all eight are kept, three have labels of -100 alone, and
#           the steps that train on these have loss 0 and gradient 0, which brings the mean loss down.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python -W ignore - "$work" <<'EOF'
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {word: i for i, word in enumerate("[UNK] [PAD] [EOS] a b c d".split())}
rules = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
)
shape = LlamaConfig(
    num_hidden_layers=1, hidden_size=64, intermediate_size=128, vocab_size=len(words), num_attention_heads=4,
    pad_token_id=1, eos_token_id=2,
)
LONG, SHORT, LENGTH = 3, 5, 16
rows = [{"prompt": "a " * 20, "completion": "b c"}] * LONG
rows += [{"prompt": "a b c d " * 3, "completion": "c d "}] * SHORT

seen = {}
for packing in (False, True):
    trainer = SFTTrainer(
        LlamaForCausalLM(shape),
        SFTConfig(
            output_dir=sys.argv[1] + "/out", max_length=LENGTH, packing=packing, num_train_epochs=1,
            per_device_train_batch_size=1, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    blank = sum(set(row["labels"]) == {-100} for row in trainer.train_dataset)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    idle = sum(entry["loss"] == 0 and entry["grad_norm"] == 0 for entry in steps)
    seen[packing] = len(trainer.train_dataset), blank, idle
    print(
        f"packing {packing}: {len(rows)} rows became {seen[packing][0]}, {blank} of them without a target; "
        f"{idle} of {len(steps)} steps with loss 0 and gradient 0"
    )
if seen == {False: (SHORT, 0, 0), True: (SHORT + LONG, LONG, LONG)}:
    print("ok: rows without a target are dropped, unless they are packed")
else:
    print("changed: what becomes of rows whose prompt fills max_length")
    sys.exit(1)
EOF
