"""One decoder layer that torch.compile has compiled, on the tape: a forward graph and a backward graph.

What forward keeps is planner/memory/compiled/kept.py's; backward first computes again what it lacks
(planner/memory/compiled/backward.py). Order and sizes are those of allocation traces on an H100 with torch
2.11 and inductor (tests/stack/traces/compiled).
"""

from __future__ import annotations

from planner.memory.compiled.backward import backward, repeat
from planner.memory.compiled.graph import Graph
from planner.memory.compiled.kept import (
    Part,
    attention_inputs,
    down_projection,
    kept_names,
    mlp_inputs,
    output_projection,
)
from planner.memory.layers.elementwise import hold
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.tape import Tape, Value
from planner.models.spec import LayerSpec


def run_compiled_layer(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, hidden: Value) -> Value:
    """Put the forward graph on the tape; backward lies on the tape. The caller keeps its hold on `hidden`."""
    graph = Graph(tape, layer, knobs)
    kept: frozenset[str] = frozenset()
    if tape.saves:
        kept = kept_names(layer, knobs, input_requires_grad=hidden.requires_grad)
    graph.buffers["x"] = hold(hidden.buffer)
    _attention(graph, kept)
    _mlp(graph, kept)
    result = Value(graph.take("out"), True, hidden.width)
    graph.keep_only(kept)
    if tape.saves:
        tape.nodes.append(lambda: backward(graph, hidden, result))
    return result


def _read(graph: Graph, readers: tuple[Part, ...], source: str, kept: frozenset[str]) -> None:
    """Linear layers that read one tensor, each with its adapter; then the tensor is let go."""
    adapted = [part for part in readers if graph.kind(part).rank]
    for part in adapted:
        if graph.kind(part).dropout:
            # The mask, unless this pass keeps none, and what dropout leaves.
            if f"{part.name}_m" in kept:
                graph.put(f"{part.name}_m")
            graph.put(f"{part.name}_d")
    graph.narrow_input(readers)
    for part in readers:
        graph.product(part)
        if part == readers[-1]:
            graph.drop(f"{readers[0].name}_in8")
        if graph.kind(part).rank:
            graph.put(f"{part.name}_r")
            _let_go(graph, kept, f"{part.name}_d")
        if part == readers[-1] and graph.kind(part).quantized:
            # Every product that reads the source is made: what is left reads those.
            _let_go(graph, kept, source)
        if part.name == "v" and graph.layer.output_norms:
            # Gemma 3 and OLMo 2 norm queries and keys before the last adapter's product.
            _norm_heads(graph, kept)
        graph.adapter(part)
        _let_go(graph, kept, f"{part.name}_r")
    _let_go(graph, kept, source)


def _let_go(graph: Graph, kept: frozenset[str], *names: str) -> None:
    graph.drop(*(name for name in names if name not in kept))


def _attention(graph: Graph, kept: frozenset[str]) -> None:
    layer = graph.layer
    if layer.input_norms:
        graph.put("root1", "n1")
        _let_go(graph, kept, "root1")
    elif "n1" in kept:
        graph.put("n1")
    _read(graph, attention_inputs(layer), "n1", kept)
    _rotate(graph, kept)
    repeat(graph)
    graph.put("ctx", "lse", foreign=graph.kernel_is_foreign)
    _let_go(graph, kept, "q_rot", "k_rot", "v", "qkv", "k_all", "v_all", "mask", "lse")
    output = output_projection(layer)
    if "ctx_copy" in kept:
        graph.put("ctx_copy")
    _read(graph, (output,), "ctx", kept)
    _add_residual(graph, kept)


def _add_residual(graph: Graph, kept: frozenset[str]) -> None:
    """The sum after attention: written if it is kept, else added up by every kernel that reads it.

    Beside a base layer in 16 bits lora_B's product adds to what is there.
    """
    layer = graph.layer
    if layer.output_norms:
        graph.put("o_root")
        _let_go(graph, kept, "o_root")
        if layer.input_norms and "o" not in kept:
            graph.rename("o", "mid")
        elif not layer.input_norms:
            graph.put("mid")
            _let_go(graph, kept, "o")
    elif "mid" in kept or not graph.kind(output_projection(layer)).quantized:
        graph.rename("o", "mid")


def _rotate(graph: Graph, kept: frozenset[str]) -> None:
    """Norms of queries and keys, their rotation, and the sums with the adapters' outputs."""
    if "q_root" not in graph:
        _norm_heads(graph, kept)
    graph.drop("v_l", "qkv_l")
    graph.put("q_rot", "k_rot")
    _let_go(graph, kept, "q", "k", "q_l", "k_l", "q_root", "k_root")


def _norm_heads(graph: Graph, kept: frozenset[str]) -> None:
    """A kernel of its own adds up what is normed; the rotation is the next one's."""
    if graph.layer.qk_norm != "none":
        graph.put("q_root", "k_root")
        _let_go(graph, kept, "q_l", "k_l")


def _mlp(graph: Graph, kept: frozenset[str]) -> None:
    layer = graph.layer
    if layer.input_norms:
        graph.put("root2", "n2")
        _let_go(graph, kept, "root2")
    elif "n2" in kept:
        graph.put("n2")
    if "mid" in graph or layer.output_norms:
        # One kernel adds up and normalises.
        graph.drop("o_l")
    inputs, down = mlp_inputs(layer), down_projection(layer)
    _read(graph, inputs, "n2", kept)
    if inputs[0].name in kept or layer.fused_gate_up:
        if inputs[0].name in kept and layer.fused_gate_up:
            # The sum is as wide as both halves, the product as one: two kernels.
            graph.drop(f"{inputs[0].name}_l")
        graph.put("product")
    else:
        graph.rename("gate", "product")
    _let_go(graph, kept, *(f"{part.name}_l" for part in inputs), *(part.name for part in inputs))
    _read(graph, (down,), "product", kept)
    if layer.output_norms:
        graph.put("down_root")
    else:
        graph.drop("down_l")
    # The output is written over what it is a sum of, if that is not kept.
    over = [name for name in ("mid", "o", "down") if name in graph and name not in kept]
    if over:
        graph.rename(over[0], "out")
    else:
        graph.put("out", size=graph.sizes["x"])
    _let_go(graph, kept, "mid", "o", "o_l", "down", "down_l")
