"""A vision tower recorded: what is allocated and freed from token ids and pixels to the language model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from launcher.models.tracing.autocast import autocast
from launcher.models.tracing.opaque import IMPLEMENTATION, register_attention
from launcher.models.tracing.recorder import Recorder
from launcher.models.vision_families import FAMILIES
from planner.base.errors import InputError
from planner.data.image_rule import SQUARE, ImageRule
from planner.models.tower import PassBytes, TowerPass

TRACED_LAYERS = 2
"""Layers of the tower that are recorded: the third asks for what the second does."""


class _Point(NamedTuple):
    """A micro-step that is recorded: tokens of its one row, images, and patches of each."""

    tokens: int
    images: int
    side: int


def _points(rule: ImageRule) -> tuple[_Point, _Point, _Point]:
    """Three that tell what grows with tokens from what grows with patches: images are one, and one window."""
    if rule.resize == SQUARE:
        side = 2 * rule.merge
        return _Point(64, 1, side), _Point(128, 1, side), _Point(64, 2, side)
    return _Point(64, 1, 2 * rule.merge), _Point(128, 1, 2 * rule.merge), _Point(64, 1, 4 * rule.merge)


def recorded_passes(values: Mapping[str, Any], rule: ImageRule) -> Iterator[TowerPass]:
    """What lies between token ids with pixels and the language model, recorded for each dtype, and for linear
    layers in 16 bits and quantised.

    Args:
        values: The model's config.json.
        rule: How its processor makes patches.

    Raises:
        InputError: the tower does other operations for other sizes.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for quantized in (False, True):
            points = _points(rule)
            runs = [_Run(values, rule, dtype, quantized).record(point) for point in points]
            yield _joined(runs, [(p.tokens, p.images * p.side**2) for p in points], dtype.itemsize, quantized)


class _Recorded(NamedTuple):
    events: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    embedding: int
    stream: int


def _joined(runs: list[_Recorded], at: list[tuple[int, int]], width: int, quantized: bool) -> TowerPass:
    first, more_tokens, more_patches = runs
    for other in runs[1:]:
        if other.events != first.events:
            raise InputError("the vision tower does other operations for other sizes, which is not modelled")
    tokens, patches = at[1][0] - at[0][0], at[2][1] - at[0][1]
    sizes = []
    for small, longer, larger in zip(first.sizes, more_tokens.sizes, more_patches.sizes, strict=True):
        per_token, per_patch = (longer - small) / tokens, (larger - small) / patches
        sizes.append(PassBytes(small - per_token * at[0][0] - per_patch * at[0][1], per_token, per_patch))
    numbers = tuple(number if kind == "allocate" else -1 - number for kind, number in first.events)
    return TowerPass(
        width=width,
        quantized=quantized,
        sizes=tuple(sizes),
        events=numbers,
        embedding=first.embedding,
        stream=first.stream,
    )


