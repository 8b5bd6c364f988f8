"""What a compiled decoder layer keeps between its forward and its backward pass, by name.

The compiler's partitioner decides it (torch/_functorch/partitioners.py), not autograd. Names: x the layer's
input, n1 and n2 the normed inputs of attention and MLP, q, k, v and o the projections (q_rot and k_rot
rotated, qkv fused), ctx and lse attention's output and log-sum-exp, mid the sum after attention, gate, up,
product and down of the MLP (gate_up fused), *root* a norm's inverse roots. A linear layer's adapter adds _r
(its rank-wide product), _l (its output), _d (its input after dropout) and _m (the mask).

Sources: allocation traces (tests/stack/traces/compiled); docs/compilation.md.
"""

from __future__ import annotations

from itertools import combinations

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.models.spec import LayerSpec
from planner.models.storage import ABSMAX_WIDTH, QUANTIZATION_BLOCK

KNAPSACK_STEPS = 10_000
"""Steps that sizes are rounded to (torch/_functorch/_activation_checkpointing/knapsack.py, dp_knapsack)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One linear layer of a decoder layer: its name here, its module's, and its features."""

    name: str
    module: str
    inputs: int
    outputs: int


def attention_inputs(layer: LayerSpec) -> tuple[Part, ...]:
    """The projections that read attention's normed input."""
    hidden, query, key = layer.hidden_size, layer.query_size, layer.key_value_size
    if layer.fused_qkv:
        return (Part(name="qkv", module="qkv_proj", inputs=hidden, outputs=query + 2 * key),)
    sizes = (("q", query), ("k", key), ("v", key))
    return tuple(Part(name=n, module=f"{n}_proj", inputs=hidden, outputs=size) for n, size in sizes)


def output_projection(layer: LayerSpec) -> Part:
    """The projection of attention's output."""
    return Part(name="o", module="o_proj", inputs=layer.query_size, outputs=layer.hidden_size)


def mlp_inputs(layer: LayerSpec) -> tuple[Part, ...]:
    """The projections that read the MLP's normed input."""
    hidden, inner = layer.hidden_size, layer.intermediate_size
    if layer.fused_gate_up:
        return (Part(name="gate_up", module="gate_up_proj", inputs=hidden, outputs=2 * inner),)
    return tuple(
        Part(name=name, module=f"{name}_proj", inputs=hidden, outputs=inner) for name in ("gate", "up")
    )


def down_projection(layer: LayerSpec) -> Part:
    """The projection of the MLP's product."""
    return Part(name="down", module="down_proj", inputs=layer.intermediate_size, outputs=layer.hidden_size)


def parts(layer: LayerSpec) -> tuple[Part, ...]:
    """All linear layers, in the order they run."""
    return (
        *attention_inputs(layer),
        output_projection(layer),
        *mlp_inputs(layer),
        down_projection(layer),
    )


