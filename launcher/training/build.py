"""TrainingSetup and TrainingJob -> tokenizer, model, LoraConfig, SFTTrainer.

Beside arguments.py (SFTConfig) the only place that knows the arguments of transformers, PEFT, bitsandbytes
and TRL. Every argument that changes memory, speed or result is given, so that an upstream default cannot
change a run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs.kept.shards import refuse_unsharded
from launcher.runs.training_job import TrainingJob
from launcher.training.adapters import freeze_down, hold_beside, lora_config
from launcher.training.arguments import sft_config
from launcher.training.loading.eight_bits import keep_no_inputs
from launcher.training.loading.stored import (
    hold_in,
    is_microscaled_in,
    refuse_other,
    stored_config,
    stored_in,
)
from launcher.training.loading.tower import drop_tower, tower_of, tower_paths
from launcher.training.several.ranks import let_cpus_shard
from planner.base.errors import InputError, MissingExtraError, shorten
from planner.memory.refusals import PLAIN_WITH_UNCOMMON, plain_beside, refuse_other_dropout_masks
from planner.setup.adapters import uncommon_knob
from planner.setup.objective import SFT
from planner.setup.training_knobs import LORAFA, SLICED
from planner.setup.training_setup import TrainingSetup
from planner.throughput.torch_attention import repeats_keys

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
    )

    from launcher.training.callbacks import LaunchedTrainer
    from launcher.training.images.tokens import ImageTokens

TF32_CAPABILITY = (8, 0)
"""Ampere and newer: https://docs.pytorch.org/docs/2.13/notes/cuda.html (TensorFloat-32)."""


def refuse_task(task: str) -> None:
    """Refuse what is planned and not launched.

    Raises:
        InputError: another task than supervised fine-tuning.
    """
    if task != SFT.name:
        raise InputError(
            f"task {task} is planned and not trained from here: give the plan's knobs to TRL's own trainer "
            "(docs/tasks.md)"
        )


def refuse_unsupported(setup: TrainingSetup, *, on_gpu: bool) -> None:
    """Refuse, by name, what this launcher cannot run here.

    Raises:
        InputError: a knob that it cannot run, or not without a GPU.
        MissingExtraError: a knob whose package is not installed.
    """
    refuse_task(setup.task)
    if setup.distributed == "fsdp":
        refuse_unsharded(setup)
    if setup.dtype == "float16" and setup.method == "full":
        raise InputError("dtype=float16 with method full: gradients of float16 weights cannot be unscaled")
    refuse_other_dropout_masks(setup)
    _refuse_uncommon(setup)
    if setup.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise MissingExtraError("kernels=liger", "the package liger-kernel")
    if setup.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingExtraError("attn_implementation=flash_attention_2", "the package flash-attn")
    if on_gpu:
        return
    if setup.dtype == "float16":
        raise InputError("dtype=float16 needs a GPU; use bfloat16 or float32 on the CPU")
    if setup.activation_offloading:
        raise InputError("activation_offloading=true needs a GPU")
    if setup.attn_implementation == "flex_attention":
        raise InputError("attn_implementation=flex_attention needs a GPU: it has no backward pass on the CPU")
    for name in ("kernels", "compile"):
        if getattr(setup, name) != "none":
            raise InputError(f"{name}={getattr(setup, name)} needs a GPU")


def _refuse_uncommon(setup: TrainingSetup) -> None:
    name = uncommon_knob(setup)
    for other, tried in (*plain_beside(setup), *PLAIN_WITH_UNCOMMON) if name is not None else ():
        if getattr(setup, other) != tried:
            raise InputError(f"{name} with {other}={getattr(setup, other)} was not tried: leave one out")


def substitutions(setup: TrainingSetup, *, on_gpu: bool) -> list[str]:
    """What runs otherwise than asked here, a sentence each."""
    if not on_gpu and setup.optim.startswith("paged_"):
        return [f"{setup.optim}: there is no paged memory without a GPU, so its state is held unpaged"]
    return []


def torch_dtype(setup: TrainingSetup) -> torch.dtype:
    """The dtype the base is loaded in."""
    import torch

    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[setup.dtype]


