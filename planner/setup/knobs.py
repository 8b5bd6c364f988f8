"""KNOBS: a row for every key of TrainingSetup but the model, in the contract's order.

The contract's checks and defaults (planner/setup/training_setup.py), the options of the command line, the
sizing screen's form, what measured runs cover, the plan's text and docs/knobs.md are read from it.
"""

from __future__ import annotations

from planner.setup.knob import WHERE_SET, Counted, Form, Knob, Line, Need
from planner.setup.objective import SFT, TASKS
from planner.setup.training_knobs import TRAINING_KNOBS

BF16 = "bf16"
"""base_matmul where products with the frozen base are in the compute dtype."""
_CHECKPOINTING = Need(other="gradient_checkpointing", other_than=False, told="gradient_checkpointing true")
_COMPARING = tuple(name for name, objective in TASKS.items() if objective.compares)

KNOBS: tuple[Knob, ...] = (
    *TRAINING_KNOBS,
    Knob(
        name="task",
        kind="choice",
        section="training",
        help="what is learned: sft from text, dpo and reward from pairs of answers, kto from good and bad "
        "ones; planned, and trained for sft alone",
        default=SFT.name,
        choices=tuple(TASKS),
        needs=(
            # None of TRL's other trainers packs (TRL 1.16).
            Need(other="packing", other_than=True, told="packing false", subject="task {value}"),
            Need(
                other="train_sampling_strategy",
                other_than="group_by_length",
                told="train_sampling_strategy random",
                subject="task {value}",
            ),
        ),
        unset="{default}",
        counted=Counted(default=False, together=True),
        line=Line(place=10, label="task"),
    ),
    Knob(
        name="precompute_ref_log_probs",
        kind="bool",
        section="training",
        help="compute what the reference says of all examples before training",
        default=False,
        needs=tuple(
            Need(other="task", other_than=name, told="task " + " or ".join(_COMPARING))
            for name in TASKS
            if name not in _COMPARING
        ),
        counted=WHERE_SET,
        line=Line(place=11, label="reference computed before"),
    ),
    Knob(
        name="gradient_checkpointing",
        kind="bool",
        section="layers",
        help="keep layer inputs only and compute layers again",
        default=True,
        counted=Counted(as_run=True, usual="all layers", together=True),
        form=Form(
            place=1,
            label="checkpointing",
            help="gradient_checkpointing: recompute activations in the backward pass instead of keeping them",
        ),
    ),
    Knob(
        name="checkpointed_layers",
        kind="int",
        section="layers",
        help="checkpoint the first K decoder layers only",
        null="all decoder layers",
        bounds=(0, 10_000),
        needs=(_CHECKPOINTING,),
        free=(0,),
    ),
    Knob(
        name="selective_checkpointing",
        kind="bool",
        section="layers",
        help="keep attention outputs when checkpointing",
        default=False,
        needs=(_CHECKPOINTING,),
        counted=WHERE_SET,
        form=Form(
            place=2,
            label="keep attention",
            help="selective_checkpointing: keep what attention returns and recompute the rest",
        ),
    ),
    Knob(
        name="activation_offloading",
        kind="bool",
        section="layers",
        help="move activations to host memory",
        default=False,
        counted=WHERE_SET,
        form=Form(
            place=3,
            label="offloading",
            help="activation_offloading: what layers keep for the backward pass waits in the host's memory",
        ),
        line=Line(place=4, label="activation offloading"),
    ),
    Knob(
        name="attn_implementation",
        kind="choice",
        section="layers",
        help="attention",
        null="what transformers picks for the model",
        choices=("sdpa", "eager", "flash_attention_2", "flex_attention"),
        unset="the model's, or flex_attention for packed examples if faster",
        counted=Counted(as_run=True, usual="sdpa", together=True),
        form=Form(
            place=7,
            label="attention",
            help="attn_implementation: auto is what transformers picks for the model",
        ),
    ),
    Knob(
        name="kernels",
        kind="choice",
        section="layers",
        help="replacement kernels",
        default="none",
        choices=("none", "liger"),
        unset="{default}",
        counted=Counted(together=True),
        form=Form(
            place=6,
            label="kernels",
            help="kernels: liger fuses norms, rotary embedding and MLP products",
        ),
        line=Line(place=2, label="kernels"),
    ),
    Knob(
        name="compile",
        kind="choice",
        section="layers",
        help="compile each decoder layer",
        default="none",
        choices=("none", "regional"),
        unset="if faster",
        counted=Counted(together=True),
        form=Form(
            place=4,
            label="compile",
            help="compile: regional compiles each decoder layer; that takes a minute, then saves time and "
            "memory",
        ),
        line=Line(place=3, label="compile"),
    ),
    Knob(
        name="activation_memory_budget",
        kind="float",
        section="layers",
        help="0 to 1, with --compile and --no-gradient-checkpointing",
        null="no budget",
        bounds=(0.0, 1.0),
        needs=(
            Need(other="compile", other_than="none", told="compile regional"),
            Need(other="gradient_checkpointing", other_than=True, told="gradient_checkpointing false"),
        ),
        counted=Counted(others="set", default=False),
        form=Form(
            place=5,
            label="memory budget",
            help="activation_memory_budget: share of activations that compiled layers keep; empty for all",
            steps=tuple(tenth / 10 for tenth in range(10, -1, -1)),
        ),
        line=Line(place=6, label="memory budget"),
    ),
    Knob(
        name="base_matmul",
        kind="choice",
        section="layers",
        help="products with the frozen base in 8 bits: the gradient's alone, or both passes'",
        default=BF16,
        choices=(BF16, "fp8_backward", "fp8"),
        methods=("qlora", "lora"),
        needs=(
            Need(other="compile", other_than="none", told="compile regional", subject="base_matmul {value}"),
            *(
                Need(other="dtype", other_than=other, told="dtype bfloat16", subject="base_matmul {value}")
                for other in ("float16", "float32")
            ),
            Need(
                other="distributed",
                other_than="fsdp",
                told="one GPU or distributed ddp",
                subject="base_matmul {value}",
            ),
        ),
        unset="{default}; with --allow-8bit what is faster",
        counted=Counted(default=False, together=True),
        form=Form(
            place=8,
            label="base products",
            help="base_matmul: fp8_backward computes gradients through the frozen base in 8 bits, fp8 the "
            "forward pass too",
        ),
        line=Line(place=7, label="base products"),
    ),
    Knob(
        name="prepare_for_kbit_training",
        kind="bool",
        section="layers",
        help="PEFT's upcast of everything unquantised to float32",
        default=False,
        methods=("qlora",),
        counted=WHERE_SET,
        line=Line(place=5, label="prepare for kbit training"),
    ),
    Knob(
        name="packing",
        kind="bool",
        section="batches",
        help="several examples a sequence",
        default=False,
        counted=WHERE_SET,
        form=Form(place=1, label="packing", help="packing: several examples fill each sequence"),
    ),
    Knob(
        name="train_sampling_strategy",
        kind="choice",
        section="batches",
        help="which examples share a batch",
        default="random",
        choices=("random", "group_by_length"),
        needs=(
            Need(
                other="packing",
                other_than=True,
                told="packing false: packed sequences are all of one length",
                subject="train_sampling_strategy {value}",
            ),
        ),
        unset="{default}",
        form=Form(
            place=2,
            label="sampling",
            help="train_sampling_strategy: group_by_length puts examples of like length into one batch",
        ),
        line=Line(place=1, label="sampling"),
    ),
    Knob(
        name="image_patches",
        kind="int",
        section="batches",
        help="patches of a sequence's images at most, as the model's processor cuts them",
        default=0,
        bounds=(0, 2**24),
        unset="as --data has them",
        counted=Counted(others="images", default=False, together=True),
        line=Line(place=9, label="image patches"),
    ),
    Knob(
        name="num_processes",
        kind="int",
        section="GPUs",
        help="GPUs",
        default=1,
        bounds=(1, 2**14),
        needs=(
            Need(
                other="distributed",
                other_than=None,
                told="distributed: ddp or fsdp",
                subject="num_processes of 2 or more",
            ),
        ),
        unset="as --gpu says",
    ),
    Knob(
        name="distributed",
        kind="choice",
        section="GPUs",
        help="how several GPUs share the work",
        null="one process",
        choices=("ddp", "fsdp"),
        needs=(Need(other="num_processes", other_than=1, told="num_processes of at least 2"),),
        planned="ddp",
        unset="what is done first",
        counted=Counted(default=False, together=True),
    ),
)
