"""The timeline of a training step: live bytes at each moment that can be the peak."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

from planner.base.values import dataclass
from planner.memory.decoder.groups import LayerGroup
from planner.memory.decoder.live_bytes import LayerMemory, at, peak
from planner.memory.held.head import HeadMemory
from planner.memory.step.images import NO_IMAGES, ImageMemory
from planner.memory.tape.tape import ACTIVATIONS, GRADIENTS, WORKSPACE, Moment
from planner.setup.trained import Trained


class StepMoment(NamedTuple):
    """One moment of a step, beyond what is there between steps.

    `kept` is what forward keeps for layers not being worked on (checkpoints, or all saved tensors), `live`
    what the layer at work holds, `workspace` dequantised weights and the like, `head` the output head's,
    `gathered` the weights that FSDP2 has gathered, with the buffers that they arrive in.
    """

    name: str
    kept_bytes: int
    live_bytes: int
    workspace_bytes: int
    gradient_bytes: int
    head_bytes: int = 0
    gathered_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All groups."""
        return _total_bytes(self)


def _total_bytes(moment: StepMoment) -> int:
    _, kept, live, workspace, gradients, head, gathered = moment
    return kept + live + workspace + gradients + head + gathered


class AtWork(NamedTuple):
    """What a layer holds at the peak of a pass, by category."""

    live_bytes: int
    workspace_bytes: int
    gradient_bytes: int

    @classmethod
    def of(cls, moment: Moment, tokens: int, scores: int) -> AtWork:
        """A moment of its tape in a micro-step of that size."""
        live, workspace, gradients = moment[ACTIVATIONS], moment[WORKSPACE], moment[GRADIENTS]
        return cls(
            int(live[0] + tokens * live[1] + scores * live[2]),
            int(workspace[0] + tokens * workspace[1] + scores * workspace[2]),
            int(gradients[0] + tokens * gradients[1] + scores * gradients[2]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Size of a micro-step: tokens, attention's score elements, bytes a token of the hidden states that enter
    the first layer and that leave the last, and whether gradients of earlier micro-steps are there.
    """

    tokens: int
    scores: int
    hidden_bytes_per_token: int
    leaving_bytes_per_token: int
    accumulating: bool


class StepTimeline:
    """Moments of a step for one setup. With `offloads` saved tensors are moved to the host, and `stash` of
    them are on the GPU until their copies are done. `embedding_copy_bytes` are those of a copy of
    the embedding, made for each forward pass, where single rows of it are trained.
    """

    def __init__(
        self,
        *,
        groups: tuple[LayerGroup, ...],
        final_norm: LayerMemory,
        head: HeadMemory,
        trained: Trained,
        embedding_gradient_bytes: int,
        embedding_scratch_bytes: int,
        tied: bool,
        embedding_copy_bytes: int,
        raw_embedding: bool,
        offloads: bool,
        stash: int,
        shape: StepShape,
        images: ImageMemory = NO_IMAGES,
    ) -> None:
        self.groups = groups
        self.offloads, self.stash = offloads, stash
        self.final_norm = final_norm
        self.head = head
        self.trained = trained
        self.embedding_gradient_bytes = embedding_gradient_bytes
        self.embedding_scratch_bytes = embedding_scratch_bytes
        self.tied = tied
        self.embedding_copy_bytes = embedding_copy_bytes
        self.shape = shape
        self.images = images
        tokens, scores = shape.tokens, shape.scores
        self._indices = [group.indices for group in groups]
        self._kept = [self._kept_by(group) for group in groups]
        self._gradients = [
            0.0 if shape.accumulating else at(group.memory.gradients, tokens, scores) for group in groups
        ]
        self.offloaded_input_bytes = (
            max(group.input_bytes_per_token for group in groups) * tokens if offloads else 0
        )
        # PEFT marks the embedding's output as a leaf that wants a gradient; scaling it makes a second tensor.
        self._raw_embedding = shape.hidden_bytes_per_token * tokens if raw_embedding else 0
        first = next(group for group in groups if group.indices[0] == 0)
        # The model's forward pass holds the embeddings in a variable even if its first layer keeps nothing.
        self._embeddings_held = 0 if first.memory.keeps_input else shape.hidden_bytes_per_token * tokens
        self._layers = sum(map(len, self._indices))
        self._all_gradients = trained.size_bytes
        # The backward passes' peaks, and what all layers keep: each is asked for more than once.
        self._backward = [peak(group.memory.backward, tokens, scores) for group in groups]
        self._kept_by_all = self._below(self._layers)

    def largest(self) -> StepMoment:
        """The peak of the step."""
        moments = self.moments()
        if self.embedding_gradient_bytes:
            moments.append(self._embedding_backward())
        return max(moments, key=_total_bytes)

    def moments(self) -> list[StepMoment]:
        """Every moment of the decoder stack and of the head that can be the peak."""
        return [*self._image_moments(), *self._head_moments(), *self._layer_moments()]

    def _image_moments(self) -> list[StepMoment]:
        """Images on their way to embeddings, before any layer runs."""
        if not self.images.peak_bytes:
            return []
        above = self._all_gradients if self.shape.accumulating else 0
        return [StepMoment("images in the vision tower", 0, self.images.peak_bytes, 0, above)]

    def between_passes(self) -> StepMoment:
        """What a micro-step holds once its forward pass is done and before its backward pass begins."""
        tokens, scores = self.shape.tokens, self.shape.scores
        return StepMoment(
            name="between forward and backward",
            kept_bytes=self._kept_by_all,
            live_bytes=int(at(self.final_norm.saved, tokens, scores)),
            workspace_bytes=0,
            gradient_bytes=self._all_gradients if self.shape.accumulating else 0,
            head_bytes=self.head.kept_bytes,
        )

    def optimizer_step(self, temporary_bytes: int) -> StepMoment:
        """Gradients of everything trained, and what the optimizer needs for a moment."""
        return StepMoment(
            name="optimizer step",
            kept_bytes=0,
            live_bytes=0,
            workspace_bytes=temporary_bytes,
            gradient_bytes=self._all_gradients,
        )

    def forward_only(self) -> StepMoment:
        """The peak of a forward pass that keeps nothing (evaluation)."""
        shape = self.shape
        hidden = 2 * shape.hidden_bytes_per_token * shape.tokens + self.images.held_bytes
        live, workspace = 0, 0
        for group in self.groups:
            size, moment = peak(group.memory.forward, shape.tokens, shape.scores)
            if size > live + workspace:
                workspace = int(moment[WORKSPACE].at(shape.tokens, shape.scores))
                live = int(size) - workspace
        if self.head.forward_bytes > live + workspace + hidden:
            return StepMoment(
                name="output head",
                kept_bytes=0,
                live_bytes=0,
                workspace_bytes=0,
                gradient_bytes=0,
                head_bytes=self.head.forward_bytes,
            )
        if self.embedding_copy_bytes > live + workspace + hidden // 2:
            return StepMoment(
                name="embedding",
                kept_bytes=hidden // 2,
                live_bytes=0,
                workspace_bytes=self.embedding_copy_bytes,
                gradient_bytes=0,
            )
        return StepMoment(
            name="forward of a decoder layer",
            kept_bytes=hidden,
            live_bytes=live,
            workspace_bytes=workspace,
            gradient_bytes=0,
        )

    @property
    def pool_bytes(self) -> int:
        """What other streams' pools hold beside what is counted at any moment."""
        return 0

    @property
    def kept_bytes(self) -> int:
        """What forward keeps for backward, all layers together."""
        return self._kept_by_all

    def _kept_by(self, group: LayerGroup) -> float:
        """What a layer leaves on the GPU for backward.

        Offloading takes what one node alone has saved to the host (trl/models/activation_offloading.py).
        """
        shape = self.shape
        if group.checkpointed:
            kept = 0 if self.offloads else group.input_bytes_per_token
            return (kept + group.selected_bytes_per_token) * shape.tokens
        saved = group.memory.shared if self.offloads else group.memory.saved
        return at(saved, shape.tokens, shape.scores)

    def _fetched_before(self, index: int) -> int:
        """What offloading has brought back for the step before a layer's backward, and not yet let go."""
        if not self.offloads:
            return 0
        if index < self._layers - 1:
            return self.offloaded_input_bytes
        return int(at(self.final_norm.saved, self.shape.tokens, self.shape.scores))

    def _stashed(self, index: int) -> int:
        """Inputs of layers below that offloading still holds in forward, the embeddings beside them."""
        return min(index, self.stash - 1) * self.offloaded_input_bytes

    def _kept_below(self, index: int) -> int:
        return self._kept_by_all if index == self._layers else self._below(index)

    def _below(self, index: int) -> int:
        layers = 0.0
        for kept, indices in zip(self._kept, self._indices, strict=True):
            layers += kept * bisect_left(indices, index)
        embeddings = self.shape.hidden_bytes_per_token * self.shape.tokens if self.offloads and index else 0
        return int(layers) + self._raw_embedding + embeddings

    def working_bytes(self) -> int:
        """What the busiest layer allocates and frees while it is worked on, its saved tensors left out."""
        tokens, scores = self.shape.tokens, self.shape.scores
        return max(
            [
                int(size - at(group.memory.saved, tokens, scores))
                for group, (size, _) in zip(self.groups, self._backward, strict=True)
            ]
        )

    def _gradients_above(self, index: int) -> int:
        if self.shape.accumulating:
            return self._all_gradients
        layers = 0.0
        for gradient, indices in zip(self._gradients, self._indices, strict=True):
            layers += gradient * (len(indices) - bisect_right(indices, index))
        return int(layers) + self.head.gradient_bytes

    def _head_moments(self) -> list[StepMoment]:
        tokens, scores = self.shape.tokens, self.shape.scores
        kept = self._kept_below(self._layers)
        accumulated = self._all_gradients if self.shape.accumulating else 0
        norm_saved = int(at(self.final_norm.saved, tokens, scores))
        # Offloading still has what two of the norm's nodes have saved (traces llama_off, qwen3_off).
        norm_left = int(at(self.final_norm.shared, tokens, scores)) if self.offloads else norm_saved
        norm_peak, _ = peak(self.final_norm.backward, tokens, scores)
        norm_forward, _ = peak(self.final_norm.forward, tokens, scores)
        stream = self.shape.leaving_bytes_per_token * tokens
        above = accumulated or self.head.gradient_bytes
        stashed = self._stashed(self._layers)
        entering = stream + self._embeddings_held + self.images.held_bytes
        forward, backward = self.head.forward_bytes, self.head.backward_bytes
        return [
            StepMoment("output head, forward", kept + stashed, norm_saved, 0, accumulated, forward),
            StepMoment("output head, backward", kept, norm_left, 0, accumulated, backward),
            StepMoment("forward of the final norm", kept + entering, int(norm_forward), 0, accumulated),
            StepMoment("backward of the final norm", kept, int(norm_peak), 0, above),
        ]

    def _layer_moments(self) -> list[StepMoment]:
        moments = []
        tokens, scores = self.shape.tokens, self.shape.scores
        for group, (_, moment) in zip(self.groups, self._backward, strict=True):
            work = AtWork.of(moment, tokens, scores)
            own = group.input_bytes_per_token * tokens if group.checkpointed else 0
            for index in {group.indices[-1], group.indices[0]}:
                held = own + (self._fetched_before(index) if group.checkpointed else 0)
                moments.append(self._layer_moment(index, held, work))
            forward = group.memory.forward_saving or group.memory.forward
            _, moment = peak(forward, tokens, scores)
            index = group.indices[-1]
            held = own + (self._embeddings_held if index else 0) + self._stashed(index)
            held += self.images.held_bytes
            # Selective checkpointing has kept this layer's own by the time its MLP is at work.
            held += group.selected_bytes_per_token * tokens
            moments.append(self._layer_moment(index, held, AtWork.of(moment, tokens, scores), backward=False))
        return moments

    def _layer_moment(self, index: int, own: int, work: AtWork, *, backward: bool = True) -> StepMoment:
        if backward:
            above = self._gradients_above(index)
        else:
            above = self._all_gradients if self.shape.accumulating else 0
        return StepMoment(
            f"{'backward' if backward else 'forward'} of decoder layer {index}",
            self._kept_below(index) + own,
            work.live_bytes,
            work.workspace_bytes,
            work.gradient_bytes + above,
        )

    def _embedding_backward(self) -> StepMoment:
        """The embedding's dense gradient; a second one for a moment when another is there to add it to, or
        rows of it are all that is wanted.
        """
        temporary = self.shape.accumulating or self.tied or self.embedding_copy_bytes > 0
        return StepMoment(
            name="backward of the embedding",
            kept_bytes=0,
            live_bytes=self.shape.hidden_bytes_per_token * self.shape.tokens,
            workspace_bytes=(self.embedding_gradient_bytes if temporary else 0)
            + self.embedding_scratch_bytes,
            gradient_bytes=self._all_gradients,
        )
