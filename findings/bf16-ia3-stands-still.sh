#!/usr/bin/env bash
# Finding:  IA3 on a 4-bit base trains nothing under TRL at a learning rate of 1e-3, though gradients and losses flow.
# Versions: torch 2.13.0, transformers 5.24.0, trl 1.16.0, peft 0.21.2, bitsandbytes 0.50.2,
#           accelerate 1.15.0, datasets 5.2.0
# Expected: what trains on a 16-bit base trains on a 4-bit base, too.
# Seen:     on a quantised base SFTTrainer casts trained parameters to bfloat16. IA3's start at 1, where bfloat16's
#           next values are 0.004 below and 0.008 above, and AdamW's updates of at most the learning rate round back
#           to 1. After six steps no tensor of six has changed; on a bfloat16 base, where they stay float32, all have.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet transformers==5.24.0 trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2 \
  accelerate==1.15.0 datasets==5.2.0

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python -W ignore - "$work" <<'EOF'
import sys

import torch
from datasets import Dataset
from peft import IA3Config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

folder = sys.argv[1] + "/model"
words = {word: i for i, word in enumerate("[UNK] [PAD] [EOS] a b c d e f g".split())}
rules = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
)
shape = LlamaConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, vocab_size=len(words), num_attention_heads=4,
    pad_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

seen = {}
for base, quantised in (("NF4", {"quantization_config": NF4}), ("bfloat16", {})):
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantised),
        SFTConfig(
            output_dir=sys.argv[1] + "/out", max_steps=6, learning_rate=1e-3, lr_scheduler_type="constant",
            logging_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[], use_cpu=True,
            bf16=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"text": "a b c d e f g"}, {"text": "b d f a c e g"}] * 6),
        processing_class=tokenizer,
        peft_config=IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    )
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    trainer.train()
    moved = sum(not torch.equal(p.detach(), before[n]) for n, p in trained.items())
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    seen[base] = {str(p.dtype) for p in trained.values()}, moved, min(norms) > 0
    print(f"{base}: {seen[base][0]}, {moved} of {len(trained)} moved, smallest gradient norm {min(norms):.3f}")
if seen == {"NF4": ({"torch.bfloat16"}, 0, True), "bfloat16": ({"torch.float32"}, 6, True)}:
    print("ok: IA3 stands still on a quantised base and moves on a 16-bit one")
else:
    print("changed: what moves in six steps of IA3")
    sys.exit(1)
EOF
