"""From what was measured of a teacher to what to do. Pure; no torch.

The two conditions are those of Rethinking OPD (arXiv 2604.13016): thinking that is compatible, and
knowledge that the student does not have. The stand-ins and every bound below are ours and
heuristic, but for the overlaps of the paper: OPD succeeded from .72 on and took a cold start from
.55. Compatible is the overlap of the two top-k sets. New knowledge is a teacher that is better on
the same prompts: what its own training gave it shows there, and a plain sibling has none. The
estimate of what can be recovered is the gain that following the teacher for one token at each of
the student's prefixes brings to first order, over the teacher's whole gain: OPD is told of nothing
else. It knows nothing of how the prefixes change as the student learns, and is too low where
several tokens of a response have to improve together.
"""

from __future__ import annotations

from typing import Any

from opdctl.checks.diagnosis.commands import Commands
from opdctl.checks.preflight.step0 import KL_LEAST, OVERLAP_LEAST

OVERLAP_GOOD = 0.72  # arXiv 2604.13016, at the start of runs that succeeded
CLOSE = 0.02  # of a cosine: no reason to prefer another signal
FEW = 8  # rollouts below which an alignment is not talked about
VERDICTS = {
    "go": "go",
    "cold_start": "cold start first",
    "nothing_to_learn": "nothing to learn",
    "another_teacher": "another teacher",
    "unclear": "not shown to be worth it",
    "not_measured": "not enough could be measured",
    "away": "the signal points away from the task",
}
SIGNALS = ("reverse_kl", "forward_kl", "jsd", "top_k", "sampled")  # the exact ones first


def composed(signal: str, top: int, served: bool, wrong: bool = False) -> tuple[str, str]:
    """``signals`` and ``objectives`` of an opd stage that follows one of SIGNALS.

    Args:
        top: k of top_k, as it was judged.
        served: the teacher's logits are not to be had: no baseline.
        wrong: on wrong rollouts alone.
    """
    weights = "{outcome_gate: {on: wrong}}" if wrong else "{}"
    if signal == "sampled":
        beside = "" if served else ", kl_baseline: {}"
        return f"{{reverse_kl: {{}}{beside}}}", f"{{policy_gradient: {{weights: {weights}}}}}"
    if signal == "top_k":
        return "{}", f"{{topk_pg: {{k: {top}, weights: {weights}}}}}"
    direction = signal.removesuffix("_kl")
    return "{}", f"{{divergence: {{direction: {direction}, weights: {weights}}}}}"


def recoverability(found: dict[str, Any]) -> dict[str, Any]:
    """The two conditions and the estimate; None for what was not measured."""
    overlap = found.get("step0", {}).get("overlap", {}).get("mean")
    gain = found.get("gain", {}).get("together")
    first = found.get("reach", {}).get("first_order", {}).get("mean")
    better = bool(gain) and gain["ci95"][0] > 0
    share = first / gain["gain"] if better and first is not None else None
    return {
        "compatible": None if overlap is None else overlap >= OVERLAP_LEAST,
        "overlap": overlap,
        "new_knowledge": better if gain else None,
        "gain": gain["gain"] if gain else None,
        "first_order": first,
        "estimate": None if share is None else min(1.0, max(0.0, share)),
        "heuristic": True,
    }


def recommend(found: dict[str, Any], commands: Commands) -> dict[str, Any]:
    """``verdict``, ``reasons`` and what to ``do``, from one entry of ``teachers``.

    Args:
        commands: whole ones, as ``do`` says them.
    """
    if found["same"]:
        if found["model"] == "policy":
            return _said("nothing_to_learn", ["it is the student, which keeps its domains"], [])
        why = "the teacher has the student's own weights: every score is zero"
        return _said("nothing_to_learn", [f"{why}; is another checkpoint meant?"], [])
    reasons: list[str] = []
    gain = found.get("gain", {}).get("together")
    step0 = found.get("step0", {})
    verdict = "go" if gain and "overlap" in step0 else "not_measured"
    if gain:
        low, high = gain["ci95"]
        of = f"{gain['gain']:+.2f} [{low:+.2f}, {high:+.2f}] on {gain['prompts']} prompts"
        if low > 0:
            reasons.append(f"new knowledge: the teacher is better by {of}")
        elif high < 0:
            verdict = "another_teacher"
            reasons.append(f"the teacher is worse, {of}: OPD moves the student to it all the same")
        else:
            verdict = "unclear"
            reasons.append(f"the teacher is not shown to be better: {of}")
        if not gain["teacher"]:
            verdict = "another_teacher"
            reasons.append("the teacher is right on none of them: the verifier, or the format?")
    overlap = step0.get("overlap", {}).get("mean")
    if overlap is not None:
        told = f"{overlap:.2f} of the top {step0['top']} at the start"
        mass = f"{step0['overlap_mass']['mean']:.2f} of the student's mass is on it"
        if overlap < OVERLAP_LEAST:
            verdict = "cold_start" if verdict in ("go", "unclear") else verdict
            reasons.append(f"thinking is not compatible: they overlap in {told}, {mass}")
        elif overlap < OVERLAP_GOOD:
            short = f"below the {OVERLAP_GOOD} from which OPD succeeded in the paper"
            reasons.append(
                f"thinking is fairly compatible: they overlap in {told}, {short}; {mass}"
            )
        else:
            reasons.append(f"thinking is compatible: they overlap in {told}, {mass}")
    kl = step0.get("reverse", {}).get("mean")
    if "log_ratio" in step0:
        kl = step0["log_ratio"]["ci95"][1]  # estimated: its upper end
    if kl is not None and kl < KL_LEAST:
        verdict = "nothing_to_learn"
        reasons.append(f"the two differ by {kl:.2g} nats a token: there is no signal to follow")
    estimate = recoverability(found)["estimate"]
    if estimate is not None:
        first = found["reach"]["first_order"]
        told = f"{first['mean']:+.2f} {_interval(first)}, {estimate:.2f} of its gain (heuristic)"
        reasons.append(f"token by token from the student's own prefixes it offers {told}")
        if first["ci95"][0] <= 0:
            verdict = "unclear" if verdict == "go" else verdict
            reasons.append("so its scores are not shown to say, token by token, what it knows")
    signal = _signal(found, reasons)
    if verdict == "go" and signal and signal[1] < 0:
        verdict = "away"
    do = _do(verdict, found, signal, commands, reasons)
    for what, why in found.get("missing", {}).items():
        reasons.append(f"not measured: {what}; {why}")
    return _said(verdict, reasons, do, signal[0] if signal else None)


