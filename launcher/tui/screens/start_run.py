"""Asks what a run needs beside the setup: data, where the model is, how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static
from textual.worker import get_current_worker

from launcher.runs.folder import check_name
from launcher.runs.training_job import SEED, check_evaluation
from launcher.tui.text import plain
from planner.base import validate
from planner.base.errors import FieldError, InputError, VramwiseError
from planner.data.files import named_on_hub
from planner.setup import defaults

MAX_STEPS = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class RunWish:
    """What the person wants: the data's path or name on the Hub, the model's folder or Hub id, where run
    folders go, and how long.

    Either `max_steps` or `num_train_epochs` decides; null for the other. `eval_data` is a path or a name on
    the Hub, `eval_split` a share of the data or a number of its examples; null stands for no evaluation, and
    of the others for the usual.
    """

    data: Path
    model_source: str
    runs: Path
    num_train_epochs: float | None
    max_steps: int | None
    name: str | None = None
    eval_data: Path | None = None
    eval_split: float | None = None
    learning_rate: float | None = None
    seed: int | None = None
    assistant_only_loss: bool = False


FIELDS = (
    ("data", "data", "a file or folder, or a data set of the Hub: org/name"),
    ("model", "model", "folder with safetensors, or a Hub id that is in the cache"),
    ("runs", "run folders", "where the run's own folder is made"),
    ("name", "name", "time and model"),
    ("epochs", "epochs", ""),
    ("steps", "max steps", "overrides the epochs"),
    ("eval", "evaluate on", "nothing; a share (0.05), examples (50), or a file"),
    ("rate", "learning rate", "by model size"),
    ("seed", "seed", str(SEED)),
    ("assistant", "learn", "all of a conversation; or: assistant"),
)
"""Name, label and what stands in an empty one."""
ASSISTANT = "assistant"
Foresee = Callable[[str, float | None], str]
"""What a run on data comes to, by its path and the passes over it: steps, time, price, disk; in a thread.

Raises InputError where the data cannot be read."""
PAUSE_SECONDS = 0.3
"""From a letter typed to the work that it asks for."""


class StartRun(ModalScreen[RunWish | None]):
    """A form that says what is wrong under the field it is wrong in, and what it is about to start."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Back", id="start.back", tooltip="Start nothing"),
        Binding("ctrl+s", "start", "Start", id="start.start", tooltip="Start the training"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]
    AUTO_FOCUS = "#start-data"

    class Foreseen(Message):
        """What the run comes to has been worked out."""

        def __init__(self, told: str) -> None:
            super().__init__()
            self.told = told

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
        foresee: Foresee | None = None,
    ) -> None:
        """Begins with `wish` where it was refused, and says why."""
        super().__init__()
        self._title = title
        self._refusal = refusal
        self._foresee = foresee
        # What the form begins with.
        self.values = {
            "data": data,
            "model": model_source,
            "runs": runs,
            "epochs": f"{defaults.EPOCHS if epochs is None else epochs:g}",
            **dict.fromkeys(("steps", "name", "eval", "rate", "seed", "assistant"), ""),
        }
        if wish is not None:
            self.values |= _texts(wish)

    def compose(self) -> ComposeResult:
        """One field a line."""
        with VerticalScroll(id="dialog"):
            yield Static(Text(plain(self._title, 90)), id="dialog-title")
            for name, label, placeholder in FIELDS:
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
            yield Static("", id="start-foreseen", classes="note")
            yield Static("", id="start-error-form", classes="knob-error")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Start (ctrl+s)", id="start", variant="primary", compact=True)
                yield Button("Back (esc)", id="back", compact=True)

    def on_mount(self) -> None:
        """Say why what the form begins with was refused."""
        if self._refusal:
            self._say("form", self._refusal)
        self._look_ahead()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if event.input.id in ("start-data", "start-epochs"):
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Say what data and passes come to."""
        data = self.query_one("#start-data", Input).value.strip()
        try:
            epochs: float | None = float(self.query_one("#start-epochs", Input).value)
        except ValueError:
            epochs = None
        if self._foresee is not None and data and epochs:
            self._work_ahead(self._foresee, data, epochs)
        else:
            self._show_foreseen("")

    @work(thread=True, exclusive=True, group="ahead")
    def _work_ahead(self, foresee: Foresee, data: str, epochs: float) -> None:
        worker = get_current_worker()
        time.sleep(PAUSE_SECONDS)
        if worker.is_cancelled:
            return
        try:
            told = foresee(data, epochs)
        except VramwiseError as error:
            # Said under the field once it is started: a path is no path until all of it is typed.
            told = str(error)
        if not worker.is_cancelled:
            self.post_message(self.Foreseen(told))

    @on(Foreseen)
    def _tell_foreseen(self, event: Foreseen) -> None:
        event.stop()
        self._show_foreseen(event.told)

    def _show_foreseen(self, told: str) -> None:
        self.query_one("#start-foreseen", Static).update(Text(plain(told, 300)))

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
    eval_data, eval_split = _evaluation(texts["eval"])
    rate, seed = texts["rate"], texts["seed"]
    return RunWish(
        data=data.resolve() if data.exists() else data,
        model_source=texts["model"],
        runs=runs.resolve(),
        num_train_epochs=epochs,
        max_steps=steps,
        name=_name(texts["name"]) if texts["name"] else None,
        eval_data=eval_data,
        eval_split=eval_split,
        learning_rate=validate.number("rate", _number(float, rate), minimum=1e-12, maximum=10.0)
        if rate
        else None,
        seed=validate.integer("seed", _number(int, seed), minimum=0, maximum=2**32 - 1) if seed else None,
        assistant_only_loss=_assistant_only(texts["assistant"]),
    )


def _texts(wish: RunWish) -> dict[str, str]:
    """What the fields show for a wish that was refused; data and folder are the application's."""

    def shown(value: object) -> str:
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    found = {
        "model": wish.model_source,
        "name": shown(wish.name),
        "steps": shown(wish.max_steps),
        "eval": shown(wish.eval_data if wish.eval_split is None else wish.eval_split),
        "rate": shown(wish.learning_rate),
        "seed": shown(wish.seed),
        "assistant": ASSISTANT if wish.assistant_only_loss else "",
    }
    return found if wish.num_train_epochs is None else {**found, "epochs": shown(wish.num_train_epochs)}


def _name(text: str) -> str:
    try:
        return check_name(text)
    except FieldError as error:
        raise FieldError("name", text, error.accepted) from error


def _evaluation(text: str) -> tuple[Path | None, float | None]:
    """What is evaluated on: a share or a number of examples, or a file."""
    if not text:
        return None, None
    share = _number(float, text)
    if isinstance(share, float):
        try:
            check_evaluation(data=None, split=share, steps=None, patience=None)
        except FieldError as error:
            raise FieldError("eval", text, error.accepted) from error
        return None, share
    path = Path(text).expanduser()
    if not (path.exists() or named_on_hub(path) is not None):
        raise FieldError("eval", text, "a share such as 0.05, a number of examples, or a file that exists")
    return path.resolve() if path.exists() else path, None


def _assistant_only(text: str) -> bool:
    if text not in ("", "all", ASSISTANT):
        raise FieldError("assistant", text, f"all or {ASSISTANT}")
    return text == ASSISTANT


def _number(kind: type[int] | type[float], text: str) -> int | float | str:
    try:
        return kind(text.replace(",", ""))
    except ValueError:
        return text
