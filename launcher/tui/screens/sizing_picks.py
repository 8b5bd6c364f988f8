"""What is sized on the sizing screen, and how it is picked: model, card and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from textual import on

from launcher.tui import cards, knobs
from launcher.tui.dataset import Dataset
from launcher.tui.screens.data_picker import DataPicker, PickedData
from launcher.tui.screens.sizing_messages import Resolved
from launcher.tui.screens.sizing_pickers import gpu_picker, model_picker
from launcher.tui.screens.sizing_workers import SizingWorkers
from launcher.tui.sizing import Sizing, Wishes
from launcher.tui.widgets.sizing.knob_form import KnobForm
from launcher.tui.widgets.sizing.pick_button import PickButton
from planner.base.errors import FieldError, VramwiseError
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup


class SizingPicks(SizingWorkers):
    """Knows what is picked; `answer` and `put` are its screen's."""

    def __init__(self, model: ModelSpec, card: cards.Card, setup: TrainingSetup) -> None:
        super().__init__()
        self._model = model
        self._model_name = setup.model
        self._card = card
        self._data: Dataset | None = None
        self._others: dict[str, Any] = knobs.other_fields(setup)
        self._loaded: TrainingSetup | None = None
        self._before: list[tuple[TrainingSetup, str]] = []
        self.sizing: Sizing | None = None

    def _answer(self, texts: Mapping[str, str]) -> None:
        """Recompute and show."""
        raise NotImplementedError

    def _put(self, setup: TrainingSetup, asked_optim: str) -> None:
        """Show a setup in the knobs and answer it."""
        raise NotImplementedError

    @property
    def _allow_network(self) -> bool:
        return bool(self.app.allow_download)  # type: ignore[attr-defined]

    @property
    def form(self) -> KnobForm:
        """The knobs."""
        return self.query_one(KnobForm)

    @on(PickButton.Pressed)
    def _pick(self, event: PickButton.Pressed) -> None:
        event.stop()
        {
            "pick-model": self.action_pick_model,
            "pick-gpu": self.action_pick_gpu,
            "pick-data": self.action_pick_data,
        }[str(event.button.id)]()

    def _shown_card(self, texts: Mapping[str, str]) -> cards.Card:
        return cards.attached(self._card, display=texts[knobs.DISPLAY] == knobs.ON)

    def action_pick_model(self) -> None:
        """Pick a model; each is shown with what it needs at the present knobs."""
        card, wishes = self._shown_card(self.form.texts), self._wishes
        self.app.push_screen(
            model_picker(self._model, card, self.form.texts, dict(self._others), wishes), self._model_picked
        )

    def _model_picked(self, name: str | None) -> None:
        if name is None:
            return
        self._resolve(name, self._allow_network)

    @on(Resolved)
    def _take_model(self, event: Resolved) -> None:
        if event.model is None:
            self.form.show_error("model", event.message)
            return
        self._model, self._model_name = event.model, event.name
        self._before.clear()
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded.model != event.name:
            self._answer(self.form.texts)
        else:
            self._put(loaded, loaded.optim)

    def load(self, setup: TrainingSetup, *, card: cards.Card | None, data: str, epochs: float | None) -> None:
        """Take over the setup, card and data of a run; a model outside the catalog is described meanwhile."""
        self._loaded, self._card = setup, card or self._card
        texts = {knobs.DISPLAY: knobs.ON if self._card.display else knobs.OFF}
        if epochs is not None:
            texts[knobs.EPOCHS] = f"{epochs:g}"
        self.form.set_texts({**self.form.texts, **texts})
        self._resolve(setup.model, self._allow_network)
        self._read_data(data, self._allow_network)

    def action_pick_gpu(self) -> None:
        """Pick a card; each is shown with the verdict on the present setup."""
        known = {str(index): card for index, card in enumerate(cards.offered())}

        def picked(key: str | None) -> None:
            if key is None:
                return
            before = self._card.spec
            try:
                self._card = known[key] if key in known else cards.card_from_text(key)
            except VramwiseError as error:
                self.form.show_error("gpu", str(error))
                return
            self.form.set_texts(knobs.on_card(self.form.texts, before, self._card.spec))
            self._answer(self.form.texts)

        texts, others = self.form.texts, dict(self._others)
        card = self._shown_card(texts)
        self.app.push_screen(
            gpu_picker(known, card, self._model, self._model_name, texts, others, self._wishes), picked
        )

    @property
    def _wishes(self) -> Wishes:
        """What is asked now; where that is not accepted, what was answered last."""
        try:
            return knobs.to_wishes(self.form.texts, self._data)
        except FieldError:
            return Wishes() if self.sizing is None else self.sizing.wishes

    def action_pick_data(self) -> None:
        """Pick the data to train on."""
        now = "" if self._data is None else self._data.path
        self.app.push_screen(DataPicker(now, allow_network=self._allow_network), self._data_picked)

    def _data_picked(self, picked: PickedData | None) -> None:
        if picked is not None:
            self._data = picked.data
            self._answer(self.form.texts)
