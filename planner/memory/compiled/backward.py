"""A compiled decoder layer's backward graph on the tape.

Recomputation leaves an adapter's output beside the base product, and each kernel that reads their sum reads
both; a forward pass writes the sum over the base product. The MLP's kernel writes every inner-wide tensor
that the gradients need at once: that is where a backward pass is at its peak.
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.compiled.graph import Graph
from planner.memory.compiled.kept import (
    Part,
    attention_inputs,
    down_projection,
    mlp_inputs,
    output_projection,
    parts,
)
from planner.memory.tape.tape import Value


def backward(graph: Graph, hidden: Value, result: Value) -> None:
    """The backward graph, from the gradient of the layer's output to that of its input."""
    layer, tape = graph.layer, graph.tape
    incoming = tape.take_grad(result)
    recomputes = not all(part.name in graph for part in mlp_inputs(layer))
    if graph.kind(down_projection(layer)).rank and not layer.output_norms:
        graph.put("out_g", size=graph.sizes["x"])
        if "down_r" in graph:
            # Both of its gradients' factors are there: they are done before anything is recomputed.
            graph.drop("out_g")
    if "ctx" not in graph:
        recompute_attention(graph)
        _run_attention(graph)
    if recomputes:
        _recompute_mlp(graph)
    _mlp_backward(graph, recomputes=recomputes)
    _middle_backward(graph, recomputes=recomputes)
    _output_projection_backward(graph)
    recompute_attention(graph)
    _attention_backward(graph)
    _inputs_backward(graph, hidden)
    _finish(graph, hidden)
    tape.free(incoming)


def recompute_attention(graph: Graph) -> None:
    """Normed input, projections and rotation, as far as they are not there."""
    layer = graph.layer
    normed = layer.qk_norm != "none"
    inputs = attention_inputs(layer)
    missing = [part for part in inputs if not _done(graph, part, normed=normed)]
    if not missing:
        return
    if layer.input_norms:
        graph.put("root1", "n1")
    _recompute(graph, missing)
    graph.drop("v_l", "qkv_l")
    graph.put("q_rot", "k_rot")
    if normed:
        graph.put("q_root", "k_root")
    else:
        graph.drop("q", "k", "q_l", "k_l")


def _done(graph: Graph, part: Part, *, normed: bool) -> bool:
    if part.name in ("q", "k"):
        there = f"{part.name}_rot" in graph or f"{part.name}_all" in graph
        return there and (not normed or part.name in graph)
    return part.name in graph or f"{part.name}_all" in graph


def _recompute(graph: Graph, readers: list[Part] | tuple[Part, ...], *, keeps_dropped: bool = True) -> None:
    """Linear layers once more; dropout draws its random numbers in fp32 and drops out again."""
    for part in readers:
        kind = graph.kind(part)
        if kind.rank and kind.dropout:
            graph.put_single(f"{part.name}_u", part.inputs)
            if keeps_dropped:
                graph.put(f"{part.name}_d")
    graph.narrow_input(readers)
    for part in readers:
        graph.product(part)
        graph.adapter(part)
    graph.drop(f"{readers[0].name}_in8")


def _recompute_one(graph: Graph, part: Part) -> None:
    graph.narrow_input((part,))
    graph.product(part)
    graph.drop(f"{part.name}_in8")
    graph.adapter(part)


def _run_attention(graph: Graph) -> None:
    layer = graph.layer
    repeat(graph)
    if "k_all" in graph:
        graph.drop("k_rot", "v")
    graph.put("ctx", "lse", foreign=graph.kernel_is_foreign)
    if layer.normed_around:
        # Gemma 3 alone keeps the kernel's output beside the one in the projection's order.
        graph.put("ctx_flat", "ctx_read", size=graph.sizes["ctx"])


def repeat(graph: Graph) -> None:
    """What the masked kernel reads: the mask in the compute dtype, keys and values of all heads."""
    layer = graph.layer
    if graph.knobs.attention != "masked" or "mask" in graph:
        return
    graph.put_scores("mask", graph.width)
    if 1 < layer.num_key_value_heads < layer.num_attention_heads:
        graph.put("k_all", "v_all", size=graph.sizes["q_rot"])


