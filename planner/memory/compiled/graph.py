"""What compiled layers on the tape are made of: named buffers, matrix products, gradients.

torch's inductor frees a buffer after its last use and writes all outputs of a fused kernel before it frees
what the kernel reads. A buffer that a later kernel takes over counts as freed and allocated here, which is
the same wherever live bytes are at their most; where it lies is planner/memory/decoder/buffer_reuse.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.units import FP32
from planner.memory.compiled.kept import Part, kept_sizes
from planner.memory.layers.base_weight import LinearKind
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.tape import GRADIENTS, WORKSPACE, Buffer, Size, Tape
from planner.models.spec import LayerSpec
from planner.models.storage import ABSMAX_WIDTH, QUANTIZATION_BLOCK


class Graph:
    """Buffers of one layer's compiled graphs by name (planner/memory/compiled/kept.py), on a tape."""

    def __init__(self, tape: Tape, layer: LayerSpec, knobs: LayerKnobs) -> None:
        self.tape, self.layer, self.knobs = tape, layer, knobs
        self.width = knobs.default.compute_width
        self.sizes = kept_sizes(layer, knobs)
        self.buffers: dict[str, Buffer] = {}
        self._passing: list[Buffer] = []
        self._spare: list[Buffer] = []

    @property
    def kernel_is_foreign(self) -> bool:
        """Whether attention is an operator of torch's; inductor generates flex attention itself."""
        return self.knobs.attention in ("fused", "masked")

    def __contains__(self, name: str) -> bool:
        return name in self.buffers

    def put(self, *names: str, size: float | None = None, foreign: bool = False) -> None:
        """Allocate buffers of so many bytes a token (by default their own); not what is there already.

        A `foreign` one is allocated by an operator that inductor does not generate.
        """
        for name in names:
            if name in self.buffers:
                continue
            wanted = self.sizes[name] if size is None else size
            fitting = [spare for spare in self._spare if spare.per_token == wanted]
            if fitting:
                self._spare.remove(fitting[-1])
                self.buffers[name] = fitting[-1]
            else:
                self.buffers[name] = self.tape.tokens(wanted)
            if foreign:
                self.tape.by_operator(self.buffers[name], inner=False)

    def _by_operator(self, buffer: Buffer | None, *, inner: bool) -> None:
        if buffer is not None:
            self.tape.by_operator(buffer, inner=inner)

    def put_single(self, name: str, values: int) -> None:
        """Allocate a buffer of so many fp32 values a token."""
        if name not in self.buffers:
            self.put(name, size=values * FP32)
            self.tape.in_single(self.buffers[name])

    def put_inner(self, name: str, size: float) -> None:
        """Allocate what an operator that inductor does not generate needs in between."""
        self.put(name, size=size)
        self._by_operator(self.buffers[name], inner=True)

    def put_scores(self, name: str, per_score: float) -> None:
        """Allocate a buffer of so many bytes an attention score."""
        self.buffers[name] = self.tape.allocate(Size(per_score=per_score))

    def rename(self, name: str, new: str) -> None:
        """Write a tensor over another."""
        self.buffers[new] = self.buffers.pop(name)

    def drop(self, *names: str) -> None:
        """Free buffers; those that are not there are passed over."""
        self.tape.free(*(self.buffers.pop(name) for name in names if name in self.buffers))

    def spare(self, *names: str) -> None:
        """Leave buffers to later kernels that write as much; they are freed when the graph ends."""
        if self.tape.logs:
            # What is left to whom follows from the program (planner/memory/decoder/buffer_reuse.py).
            self.drop(*names)
            return
        self._spare += [self.buffers.pop(name) for name in names if name in self.buffers]

    def keep_only(self, names: frozenset[str]) -> None:
        """Free all but the named buffers."""
        self.drop(*(name for name in tuple(self.buffers) if name not in names))

    def take(self, name: str) -> Buffer:
        """Hand a buffer over to the caller."""
        return self.buffers.pop(name)

    def kind(self, part: Part) -> LinearKind:
        """How a linear layer is held and trained."""
        return self.knobs.kind(part.module)

    def narrow_input(self, readers: Sequence[Part]) -> None:
        """The input of layers whose forward products are in 8 bits: e4m3, and a scale a token."""
        if any(self.kind(part).forward_in_8bit(part.inputs, part.outputs) for part in readers):
            self.put(f"{readers[0].name}_in8", size=readers[0].inputs + FP32)

    def product(self, part: Part) -> None:
        """A base layer's product in a forward pass; an NF4 weight is dequantised for it."""
        if part.name in self.buffers:
            return
        if self.kind(part).forward_in_8bit(part.inputs, part.outputs):
            weight = self._eight_bit_weight(part)
            self.put(part.name)
            self.tape.product()
            self.tape.free(weight)
            return
        inner = self._constants(part), self._constants(part), self._weight(part)
        for buffer in inner:
            self._by_operator(buffer, inner=True)
        self.put(part.name, foreign=self.kind(part).quantized)
        self.tape.product()
        self.tape.free(*inner)

    def adapter(self, part: Part) -> None:
        """Both products of a linear layer's adapter."""
        if self.kind(part).rank:
            self.put(f"{part.name}_r", f"{part.name}_l")

    def input_gradient(self, part: Part, name: str) -> None:
        """The gradient of a base layer's input, under a name."""
        if self.kind(part).backward_in_8bit(part.inputs, part.outputs):
            narrow_weight = self._eight_bit_weight(part)
            # The output's gradient in e4m3; of its scales, and their largest values before, one a token.
            narrow, scales = self.tape.tokens(part.outputs), self.tape.tokens(2 * FP32)
            ones = self.tape.fixed(part.inputs * FP32)
            self.put(name, size=part.inputs * self.width)
            self.tape.free(narrow_weight, narrow, scales, ones)
            return
        constants = self._constants(part)
        weight = self._weight(part)
        self._by_operator(constants, inner=True)
        self._by_operator(weight, inner=False)
        self.tape.free(constants)
        self.put(name, size=part.inputs * self.width)
        self.tape.free(weight)

    def adapter_gradients(self, part: Part) -> None:
        """Gradients of both adapter weights; lets go of the rank-wide product."""
        kind = self.kind(part)
        if kind.rank:
            self._gradient(kind, kind.rank * part.outputs)
            self.drop(f"{part.name}_r")
            self._gradient(kind, kind.rank * part.inputs)

    def trained_gradient(self, kind: LinearKind, elements: int) -> None:
        """The gradient of a weight that is trained in full."""
        if kind.trained:
            self._gradient(kind, elements)

    def finish(self) -> None:
        """Let go of all that is left."""
        self.drop(*tuple(self.buffers))
        self.tape.free(*self._passing, *self._spare)
        self._passing, self._spare = [], []

    def _gradient(self, kind: LinearKind, elements: int) -> None:
        size = Size(constant=elements * kind.adapter_width)
        if kind.accumulating:
            # A graph returns all of its gradients at once; autograd then adds them to those that are there.
            self._passing.append(self.tape.allocate(size, WORKSPACE))
        else:
            self.tape.allocate(size, GRADIENTS)

    def _eight_bit_weight(self, part: Part) -> Buffer:
        """The weight in e4m3: a kernel of its own makes it of an NF4 one, inductor's of a 16-bit one."""
        weight = self.tape.fixed(part.inputs * part.outputs)
        if self.kind(part).quantized:
            self._by_operator(weight, inner=False)
        return weight

    def _constants(self, part: Part) -> Buffer | None:
        kind = self.kind(part)
        if not (kind.quantized and kind.double_quant):
            return None
        return self.tape.fixed(part.inputs * part.outputs / QUANTIZATION_BLOCK * ABSMAX_WIDTH)

    def _weight(self, part: Part) -> Buffer | None:
        kind = self.kind(part)
        return self.tape.fixed(part.inputs * part.outputs * kind.weight_width) if kind.quantized else None
