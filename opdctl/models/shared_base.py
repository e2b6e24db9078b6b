"""A frozen model and the adapters on it: several teachers whose base is loaded once.

A teacher is a view of the same module; its adapter is turned on before each of its forward passes.
Switching copies nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.lora import (
    adapter_error,
    adapter_tokenizer,
    alters_base,
    read_adapter,
    require_safe,
)
from opdctl.models.merging import head_now
from opdctl.models.model import Model


class SharedBase:
    """A frozen base model and its views, one per adapter.

    Args:
        base: the model, which is also the view without an adapter.
    """

    def __init__(self, base: Model) -> None:
        base.net.requires_grad_(False)
        self.base: Model = base
        self.peft: Any = None
        self.head = base.head  # without an adapter
        self.active: str | None = ""
        self.names: dict[str, str] = {}
        self.views: dict[str, Model] = {"": base}

    def view(self, folder: str) -> Model:
        """Return the base with the adapter of a folder, read on first use; "" is the base alone.

        Raises:
            UsageError: the adapter does not fit the base.
        """
        if folder not in self.views:
            self._read(folder)
            self._switch_to(folder)
            head = head_now(self.base, self.head)
            tokenizer, keys = adapter_tokenizer(self.base, folder), self.base.chat_keys
            view = Model(self.base.net, tokenizer, folder, chat_keys=keys, own_head=head)
            view.one_row = self.base.one_row
            view.before_forward = lambda: self._switch_to(folder)
            self.views[folder] = view
        return self.views[folder]

    def _read(self, folder: str) -> None:
        name = f"a{len(self.views)}"
        _require_switchable(folder)
        if self.peft is None:
            self.peft = read_adapter(self.base, folder, name)
            self.base.before_forward = lambda: self._switch_to("")
            self.base.own_head = self.head
        else:
            require_safe(folder)
            try:
                self.peft.load_adapter(folder, name)
            except Exception as error:  # files of a stranger make peft raise anything
                raise adapter_error(folder, error) from error
        self.base.net.requires_grad_(False)
        self.names[folder], self.active = name, None  # whatever peft left on

    def _switch_to(self, folder: str) -> None:
        """Turn this adapter on, and any other off."""
        if self.active == folder:
            return
        layers = self.peft.base_model
        if folder:
            layers.enable_adapter_layers()
            self.peft.set_adapter(self.names[folder], inference_mode=True)
        else:
            layers.disable_adapter_layers()
        self.base.net.requires_grad_(False)  # peft turns it on for modules that it keeps whole
        self.active = folder


def _require_switchable(folder: str) -> None:
    """Check that an adapter, when turned off, leaves its base as it was.

    Raises:
        UsageError: it adds biases to the base's own, or its start was subtracted from the base.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    problem = ""
    if config.get("bias", "none") != "none":
        problem = "has biases, which would stay in the base when it is switched off"
    elif alters_base(config):
        start = config["init_lora_weights"]
        problem = f"was started with {start!r}: the base's weights change when it is read"
    if problem:
        hint = "merge it into a model of its own: a stage of kind merge"
        raise UsageError(f"{folder} {problem}", hint)