def _recompute_mlp(graph: Graph) -> None:
    layer = graph.layer
    if "mid" not in graph:
        _recompute(graph, [output_projection(layer)], keeps_dropped=False)
        graph.drop("ctx_read")
    if layer.output_norms:
        # Gemma's kernel leaves the sum in fp32, for the norm that follows.
        graph.put("o_root")
        graph.put("mid", size=graph.sizes["x"] // graph.width * FP32 if layer.input_norms else None)
    if layer.input_norms:
        graph.put("root2", "n2")
    inputs, down = mlp_inputs(layer), down_projection(layer)
    _recompute(graph, inputs)
    if any(graph.kind(part).dropout and graph.kind(part).rank for part in inputs):
        graph.drop("n2")
    if graph.kind(down).rank:
        graph.put("down_r")
    if layer.output_norms:
        graph.put("product")
        _recompute_one(graph, down)
        graph.put("down_root")
        if layer.input_norms:
            graph.put("down_g", "down_s", size=graph.sizes["x"])
            graph.drop("down", "down_s")
        graph.drop("down_l")


def _mlp_backward(graph: Graph, *, recomputes: bool) -> None:
    layer = graph.layer
    inputs, down = mlp_inputs(layer), down_projection(layer)
    kind = graph.kind(down)
    reads = kind.rank > 0 or kind.trained
    if layer.normed_around and not recomputes:
        graph.put("down_g", size=graph.sizes["x"])
        graph.drop("down")
    if layer.fused_gate_up and reads:
        graph.put("product")
        graph.drop("out_g")
    early = "product" in graph and kind.rank > 0
    if early:
        # lora_A's gradient is done with the product; its input's gradient takes the room.
        graph.adapter_gradients(down)
        graph.rename("product", "through_adapter")
    elif kind.rank and recomputes:
        graph.put("through_adapter", size=graph.sizes["product"])
    graph.input_gradient(down, "product_g")
    if kind.rank:
        graph.put("through_adapter", size=graph.sizes["product"])
    graph.drop("down", "down_g")
    if reads and not early:
        graph.put("product")
    if recomputes and layer.output_norms and not layer.input_norms:
        # OLMo 2's kernel writes one gradient over what it reads.
        graph.rename("up", "up_g")
    for part in reversed(inputs):
        if graph.kind(part).rank:
            graph.put(f"{part.name}_s", size=graph.sizes[part.name])
        graph.put(f"{part.name}_g", size=graph.sizes[part.name])
    _put_parts(graph, inputs, recomputes=recomputes)
    graph.drop(*(f"{part.name}{end}" for part in inputs for end in ("", "_l")))
    graph.drop("through_adapter", "product_g")
    graph.spare("out_g")
    graph.adapter_gradients(down)
    if not kind.trained:
        graph.drop("product", "down_m")
    # One gradient of the last adapter waits for the norm's kernels.
    waits = not recomputes and layer.input_norms and len(inputs) > 1 and kind.quantized
    for part in reversed(inputs):
        late = waits and part is inputs[0]
        _input_gradients(graph, part, keeps=f"{part.name}_s" if late else "")
        graph.drop(*_PARTS)
        if recomputes and layer.normed_around and part is not inputs[0]:
            # The norm's kernels add up gradients as they come.
            graph.drop(f"{part.name}_xa")


_PARTS = ("gradient_part", "gradient_part_again")


def _put_parts(graph: Graph, inputs: tuple[Part, ...], *, recomputes: bool) -> None:
    """With 8-bit products, what a gradient is made of once more: the kernel that narrows it reads that, and
    not the gradient. One tensor as wide as the MLP, two where gate and up are recomputed: 28,672
    and 57,344 bytes a token of Llama-3.1-8B on an H200 (docs/eight-bit.md).
    """
    last = inputs[-1]
    if graph.kind(last).backward_in_8bit(last.inputs, last.outputs):
        graph.put(*(_PARTS if recomputes else _PARTS[:1]), size=graph.sizes[last.name])


def _input_gradients(graph: Graph, part: Part, keeps: str = "") -> None:
    """Gradients of one linear layer's adapter and input; that of its output ends here.

    `keeps` names what a kernel that comes later still reads.
    """
    kind = graph.kind(part)
    graph.adapter_gradients(part)
    graph.drop(*(name for name in (f"{part.name}_s", f"{part.name}_d") if name != keeps))
    if kind.rank:
        graph.put(f"{part.name}_xa", size=part.inputs * graph.width)
    graph.input_gradient(part, f"{part.name}_x")
    graph.drop(f"{part.name}_m", f"{part.name}_u")
    if not kind.trained:
        graph.drop(f"{part.name}_g")


def _middle_backward(graph: Graph, *, recomputes: bool) -> None:
    """The norms between attention and MLP: from the MLP's inputs to what the attention block returned."""
    layer = graph.layer
    graph.put_single("wide", layer.hidden_size)
    graph.put("mid_g", size=graph.sizes["x"])
    if layer.normed_around:
        graph.put("o_g", "o_s", size=graph.sizes["x"])
    if layer.input_norms:
        graph.put("n2")
    output = graph.kind(output_projection(layer))
    if not recomputes and not layer.output_norms and output.rank and output.quantized:
        graph.put("o_s", size=graph.sizes["x"])
    graph.spare(*(f"{part.name}{end}" for part in mlp_inputs(layer) for end in ("_xa", "_x")), "wide")
    graph.drop("mid", "root2", "o", "o_l", "o_root", "out_g", "down_root")
    graph.drop(f"{mlp_inputs(layer)[0].name}_s")
    if not graph.knobs.default.trained:
        graph.drop("n2")


def _output_projection_backward(graph: Graph) -> None:
    part = output_projection(graph.layer)
    if graph.kind(part).rank:
        if "o_s" not in graph:
            graph.put("o_s", size=graph.sizes["x"])
        graph.adapter_gradients(part)
        graph.drop("o_s", "ctx_flat")
        graph.put("o_xa", size=graph.sizes["ctx"])
    graph.input_gradient(part, "ctx_g")
    graph.drop("o_xa", "o_m", "o_u", "ctx_copy", "o_g", "o_s")


def _attention_backward(graph: Graph) -> None:
    """The kernel: fp32 gradients of queries, and of all heads' keys and values where heads share them."""
    layer = graph.layer
    repeat(graph)
    shared = layer.num_key_value_heads != layer.num_attention_heads
    repeated = "k_all" in graph
    graph.put("q_g", size=graph.sizes["q_rot"], foreign=graph.kernel_is_foreign)
    names = ("k_all_g", "v_all_g") if repeated else ("k_g", "v_g")
    graph.put(*names, size=graph.sizes["q_rot" if repeated else "k_rot"], foreign=graph.kernel_is_foreign)
    wide = 8 if shared and graph.knobs.attention == "fused" else 4
    graph.put_inner("scratch", layer.num_attention_heads * (wide * layer.head_dim + FP32))
    graph.drop("scratch", "q_rot", "k_rot", "v", "lse", "ctx_g", "ctx_flat", "k_all", "v_all", "mask")
    if not graph.knobs.default.trained:
        graph.drop("ctx")
    graph.put("k_g", "v_g", size=graph.sizes["k_rot"])
    graph.drop("k_all_g", "v_all_g")


def _inputs_backward(graph: Graph, hidden: Value) -> None:
    layer = graph.layer
    inputs = attention_inputs(layer)
    if layer.qk_norm != "none" and layer.output_norms:
        graph.put_single("q_wide", layer.query_size)
        graph.drop("q", "q_l", "q_wide", "k", "k_l", "q_root", "k_root")
    if layer.fused_qkv:
        graph.put("qkv_g", "qkv_s", size=graph.sizes["qkv"])
        graph.drop("qkv", "q_g", "k_g", "v_g")
    if layer.input_norms and any(graph.kind(part).rank for part in inputs):
        graph.put("n1")
    for part in reversed(inputs):
        if hidden.requires_grad:
            _input_gradients(graph, part)
        else:
            graph.adapter_gradients(part)
        graph.drop(part.name, f"{part.name}_l", f"{part.name}_root")


def _finish(graph: Graph, hidden: Value) -> None:
    """The first norm, then the gradients of weights that are trained in full, one after another."""
    layer, tape = graph.layer, graph.tape
    if hidden.requires_grad:
        if layer.input_norms:
            graph.put_single("wide", layer.hidden_size)
        graph.put("x_g", size=graph.sizes["x"])
        tape.add_grad(hidden, graph.take("x_g"))
    inputs = attention_inputs(layer)
    graph.drop("wide", "x", "root1", *(f"{part.name}{end}" for part in inputs for end in ("_xa", "_x")))
    kind = graph.knobs.default
    if kind.trained:
        held = {"q": "n1", "o": "ctx", "down": "product"}
        for part in parts(layer):
            graph.trained_gradient(graph.kind(part), part.inputs * part.outputs)
            graph.drop(f"{part.name}_g")
            if part.name in held:
                graph.drop(held[part.name])
        for _ in range(2):
            graph.trained_gradient(kind, layer.hidden_size)
    graph.finish()
