"""What a rank really holds of tiny models, by DDP and by FSDP2 on the CPU: run in one process a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

from launcher.measuring.random_weights import build_random_model, random_filling
from launcher.training.build import quantization_config
from launcher.training.several.ranks import asked_ranks, join
from launcher.training.several.sharded_model import adapted
from launcher.training.several.sharding import sharded_model
from planner.setup.training_setup import TrainingSetup
from tests.stack.small_models import FAMILIES

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora": ("llama", {"method": "qlora"}),
    "qlora, constants in fp32, tied": ("qwen2", {"method": "qlora", "bnb_4bit_use_double_quant": False}),
    "lora": ("llama", {"method": "lora"}),
    "full": ("llama", {"method": "full"}),
}
SHARED = {"max_length": 64, "lora_r": 8, "optim": "adamw_torch", "num_processes": 2}


def setup_of(case: str, distributed: str) -> TrainingSetup:
    family, knobs = CASES[case]
    return TrainingSetup(model=family, distributed=distributed, **SHARED, **knobs)


def measured_rank(folder: str) -> int:
    """Write the bytes of this rank."""
    torch.set_num_threads(1)
    ranks = asked_ranks()
    join(ranks, on_gpu=False)
    found = {case: _sharded(case) for case in CASES}
    told = {"sharded": found, "replicated": {case: _replicated(case) for case in ("qlora", "full")}}
    Path(folder, f"rank{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _sharded(case: str) -> dict[str, int]:
    setup, family = setup_of(case, "fsdp"), CASES[case][0]
    config = AutoConfig.for_model(**FAMILIES[family])
    model = sharded_model(setup, config, random_filling(torch.bfloat16), device=torch.device("cpu"), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with gathered_bytes() as most:
        for _ in range(2):  # micro-steps
            _micro_step(model)
            gathered = most()
    gradients = _bytes(_local(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    on_host = model.get_input_embeddings().weight
    base = {id(p): p for name, p in model.named_parameters() if not p.requires_grad or case == "full"}
    if not isinstance(on_host, DTensor) and family == "llama":
        base.pop(id(on_host))
    absmax = [p for name, p in model.named_parameters() if "absmax_shards" in name]
    packed = [p for p in base.values() if _is_column(p) and not any(p is one for one in absmax)]
    rest = [p for p in base.values() if not any(p is one for one in (*packed, *absmax))]
    return {
        "quantized": _bytes(map(_local, packed)),
        "absmax": _bytes(map(_local, absmax)),
        "unquantized": _bytes(map(_local, rest)),
        "adapter": _bytes(_local(p) for p in model.parameters() if p.requires_grad and case != "full"),
        "gradients": gradients,
        "optimizer": _bytes(_local(value) for value in states if value.numel() > 1),
        "gathered": gathered,
    }


def _replicated(case: str) -> dict[str, int]:
    """Gradients under DDP in a step of one micro-step, and when one was accumulated before it is averaged."""
    setup, family = setup_of(case, "ddp"), CASES[case][0]
    bare = build_random_model(
        AutoConfig.for_model(**FAMILIES[family]),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        attn_implementation=None,
        quantization_config=quantization_config(setup),
    )
    model = adapted(bare, setup, 0)
    parallel = DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # the second step has the buckets that stay
        parallel.zero_grad()
        _micro_step(parallel)
    buckets = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in trained}
    parallel.zero_grad()
    with parallel.no_sync():
        _micro_step(parallel)
    own = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in trained}
    return {
        "buckets": sum(buckets.values()),
        "beside": sum(size for place, size in own.items() if place not in buckets),
    }


def _micro_step(model: torch.nn.Module) -> None:
    # Few tokens: bfloat16 is slow on a CPU without units for it.
    ids = torch.arange(4).view(1, 4)
    model(input_ids=ids, labels=ids).loss.backward()


class gathered_bytes:  # noqa: N801
    """Bytes that FSDP2 has gathered at most: parameters to compute with, and buffers that they came in."""

    def __enter__(self) -> Callable[[], int]:
        self._most, self._groups = 0, list[Any]()
        group = _fsdp_param_group.FSDPParamGroup
        self._undo = ExitStack()
        for name in ("unshard", "wait_for_unshard"):
            self._undo.callback(setattr, group, name, getattr(group, name))
            setattr(group, name, self._watched(getattr(group, name)))
        return lambda: self._most

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _watched(self, method: Any) -> Any:
        def watched(group: Any, *arguments: Any, **named: Any) -> Any:
            if group not in self._groups:
                self._groups.append(group)
            found = method(group, *arguments, **named)
            self._most = max(self._most, sum(self._buffers().values()))
            return found

        return watched

    def _buffers(self) -> dict[int, int]:
        return {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for group in self._groups
            for one in _held_by(group)
        }


def _held_by(group: Any) -> Iterator[torch.Tensor]:
    for parameter in group.fsdp_params:
        yield from getattr(parameter, "all_gather_outputs", ())
    states = [group._all_gather_result]
    states.append(getattr(group.comm_ctx.all_gather_state, "all_gather_result", None))
    yield from (state.all_gather_output for state in states if state is not None)


def _is_column(parameter: torch.Tensor) -> bool:
    """Whether it has the bits of a 4-bit weight or of its constants: no other matrix here is a column."""
    return parameter.dim() == 2 and parameter.shape[1] == 1


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return cast(torch.Tensor, tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
