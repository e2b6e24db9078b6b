"""Turn the measurements of a teacher into a verdict, reasons and commands. Pure; no torch.

The two conditions are those of Rethinking OPD (arXiv 2604.13016): thinking that is compatible, and
knowledge that the student does not have. Our measures of them and every bound below are heuristic,
except the overlaps of the paper: OPD succeeded from .72 on and took a cold start from .55.
Compatibility is measured by the overlap of the two top-k sets. Knowledge is new where the teacher
is better on the same prompts: the effect of its own training shows there, and a plain sibling has
none. The recoverable share is estimated as the first-order gain of following the teacher for one
token at each of the student's prefixes, over the teacher's whole gain: OPD learns from nothing
else. The estimate ignores that the prefixes change as the student learns, and is too low where
several tokens of a response have to improve together.
"""

from __future__ import annotations

from typing import Any

from opdctl.checks.diagnosis.next_commands import NextCommands
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


def recipe_keys(signal: str, top: int, served: bool, wrong: bool = False) -> tuple[str, str]:
    """Return ``signals`` and ``objectives`` of an opd stage that follows one of SIGNALS.

    Args:
        top: k of the signal top_k, as in the diagnosis.
        served: the teacher is behind a server, so no baseline can be computed from its logits.
        wrong: train on wrong rollouts only.
    """
    weights = "{outcome_gate: {on: wrong}}" if wrong else "{}"
    if signal == "sampled":
        beside = "" if served else ", kl_baseline: {}"
        return f"{{reverse_kl: {{}}{beside}}}", f"{{policy_gradient: {{weights: {weights}}}}}"
    if signal == "top_k":
        return "{}", f"{{topk_pg: {{k: {top}, weights: {weights}}}}}"
    direction = signal.removesuffix("_kl")
    return "{}", f"{{divergence: {{direction: {direction}, weights: {weights}}}}}"