def quantization_config(setup: TrainingSetup, tower: Sequence[str] = ()) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration for qlora, of 4 bits or 8, else None. `tower` are the paths of a model's
    vision tower, which stays in 16 bits unless the setup says otherwise.

    The compute dtype is the load dtype: another one makes bitsandbytes cast each dequantised weight.
    """
    if setup.method != "qlora":
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if setup.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=setup.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=setup.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=torch_dtype(setup),
        # FSDP2 shards floating point alone; the bits are the same.
        bnb_4bit_quant_storage=torch_dtype(setup) if setup.distributed == "fsdp" else torch.uint8,
        # Paths from the root: the last name alone would keep nothing, without a word (transformers
        # quantizers/quantizers_utils.py). A list stands in place of the usual one, which has the head.
        llm_int8_skip_modules=[*tower, "lm_head"] if tower and setup.vision_tower == "16bit" else None,
    )


def load_tokenizer(source: str, *, allow_download: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, without remote code.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=not allow_download
        )
    except (OSError, ValueError) as error:
        why = _first_line(error)
        if Path(source).is_dir():
            why = f"the folder needs tokenizer.json and tokenizer_config.json ({why})"
        elif not allow_download:
            why = "it is not on this machine; --allow-download fetches it"
        raise InputError(f"{source}: no tokenizer could be loaded: {why}") from error


def load_model(
    setup: TrainingSetup, source: str, *, device: torch.device, allow_download: bool
) -> PreTrainedModel:
    """The model of a folder or Hub id on `device`, quantised while loading for qlora unless it is stored so;
    safetensors only.

    Raises:
        InputError: it is not there, or its weights are not safetensors.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if setup.experts == "4bit" or is_microscaled_in(source, allow_download=allow_download):
        return _load_by_layer(setup, source, device=device, allow_download=allow_download)
    if setup.load_in_8bit:
        keep_no_inputs()
    tower = tower_of(setup, source, allow_download=allow_download)
    chosen: dict[str, Any] = {"quantization_config": quantization_config(setup, tower)}
    checkpoint = stored_in(source, allow_download=allow_download)
    if checkpoint is not None:
        refuse_other(setup, checkpoint, source)
        config = stored_config(source, dtype=torch_dtype(setup), allow_download=allow_download)
        chosen = {"config": config}
    if setup.attn_implementation:
        chosen["attn_implementation"] = setup.attn_implementation
    kind = AutoModelForImageTextToText if tower else AutoModelForCausalLM
    try:
        model: PreTrainedModel = kind.from_pretrained(
            source,
            dtype=torch_dtype(setup),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=not allow_download,
            **chosen,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: the model could not be loaded: {_first_line(error)}") from error
    if checkpoint is not None:
        hold_in(model, torch_dtype(setup))
    if setup.uses_lora and not tower:
        drop_tower(model)
    return model


def _load_by_layer(
    setup: TrainingSetup, source: str, *, device: torch.device, allow_download: bool
) -> PreTrainedModel:
    from launcher.training.loading.base_folder import find_base
    from launcher.training.loading.by_layer import load_by_layer

    return load_by_layer(
        find_base(source, allow_download=allow_download),
        dtype=torch_dtype(setup),
        quantization_config=quantization_config(setup),
        quantizes_experts=setup.experts == "4bit",
        attn_implementation=setup.attn_implementation,
        device=device,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__, 200)


def build_trainer(
    setup: TrainingSetup,
    job: TrainingJob,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    output_dir: Path,
    on_gpu: bool,
    callbacks: Sequence[TrainerCallback] = (),
    images: tuple[ImageTokens, Any] | None = None,
) -> LaunchedTrainer:
    """SFTTrainer for a model from load_model, or one of the same form made otherwise (random weights).

    Datasets have the columns of launcher.training.dataset.to_trl_dataset: `input_ids` and `labels`, and with
    images the files to read. `images`: launcher.training.images.batches.collator_for.

    Raises:
        InputError: the setup cannot be run here.
    """
    from transformers import PrinterCallback

    from launcher.training.callbacks import LaunchedTrainer, PartialCheckpointing, QuietHeap
    from launcher.training.evaluation import evaluation_callbacks
    from launcher.training.loading.quantised_experts import as_parameters

    refuse_unsupported(setup, on_gpu=on_gpu)
    if on_gpu:
        use_card(setup)
    model = _prepared(model, setup)
    deciding = [] if eval_dataset is None else evaluation_callbacks(job)
    partial = [] if setup.checkpointed_layers is None else [PartialCheckpointing(setup.checkpointed_layers)]
    collator = None
    if setup.image_patches:
        from launcher.training.images.batches import collator_for

        collator = collator_for(tokenizer, job, images)
    evaluates = eval_dataset is not None
    arguments = sft_config(setup, job, output_dir=output_dir, on_gpu=on_gpu, evaluates=evaluates)
    if setup.distributed == "fsdp" and not on_gpu:
        let_cpus_shard()
    try:
        with as_parameters(model):
            trainer = LaunchedTrainer(
                model=model,
                args=arguments,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                # A model that was sharded while it was loaded has its adapters already.
                peft_config=None if setup.distributed == "fsdp" else lora_config(setup, model),
                callbacks=[QuietHeap(), *partial, *callbacks, *deciding],
            )
    except ValueError as error:
        raise InputError(f"the run could not be built: {_first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    _set_upon(trainer, setup)
    return trainer


def use_eight_bit_products(model: torch.nn.Module, base_matmul: str) -> tuple[str, ...]:
    """Have the decoder layers' frozen linear layers compute in 8 bits; returns the names of those that are
    left as they are, since no such product takes their shape.
    """
    from launcher.training.callbacks import decoder_layers
    from launcher.training.products.base_linear import use_eight_bit

    layers = [(f"layers.{index}", layer) for index, layer in enumerate(decoder_layers(model))]
    return use_eight_bit(layers, base_matmul).refused


def use_card(setup: TrainingSetup) -> None:
    """What torch and transformers are told of the card that they run on."""
    import torch

    allow_tf32()
    repeat_shared_keys(capability=torch.cuda.get_device_capability(), dtype=setup.dtype)


def _set_upon(trainer: LaunchedTrainer, setup: TrainingSetup) -> None:
    """What no argument of the trainer sets."""
    trainer.loraplus_lr_ratio = setup.loraplus_lr_ratio
    tower = tower_paths(trainer.model.config)
    if tower:
        from launcher.training.images.batches import FrozenTower

        trainer.add_callback(FrozenTower(trainer.model, tower[0]))
    if setup.optim == LORAFA:
        trainer.lorafa = True
        freeze_down(trainer.model)
    if setup.distributed == "ddp":
        # Gradients then lie in DDP's buckets alone, not beside them.
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    if uncommon_knob(setup) is not None:
        hold_beside(trainer.model)
    if setup.dtype == "float16":
        hold_trainables_in_float32(trainer.model)
    if setup.experts_matmul == SLICED:
        from launcher.training.products.sliced_experts import use_sliced_experts

        use_sliced_experts(trainer.model)
    if setup.base_matmul != "bf16":
        trainer.left_in_16bit = use_eight_bit_products(trainer.model, setup.base_matmul)
    if setup.compile == "regional":
        from launcher.training.compilation import compile_decoder_layers

        compiled = compile_decoder_layers(
            trainer.model, activation_memory_budget=setup.activation_memory_budget
        )
        trainer.add_callback(compiled)


def _prepared(model: PreTrainedModel, setup: TrainingSetup) -> PreTrainedModel:
    """The model with what has to be set on it before TRL's trainer wraps it."""
    if model.base_model is model and hasattr(model, "model"):
        # Llama 4's prefix names a part that only its vision model has, and TRL's head asks for what lies
        # before it by that name (trl/trainer/utils.py, add_fused_lm_head).
        model.base_model_prefix = "model"
    if setup.prepare_for_kbit_training:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=setup.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if setup.selective_checkpointing:
        from trl.models import enable_selective_activation_checkpointing

        # TRL's own switch marks the PEFT wrapper, which transformers 5.23 does not ask; it asks the base.
        enable_selective_activation_checkpointing(model)
    return model


def allow_tf32() -> None:
    """Let matrix products of float32 use tensor cores, on cards that have them for it.

    Through torch's older switch: SFTConfig's `tf32` sets the newer one (transformers' enable_tf32), after
    which readers of the older one raise (torch/_inductor/select_algorithm.py is one).
    """
    import torch

    if torch.cuda.get_device_capability() >= TF32_CAPABILITY:
        torch.set_float32_matmul_precision("high")


def repeat_shared_keys(*, capability: tuple[int, int], dtype: str) -> None:
    """Have transformers repeat keys and values to all heads before sdpa, on cards where that is to be.

    transformers has no switch for it: it hands shared keys to torch wherever there is no mask
    (transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa). Below 8.0 no kernel of torch's takes them,
    and it would write whole score matrices: memory with the square of the length.
    """
    from transformers.integrations import sdpa_attention

    if repeats_keys(capability, dtype):
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False


def hold_trainables_in_float32(model: torch.nn.Module) -> None:
    """TRL casts QLoRA adapters to bfloat16 (sft_trainer.py, "is_quantized_model"), which cards that train in
    float16 lack; mixed-precision training with a gradient scaler wants float32 master weights.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
