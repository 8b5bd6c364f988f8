"""How well a replay of torch's caching allocator over whole steps tells reserved memory.

The memory model counts live bytes exactly and fits what the allocator reserves beside them. This benchmark
feeds the same replays, in order and with sizes, through planner.memory.allocator and compares the reserved
bytes with the committed records of checkpointed runs. It is not part of the planner: a replay takes about
50 ms where a fitted estimate takes 0.1 ms.

    python -m benchmarks.allocator_replay [--layers N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from planner.accuracy import shipped_records
from planner.memory.activations import _gradients_before
from planner.memory.adapter import Trainables, trainables
from planner.memory.allocator import MIB, CachingAllocator
from planner.memory.decoder_layer import replay
from planner.memory.head import TOKEN_CHUNK, VOCABULARY_CHUNK
from planner.memory.layer_knobs import LayerKnobs
from planner.memory.optimizer import MIN_8BIT_ELEMENTS, MIN_PAGED_ELEMENTS, MOMENTS, optimizer_memory
from planner.memory.refusals import attention_implementation
from planner.memory.segments import _linear_kind, _window
from planner.memory.tape import Buffer, Tape, Value
from planner.memory.weights import DTYPE_BYTES, _in_module_order, _quantize, is_quantized
from planner.model_catalog import load_shipped
from planner.model_spec import LayerSpec, ModelSpec
from planner.records import RunRecord
from planner.training_setup import TrainingSetup

RESULTS = Path(__file__).parent / "results" / "allocator_replay.json"
WORKSPACE = 32 * MIB
Event = tuple[int, float, float, float]
"""Block number (-1 - n frees block n), constant bytes, bytes a token, bytes a score element."""


class LoggingTape(Tape):
    """A tape that writes down every allocation and free, in order."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__(saves=saves)
        self.events: list[Event] = []
        self._numbers: dict[int, tuple[int, Buffer]] = {}

    def number(self, buffer: Buffer) -> int:
        return self._numbers[id(buffer)][0]

    def _take(self, constant: float, per_token: float, per_score: float, slot: int) -> Buffer:
        buffer = super()._take(constant, per_token, per_score, slot)
        self._numbers[id(buffer)] = (len(self._numbers), buffer)
        self.events.append((self.number(buffer), constant, per_token, per_score))
        return buffer

    def tokens(self, per_token: float, category: int = 0) -> Buffer:
        return self._take(0.0, per_token, 0.0, 3 * category)

    def free(self, *buffers: Buffer | None) -> None:
        for buffer in buffers:
            if buffer is not None:
                last = buffer.holders == 1
                super().free(buffer)
                if last:
                    self.events.append((-1 - self.number(buffer), 0.0, 0.0, 0.0))


class Layer:
    """Events of one kind of decoder layer: forward without saving, and recomputation with backward."""

    def __init__(self, layer: LayerSpec, knobs: LayerKnobs) -> None:
        forward = LoggingTape(saves=False)
        output = replay(forward, layer, knobs, Value(forward.tokens(0), False))
        self.forward, self.output = forward.events, forward.number(output.buffer)
        tape = LoggingTape(saves=True)
        hidden = Value(tape.tokens(0), True)
        incoming, *early = [tape.tokens(size) for size in _gradients_before(layer, knobs)]
        output = replay(tape, layer, knobs, hidden)
        tape.free(output.buffer, *early)
        output.grad = incoming
        tape.backward()
        if hidden.grad is None:
            raise AssertionError("a checkpointed layer's input has no gradient")
        self.backward, self.incoming, self.outgoing = (
            tape.events,
            tape.number(incoming),
            tape.number(hidden.grad),
        )


