"""A frozen model and the adapters on it: several teachers whose base is loaded once.

A teacher is a view: the same module, and which adapter is on is set before each of its forward
passes. Switching copies nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.lora import of_base, read, require_safe, tokenizer, unfit
from opdctl.models.model import Model


class Shared:
    """A frozen base.

    Args:
        base: its model, which becomes the view without an adapter.
    """

    def __init__(self, base: Model) -> None:
        base.net.requires_grad_(False)
        self.base, self.peft = base, None
        self.on: str | None = ""
        self.names: dict[str, str] = {}
        self.views: dict[str, Model] = {"": base}

    def view(self, folder: str) -> Model:
        """The base with the adapter in a folder, read when first asked for; without one for "".

        Raises:
            UsageError: the adapter does not fit.
        """
        if folder not in self.views:
            self._read(folder)
            view = Model(self.base.net, tokenizer(self.base, folder), folder)
            view.one_row = self.base.one_row
            view.before_forward = lambda: self._turn(folder)
            self.views[folder] = view
        return self.views[folder]

    def _read(self, folder: str) -> None:
        name = f"a{len(self.views)}"
        _require_switchable(folder)
        if self.peft is None:
            self.peft = read(self.base, folder, name)
            self.base.before_forward = lambda: self._turn("")
        else:
            require_safe(folder)
            try:
                self.peft.load_adapter(folder, name)
            except Exception as error:  # files of a stranger make peft raise anything
                raise unfit(folder, error) from error
        self.base.net.requires_grad_(False)
        self.names[folder], self.on = name, None  # whatever peft left on

    def _turn(self, folder: str) -> None:
        """Have this adapter on, and no other."""
        if self.on == folder:
            return
        layers: Any = self.peft.base_model
        if folder:
            layers.enable_adapter_layers()
            self.peft.set_adapter(self.names[folder], inference_mode=True)
        else:
            layers.disable_adapter_layers()
        self.on = folder


def _require_switchable(folder: str) -> None:
    """An adapter that is off must leave its base as it was.

    Raises:
        UsageError: its biases stand in the base's own, or its start was taken out of the base.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    what = ""
    if config.get("bias", "none") != "none":
        what = "has biases, which would stay in the base when it is switched off"
    elif of_base(config):
        start = config["init_lora_weights"]
        what = f"was started with {start!r}: the base's weights change when it is read"
    if what:
        hint = "merge it into a model of its own: a stage of kind merge"
        raise UsageError(f"{folder} {what}", hint)
