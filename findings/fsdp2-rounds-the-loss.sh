#!/usr/bin/env bash
# Finding:  under accelerate's FSDP2 with bf16 a loss that a model returns for each token is rounded to bfloat16, so that
#           the sum over a batch, and with it the logged loss, stands still while the model learns.
# Versions: torch 2.13.0, accelerate 1.15.0, numpy 2.4.6
# Expected: mixed_precision "bf16" computes products in bfloat16 and leaves float32 results of the model float32, as
#           accelerate does on one GPU and under DDP, where outputs are converted back to float32.
# Seen:     the policy's output_dtype is bfloat16. Of 8,188 losses near 12.57 the sum is near 102,900, where bfloat16
#           counts in steps of 512: four models whose mean losses are 12.55, 12.56, 12.57 and 12.58 all log 12.568637,
#           and with output_dtype=float32 each logs its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet accelerate==1.15.0 numpy==2.4.6

python -W ignore - "$work" <<'EOF'
import dataclasses
import sys

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TOKENS = 8188
MEANS = (12.55, 12.56, 12.57, 12.58)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


class Losses(torch.nn.Module):
    """What a model with a fused head returns: one float32 loss for each token."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        spread = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
        return self.mean + spread - spread.mean() + self.weight.float()


def logged(policy):
    found = []
    for mean in MEANS:
        losses = fully_shard(Losses(mean), mesh=mesh, mp_policy=policy)(TOKENS)
        found.append((str(losses.dtype), round(float(losses.sum()) / TOKENS, 6)))
    return found


plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
policy = plugin.mixed_precision_policy
rounded = logged(policy)
exact = logged(dataclasses.replace(policy, output_dtype=torch.float32))
print(f"output_dtype {policy.output_dtype}: {rounded}")
print(f"output_dtype torch.float32: {exact}")
dist.destroy_process_group()
stands_still = {value for _, value in rounded}
if policy.output_dtype is torch.bfloat16 and len(stands_still) == 1 and len({v for _, v in exact}) == len(MEANS):
    print("ok: four models of different losses log the same one under FSDP2's default policy")
else:
    print("changed: what accelerate's FSDP2 policy does to a loss")
    sys.exit(1)
EOF