class Step:
    """Steps of a checkpointed run through the allocator."""

    def __init__(self, setup: TrainingSetup, model: ModelSpec, *, padded: bool, layers: int | None) -> None:
        self.setup, self.model = setup, model
        self.allocator = CachingAllocator()
        self.width = DTYPE_BYTES[setup.dtype]
        self.tokens = setup.tokens_per_micro_step
        self.scores = setup.per_device_train_batch_size * setup.max_length**2
        self.trained = trainables(setup, model)
        self.layers = self._layers(padded=padded)[:layers]
        self._load()

    def _layers(self, *, padded: bool) -> list[Layer]:
        setup, trained = self.setup, self.trained
        accumulating = setup.gradient_accumulation_steps > 1
        kinds = tuple(
            (name, _linear_kind(setup, rank, trained.element_bytes, accumulating=accumulating))
            for name, rank in (*trained.ranks, ("experts", trained.experts_rank))
        )
        default = _linear_kind(setup, 0, trained.element_bytes, accumulating=accumulating)
        found: dict[int, Layer] = {}
        for layer in self.model.layers:
            knobs = LayerKnobs(
                kinds=kinds,
                default=default,
                attention=attention_implementation(setup, self.model),
                masked=padded or _window(layer, setup.max_length),
            )
            found |= dict.fromkeys(layer.indices, Layer(layer, knobs))
        return [found[index] for index in sorted(found)]

    def _load(self) -> None:
        for parameter in _in_module_order(self.model):
            size = parameter.elements * self.width
            block = self.allocator.allocate(size)
            if self.setup.method == "qlora" and is_quantized(parameter):
                _quantize(self.allocator, parameter.elements, self.setup.bnb_4bit_use_double_quant)
                self.allocator.free(block)
        if not self.setup.uses_lora:
            return
        for elements in _each(self.trained):
            wide = self.allocator.allocate(elements * 4)
            if self.trained.element_bytes == 2:
                self.allocator.allocate(elements * 2)
                self.allocator.free(wide)

    def _run(self, events: Sequence[Event], given: dict[int, int], keep: int) -> dict[int, int]:
        """Replay events; blocks of `given` are there already, `keep` is not freed; returns what is left."""
        held = dict(given)
        for number, constant, per_token, per_score in events:
            if number >= 0:
                size = int(constant + per_token * self.tokens + per_score * self.scores)
                if number not in held and size:
                    held[number] = self.allocator.allocate(size)
            elif -1 - number != keep and -1 - number in held:
                self.allocator.free(held.pop(-1 - number))
        return held

    def run(self, *, first: bool) -> None:
        """One optimizer step."""
        take, free = self._take, self.allocator.free
        hidden = self.tokens * self.model.hidden_size * self.width
        inputs = [take(8 * self.tokens) for _ in range(3)]
        checkpoints = [take(hidden)]
        rotary = self.setup.max_length * self.model.layers[0].head_dim * self.width
        tables = [take(rotary) for _ in range(2 * self.model.rotary_tables)]
        if first:
            take(WORKSPACE)
        for layer in self.layers:
            checkpoints.append(self._run(layer.forward, {}, layer.output)[layer.output])
        gradient, gradients = self._head(checkpoints.pop(), first=first)
        for layer in reversed(self.layers):
            held = self._run(layer.backward, {layer.incoming: gradient}, layer.outgoing)
            gradient = held.pop(layer.outgoing)
            gradients += held.values()
            free(checkpoints.pop())
        for block in (gradient, *tables, *inputs):
            free(block)
        if self.setup.method == "full":
            embedding = take(self.model.vocab_size * self.model.hidden_size * self.width)
            free(embedding) if self.model.tied_embeddings else gradients.append(embedding)
        self._optimizer(first=first)
        for block in gradients:
            free(block)

    def _take(self, size: float) -> int:
        return self.allocator.allocate(int(size))

    def _head(self, last: int, *, first: bool) -> tuple[int, list[int]]:
        """Final norm and tiled head, forward and backward; returns the gradient of the last hidden state."""
        take, free = self._take, self.allocator.free
        size, width = self.model.hidden_size, self.width
        tokens, rows = self.tokens, self.tokens - self.setup.per_device_train_batch_size
        weight = self.model.vocab_size * size
        tile_bytes = min(rows, TOKEN_CHUNK) * VOCABULARY_CHUNK * width
        wide = take(tokens * size * 4)
        free(take(tokens * size * 4))
        scaled = take(tokens * size * 4)
        free(last)
        narrow, normed = take(tokens * size * 2), take(tokens * size * width)
        for block in (narrow, scaled):
            free(block)
        selected = take(rows * size * width)
        statistics_ = [take(4 * rows) for _ in range(8)]
        free(take(tile_bytes))
        free(normed)
        if first:
            take(WORKSPACE)
        row_gradient = take(rows * size * 4)
        full = self.setup.method == "full"
        weight_gradient = take(weight * 4) if full else None
        tile, gradient = take(tile_bytes), take(rows * size * width)
        kept = []
        if weight_gradient is not None:
            kept.append(take(weight * width))
            free(weight_gradient)
        for block in (row_gradient, tile, selected, *statistics_):
            free(block)
        for bytes_each in (width, width, width, 4):
            following = take(tokens * size * bytes_each)
            free(gradient)
            gradient = following
        to_rsqrt, to_input = take(tokens * size * 4), take(tokens * size * 4)
        for block in (to_rsqrt, gradient):
            free(block)
        expanded, power, doubled, through = (take(tokens * size * 4) for _ in range(4))
        for block in (doubled, power, wide, expanded, through):
            free(block)
        result = take(tokens * size * width)
        free(to_input)
        return result, kept

    def _optimizer(self, *, first: bool) -> None:
        take, free = self._take, self.allocator.free
        optim, width = self.setup.optim, self.trained.element_bytes
        if first:
            for elements in _each(self.trained):
                narrow = "8bit" in optim and elements >= MIN_8BIT_ELEMENTS
                for _ in range(MOMENTS.get(optim, 2 if optim.startswith("adamw") else 0)):
                    if not (optim.startswith("paged") and elements >= MIN_PAGED_ELEMENTS):
                        take(elements * (1 if narrow else 4 if optim in MOMENTS else width))
                    if narrow:
                        take(-(-elements // 256) * 4)
        temporary = optimizer_memory(optim, self.trained).temporary_bytes
        sizes = [e * width for e in _each(self.trained)] if optim == "adamw_torch" else [temporary / 4] * 4
        for block in [take(size) for size in sizes] if temporary else []:
            free(block)


def _each(trained: Trainables) -> list[int]:
    return [tensor.elements for tensor in trained.tensors for _ in range(tensor.count)]


def _comparable(record: RunRecord) -> bool:
    setup = record.setup
    plain = not (setup.use_dora or setup.prepare_for_kbit_training or setup.activation_offloading)
    whole = setup.gradient_checkpointing and setup.checkpointed_layers is None and setup.kernels == "none"
    return plain and whole and setup.gradient_accumulation_steps == 1 and record.memory_cap_bytes is None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="replay so many decoder layers only")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    rows, seconds = [], []
    for record in filter(_comparable, shipped_records()):
        measured = record.phase("step")
        if measured is None:
            continue
        begun = time.perf_counter()
        model = load_shipped(record.setup.model)
        step = Step(record.setup, model, padded=record.padded, layers=arguments.layers)
        for number in range(arguments.steps):
            step.run(first=number == 0)
        seconds.append(time.perf_counter() - begun)
        allocator = step.allocator
        reserve = allocator.reserved_bytes - allocator.peak_allocated_bytes
        error = (reserve + measured.allocated_bytes) / measured.reserved_bytes - 1
        rows.append({"record": record.id, "model": model.id, "reserved_error": round(error, 5)})
    sizes = sorted(abs(row["reserved_error"]) for row in rows)
    summary = {
        "runs": len(rows),
        "median": statistics.median(sizes),
        "percentile_95": sizes[int(0.95 * len(sizes))],
        "worst": sizes[-1],
        "seconds_median": round(statistics.median(seconds), 4),
    }
    print(json.dumps(summary, indent=1))
    if arguments.layers is None and arguments.steps == 2:
        RESULTS.write_text(json.dumps({"summary": summary, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
