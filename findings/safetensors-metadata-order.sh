#!/usr/bin/env bash
# Finding:  the same tensors and metadata, saved twice by safetensors, are two files of different bytes.
# Versions: torch 2.13.0, safetensors 0.8.0, numpy 2.4.6
# Expected: one content, one file, so that a hash tells whether an adapter or a checkpoint is another's copy. The
#           format's order of tensors is fixed (by size of type, then name).
# Seen:     with two or more metadata entries their order in the header changes from one save to the next, within a
#           process and for equal dictionaries: 40 saves give more than ten different hashes. Tensors' bytes are the
#           same, and so is the file with one entry or none, which is what transformers writes: {"format": "pt"}.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet torch==2.13.0
python -m pip install --quiet safetensors==0.8.0 numpy==2.4.6

python -W ignore - <<'EOF'
import hashlib
import struct
import sys

import torch
from safetensors.torch import save

SAVES = 40
tensors = {"lora_A": torch.arange(4.0), "lora_B": torch.zeros(4)}
entries = {"format": "pt", "base_model": "a-model", "rank": "16", "step": "100"}

seen = {}
for count in (0, 1, 2, 4):
    metadata = dict(list(entries.items())[:count]) or None
    files = [save(tensors, metadata=metadata) for _ in range(SAVES)]
    bodies = {file[8 + struct.unpack("<Q", file[:8])[0] :] for file in files}
    hashes = {hashlib.sha256(file).hexdigest() for file in files}
    seen[count] = len(hashes)
    print(f"{count} entries of metadata: {len(hashes)} different files in {SAVES} saves, {len(bodies)} of tensors")
if seen[0] == seen[1] == 1 and seen[2] == 2 and seen[4] > 10 and len(bodies) == 1:
    print("ok: metadata is written in another order at each save")
else:
    print("changed: how many different files equal saves give")
    sys.exit(1)
EOF
