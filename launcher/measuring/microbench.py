"""Measure what single kernels reach on this machine's GPU: -> Microbenchmarks.

`python -m launcher.measuring.microbench --output FILE` measures the first visible GPU in less than a minute;
`--device cpu` runs the same code with tiny sizes. Says on stdout, a JSON line each, what it measures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.measuring.kernel_clock import CPU_SIZES, GPU_SIZES, KernelClock, eager_block
from launcher.runs import stack
from launcher.training.build import allow_tf32
from launcher.training.card import multiplies_bfloat16
from planner.base.data_files import write_atomically
from planner.gpus.detect import local_gpus
from planner.throughput.microbenchmarks import AttentionRate, MatrixRate, Microbenchmarks

RANK = 16
SECONDS = 40.0
"""What all measurements may take together once the libraries are loaded."""
# Attention forward and backward: two matmuls and five (Dao 2023, arXiv:2307.08691, section 4.1).
ATTENTION_MATMULS = 7


class Bench:
    """Measures one device, in the order of what tells most, until the time is up."""

    def __init__(self, device: str, *, seconds: float = SECONDS) -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self.sizes = GPU_SIZES if self.device.type == "cuda" else CPU_SIZES
        self._clock = KernelClock(self.device, self.sizes)
        other = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = torch.bfloat16 if multiplies_bfloat16(self.device) else other
        self._begun, self._seconds = time.monotonic(), seconds

    def run(self, gpu_id: str, gpu_name: str) -> Microbenchmarks:
        """Measure everything; shapes for which time or memory is short are left out."""
        self._warm()
        _say("launch latency and memory bandwidth")
        kernel = self._kernel_launch()
        block = self._clock.host_seconds(eager_block(self.device, self.dtype))
        copy, elementwise = self._bandwidth()
        host_copy = self._host_copy()
        _say("4-bit weights")
        dequantized, call = self._dequantized(), self._quantized_call()
        _say("matrix products of a layer")
        single, tf32 = self._single(), self._tf32()
        matrix = tuple(self._matrix())
        _say("LoRA's products")
        adapter = tuple(self._adapter())
        _say("attention")
        attention = tuple(self._attention())
        return Microbenchmarks(
            gpu=gpu_id,
            gpu_name=gpu_name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            dtype=str(self.dtype).removeprefix("torch."),
            versions=stack.versions(),
            matrix=matrix,
            adapter=adapter,
            attention=attention,
            single_flops_per_second=single,
            copy_bytes_per_second=copy,
            elementwise_bytes_per_second=elementwise,
            dequantized_bytes_per_second=dequantized,
            host_copy_bytes_per_second=host_copy,
            kernel_launch_seconds=kernel,
            eager_block_seconds=block,
            quantized_call_seconds=call,
            tf32_flops_per_second=tf32,
        )

    def _has_time(self, share: float) -> bool:
        """Whether less than that share of the time is used."""
        return time.monotonic() - self._begun < share * self._seconds

    def _has_room(self, needed_bytes: int) -> bool:
        """Whether half of what is free would hold it: others may take memory meanwhile."""
        if self.device.type != "cuda":
            return True
        self._torch.cuda.empty_cache()
        free, _ = self._torch.cuda.mem_get_info(self.device)
        return needed_bytes <= int(free) // 2

    def _random(self, *shape: int, dtype: Any = None) -> Any:
        return self._torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    def _warm(self) -> None:
        """Let clocks rise as under training."""
        left = self._random(self.sizes.single, self.sizes.single)
        end = time.monotonic() + self.sizes.warm_seconds
        while time.monotonic() < end:
            left @ left
            self._clock.wait()

    def _kernel_launch(self) -> float:
        tiny = self._random(8)
        return self._clock.host_seconds(lambda: tiny.add_(1))

    def _bandwidth(self) -> tuple[float, float]:
        """Bytes read and written a second, by a copy and by the sum of two tensors."""
        count = self.sizes.buffer_bytes
        while not self._has_room(3 * count) and count > 2**20:
            count //= 2
        left, right, out = (self._random(count // 2) for _ in range(3))
        size = left.numel() * left.element_size()
        copied = self._clock.device_seconds(lambda: out.copy_(left))
        added = self._clock.device_seconds(lambda: self._torch.add(left, right, out=out))
        return 2 * size / copied, 3 * size / added

    def _host_copy(self) -> float | None:
        """Bytes a second from pinned memory and back, as activation offloading moves them."""
        if self.device.type != "cuda":
            return None
        size = 2**26
        host = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        there = self._torch.empty(size, dtype=self._torch.uint8, device=self.device)

        def work() -> None:
            there.copy_(host, non_blocking=True)
            host.copy_(there, non_blocking=True)

        return 2 * size / self._clock.device_seconds(work)

    def _dequantized(self) -> float | None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        inputs, outputs = self.sizes.dequantized
        if not self._has_room(8 * inputs * outputs):
            return None
        packed, state = quantize_4bit(
            self._random(outputs, inputs), compress_statistics=True, quant_type="nf4"
        )
        seconds = self._clock.device_seconds(lambda: dequantize_4bit(packed, state))
        return 2 * inputs * outputs / seconds

    def _quantized_call(self) -> float:
        """Host time of a pass through a 4-bit layer with LoRA: the mean of forward and backward."""
        torch, model = self._torch, self._quantized_layer()
        # More rows than the fused forward takes, as in training (bitsandbytes/backends/cuda/ops.py:745-811).
        hidden = self._random(512, 512).requires_grad_()
        trained = [one for one in model.parameters() if one.requires_grad]

        def work() -> None:
            with torch.autocast(self.device.type, dtype=self.dtype):
                out = model(hidden)
            torch.autograd.grad(out.sum(), [hidden, *trained])

        return self._clock.host_seconds(work) / 2

    def _quantized_layer(self) -> Any:
        from bitsandbytes.nn import Linear4bit
        from peft import LoraConfig, inject_adapter_in_model

        layer = Linear4bit(
            512, 512, bias=False, compute_dtype=self.dtype, compress_statistics=True, quant_type="nf4"
        )
        model = self._torch.nn.Sequential(layer).to(self.dtype).to(self.device)
        # By this PEFT knows a model in 4 bits, as transformers marks it (peft/tuners/lora/model.py).
        model.is_loaded_in_4bit = True
        return inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"]), model).to(self.device)

    def _single(self) -> float | None:
        size = self.sizes.single
        if not self._has_room(12 * size * size):
            return None
        left, out = (self._random(size, size, dtype=self._torch.float32) for _ in range(2))
        return 2 * size**3 / self._clock.device_seconds(lambda: self._torch.mm(left, left.t(), out=out))

    def _tf32(self) -> float | None:
        """The same rate as training has it: by tensor cores where the GPU has them for float32."""
        precision = self._torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            allow_tf32()
        try:
            return self._single()
        finally:
            self._torch.set_float32_matmul_precision(precision)

    def _matrix(self) -> Iterator[MatrixRate]:
        for tokens in self.sizes.tokens:
            for inputs, outputs in self.sizes.shapes:
                needed = 2 * (tokens * (inputs + outputs) + inputs * outputs)
                if not self._has_time(0.8) or not self._has_room(needed):
                    continue
                hidden, weight = self._random(tokens, inputs), self._random(outputs, inputs)
                out = self._torch.empty(tokens, outputs, dtype=self.dtype, device=self.device)
                seconds = self._clock.device_seconds(self._product(hidden, weight, out))
                yield MatrixRate(
                    tokens=tokens,
                    inputs=inputs,
                    outputs=outputs,
                    flops_per_second=2.0 * tokens * inputs * outputs / seconds,
                )

    def _product(self, hidden: Any, weight: Any, out: Any) -> Callable[[], object]:
        return lambda: self._torch.mm(hidden, weight.t(), out=out)

    def _adapter(self) -> Iterator[MatrixRate]:
        for tokens in self.sizes.adapter_tokens:
            for inputs, outputs in self.sizes.shapes:
                if not self._has_time(0.9) or not self._has_room(2 * tokens * (inputs + outputs)):
                    continue
                hidden, thin = self._random(tokens, inputs), self._random(tokens, RANK)
                out = self._random(tokens, outputs)
                down = self._product(hidden, self._random(RANK, inputs), thin)
                up = self._product(thin, self._random(outputs, RANK), out)
                seconds = self._clock.device_seconds(lambda down=down, up=up: (down(), up()))  # type: ignore[misc]
                yield MatrixRate(
                    tokens=tokens,
                    inputs=inputs,
                    outputs=outputs,
                    flops_per_second=2.0 * tokens * RANK * (inputs + outputs) / seconds,
                )

    def _attention(self) -> Iterator[AttentionRate]:
        for head_dim in self.sizes.head_dims:
            for length in self.sizes.lengths:
                heads = self.sizes.attention_width // head_dim
                batch = max(1, self.sizes.attention_tokens // length)
                if not self._has_time(1.0) or not self._has_room(24 * batch * heads * length * head_dim):
                    continue
                shape = (batch, heads, length, head_dim)
                inputs = [self._random(*shape).requires_grad_() for _ in range(3)]
                seconds = self._clock.device_seconds(self._attend(inputs, self._random(*shape)))
                pairs = batch * heads * length * (length + 1) / 2
                yield AttentionRate(
                    head_dim=head_dim,
                    length=length,
                    flops_per_second=2.0 * ATTENTION_MATMULS * head_dim * pairs / seconds,
                )

    def _attend(self, inputs: list[Any], gradient: Any) -> Callable[[], object]:
        def work() -> None:
            out = self._torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
            self._torch.autograd.grad(out, inputs, gradient)

        return work


def _say(what: str) -> None:
    print(json.dumps({"event": "microbenchmark", "what": what}), flush=True)


def measure(device: str = "cuda", *, seconds: float = SECONDS) -> Microbenchmarks:
    """Measure the first visible GPU, or with `device` "cpu" the processor, with tiny sizes.

    Raises:
        NoGpuError: there is no GPU.
    """
    if device == "cpu":
        return Bench("cpu", seconds=seconds).run("cpu", "CPU")
    gpu = local_gpus()[0]
    return Bench("cuda:0", seconds=seconds).run(gpu.spec.id, gpu.spec.name)


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description="Measure what single kernels reach on this GPU.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time to measure for at most")
    args = parser.parse_args()
    found = measure(args.device, seconds=args.seconds)
    write_atomically(args.output, json.dumps(found.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
