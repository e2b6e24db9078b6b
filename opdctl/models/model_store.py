"""The models of a stage: where a reference leads, what is loaded, what samples from it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from opdctl import draws
from opdctl.config import references
from opdctl.config.registry import member


class ModelStore:
    """Loads the models that a stage names; frozen ones are kept.

    Attributes:
        loads: frozen models loaded so far.
    """

    def __init__(self, ctx: Any) -> None:
        """Hold a stage's context, whose keys say how its models are loaded."""
        self.ctx, self.loads = ctx, 0
        self._frozen: dict[str, Any] = {}
        self._engine: Any = None

    def path_of(self, reference: str) -> str:
        """Return where transformers finds a referenced model."""
        parsed = references.parse(reference)
        if parsed.form == "policy":
            return self.path_of(self.ctx.config.student)
        if parsed.form == "public":
            from opdctl.remote.hub import adapter_of

            return adapter_of(parsed.name) or parsed.name
        return str(self.ctx.run.output(parsed.name)) if parsed.form == "stage" else parsed.name

    def load(
        self, reference: str, *, device: str = "", classifier: bool = False, trained: bool = False
    ) -> Any:
        """Load a model, as the run's keys say; an adapter is merged into its base.

        One on a base in 16 bits, which would round away what it adds, stays beside it.

        Args:
            trained: gradients are taken of it.

        Raises:
            UsageError: it cannot be loaded, or is not whole; or an adapter on a base in 16 bits
                would have to be merged.
        """
        path = self.path_of(reference)
        base = references.base_of(path)
        checkpointing = trained and self.ctx.runtime.gradient_checkpointing
        where = device or self.ctx.device
        options = {"device": where, "classifier": classifier}
        options["widen"] = classifier and not trained  # a reward is compared with no other model
        model = self._load(base or path, gradient_checkpointing=checkpointing, **options)
        if base:
            from opdctl.models.lora import adapted, merged
            from opdctl.models.merging import is_narrow

            beside = is_narrow(model.net) and not trained
            return adapted(model, path) if beside else merged(model, path)
        return model

    def _load(self, path: str, **options: Any) -> Any:
        from opdctl.models.model import load

        runtime = self.ctx.runtime
        options |= {"dtype": runtime.dtype, "attn": runtime.attn, "packing": runtime.packing}
        options |= {"trust_remote_code": runtime.trust_remote_code, "chat_keys": self.chat_keys}
        return load(path, **options)

    @cached_property
    def chat_keys(self) -> Any:
        """The keys of the run that say how its models are spoken to."""
        from opdctl.models.chat.control_tokens import chat_keys_of

        return chat_keys_of(self.ctx.runtime.template_date, self.ctx.recipe.data)

    def student(self, classifier: bool = False) -> Any:
        """Load the model that the stage trains, at its start, with an adapter if the keys say so;
        one that it starts from is trained further."""
        lora = self.ctx.config.lora
        if not lora.rank:
            return self.load(self.ctx.config.student, classifier=classifier, trained=True)
        from opdctl.models.lora import attach, continue_adapter, unadapted_matrices

        path = self.path_of(self.ctx.config.student)
        base, checkpointing = references.base_of(path), self.ctx.runtime.gradient_checkpointing
        options = {"device": self.ctx.device, "classifier": classifier}
        model = self._load(base or path, gradient_checkpointing=checkpointing, **options)
        if base:
            continue_adapter(model, path, lora, base)
        else:
            attach(model, lora, path, draws.key(self.ctx.seed, "lora") % 2**63)
            if missed := unadapted_matrices(model, lora):
                print(f"[{self.ctx.name}] warning: peft adapts no {', '.join(missed)}", flush=True)
        return model

    def frozen(self, reference: str) -> Any:
        """Return a frozen model, loaded on demand; those that name the same place share their
        weights, and adapters share those of their base.

        With ``runtime.resident_teachers`` the one that was used longest ago makes room.
        """
        from opdctl.models.shared_base import SharedBase

        path, most = self.path_of(reference), self.ctx.runtime.resident_teachers
        base = references.base_of(path)
        place = base or path
        if place not in self._frozen:
            while most and len(self._frozen) >= most:
                self._frozen.pop(next(iter(self._frozen)))
            self._frozen[place] = SharedBase(self._load(place, device=self.ctx.device))
            self.loads += 1
        self._frozen[place] = self._frozen.pop(place)  # the newest stands last
        return self._frozen[place].view(path if base else "")

    def start(self) -> Any:
        """Return the stage's student at its start, frozen, prompted as it will be."""
        return self.aligned(self.frozen(self.ctx.config.student))

    def aligned(self, model: Any) -> Any:
        """Return the student, or its outline, with the chat template that the stage prompts it by.

        Raises:
            UsageError: the model that is to bring one has none.
        """
        reference = self.ctx.config.template
        if reference:
            from opdctl.models.model import template_of

            path = self.path_of(reference)
            place = references.base_of(path) or path
            model.take_template(template_of(place, self.ctx.runtime.trust_remote_code), reference)
        return model

    def engine(self, model: Any, blend: tuple[Any, float] | None = None) -> Any:
        """Return what samples from a model; an engine that holds weights is kept while it can take
        the model's.

        Args:
            blend: another model and its share in every token; by the transformers engine alone.
        """
        common = (model, self.ctx.runtime.rollout_batch, self.ctx.check, self.ctx.wal)
        if blend:
            return member("engines", "transformers")(*common, blend)
        cls = member("engines", self.ctx.runtime.engine)
        if not cls.has_own_weights:
            return cls(*common)
        ours = self._engine
        if ours is not None and not (ours.model is model or ours.switch_model(model)):
            ours.close()
            self._engine = None
        if self._engine is None:
            self._engine = cls(*common, cls.settings(self.ctx.runtime))
        return self._engine
