"""What the sizing screen's workers report back to it."""

from __future__ import annotations

from textual.message import Message

from launcher.tui.advice import Suggestions
from launcher.tui.dataset import Dataset
from launcher.tui.longest import LongestAnswer
from launcher.tui.sizing import Sizing
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup


class Refined(Message):
    """The figures of a sizing have been refined."""

    def __init__(self, first: Sizing, refined: Sizing) -> None:
        super().__init__()
        self.first = first
        self.refined = refined


class Advised(Message):
    """Advice for a sizing has been worked out."""

    def __init__(self, sizing: Sizing, found: Suggestions) -> None:
        super().__init__()
        self.sizing = sizing
        self.found = found


class LongestFound(Message):
    """How long sequences may be has been worked out for what a sizing asks."""

    def __init__(self, found: LongestAnswer) -> None:
        super().__init__()
        self.found = found


class Resolved(Message):
    """A model was found by its name, or says why not."""

    def __init__(self, name: str, model: ModelSpec | None, message: str) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.message = message


class Opened(Message):
    """The setup that the screen opens on has been searched; None where the model is not modelled."""

    def __init__(self, setup: TrainingSetup | None) -> None:
        super().__init__()
        self.setup = setup


class Chosen(Message):
    """The automatic choice has been made, or says why none can be."""

    def __init__(self, setup: TrainingSetup | None, message: str) -> None:
        super().__init__()
        self.setup = setup
        self.message = message


class DataRead(Message):
    """The data that the screen begins with was read, or says why it cannot be."""

    def __init__(self, data: Dataset | None, message: str) -> None:
        super().__init__()
        self.data = data
        self.message = message
