"""The values that pass between the families: prompts, rollouts, score requests. No torch here.

Everything that has one number per response token has one for each token of a rollout that was
written by its source; what an environment answered in between is context.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    """One question of one domain.

    Attributes:
        id: hash of the domain and the canonical question, 16 hex digits.
        domain: name of the data entry it came from; routes it to its teacher.
        text: what the user turn says.
        answer: the reference answer as the model should write it.
        item: what the verifier needs to score an answer.
        lead: what a demonstration writes before the answer: its thinking, with its marks.
        calls: what a demonstration asks the environment first, one a turn.
        messages: the conversation where it is more than ``text`` as a user turn, its answer
            included if the data has one; see ``models/chat/messages.py``.
        tools: what the chat template is told of tools, as JSON schemas.
        system: the system turn, where ``messages`` has none of its own.
        enable_thinking: what the chat template is told; None says nothing.
    """

    id: str
    domain: str
    text: str
    answer: str
    item: dict = field(compare=False, hash=False, repr=False)
    lead: str = ""
    calls: tuple[str, ...] = ()
    messages: tuple[dict, ...] = field(default=(), compare=False, repr=False)
    tools: tuple[dict, ...] = field(default=(), compare=False, repr=False)
    system: str = ""
    enable_thinking: bool | None = None


@dataclass
class Rollout:
    """One response to one prompt.

    Attributes:
        prompt: the question.
        prompt_ids: token ids of the rendered prompt; context, never supervised.
        response_ids: token ids of the response, with its end token if there is one. Of several
            turns: all of them, and what the environment answered.
        observed: ``(from, to)`` places in ``response_ids`` that the environment wrote.
        behaviour_logprobs: log-probs under the distribution sampled from, of all other tokens;
            None where the response was not sampled (a dataset).
        truncated: it was cut at the length limit, without an end token.
        source: ``student``, ``teacher``, ``dataset``, or ``mixture`` of the first two by token.
        group: rollouts of one prompt in one step share this number.
        version: optimizer steps the sampling weights had seen.
        text: the decoded response, without its end token; of several turns, the last one.
        before: the turns before it and the environment's answers, decoded, in turn.
        reward: set by a reward; None until then.
        right: the verifier's verdict; None until it was asked.
        teacher: name of the teacher that scores it; None without one.
    """

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]
    behaviour_logprobs: list[float] | None = None
    truncated: bool = False
    source: str = "student"
    group: int = 0
    version: int = 0
    text: str = ""
    reward: float | None = None
    right: float | None = None
    teacher: str | None = None
    observed: tuple[tuple[int, int], ...] = ()
    before: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens that its source wrote."""
        return len(self.response_ids) - sum(stop - start for start, stop in self.observed)

    @property
    def forwarded(self) -> int:
        """The tokens that sampling ran through the model: each turn reads all before it again."""
        whole = len(self.prompt_ids)
        return whole + len(self.response_ids) + sum(whole + start for start, _ in self.observed)

    @property
    def request(self) -> ScoreRequest:
        """The span to score or to train on."""
        start = len(self.prompt_ids)
        skip = tuple((start + a, start + b) for a, b in self.observed)
        return ScoreRequest((*self.prompt_ids, *self.response_ids), start, skip)

    @property
    def name(self) -> str:
        """The name in messages: its prompt's id, and its place among the samples of the step."""
        return f"the rollout of prompt {self.prompt.id} ({self.prompt.domain}), group {self.group}"


@dataclass(frozen=True)
class ScoreRequest:
    """A span to score: the targets ``ids[start:]``, each given all ids before it.

    The context may differ from what the student saw; the targets may not. Places ``(from, to)`` of
    ``skip`` are context too, though they stand after ``start``: what an environment wrote.
    """

    ids: tuple[int, ...]
    start: int
    skip: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert 0 < self.start <= len(self.ids), "a target needs one token of context"

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.ids) - self.start - sum(stop - start for start, stop in self.skip)

    @property
    def targets(self) -> list[int]:
        """The places of the targets in ``ids``."""
        places, at = [], self.start
        for start, stop in (*self.skip, (len(self.ids), len(self.ids))):
            places += range(at, start)
            at = stop
        return places


WAITING = ": waiting for "  # in a line of a stage's log: it is shown while it is the last one
FORWARD, TRAIN = 2.0, 6.0  # floating-point operations a parameter and token


@dataclass
class Compute:
    """Tokens and floating-point operations of one stage.

    A forward pass is counted as FORWARD x parameters a token, a training pass as TRAIN x.
    """

    rollout_tokens: int = 0
    teacher_tokens: int = 0
    teacher_sampled_tokens: int = 0
    train_tokens: int = 0
    flops: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("rollout", "teacher", "teacher_sampling", "train"), 0.0
        )
    )
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("rollout", "score", "train", "other"), 0.0)
    )


@dataclass(frozen=True)
class Finding:
    """A result of a check.

    Attributes:
        severity: error, warning or ok.
        what: the numbers, or the first difference.
        do: what to type or to change; empty where it is ok.
        teacher: of which teacher; empty where it is about the stage.
        why: why it matters, with the public thread; as all below set by who runs the check.
    """

    severity: str
    what: str
    do: str = ""
    teacher: str = ""
    why: str = ""
    check: str = ""
    revision: int = 0
    stage: str = ""
