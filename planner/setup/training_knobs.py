"""Rows of KNOBS: what is trained, on how long sequences and how many, in which types, and its optimizer."""

from __future__ import annotations

from planner.setup.defaults import FASTER_OPTIM, OPTIM
from planner.setup.knob import METHODS, WHERE_SET, Counted, Form, Knob, Line, Need

LORAFA = "lorafa"
"""PEFT's optimizer for LoRA-FA, which transformers has no name for: lora_A stays frozen."""
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adafactor", "lion_8bit", "paged_lion_8bit", "sgd", LORAFA),
)
ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16
MAX_LENGTH = 2**24
WHOLE, SLICED = "whole", "sliced"
"""experts_matmul: all of a layer's experts dequantised at once, or a few at a time in each product."""
_MAX_RANK = 2**14
_LORA = ("qlora", "lora")
_POWERS = tuple(2**k for k in range(11))
_LENGTHS = tuple(sorted({2**k for k in range(7, 21)} | {3 * 2**k for k in range(7, 19)}))

_STAND_STILL = (
    "its values start at 1, and TRL 1.16 holds them in bfloat16 on a quantised base, where 1 and a step of "
    "1e-3 is 1: nothing moves (findings/bf16-ia3-stands-still.sh); use qlora or lora"
)
_REFUSED_METHODS = (("ia3", _STAND_STILL), ("ln_tuning", _STAND_STILL))
_REWRITES = "and on 16 it rewrites the base that a merge and servers read"
_REFUSED_INITS = (
    ("pissa", f"PEFT 0.21.2 raises TypeError on weights in 4 or 8 bits, {_REWRITES}"),
    ("corda", f"PEFT 0.21.2 raises TypeError on weights in 4 or 8 bits, {_REWRITES}"),
    (
        "orthogonal",
        "PEFT 0.21.2 raises RuntimeError on weights in 4 bits, whose shape is that of their bytes",
    ),
    (
        "loftq",
        "PEFT 0.21.2 makes its own 4 bits of a 16-bit base, and has none on a base that is in 4 already",
    ),
    (
        "olora",
        "PEFT 0.21.2 takes what lora_A and lora_B begin with from the base and quantises that anew: 9% of a "
        "weight in 4 bits is lost before the first step, and a merge and servers read the base as it was",
    ),
    ("eva", "PEFT 0.21.2 needs a pass over the data before training for it, which is not run"),
)
_PROJECTED = "is for full fine-tuning, and its projections are not counted; with an adapter"
_REFUSED_OPTIMIZERS = (
    ("galore_adamw", f"{_PROJECTED} it does nothing (galore-torch 1.0)"),
    ("apollo_adamw", f"{_PROJECTED} its states are 16 times AdamW's (apollo-torch 1.0.3)"),
)