def _do(
    verdict: str,
    found: dict,
    signal: tuple[str, float, bool] | None,
    commands: Commands,
    reasons: list[str],
) -> list[str]:
    """The commands that a verdict calls for, known only once it stands: of a teacher that is right
    on nothing a cold start would keep no sample. Says why these."""
    do: list[str] = []
    gain = found.get("gain", {}).get("together")
    if verdict == "cold_start":
        do = commands.sft()
        if not do:
            reasons.append("before OPD an sft stage with sources.teacher: docs/diagnose.md")
    if verdict in ("cold_start", "unclear") and gain["ci95"][0] <= 0:
        if gain["prompts"] < commands.prompts * len(found["domains"]):
            reasons.append("these are all its prompts: more data, or a teacher trained further")
        else:
            reasons.append(
                "four times the prompts halve the interval of its gain; or a teacher "
                "trained further"
            )
            do.append(commands.again())
    if verdict == "go" and signal:
        if signal[2]:
            reasons.append("the second command distils on wrong rollouts alone")
        for wrong in (False, True) if signal[2] else (False,):
            way = composed(signal[0], found["step0"]["top"], found["served"], wrong)
            do.append(commands.opd(*way))
    elif verdict == "go":
        reasons.append("no signal was judged: the stage's own are kept")
        do.append(commands.as_is())
    return do


def _signal(found: dict, reasons: list[str]) -> tuple[str, float, bool] | None:
    """The best aligned of a teacher's signals on wrong rollouts, the upper end of its interval, and
    whether on right ones it is mostly noise; says what the alignments are."""
    given = found.get("alignment")
    if not given:
        return None
    sides, signals = given["sides"], given["signals"]
    side = "wrong" if sides["wrong"]["rollouts"] >= FEW else "right"
    if sides[side]["rollouts"] < FEW:
        reasons.append("too few prefixes where the next token decides to judge the signals by")
        return None
    means = {n: s[side] for n, s in signals.items() if n in SIGNALS}
    behind = {n: means[n]["behind"] for n in SIGNALS if n in means}
    near = [n for n, b in behind.items() if b["ci95"][0] <= 0 or b["mean"] < CLOSE]
    best = near[0]  # of those that are not told apart, the exact ones first
    told = f"{best} has cos {means[best]['mean']:.2f} {_interval(means[best])}"
    low = means[best]["ci95"][0]
    beside = f"; not told apart from it: {', '.join(near[1:])}" if near[1:] else ""
    reasons.append(f"aligned with the ideal update on {side} rollouts: {told}{beside}")
    noisy = False
    if sides["right"]["rollouts"] >= FEW and side == "wrong":
        right = signals[best]["right"]
        noisy = right["ci95"][1] < low and right["mean"] < means[best]["mean"] / 2
        if noisy:
            told = f"on right rollouts it has cos {right['mean']:.2f}: mostly noise there"
            reasons.append(told)
    return best, means[best]["ci95"][1], noisy


def _interval(value: dict) -> str:
    return f"[{value['ci95'][0]:+.2f}, {value['ci95'][1]:+.2f}]"


def _said(verdict: str, reasons: list[str], do: list[str], signal: str | None = None) -> dict:
    return {
        "verdict": verdict,
        "says": VERDICTS[verdict],
        "signal": signal,
        "reasons": reasons,
        "do": do,
    }
