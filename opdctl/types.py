"""What passes between the families: prompts, rollouts, score requests. No torch here.

Everything that has one number per response token is as long as ``response_ids``.
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
    """

    id: str
    domain: str
    text: str
    answer: str
    item: dict = field(compare=False, hash=False, repr=False)


@dataclass
class Rollout:
    """One response to one prompt.

    Attributes:
        prompt: the question.
        prompt_ids: token ids of the rendered prompt; context, never supervised.
        response_ids: token ids of the response, with its end token if there is one.
        behaviour_logprobs: log-probs under the distribution sampled from; None where
            the response was not sampled (a dataset).
        truncated: it was cut at the length limit, without an end token.
        source: ``student``, ``teacher`` or ``dataset``.
        group: rollouts of one prompt in one step share this number.
        version: optimizer steps the sampling weights had seen.
        text: the decoded response, without special tokens.
        reward: set by a reward; None until then.
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
    teacher: str | None = None

    @property
    def name(self) -> str:
        """How messages name it: its prompt's id, and its place among the samples of the step."""
        return f"the rollout of prompt {self.prompt.id} ({self.prompt.domain}), group {self.group}"


@dataclass(frozen=True)
class ScoreRequest:
    """A span to score: ``ids[start:]`` given all ids before it.

    The context may differ from what the student saw; the target may not.
    """

    ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        assert 0 < self.start <= len(self.ids), "a target needs one token of context"


@dataclass
class Compute:
    """Tokens and floating-point operations of one stage.

    A forward pass is counted as 2 x parameters a token, a training pass as 6 x.
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