def kept_names(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> frozenset[str]:
    """What the layer keeps, its input included where it does."""
    if knobs.recomputes:
        return frozenset({"x", "ctx", "lse"}) if knobs.selective else frozenset({"x"})
    if knobs.budget is None or knobs.budget == 1:
        return _all_names(layer, knobs, input_requires_grad=input_requires_grad)
    return frozenset({"x"}) | _chosen(layer, knobs, input_requires_grad=input_requires_grad)


def _all_names(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> frozenset[str]:
    names = {f"{part.name}_r" for part in parts(layer) if knobs.kind(part.module).rank}
    names |= {"q_rot", "k_rot", "ctx", "lse", *(part.name for part in mlp_inputs(layer))}
    names.add("qkv" if layer.fused_qkv else "v")
    if layer.qk_norm != "none":
        names |= {"q", "k", "q_root", "k_root"}
    names = _repeated(names, layer, knobs)
    if layer.output_norms:
        names |= {"o", "o_root", "down", "down_root"}
    else:
        names.add("mid")
    if layer.input_norms:
        names.add("root2")
    if _reads_input(layer, input_requires_grad=input_requires_grad):
        names |= {"x", "root1"} if layer.input_norms else {"x"}
    names |= _adapter_inputs(layer, knobs, input_requires_grad=input_requires_grad)
    return frozenset(names)


def _repeated(names: set[str], layer: LayerSpec, knobs: LayerKnobs) -> set[str]:
    """With a mask keys and values are repeated to all heads; where that doubles them, the copies are kept
    instead, of keys only where no norm makes theirs dear (tests/stack/test_compilation.py).
    """
    if knobs.attention != "masked" or layer.num_attention_heads != 2 * layer.num_key_value_heads:
        return names
    instead = {"v": "v_all"} | ({"k_rot": "k_all"} if layer.qk_norm == "none" else {})
    return {instead.get(name, name) for name in names}


def _reads_input(layer: LayerSpec, *, input_requires_grad: bool) -> bool:
    """Whether backward reads the layer's input: for the first norm, or for a sum that is not kept."""
    return input_requires_grad or layer.output_norms or not layer.input_norms


def _adapter_inputs(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> set[str]:
    """Inputs of adapters: what of them is kept, where they are not just read from another kept tensor.

    An adapter in fp32 casts its input, and the product's own copy of it is kept (n1 and n2 are copies where
    there are no norms). With dropout the masks are;
    of adapters that read one tensor all but the first keep what dropout left as well.
    """
    names: set[str] = set()
    for readers, source in (
        (attention_inputs(layer), "n1"),
        ((output_projection(layer),), "ctx_copy"),
        (mlp_inputs(layer), "n2"),
        ((down_projection(layer),), "product"),
    ):
        adapted = [part for part in readers if knobs.kind(part.module).rank]
        if not adapted:
            continue
        wanted = source != "n1" or _reads_input(layer, input_requires_grad=input_requires_grad)
        kind = knobs.kind(adapted[0].module)
        if kind.dropout:
            names |= {f"{part.name}_m" for part in adapted} if wanted else set()
            names |= {f"{part.name}_d" for part in (adapted[1:] if wanted else adapted)}
        elif kind.adapter_width > knobs.default.compute_width or not wanted:
            names.add(source)
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """A matrix product that the partitioner may keep: bytes a token, and multiplications a token."""

    names: tuple[str, ...]
    size: int
    work: int


def _chosen(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> set[str]:
    """What a budget keeps beside the input: the products that take the most work to compute again.

    torch solves a knapsack over the products that it knows the FLOPs of (partitioners.py,
    choose_saved_values_set): bitsandbytes' 4-bit products are not among them.
    """
    whole = _whole(layer, knobs, input_requires_grad=input_requires_grad)
    budget = round((knobs.budget or 0) * KNAPSACK_STEPS)
    items = _items(layer, knobs, input_requires_grad=input_requires_grad)
    kept: set[str] = set()
    # Adapters' rank-wide products save the most work a byte, down_proj's above all.
    small = [item for item in items if item.names[0].endswith("_r")]
    for item in sorted(small, key=lambda item: -item.work):
        units = _units(item, whole)
        if units <= budget:
            budget -= units
            kept.update(item.names)
    large = [(item.work, _units(item, whole), item.names) for item in items if item not in small]
    most = 0
    best: tuple[tuple[int, int, tuple[str, ...]], ...] = ()
    for count in range(1, len(large) + 1):
        for chosen in combinations(large, count):
            work = units = 0
            for item_work, item_units, _ in chosen:
                work += item_work
                units += item_units
            if work > most and units <= budget:
                most, best = work, chosen
    return kept.union(*(names for _, _, names in best))


def _whole(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> float:
    """What a budget is a share of, in bytes a token: what is kept without one, beyond the graph's inputs.

    Parameters that the backward pass does not need are inputs that are not kept: in a layer whose input wants
    no gradient the projections' weights.
    """
    sizes = kept_sizes(layer, knobs)
    names = _all_names(layer, knobs, input_requires_grad=input_requires_grad)
    whole = sum(sizes[name] for name in names) - sizes["x"]
    if input_requires_grad:
        return whole
    unused = 0.0
    for part in attention_inputs(layer):
        kind = knobs.kind(part.module)
        elements = part.inputs * part.outputs
        unused += kind.rank * part.inputs * kind.adapter_width
        if kind.quantized:
            constants = 1 if kind.double_quant else ABSMAX_WIDTH
            unused += elements / 2 + elements / QUANTIZATION_BLOCK * constants
        else:
            unused += elements * kind.weight_width
    return max(whole - unused / knobs.graph_tokens, 1.0)


def _units(item: _Item, whole: float) -> int:
    return round(item.size / whole * KNAPSACK_STEPS)


def _items(layer: LayerSpec, knobs: LayerKnobs, *, input_requires_grad: bool) -> list[_Item]:
    """Products of adapters, and of base layers that are not in 4 bits.

    down_proj's are asked for by an output norm alone, a fused qkv_proj's not in Phi-3's first layer (trace
    phi3_b30).
    """
    width = knobs.default.compute_width
    found = []
    for part in parts(layer):
        kind = knobs.kind(part.module)
        if kind.rank:
            size = kind.rank * width
            found.append(_Item(names=(f"{part.name}_r",), size=size, work=part.inputs * kind.rank))
        if part.name == "down" and not layer.output_norms:
            continue
        if part.name == "qkv" and not input_requires_grad:
            continue
        if kind.rank:
            work = part.outputs * kind.rank
            found.append(_Item(names=_stands_for(part, layer), size=part.outputs * width, work=work))
        if not kind.quantized:
            work = part.outputs * part.inputs
            found.append(_Item(names=(part.name,), size=part.outputs * width, work=work))
    return found


def _stands_for(part: Part, layer: LayerSpec) -> tuple[str, ...]:
    """What the partitioner keeps in place of an adapter's output: where it is all that a later tensor still
    needs, and as large, that one.
    """
    if part.name in ("q", "k") and layer.qk_norm == "none":
        return (f"{part.name}_rot",)
    if part.name == "v":
        return ("v",)
    if part.name == "qkv":
        return ("qkv", "q_rot", "k_rot")
    return (f"{part.name}_l",)


def kept_sizes(layer: LayerSpec, knobs: LayerKnobs) -> dict[str, float]:
    """Bytes a token of everything that can be kept."""
    width = knobs.default.compute_width
    hidden, query, key = (
        size * width for size in (layer.hidden_size, layer.query_size, layer.key_value_size)
    )
    sizes: dict[str, float] = {
        **dict.fromkeys(("x", "n1", "n2", "mid"), hidden),
        **dict.fromkeys(("q_rot", "ctx", "ctx_copy", "k_all", "v_all"), query),
        **dict.fromkeys(("k_rot", "v"), key),
        "lse": layer.num_attention_heads * FP32,
        **dict.fromkeys(("root1", "root2", "o_root", "down_root"), FP32),
        "product": layer.intermediate_size * width,
    }
    groups = layer.qk_norm == "head"
    sizes["q_root"] = FP32 * (layer.num_attention_heads if groups else 1)
    sizes["k_root"] = FP32 * (layer.num_key_value_heads if groups else 1)
    for part in parts(layer):
        sizes[part.name] = part.outputs * width
        sizes[f"{part.name}_l"] = part.outputs * width
        sizes[f"{part.name}_r"] = knobs.kind(part.module).rank * width
        sizes[f"{part.name}_d"] = part.inputs * width
        sizes[f"{part.name}_m"] = part.inputs
    return sizes