def recoverability(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the two conditions and the recoverable share; None for each that was not measured."""
    overlap = entry.get("step0", {}).get("overlap", {}).get("mean")
    gain = entry.get("gain", {}).get("together")
    first = entry.get("reach", {}).get("first_order", {}).get("mean")
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


def recommend(entry: dict[str, Any], commands: NextCommands) -> dict[str, Any]:
    """Return the recommendation for one entry of ``teachers``: verdict, reasons, commands.

    Args:
        commands: the complete commands that ``do`` may contain.
    """
    if entry["same"]:
        if entry["model"] == "policy":
            return _recommendation(
                "nothing_to_learn", ["it is the student, which keeps its domains"], []
            )
        why = "the teacher has the student's own weights: every score is zero"
        return _recommendation("nothing_to_learn", [f"{why}; is another checkpoint meant?"], [])
    reasons: list[str] = []
    gain = entry.get("gain", {}).get("together")
    step0 = entry.get("step0", {})
    verdict = "go" if gain and "overlap" in step0 else "not_measured"
    verdict = _judge_gain(gain, verdict, reasons) if gain else verdict
    if "overlap" in step0:
        verdict = _judge_overlap(step0, verdict, reasons)
    kl = step0.get("reverse", {}).get("mean")
    if "log_ratio" in step0:
        kl = step0["log_ratio"]["ci95"][1]  # estimated: its upper end
    if kl is not None and kl < KL_LEAST:
        verdict = "nothing_to_learn"
        reasons.append(f"the two differ by {kl:.2g} nats a token: there is no signal to follow")
    estimate = recoverability(entry)["estimate"]
    if estimate is not None:
        first = entry["reach"]["first_order"]
        text = f"{first['mean']:+.2f} {_interval(first)}, {estimate:.2f} of its gain (heuristic)"
        reasons.append(f"token by token from the student's own prefixes it offers {text}")
        if first["ci95"][0] <= 0:
            verdict = "unclear" if verdict == "go" else verdict
            reasons.append("so its scores are not shown to say, token by token, what it knows")
    signal = _best_signal(entry, reasons)
    if verdict == "go" and signal and signal[1] < 0:
        verdict = "away"
    do = _commands_for(verdict, entry, signal, commands, reasons)
    for name, why in entry.get("missing", {}).items():
        reasons.append(f"not measured: {name}; {why}")
    return _recommendation(verdict, reasons, do, signal[0] if signal else None)


def _judge_gain(gain: dict, verdict: str, reasons: list[str]) -> str:
    """Add to ``reasons`` how much better the teacher is. Return the verdict so far."""
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
    return verdict


def _judge_overlap(step0: dict, verdict: str, reasons: list[str]) -> str:
    """Add to ``reasons`` how compatible the two are. Return the verdict so far."""
    overlap = step0["overlap"]["mean"]
    text = f"{overlap:.2f} of the top {step0['top']} at the start"
    mass = f"{step0['overlap_mass']['mean']:.2f} of the student's mass is on it"
    if overlap < OVERLAP_LEAST:
        verdict = "cold_start" if verdict in ("go", "unclear") else verdict
        reasons.append(f"thinking is not compatible: they overlap in {text}, {mass}")
    elif overlap < OVERLAP_GOOD:
        short = f"below the {OVERLAP_GOOD} from which OPD succeeded in the paper"
        reasons.append(f"thinking is fairly compatible: they overlap in {text}, {short}; {mass}")
    else:
        reasons.append(f"thinking is compatible: they overlap in {text}, {mass}")
    return verdict


def _commands_for(
    verdict: str,
    entry: dict,
    signal: tuple[str, float, bool] | None,
    commands: NextCommands,
    reasons: list[str],
) -> list[str]:
    """Return the commands that a final verdict calls for, and add to ``reasons`` why.

    They depend on the verdict and not on single numbers: with a teacher that is never right, for
    example, a cold start would keep no sample.
    """
    do: list[str] = []
    gain = entry.get("gain", {}).get("together")
    if verdict == "cold_start":
        do = commands.sft()
        if not do:
            reasons.append("before OPD an sft stage with sources.teacher: docs/diagnose.md")
    if verdict in ("cold_start", "unclear") and gain["ci95"][0] <= 0:
        if gain["prompts"] < commands.prompts * len(entry["domains"]):
            reasons.append("these are all its prompts: more data, or a teacher trained further")
        else:
            reasons.append(
                "four times the prompts halve the interval of its gain; or a teacher "
                "trained further"
            )
            do.append(commands.with_more_prompts())
    if verdict == "go" and signal:
        if signal[2]:
            reasons.append("the second command distils on wrong rollouts alone")
        for wrong in (False, True) if signal[2] else (False,):
            way = recipe_keys(signal[0], entry["step0"]["top"], entry["served"], wrong)
            do.append(commands.opd(*way))
    elif verdict == "go":
        reasons.append("no signal was judged: the stage's own are kept")
        do.append(commands.opd_as_it_is())
    return do


def _best_signal(entry: dict, reasons: list[str]) -> tuple[str, float, bool] | None:
    """Choose the best aligned of a teacher's signals, and add the alignments to ``reasons``.

    Returns:
        The signal; the upper end of its interval on wrong rollouts (on right ones where there are
        too few wrong); True where it is mostly noise on right rollouts. None where no signal can
        be judged.
    """
    alignment = entry.get("alignment")
    if not alignment:
        return None
    sides, signals = alignment["sides"], alignment["signals"]
    side = "wrong" if sides["wrong"]["rollouts"] >= FEW else "right"
    if sides[side]["rollouts"] < FEW:
        reasons.append("too few prefixes where the next token decides to judge the signals by")
        return None
    means = {n: s[side] for n, s in signals.items() if n in SIGNALS}
    behind = {n: means[n]["behind"] for n in SIGNALS if n in means}
    near = [n for n, b in behind.items() if b["ci95"][0] <= 0 or b["mean"] < CLOSE]
    best = near[0]  # of those that are not told apart, the exact ones first
    text = f"{best} has cos {means[best]['mean']:.2f} {_interval(means[best])}"
    low = means[best]["ci95"][0]
    beside = f"; not told apart from it: {', '.join(near[1:])}" if near[1:] else ""
    reasons.append(f"aligned with the ideal update on {side} rollouts: {text}{beside}")
    noisy = False
    if sides["right"]["rollouts"] >= FEW and side == "wrong":
        right = signals[best]["right"]
        noisy = right["ci95"][1] < low and right["mean"] < means[best]["mean"] / 2
        if noisy:
            text = f"on right rollouts it has cos {right['mean']:.2f}: mostly noise there"
            reasons.append(text)
    return best, means[best]["ci95"][1], noisy


def _interval(value: dict) -> str:
    return f"[{value['ci95'][0]:+.2f}, {value['ci95'][1]:+.2f}]"


def _recommendation(
    verdict: str, reasons: list[str], do: list[str], signal: str | None = None
) -> dict:
    return {
        "verdict": verdict,
        "says": VERDICTS[verdict],
        "signal": signal,
        "reasons": reasons,
        "do": do,
    }
