"""Plans for other trainers: the search restricted to what a trainer has, counted with its stack."""

from __future__ import annotations

from typing import Any

from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.data.lengths import DatasetStats
from planner.gpus.target import resolve_gpu
from planner.models.catalog import Inspector, resolve_model
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest
from planner.setup.stack import AXOLOTL, LLAMA_FACTORY, TRL_SFT, UNSLOTH, Stack
from planner.trainers import unsloth
from planner.trainers.config import TrainerConfig
from planner.trainers.files import Trainer

STACK_OF: dict[str, Stack] = {
    "axolotl": AXOLOTL,
    "llamafactory": LLAMA_FACTORY,
    "trl": TRL_SFT,
    "unsloth": UNSLOTH,
}


def plan_for(
    trainer: Trainer,
    request: PlanRequest,
    *,
    stats: DatasetStats | None = None,
    allow_network: bool = False,
    inspector: Inspector | None = None,
    model: ModelSpec | None = None,
) -> Plan:
    """The longest sequences that fit by what a trainer has, run the fastest way; the smallest where none fit.

    Every layer is checkpointed or none is, and nothing is compiled: what lies between is nobody else's. With
    several GPUs they share the work by DDP. `model` is the request's, where it has been looked up before.

    Raises:
        InputError: model, GPU or knobs are not usable, or a knob is none of the trainer's.
    """
    if request.fixed.get("image_patches") or (stats is not None and stats.images):
        raise InputError(
            "images: plans for other trainers are of text; vramwise train trains them (docs/vision.md)"
        )
    target = resolve_gpu(request.gpu, display=request.display)
    if model is None:
        model = resolve_model(request.model, allow_network=allow_network, inspector=inspector)
    plans = [
        make_plan(one, stats=stats, target=target, model=model, whole=False, stack=STACK_OF[trainer.name])
        for one in _requests(trainer, request, target.count)
    ]
    return min(plans, key=rank)


def _requests(trainer: Trainer, request: PlanRequest, count: int) -> list[PlanRequest]:
    fixed = request.fixed
    plain: dict[str, Any] = {"compile": "none"}
    if fixed.get("method", "qlora") == "qlora":
        plain["experts"] = "16bit"
    if count > 1 and "distributed" not in fixed:
        plain |= {"num_processes": count, "distributed": "ddp"}
    # Packed rows want attention that keeps examples apart, which is each trainer's own business.
    plain |= {} if "packing" in fixed else {"packing": False}
    if trainer.name == "llamafactory":
        plain["activation_offloading"] = False
    found = []
    for checkpointed in (True, False):
        if fixed.get("gradient_checkpointing", checkpointed) != checkpointed:
            continue
        own = {**plain, "gradient_checkpointing": checkpointed}
        if not checkpointed:
            own["activation_offloading"] = False
        found.append(request.with_knobs({**own, **fixed}))
    return found


def rank(plan: Plan) -> tuple[bool, int, float, int]:
    """By which plans of one request are ordered, the one to take first: what fits, of that the longest, since
    what is cut of an example is not learned; then the fastest.
    """
    hours = float("inf") if plan.duration is None else plan.duration.hours
    fits = plan.fits
    length = plan.setup.max_length if fits else 0
    return not fits, -length, hours if fits else 0.0, plan.memory.peak_upper_bytes


def request_of(config: TrainerConfig, request: PlanRequest) -> PlanRequest:
    """What a config asks for, for a plan of this program's own: model, method, length, adapter, effective
    batch and schedule are kept, how it is run is chosen anew. What `request` has fixed wins.

    Raises:
        InputError: the two contradict each other.
    """
    setup = config.setup
    names = ["method", "max_length"]
    if setup.uses_lora:
        names += ["lora_r", "lora_dropout", "target_modules", "use_dora", "use_rslora"]
        names += ["lora_alpha"] if setup.lora_alpha is not None else []
    if setup.method == "qlora":
        names += ["bnb_4bit_use_double_quant", "bnb_4bit_quant_type"]
    kept = {name: getattr(setup, name) for name in names}
    fixed = request.fixed
    if request.effective_batch_size is None and not fixed.keys() & {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }:
        request = request.with_effective_batch(setup.effective_batch_size)
    import dataclasses

    return dataclasses.replace(
        request,
        knobs=tuple({**kept, **fixed}.items()),
        num_train_epochs=request.num_train_epochs or config.num_train_epochs,
        learning_rate=request.learning_rate or config.learning_rate,
    )


def refuse_for(trainer: Trainer, request: PlanRequest) -> None:
    """Refuse a knob that is fixed and that a trainer does not have.

    Raises:
        InputError: the knob, by name.
    """
    for name in trainer.lacking:
        value = request.fixed.get(name)
        if value not in (None, "none", False, "16bit"):
            raise InputError(f"{trainer.title} has no {name}={value}")
    if trainer.name == "unsloth":
        fixed = request.fixed
        count = resolve_gpu(request.gpu, display=request.display).count
        unsloth.refuse(
            str(fixed.get("method", "qlora")), str(fixed.get("dtype", "")), fixed.get("use_dora"), count
        )
