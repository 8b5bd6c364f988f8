"""What a run needs beside the GPU: download, disk, host memory; and facts that guides get wrong."""

from __future__ import annotations

import dataclasses
import math

from planner.answers.plan import LoadNeeds, Note
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.held.optimizer import saved_state
from planner.models.spec import ModelSpec
from planner.setup.defaults import KEPT_CHECKPOINTS
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.work import step_work

# Allowance for the training process itself, not measured on a GPU: the imports of torch, transformers, TRL,
# PEFT and bitsandbytes held 0.49 GB resident with torch 2.13's CPU build; CUDA's libraries come on top.
HOST_PROCESS_BYTES = 3_000_000_000
# Weights are published in 16 bits and read tensor by tensor: one as mapped from the file, one converted.
PUBLISHED_BYTES_PER_PARAMETER = 2
TENSORS_AT_ONCE = 2
# What a checkpoint has beside tensors and tokenizer: states of random numbers (14 KB) and of the trainer,
# schedule, configs, manifest, model card; about 30 KB in all.
SAVED_BESIDE_BYTES = 64_000
# Of a tensor in a file of its own kind, header and padding to the next 64 bytes: safetensors about 130 bytes,
# torch.save's archive about 270.
SAVED_PER_TENSOR_BYTES = 400
# tokenizer.json for a token of the vocabulary: 127 bytes for Gemma 3, 134 for Llama 3.2, 75 for Qwen2.5.
TOKENIZER_BYTES_PER_TOKEN = 140


def load_needs(run: TrainingRun) -> LoadNeeds:
    """Download, disk and host memory to load the model, train and save the result. Of several GPUs each has a
    process; weights, which are mapped from their files, are shared by them.
    """
    largest = max(p.elements for p in run.model.parameters) * PUBLISHED_BYTES_PER_PARAMETER
    download = run.model.download_bytes
    needs = LoadNeeds(
        download_bytes=download,
        result_bytes=result_bytes(run),
        checkpoint_bytes=checkpoint_bytes(run),
        disk_bytes=None,
        host_memory_bytes=run.parallelism.num_processes
        * (HOST_PROCESS_BYTES + max(TENSORS_AT_ONCE * largest, offloaded_bytes(run))),
    )
    if download is None:
        return needs
    return dataclasses.replace(needs, disk_bytes=download + needs.written_bytes(KEPT_CHECKPOINTS))


def result_bytes(run: TrainingRun) -> int:
    """What a run leaves on disk in the end, at most: the adapter, or all weights, and the tokenizer."""
    trained = run.trained
    tokenizer = run.model.vocab_size * TOKENIZER_BYTES_PER_TOKEN
    tensors = trained.size_bytes + trained.tensor_count * SAVED_PER_TENSOR_BYTES
    return tensors + tokenizer + SAVED_BESIDE_BYTES


def checkpoint_bytes(run: TrainingRun) -> int:
    """A checkpoint's bytes at most: the result so far and the optimizer's state."""
    state, count = saved_state(run.setup.optim, run.trained)
    return result_bytes(run) + state + count * SAVED_PER_TENSOR_BYTES


def offloaded_bytes(run: TrainingRun) -> int:
    """Pinned host memory for what activation offloading takes off the GPU, at most.

    torch rounds pinned blocks up to a power of two (aten/src/ATen/core/CachingHostAllocator.h, allocate).
    Where every layer is checkpointed each leaves its input; else what layers keep is taken at twice its size.
    """
    setup, model, shape = run.setup, run.model, run.micro_step
    if not setup.activation_offloading:
        return 0
    if setup.gradient_checkpointing and setup.checkpointed_layers is None:
        block = shape.tokens * model.hidden_size * shape.stream_width
        return model.num_hidden_layers * (1 << (block - 1).bit_length())
    return 2 * int(step_work(run).offloaded_bytes)


def model_notes(
    model: ModelSpec, setup: TrainingSetup, memory: MemoryBreakdown, usable_bytes: int
) -> tuple[Note, ...]:
    """What guides get wrong about such a run: weights that stay in 16 bits, what paging does not page."""
    notes = []
    if memory.weights_bytes > usable_bytes:
        notes.append(
            Note(
                text="the weights alone take {size}; a paged optimizer pages its own state, never weights",
                size_bytes=memory.weights_bytes,
            )
        )
    if setup.prepare_for_kbit_training:
        notes.append(
            Note(
                text="prepare_model_for_kbit_training turns what is not quantised into float32; TRL's "
                "SFTTrainer does not call it, and QLoRA does not need it"
            )
        )
    if model.checkpoint is not None:
        bits = model.checkpoint.bits
        left = " but for the layers that its config names" if any(one.kept for one in model.layers) else ""
        notes.append(
            Note(
                text=f"the weights are stored in {bits} bits{left} and are trained as they are; a merge adds "
                "the adapter to what they stand for"
            )
        )
    if setup.method == "qlora":
        notes += _unquantized_notes(model, setup)
    return tuple(notes)


def _unquantized_notes(model: ModelSpec, setup: TrainingSetup) -> list[Note]:
    width = 4 if setup.dtype == "float32" else 2
    notes = []
    experts = sum(
        p.elements * p.count
        for p in model.parameters
        if len(p.shape) == 3 and p.in_decoder_layer and not p.tied
    )
    if experts and setup.experts == "4bit":
        notes.append(
            Note(
                text="experts are held in 4 bits by vramwise itself: where bitsandbytes loads a model it "
                "replaces nn.Linear only and leaves them in 16"
            )
        )
    elif experts:
        notes.append(
            Note(
                text="the experts' weights, {size}, are not quantised: bitsandbytes replaces nn.Linear only, "
                "and transformers keeps experts as 3-D tensors",
                size_bytes=experts * width,
            )
        )
    embeddings = sum(
        math.prod(p.shape) * p.count
        for p in model.parameters
        if not p.tied and (p.module_class == "Embedding" or p.module_name == "lm_head")
    )
    if embeddings:
        tied = " (tied, held once)" if model.tied_embeddings else ""
        notes.append(
            Note(
                text=f"embeddings and output head{tied} stay in {width * 8} bits: {{size}} of the weights",
                size_bytes=embeddings * width,
            )
        )
    return notes
