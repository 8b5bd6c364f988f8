"""Vision-language models: the language part by its recipe, the tower by recording what runs before it.

Only families whose forward pass around both was read are described (transformers 5.23, models/qwen2_5_vl and
models/gemma3): tokens are embedded, the tower and its projector see the pixels, what comes of them takes the
place of the images' tokens, and the language model goes on as it does with text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from launcher.models.tracing.autocast import autocast
from launcher.models.tracing.opaque import IMPLEMENTATION, register_attention
from launcher.models.tracing.recorder import Recorder
from planner.base.errors import InputError
from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec
from planner.models.tower import FITTED, SQUARE, ImageRule, PassBytes, Tower, TowerPass
from planner.models.vision_config import as_processed

TRACED_LAYERS = 2
"""Layers of the tower that are recorded: the third asks for what the second does."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type: paths of the tower and of what else sees images, where the tower's layers are, the name
    of the input that tells images' tokens, whether there is always a mask, and how images become patches.
    """

    paths: tuple[str, ...]
    layers: str
    type_ids: str
    masked: bool
    rule: Callable[[Any], ImageRule]


def _fitted(config: Any) -> ImageRule:
    """Qwen's, with the pixels of the processor's class (image_processing_pil_qwen2_vl.py)."""
    return ImageRule(
        resize=FITTED,
        patch_size=config.vision_config.patch_size,
        merge=config.vision_config.spatial_merge_size,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        around=0,
    )


def _square(config: Any) -> ImageRule:
    """Gemma 3's: every image is image_size pixels a side; its template has one token where the processor
    puts a line break, that token, the image's, an end of image and a line break (processing_gemma3.py).
    """
    vision, side = config.vision_config, int(config.mm_tokens_per_image**0.5)
    return ImageRule(
        resize=SQUARE,
        patch_size=vision.patch_size,
        merge=vision.image_size // vision.patch_size // side,
        min_pixels=vision.image_size**2,
        max_pixels=vision.image_size**2,
        around=3,
    )


FAMILIES = {
    "qwen2_5_vl": Family(
        paths=("model.visual",),
        layers="model.visual.blocks",
        type_ids="mm_token_type_ids",
        masked=False,
        rule=_fitted,
    ),
    "gemma3": Family(
        paths=("model.vision_tower", "model.multi_modal_projector"),
        layers="model.vision_tower.encoder.layers",
        type_ids="token_type_ids",
        masked=True,
        rule=_square,
    ),
}


class LanguagePart(nn.Module):  # type: ignore[misc]  # torch has no types here
    """The language model of a vision-language one, in the form of a causal language model."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.model, self.lm_head = whole.model.language_model, whole.lm_head
        self.config = whole.model.language_model.config

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.lm_head

    def get_input_embeddings(self) -> Any:
        """The embeddings."""
        return self.model.embed_tokens


def build_whole(values: Mapping[str, Any]) -> Any:
    """The vision-language model of a config on the meta device.

    Raises:
        InputError: it is of another kind than those of FAMILIES.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    rest = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    model_type = str(values["model_type"])
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"images are not trained with models of type {model_type}, but with {known}")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **rest))


def renamed(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The language part's parameters by their names in the whole."""
    inner = "model.language_model."
    return tuple(
        replace(one, name=inner + one.name.removeprefix("model.")) if one.name.startswith("model.") else one
        for one in parameters
    )


def describe_vision(
    values: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    model_id: str,
    hub_id: str,
    aliases: tuple[str, ...],
    note: str,
) -> ModelSpec:
    """Describe a vision-language model.

    Args:
        values: The content of its config.json.
        processor: That of its preprocessor_config.json, empty where there is none.
        model_id: As of inspect_config, with the rest.

    Raises:
        InputError: it is of a type that is not described, or has parts that are not understood.
    """
    from launcher.models.inspect import describe_by_recipe

    whole = build_whole(values)
    tower = describe_tower(values, whole, processor)
    text = describe_by_recipe(
        LanguagePart(whole), model_id=model_id, hub_id=hub_id, aliases=aliases, note=note
    )
    assert text.download_bytes is not None
    return replace(
        text,
        architecture=type(whole).__name__,
        parameters=renamed(text.parameters),
        download_bytes=text.download_bytes + 2 * tower.parameter_count,
        tower=tower,
    )


def describe_tower(values: Mapping[str, Any], whole: Any, processor: Mapping[str, Any]) -> Tower:
    """The tower of a model on the meta device.

    Args:
        values: The model's config.json.
        whole: The model that it builds.
        processor: The content of preprocessor_config.json, empty where there is none.
    """
    family = FAMILIES[values["model_type"]]
    config, vision = whole.config, whole.config.vision_config
    rule = as_processed(family.rule(config), processor)
    depth = len(whole.get_submodule(family.layers))
    full = getattr(vision, "fullatt_block_indexes", None)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    return Tower(
        paths=family.paths,
        parameters=tuple(_parameters(whole, family)),
        rule=rule,
        patch_floats=channels * getattr(vision, "temporal_patch_size", 1) * rule.patch_size**2,
        type_ids=family.type_ids,
        masked=family.masked,
        hidden_size=vision.hidden_size,
        depth=depth,
        full_layers=depth if full is None else len(full),
        passes=tuple(_passes(values, rule)),
    )


def _parameters(whole: Any, family: Family) -> Iterator[Parameter]:
    """The tower's, in the model's order, those of its layers under one name."""
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, parameter in whole.named_parameters():
        if not name.startswith(tuple(path + "." for path in family.paths)):
            continue
        owner = type(whole.get_submodule(name.rpartition(".")[0])).__name__
        if name.startswith(family.layers + "."):
            index, _, rest = name.removeprefix(family.layers + ".").partition(".")
            name = f"{family.layers}.*.{rest}"
        key = name, owner, tuple(parameter.shape)
        counts[key] = counts.get(key, 0) + 1
    for (name, owner, shape), count in counts.items():
        yield Parameter(name=name, module_class=owner, shape=shape, count=count)


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


def _passes(values: Mapping[str, Any], rule: ImageRule) -> Iterator[TowerPass]:
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
        whole.model.get_submodule(self.family.paths[0].removeprefix("model.")).config._attn_implementation = (
            IMPLEMENTATION
        )
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
        """A frozen linear layer: in 16 bits under autocast; or quantised, which computes in its own dtype with
        the weight made whole, and answers in its input's (bitsandbytes nn/modules.py, Linear4bit.forward).
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


def _compact(
    events: tuple[tuple[str, int], ...], sizes: list[int], embedding: int, stream: int
) -> _Recorded:
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
