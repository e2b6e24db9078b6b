"""A teacher whose weights are on this machine."""

from __future__ import annotations

from opdctl.protocols import Teacher
from opdctl.scoring.quantities import LOCAL


class Local(Teacher):
    """A frozen model in this process; scores the exact token ids."""

    revision = 1
    keeps = False  # its answers are logged by who asks
    provides = LOCAL

    def __init__(self, ctx, student, name: str, reference: str) -> None:
        self.ctx, self.student, self.reference = ctx, student, reference
        self.where = f"stages.{ctx.name}.teachers.{name}"
        self.parameters = 0
        self.aside = ctx.folder / "checkpoints" / "heads" / f"{name}.safetensors"
        self.stored = None

    @property
    def model(self):
        """The model, loaded when first asked for; with resident_teachers, again after eviction."""
        from opdctl.models.model import require_same_tokens

        model = self.ctx.models.frozen(self.reference)
        if not self.parameters:
            require_same_tokens(self.student, model, self.where)
            self.parameters = model.parameters
        return model

    def head(self, temperature: float, rounded: bool):
        """Return its head. Where its weights may be evicted only its shape: the weight of the head
        is in host memory for a GPU, for a CPU on disk at ``stored``."""
        head = self.model.lm_head(temperature, rounded)
        if not self.ctx.runtime.resident_teachers:
            return head
        if head.weight_VD.is_cuda:
            head.weight_VD = head.weight_VD.detach().cpu().pin_memory()
            head.bias_V = None if head.bias_V is None else head.bias_V.detach().cpu().pin_memory()
        else:
            if self.stored is None:
                from opdctl.models import tensor_file

                tensor_file.write(self.aside, {"weight": head.weight_VD})
                self.stored = self.aside
            head.weight_VD = head.weight_VD.detach().to("meta")
        return head

    def score(self, requests, asks, run, other_ids_N=None):
        """Return scores of every target token, in the order of the requests.

        Args:
            other_ids_N: tokens whose log-probs are wanted beside the targets', one for each.
        """
        from opdctl.scoring.score import score

        return score(self.model, requests, asks, run, other_ids_N)