TRAINING_KNOBS: tuple[Knob, ...] = (
    Knob(
        name="max_length",
        kind="int",
        section="training",
        help="tokens per sequence",
        required=True,
        bounds=(1, MAX_LENGTH),
        form=Form(place=2, label="max length", help="max_length: tokens per sequence", steps=_LENGTHS),
    ),
    Knob(
        name="method",
        kind="choice",
        section="training",
        help="how to train",
        default="qlora",
        choices=METHODS,
        refused=_REFUSED_METHODS,
        unset="{default}",
        counted=Counted(together=True),
        form=Form(
            place=1,
            label="method",
            help="qlora: adapter on a 4-bit base; lora: on a 16-bit base; full: all weights",
        ),
    ),
    Knob(
        name="per_device_train_batch_size",
        kind="int",
        section="training",
        help="sequences of one forward pass",
        default=1,
        bounds=(1, 2**16),
        form=Form(
            place=3,
            label="micro-batch",
            help="per_device_train_batch_size: sequences in one forward pass",
            steps=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        ),
    ),
    Knob(
        name="gradient_accumulation_steps",
        kind="int",
        section="training",
        help="forward passes of one optimizer step",
        default=1,
        bounds=(1, 2**20),
        counted=Counted(others="several"),
        form=Form(
            place=4,
            label="accumulation",
            help="gradient_accumulation_steps: micro-batches in one optimizer step",
            steps=_POWERS,
        ),
    ),
    Knob(
        name="dtype",
        kind="choice",
        section="training",
        help="how the base is loaded",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        unset="what the GPU computes in",
        counted=Counted(together=True),
        form=Form(place=10, label="dtype", help="dtype: how the base model is loaded"),
    ),
    Knob(
        name="bnb_4bit_use_double_quant",
        kind="bool",
        section="training",
        help="quantise the quantisation constants too",
        default=True,
        methods=("qlora",),
        kept=True,
        unset="{default}",
        counted=Counted(),
    ),
    Knob(
        name="bnb_4bit_quant_type",
        kind="choice",
        section="training",
        help="4-bit type",
        default="nf4",
        choices=("nf4", "fp4"),
        methods=("qlora",),
        kept=True,
        unset="{default}",
        counted=Counted(),
    ),
    Knob(
        name="load_in_8bit",
        kind="bool",
        section="training",
        help="hold the base in 8 bits instead of 4",
        default=False,
        methods=("qlora",),
        needs=(
            # AttributeError: 'NoneType' object has no attribute 'unsqueeze' (tuners/lora/dora.py).
            Need(
                other="use_dora",
                other_than=True,
                told="use_dora false: DoRA fails on weights in 8 bits (PEFT 0.21.2)",
            ),
            Need(other="experts", other_than="4bit", told="experts 16bit"),
            Need(other="prepare_for_kbit_training", other_than=True, told="prepare_for_kbit_training false"),
            # FSDP2 makes plain parameters of them: "'Parameter' object has no attribute 'CB'".
            Need(
                other="distributed",
                other_than="fsdp",
                told="one GPU or distributed ddp: sharded, its constants are lost (bitsandbytes 0.50.2)",
            ),
        ),
        counted=WHERE_SET,
    ),
    Knob(
        name="experts",
        kind="choice",
        section="training",
        help="how a mixture's experts are held",
        default="16bit",
        choices=("4bit", "16bit"),
        methods=("qlora",),
        needs=(
            Need(
                other="prepare_for_kbit_training",
                other_than=True,
                told="prepare_for_kbit_training false",
                subject="experts {value}",
            ),
            Need(
                other="distributed",
                other_than="fsdp",
                told="one GPU or distributed ddp",
                subject="experts {value}",
            ),
            Need(
                other="kernels",
                other_than="liger",
                told="kernels none",
                subject="experts {value}",
            ),
        ),
        unset="4bit where the model has experts",
        counted=Counted(default=False, together=True),
        line=Line(place=0, label="experts"),
    ),
    Knob(
        name="experts_matmul",
        kind="choice",
        section="training",
        help="products with experts in 4 bits: by all of a layer's dequantised at once, or a few at a time",
        default=WHOLE,
        choices=(WHOLE, SLICED),
        methods=("qlora",),
        needs=(
            Need(
                other="experts",
                other_than="16bit",
                told="experts 4bit",
                subject="experts_matmul {value}",
            ),
        ),
        unset="{default}; sliced where nothing fits otherwise",
        counted=Counted(default=False),
        line=Line(place=8, label="expert products"),
    ),
    Knob(
        name="vision_tower",
        kind="choice",
        section="training",
        help="how a vision-language model's tower is held",
        default="16bit",
        choices=("4bit", "16bit"),
        methods=("qlora",),
        needs=(Need(other="load_in_8bit", other_than=True, told="load_in_8bit false"),),
        unset="{default}",
        counted=Counted(others="4bit", default=False),
        line=Line(place=12, label="vision tower"),
    ),
    Knob(
        name="lora_r",
        kind="int",
        section="training",
        help="rank of the adapter",
        default=DEFAULT_RANK,
        bounds=(1, _MAX_RANK),
        methods=_LORA,
        kept=True,
        unset="{default}",
        form=Form(place=5, label="rank", help="lora_r: the adapter's rank", steps=_POWERS),
    ),
    Knob(
        name="lora_alpha",
        kind="int",
        section="training",
        help="scale of the adapter",
        null="twice the rank",
        bounds=(1, _MAX_RANK * 64),
        methods=_LORA,
        unset="{default}",
        form=Form(
            place=6,
            label="alpha",
            help="lora_alpha: the adapter's scale; empty for twice the rank",
            steps=_POWERS,
        ),
    ),
    Knob(
        name="lora_dropout",
        kind="float",
        section="training",
        help="dropout before the adapter",
        default=0.0,
        bounds=(0.0, 0.99),
        methods=_LORA,
        unset="{default}",
        counted=Counted(others="above 0"),
        form=Form(
            place=7,
            label="dropout",
            help="lora_dropout: share of the adapter's inputs that is zeroed",
            steps=(0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        ),
    ),
    Knob(
        name="target_modules",
        kind="names",
        section="training",
        help="all-linear, or module names: q_proj,v_proj",
        default=ALL_LINEAR,
        choices=(ALL_LINEAR,),
        methods=_LORA,
        unset="{default}",
        counted=Counted(others="a list"),
        form=Form(
            place=8,
            label="targets",
            help="target_modules: all-linear, or module names with spaces between them",
            steps=(
                ALL_LINEAR,
                ("q_proj", "v_proj"),
                ("q_proj", "k_proj", "v_proj", "o_proj"),
                ("gate_proj", "up_proj", "down_proj"),
            ),
        ),
    ),
    Knob(
        name="peft_type",
        kind="choice",
        section="training",
        help="kind of adapter, in PEFT's names; lora_r is its rank, of oft the size of its blocks",
        default="lora",
        choices=("lora", "vera", "miss", "oft"),
        methods=_LORA,
        unset="{default}",
        counted=Counted(default=False, together=True),
    ),
    Knob(
        name="bias",
        kind="choice",
        section="training",
        help="biases of the base that are trained",
        default="none",
        choices=("none", "lora_only", "all"),
        methods=("lora",),
        unset="{default}",
        counted=Counted(default=False, together=True),
    ),
    Knob(
        name="modules_to_save",
        kind="names",
        section="training",
        help="modules that are trained whole beside the adapter: embed_tokens,lm_head",
        null="none",
        methods=_LORA,
        unset="{default}",
        counted=Counted(others="a list", default=False, together=True),
    ),
    Knob(
        name="trainable_token_indices",
        kind="indices",
        section="training",
        help="ids of tokens whose embeddings are trained beside the adapter",
        null="none",
        methods=_LORA,
        unset="{default}",
        counted=Counted(others="a list", default=False, together=True),
    ),
    Knob(
        name="use_dora",
        kind="bool",
        section="training",
        help="DoRA",
        default=False,
        methods=_LORA,
        counted=WHERE_SET,
    ),
    Knob(
        name="use_rslora",
        kind="bool",
        section="training",
        help="rank-stabilised scaling",
        default=False,
        methods=_LORA,
    ),
    Knob(
        name="init_lora_weights",
        kind="choice",
        section="training",
        help="how lora_A begins",
        default="default",
        choices=("default", "gaussian"),
        refused=_REFUSED_INITS,
        methods=_LORA,
        unset="{default}",
    ),
    Knob(
        name="loraplus_lr_ratio",
        kind="float",
        section="training",
        help="LoRA+: how much faster lora_B learns than lora_A",
        null="one rate for both",
        bounds=(1.0, 1000.0),
        methods=_LORA,
        needs=(
            # Its temporaries would be those of one of two groups, which is not counted.
            Need(other="optim", other_than="adamw_torch", told="another optim, such as adamw_torch_fused"),
            Need(other="distributed", other_than="fsdp", told="one GPU or distributed ddp"),
        ),
        unset="one rate for both",
    ),
    Knob(
        name="optim",
        kind="choice",
        section="training",
        help="optimizer",
        default="paged_adamw_8bit",
        choices=OPTIMIZERS,
        refused=_REFUSED_OPTIMIZERS,
        planned=OPTIM,
        unset=f"{{planned}}; {FASTER_OPTIM} if faster",
        counted=Counted(),
        form=Form(place=9, label="optimizer", help="optim: the optimizer, in TRL's names"),
    ),
)
