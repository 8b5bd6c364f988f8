"""Products in 8 bits on this GPU: what their kernels take, and what they cost in learning.

    python -m benchmarks.eight_bit kernels OUT.jsonl
    python -m benchmarks.eight_bit learn OUT.jsonl --model FOLDER --tokens ROWS.npz [--way fp8] [--seeds 1 2]

`kernels` times a weight's way from NF4 to e4m3, the narrowing of inputs and the products, and compares the
Triton kernel with plain torch. `learn` trains an adapter on a real model with each `--way` of computing, the
same rows, order and first adapter for all, and notes the loss on held-out rows before and after: with the
products it was trained with, and with exact ones. FOLDER has safetensors; ROWS.npz has `train` and `held`,
arrays of token ids, a row an example. A process trains one way; several fit on one GPU. Results that are
committed: benchmarks/results/eight_bit.json. Rates of whole setups are measured by benchmarks.measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.training.callbacks import decoder_layers
from launcher.training.compilation import compile_decoder_layers
from launcher.training.products import base_linear, scaled
from launcher.training.products.base_linear import EightBitLinear4bit, use_eight_bit
from launcher.training.products.nf4 import Constants, dequantised, weight_in_e4m3

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
ROWS = (4096, 16384)
STEPS, BATCH, EVALUATED = 240, 16, 32
LEARNING_RATE, WARM_UP = 2e-4, 0.03
Chosen = Callable[[int, int, str], bool]
WAYS: dict[str, Chosen] = {
    "bf16": lambda layer, layers, name: False,
    "fp8_backward": lambda layer, layers, name: False,
    "every_layer": lambda layer, layers, name: True,
    "fp8": lambda layer, layers, name: 2 <= layer < layers - 2,
    "no_down": lambda layer, layers, name: "down_proj" not in name,
    "mlp": lambda layer, layers, name: "mlp" in name,
    "ends_exact": lambda layer, layers, name: True,
}
"""Which layers' forward products are in 8 bits; `ends_exact` trains the last fifth of its steps without."""


def kernels() -> list[dict[str, Any]]:
    """Times in microseconds, a row a shape."""
    return [_of_shape(rows, columns) for rows, columns in SHAPES]


def _of_shape(rows: int, columns: int) -> dict[str, Any]:
    from triton.testing import do_bench

    def micros(run: Callable[[], Any]) -> float:
        return round(1e3 * do_bench(run, warmup=5, rep=25, return_mode="median"), 1)

    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    one = Constants.of(state)
    values = dequantised(
        packed, one.absmax, one.code, one.nested, one.nested_code, one.offset, one.block, columns
    )
    scales = scaled.row_scales(values)
    wanted = scaled.to_e4m3(values / scales)
    wide = bnb.functional.dequantize_4bit(packed, state)
    narrow = torch.compile(scaled.in_rows)
    found: dict[str, Any] = {"rows": rows, "columns": columns}
    for name, turned in (("as_it_lies", False), ("turned", True)):
        made = weight_in_e4m3(packed, one, scales, columns, transposed=turned).float()
        differing = int(((made.t() if turned else made) != wanted.float()).sum())
        found[name] = {
            "elements_that_differ": differing,
            "triton": micros(lambda t=turned: weight_in_e4m3(packed, one, scales, columns, transposed=t)),
        }
    found["bitsandbytes"] = micros(lambda: bnb.functional.dequantize_4bit(packed, state))
    for tokens in ROWS:
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        eight, own = narrow(x)
        product = scaled.scaled_product(eight, own, wanted, scales, x.dtype).float()
        exact = x.float() @ wide.float().t()
        found[str(tokens)] = {
            "bf16": micros(lambda x=x: x @ wide.t()),
            "narrowing": micros(lambda x=x: narrow(x)),
            "e4m3": micros(
                lambda e=eight, o=own: scaled.scaled_product(e, o, wanted, scales, torch.bfloat16)
            ),
            "error": float((product - exact).norm() / exact.norm()),
        }
    return found


class Learner:
    """An adapter on a real model, trained one way from several seeds."""

    def __init__(self, folder: Path, tokens: Path, way: str) -> None:
        data = np.load(tokens)
        self.train, self.held = (torch.from_numpy(data[name].astype("int64")) for name in ("train", "held"))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if self._on_gpu else torch.float32
        base = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map={"": self.device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
        )
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        self.adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.adapter.values():
            parameter.data = parameter.data.to(dtype)
        self._way = way
        layers = decoder_layers(self.model)
        if way != "bf16":
            use_eight_bit([(str(index), layer) for index, layer in enumerate(layers)], base_linear.FP8)
        self._changed = [
            (index, len(layers), name, module)
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if isinstance(module, EightBitLinear4bit)
        ]
        if self._on_gpu:
            compile_decoder_layers(self.model, activation_memory_budget=None)
        self.model.train()

    def learn(self, seed: int, steps: int) -> dict[str, Any]:
        """Train from a seed; losses on held-out rows."""
        self._begin(seed)
        self._forward(WAYS[self._way])
        before = self._evaluate()
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.AdamW(self.adapter.values(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
            ),
        )
        begun, losses = time.monotonic(), []
        for step in range(steps):
            if self._way == "ends_exact" and step == int(0.8 * steps):
                self._forward(WAYS["bf16"])
            chosen = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
            loss = self._loss(self.train[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.adapter.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        own = self._evaluate()
        self._forward(WAYS["bf16"])
        return {
            "way": self._way,
            "seed": seed,
            "steps": steps,
            "before": before,
            "own": own,
            "exact": self._evaluate(),
            "mean_of_the_last_50_steps": statistics.fmean(losses[-50:]),
            "seconds": round(time.monotonic() - begun, 1),
        }

    def _begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        for name, parameter in self.adapter.items():
            fresh = torch.zeros(parameter.shape)
            if "lora_B" not in name:
                torch.nn.init.kaiming_uniform_(fresh, a=5**0.5)
            parameter.data.copy_(fresh)

    def _forward(self, chosen: Chosen) -> None:
        for layer, layers, name, module in self._changed:
            module.forward_in_8bit = chosen(layer, layers, name)

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        ids = rows.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._on_gpu):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def _evaluate(self) -> float:
        """Mean loss over the held-out rows; layers stay as in training."""
        total = 0.0
        with torch.no_grad():
            for rows in self.held.split(EVALUATED):
                total += float(self._loss(rows)) * len(rows)
        return total / len(self.held)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kernels", "learn"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--way", choices=WAYS, default="fp8")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.what == "kernels":
        lines = iter(kernels())
    elif arguments.model is None or arguments.tokens is None:
        parser.error("learn needs --model and --tokens")
    else:
        learner = Learner(arguments.model, arguments.tokens, arguments.way)
        lines = (learner.learn(seed, arguments.steps) for seed in arguments.seeds)
    for line in lines:
        with arguments.output.open("a", encoding="utf-8") as output:
            output.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