class _Run:
    """One recording: everything but linear layers, attention and embeddings runs, on true widths and few
    patches, under the no_grad in which the launcher has the tower run.
    """

    def __init__(
        self, values: Mapping[str, Any], rule: ImageRule, dtype: torch.dtype, quantized: bool
    ) -> None:
        self.family, self.rule = FAMILIES[values["model_type"]], rule
        self.dtype, self.quantized = dtype, quantized
        self.values = values
        self.recorder = _FloatRecorder()
        self.embedding = -1

    def record(self, point: _Point) -> _Recorded:
        """What a micro-step of that size allocates and frees before the language model begins."""
        register_attention()
        whole = self._model(point)
        inputs = self._inputs(whole, point)
        reached: list[int] = []

        def language(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
            reached.append(self.recorder.number(inputs_embeds))
            self.events = list(self.recorder.events)
            raise _ReachedError

        whole.model.language_model.forward = language
        self.recorder.know(one for one in inputs.values())
        self.recorder.know(one for one in whole.parameters() if not one.is_meta)
        self.recorder.know(whole.buffers())
        with contextlib.suppress(_ReachedError), torch.no_grad(), autocast(self.dtype), self.recorder:
            whole.model(**inputs, use_cache=False)
        if not reached:
            raise InputError("the language model is not reached, so that the tower cannot be recorded")
        events = tuple(event for event in self.events if self.recorder.counted[event[1]])
        return _compact(events, self.recorder.sizes_bytes, self.embedding, reached[0])

    def _model(self, point: _Point) -> Any:
        from transformers import AutoConfig, AutoModelForImageTextToText

        rest = {key: value for key, value in self.values.items() if key not in ("model_type", "auto_map")}
        config = AutoConfig.for_model(self.values["model_type"], **rest)
        _shorten(config, point, self.rule)
        config.vision_config._attn_implementation = IMPLEMENTATION
        with torch.device("meta"):
            whole = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
        whole.model.get_submodule(
            self.family.paths[0].removeprefix("model.")
        ).config._attn_implementation = IMPLEMENTATION
        whole.train()
        self._fill(whole)
        return whole

    def _fill(self, whole: Any) -> None:
        """Weights of all that runs, but for linear layers and the tokens' embeddings, which are named."""
        language = set(whole.model.language_model.modules())
        whole.get_input_embeddings().forward = self._embed(whole.get_input_embeddings())
        for module in whole.modules():
            if module in language or module is whole.lm_head:
                continue
            if type(module) is nn.Linear:
                module.forward = self._linear(module)
                continue
            for name, parameter in module.named_parameters(recurse=False):
                made = torch.ones(parameter.shape, dtype=self.dtype)
                module.register_parameter(name, nn.Parameter(made, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                made = torch.zeros(buffer.shape, dtype=buffer.dtype)
                if name == "position_ids":
                    made = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                module.register_buffer(name, made, persistent=False)

    def _inputs(self, whole: Any, point: _Point) -> dict[str, torch.Tensor]:
        per_image = point.side**2 // self.rule.merge**2
        ids = torch.zeros((1, point.tokens), dtype=torch.int64)
        ids[0, 4 : 4 + point.images * per_image] = whole.config.image_token_id
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            self.family.type_ids: (ids == whole.config.image_token_id).long(),
        }
        vision = whole.config.vision_config
        if self.rule.resize == SQUARE:
            inputs["pixel_values"] = torch.zeros((point.images, 3, vision.image_size, vision.image_size))
            return inputs
        floats = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.zeros((point.images * point.side**2, floats))
        inputs["image_grid_thw"] = torch.tensor([[1, point.side, point.side]] * point.images)
        return inputs

    def _linear(self, module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """A frozen linear layer: in 16 bits under autocast; or quantised, which computes in its own dtype
        with the weight made whole, and answers in its input's (bitsandbytes nn/modules.py,
        Linear4bit.forward).
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            given = x.dtype
            x = x.to(self.dtype)
            weight = torch.empty(module.weight.shape, dtype=self.dtype) if self.quantized else None
            made = x.new_empty((*x.shape[:-1], module.out_features))
            del weight
            return made.to(given) if self.quantized else made

        return forward

    def _embed(self, module: nn.Embedding) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            found = torch.empty((*ids.shape, module.embedding_dim), dtype=self.dtype)
            if "Scaled" in type(module).__name__:
                found = found * 1.0
            self.embedding = self.recorder.number(found)
            return found

        return forward


class _ReachedError(Exception):
    """Ends a recording where the language model begins."""


class _FloatRecorder(Recorder):
    """Knows which storages hold numbers with fractions: ids, places and masks of tokens are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[bool] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Number a storage."""
        self.counted.append(tensor.is_floating_point() and tensor.numel() > 1)
        return super().add(tensor)


def _shorten(config: Any, point: _Point, rule: ImageRule) -> None:
    """Few layers, and for towers of one size an image of few patches."""
    vision, text = config.vision_config, config.text_config
    for name in ("depth", "num_hidden_layers"):
        if hasattr(vision, name):
            setattr(vision, name, TRACED_LAYERS)
    if rule.resize == SQUARE:
        vision.image_size = point.side * rule.patch_size
        config.mm_tokens_per_image = (point.side // rule.merge) ** 2
    else:
        vision.fullatt_block_indexes = [1]
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]


def _compact(events: tuple[tuple[str, int], ...], sizes: list[int], embedding: int, stream: int) -> _Recorded:
    """The events with buffers numbered in the order in which they are made."""
    numbers: dict[int, int] = {}
    for kind, number in events:
        if kind == "allocate":
            numbers[number] = len(numbers)
    return _Recorded(
        events=tuple((kind, numbers[number]) for kind, number in events if number in numbers),
        sizes=tuple(sizes[number] for number in numbers),
        embedding=numbers[embedding],
        stream=numbers[stream],
    )
