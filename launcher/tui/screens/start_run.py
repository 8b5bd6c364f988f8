"""Asks what a run needs beside the setup: data, where the model is, how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static

from launcher.tui.text import plain
from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.data.files import named_on_hub
from planner.setup import defaults

MAX_STEPS = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class RunWish:
    """What the person wants: the data's path or name on the Hub, the model's folder or Hub id, where run
    folders go, and how long.

    Either `max_steps` or `num_train_epochs` decides; null for the other.
    """

    data: Path
    model_source: str
    runs: Path
    num_train_epochs: float | None
    max_steps: int | None


class StartRun(ModalScreen[RunWish | None]):
    """A form that says what is wrong under the field it is wrong in."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Back", id="start.back", tooltip="Start nothing"),
        Binding("ctrl+s", "start", "Start", id="start.start", tooltip="Start the training"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]
    AUTO_FOCUS = "#start-data"

    def __init__(
        self,
        *,
        title: str,
        model_source: str,
        data: str,
        runs: str,
        epochs: float | None = None,
        wish: RunWish | None = None,
        refusal: str = "",
    ) -> None:
        """Begins with `wish` where it was refused, and says why."""
        super().__init__()
        self._title = title
        self._refusal = refusal
        # What the form begins with.
        self.values = {
            "data": data,
            "model": model_source,
            "runs": runs,
            "epochs": f"{defaults.EPOCHS if epochs is None else epochs:g}",
            "steps": "",
        }
        if wish is not None:
            self.values |= {
                "model": wish.model_source,
                "epochs": self.values["epochs"]
                if wish.num_train_epochs is None
                else f"{wish.num_train_epochs:g}",
                "steps": "" if wish.max_steps is None else str(wish.max_steps),
            }

    def compose(self) -> ComposeResult:
        """One field a line."""
        fields = (
            ("data", "data", "a file or folder, or a data set of the Hub: org/name"),
            ("model", "model", "folder with safetensors, or a Hub id that is in the cache"),
            ("runs", "run folders", "where the run's own folder is made"),
            ("epochs", "epochs", ""),
            ("steps", "max steps", "overrides the epochs"),
        )
        with Vertical(id="dialog"):
            yield Static(Text(plain(self._title, 90)), id="dialog-title")
            for name, label, placeholder in fields:
                with Horizontal(classes="knob-row"):
                    yield Label(label, classes="knob-label")
                    yield Input(
                        self.values[name],
                        id=f"start-{name}",
                        compact=True,
                        placeholder=placeholder,
                        select_on_focus=False,
                    )
                yield Static("", id=f"start-error-{name}", classes="knob-error")
            yield Static("", id="start-error-form", classes="knob-error")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Start (ctrl+s)", id="start", variant="primary", compact=True)
                yield Button("Back (esc)", id="back", compact=True)

    def on_mount(self) -> None:
        """Say why what the form begins with was refused."""
        if self._refusal:
            self._say("form", self._refusal)

    def _say(self, name: str, message: str) -> None:
        place = self.query_one(f"#start-error-{name}", Static)
        place.update(Text(plain(message)))
        place.add_class("shown")

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "start":
            self.action_start()
        else:
            self.action_cancel()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_start()

    def action_cancel(self) -> None:
        """Leave without starting."""
        self.dismiss(None)

    def action_start(self) -> None:
        """Check the fields and hand the wish back."""
        for place in self.query(".knob-error"):
            place.remove_class("shown")
        texts = {name: self.query_one(f"#start-{name}", Input).value.strip() for name in self.values}
        try:
            self.dismiss(read_wish(texts))
        except InputError as error:
            self._say(error.field if isinstance(error, FieldError) else "form", str(error))


def read_wish(texts: dict[str, str]) -> RunWish:
    """Check the texts of the form.

    Raises:
        FieldError: a field is not usable; its name is the form's.
    """
    data = Path(texts["data"]).expanduser()
    if not texts["data"] or not (data.exists() or named_on_hub(data) is not None):
        raise FieldError("data", texts["data"], "a file that exists, a folder, or a data set of the Hub")
    validate.text("model", texts["model"])
    runs = Path(texts["runs"]).expanduser()
    if not texts["runs"] or (runs.exists() and not runs.is_dir()):
        raise FieldError("runs", texts["runs"], "a folder")
    steps = None
    if texts["steps"]:
        steps = validate.integer("steps", _number(int, texts["steps"]), minimum=1, maximum=MAX_STEPS)
    epochs = None
    if steps is None:
        epochs = validate.number("epochs", _number(float, texts["epochs"]), minimum=1e-6, maximum=1e6)
    return RunWish(
        data=data.resolve() if data.exists() else data,
        model_source=texts["model"],
        runs=runs.resolve(),
        num_train_epochs=epochs,
        max_steps=steps,
    )


def _number(kind: type[int] | type[float], text: str) -> int | float | str:
    try:
        return kind(text.replace(",", ""))
    except ValueError:
        return text
