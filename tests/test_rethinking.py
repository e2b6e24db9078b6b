"""The two recoveries of Rethinking OPD at tiny: samples of the teacher first, then its own template
on prompts of its own RL data among others."""

import json
import shutil

import pytest
from one_step import prompts

from conftest import make_model
from opdctl.checks.preflight._run_checks import check
from opdctl.errors import RecipeError, UsageError
from opdctl.models.model import load, outline, save
from opdctl.rollout.prompts import PromptOrder
from opdctl.run.fingerprint import fingerprints
from opdctl.run.rundir import read_json
from running import carry_out, one_stage

OURS, THEIRS = "<|user|>{{ m.content }}", "<|user|>q {{ m.content }}"


@pytest.fixture(scope="module")
def pair(on_disk, tmp_path_factory):
    """A student, and a teacher that was trained on another template of the same tokens."""
    folder = tmp_path_factory.mktemp("templates")
    save(make_model(0), folder / "s")
    save(make_model(1), folder / "t")
    path = folder / "t" / "chat_template.jinja"
    assert OURS in path.read_text()
    path.write_text(path.read_text().replace(OURS, THEIRS))
    for name in ("rl", "other"):
        shutil.copy(on_disk / "sums.jsonl", folder / f"{name}.jsonl")
    return folder


def stage(pair, folder, kind="opd", student="", **keys):
    data = {n: prompts(pair) | {"path": f"{pair}/{n}.jsonl"} for n in ("rl", "other")}
    keys = {"prompts": {"domains": {"rl": 3, "other": 1}, "per_step": 8}, "steps": 2, **keys}
    return one_stage(folder, data, kind=kind, student=student or str(pair / "s"), **keys)


def opd(pair, folder, **keys):
    served = {"model": str(pair / "t"), "serves": {"rl": True, "other": True}}
    return stage(pair, folder, teachers={"both": served}, sampling={"max_tokens": 6}, **keys)


def test_cold_start_then_the_teachers_template_and_content(pair, tmp_path):
    sample = {"model": str(pair / "t"), "keep": "all", "sampling": {"max_tokens": 6}}
    cold = stage(pair, tmp_path / "a", "sft", sources={"teacher": sample})
    assert len(carry_out(cold)) == 2
    keys = {"student": str(cold.run.output("it"))}
    ctx = opd(pair, tmp_path / "b", template=str(pair / "t"), **keys)
    rows = carry_out(ctx)
    assert len(rows) == 2 and {"overlap", "entropy_gap"} <= rows[0].keys()
    shown = "".join(part["text"] for part in read_json(ctx.folder / "example.json")["parts"])
    teacher = load(str(pair / "t"))
    first = PromptOrder(ctx, teacher).at(0)
    assert [p.domain for p in first].count("rl") == 6, "three quarters are the teacher's own"
    assert teacher.tokenizer.decode(teacher.render(first[0])) in shown
    left = load(str(ctx.run.output("it")))
    assert left.render("1+1=") == teacher.render("1+1="), "the output is asked as it was trained"


def test_the_template_is_what_the_checks_see(pair, tmp_path):
    found = [f for f in check(opd(pair, tmp_path / "a")) if f.severity == "error"]
    assert [f.check for f in found] == ["template"]
    assert "template=" in found[0].do
    aligned = opd(pair, tmp_path / "b", template=str(pair / "t"))
    assert not [f for f in check(aligned) if f.severity == "error"]
    prints = [fingerprints(c.recipe)["it"] for c in (aligned, opd(pair, tmp_path / "c"))]
    assert prints[0] != prints[1]


def test_a_model_without_a_template_brings_none(pair, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(pair / "t", bare)
    (bare / "chat_template.jinja").unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="has no chat template to take"):
        carry_out(opd(pair, tmp_path / "a", template=str(bare)))
    with pytest.raises(RecipeError, match="server"):
        opd(pair, tmp_path / "b", template="http://host:8000")


def test_the_ends_are_those_of_the_template(pair):
    model = outline(str(pair / "s"))
    before = model.ends
    other = model.tokenizer.chat_template.replace("<|end|>", "<|user|>")
    model.take_template(other, "other")
    assert model.ends != before and model.end_of_turn != before[0]
