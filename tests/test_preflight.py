"""Each check on pairs that are really broken, and on one that is sound; where they are run."""

import json
import os
import shutil

import pytest
import torch

from conftest import make_model
from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight._run_checks import check
from opdctl.checks.preflight._weights import same_weights
from opdctl.checks.preflight.memory import stage_memory
from opdctl.checks.preflight.step0 import divergence_and_overlap
from opdctl.config.registry import members
from opdctl.errors import UsageError
from opdctl.models.model import load, outline, save
from opdctl.recipe.recipe import resolve
from opdctl.rollout.engines.transformers import cache_name
from opdctl.run.launch import new_run
from opdctl.run.plan import ready
from opdctl.run.rundir import RunDir
from opdctl.train.context import Context
from running import inside, opdctl, worker

EVERY = set(members("preflight")) - {"served"}  # no teacher here is behind a server
CHEAP = {"distinct", "memory", "padded_rows", "template", "tokens", "widths"}


def taught(share, steps=60):
    """A model that answers 7 with this probability and else 3, then ends."""
    model = make_model(1, layers=1)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=1e-2)
    prompts = [model.render(f"{i % 10}{i // 10}=") for i in range(0, 100, 7)]
    rows = [(p, model.encode(a), w) for p in prompts for a, w in (("7", share), ("3", 1 - share))]
    ids_BT = torch.tensor([p + a for p, a, _ in rows])
    weight_B1 = torch.tensor([[w] for _, _, w in rows])
    start = len(prompts[0])
    for _ in range(steps):
        logp = model.net(ids_BT).logits[:, start - 1 : -1].log_softmax(-1)
        nll_BT = -logp.gather(-1, ids_BT[:, start:, None])[..., 0]
        optimizer.zero_grad()
        (weight_B1 * nll_BT).mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models on disk, and prompts whose answer is 7."""
    folder = tmp_path_factory.mktemp("preflight")
    for name, share in (("student", 0.5), ("teacher", 0.9)):
        save(taught(share), folder / name)
    rows = [{"prompt": f"{i % 10}{i // 10}=", "answer": "7"} for i in range(100)]
    (folder / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe_of(folder, teachers, student="student", **more):
    """An opd stage; its teachers are put in last: some would be refused without a look at them."""
    stage = {
        "kind": "opd",
        "student": f"{folder}/{student}",
        "teachers": dict.fromkeys(teachers, "policy"),
        "steps": 2,
        "prompts": {"per_step": 6, "samples": 2},
        "sampling": {"max_tokens": 4},
    }
    for name in ("sampling", "signals"):
        if name in more:
            stage[name] = more.pop(name)
    data = {"kind": "jsonl", "path": f"{folder}/p.jsonl", **more.pop("data", {})}
    named = {"sums": data, "more": data} if "more" in teachers else {"sums": data}
    recipe = resolve({"name": "p", "data": named, "stages": {"opd": stage}, **more}, "p")
    for name, reference in teachers.items():
        recipe.stages["opd"].teachers[name].model = reference
    return recipe


def context(tmp_path, recipe):
    return Context(new_run(recipe, "", tmp_path / "run"), recipe, "opd")


def found(tmp_path, folder, teachers, deep=False, **more):
    """Findings by check: those that are not ok, and the names of all."""
    every = check(context(tmp_path, recipe_of(folder, teachers, **more)), deep=deep)
    bad = {f.check: f for f in every if f.severity != "ok"}
    assert all(f.what and f.do and f.why and f.stage == "opd" for f in bad.values())
    return bad, {f.check for f in every}


def altered(folder, tmp_path, edit, source="teacher"):
    """A copy of a model with an edit of its folder, as teachers."""
    target = tmp_path / "altered"
    shutil.copytree(folder / source, target)
    edit(target)
    return {"sums": str(target)}


def edit_json(name, change):
    def edit(target):
        content = json.loads((target / name).read_text())
        change(content)
        (target / name).write_text(json.dumps(content))

    return edit


def edit_weights(change):
    def edit(target):
        model = load(str(target))
        with torch.no_grad():
            change(model.net)
        model.net.save_pretrained(target)

    return edit


def test_a_sound_pair_passes_every_check(folder, tmp_path):
    bad, names = found(tmp_path, folder, {"sums": f"{folder}/teacher"}, deep=True)
    assert not bad and names == EVERY
    assert CHEAP | {"gain", "step0", "truncation"} == names


def swap_ids(content):
    vocab = content["model"]["vocab"]  # of tokens that no prompt has: sizes and renderings agree
    vocab["y"], vocab["z"] = vocab["z"], vocab["y"]


def other_end(content):
    content["eos_token"] = "<|user|>"


def test_tokens(folder, tmp_path):
    swapped = altered(folder, tmp_path, edit_json("tokenizer.json", swap_ids))
    bad, _ = found(tmp_path, folder, swapped)
    assert bad.keys() == {"tokens"} and bad["tokens"].severity == "error"
    assert "is 'y' on one side and 'z' on the other" in bad["tokens"].what


def test_the_end_token(folder, tmp_path):
    other = altered(folder, tmp_path, edit_json("tokenizer_config.json", other_end))
    bad, names = found(tmp_path, folder, other, deep=True)
    assert "ends a response by '<|end|>'" in bad["tokens"].what
    assert names == CHEAP, "nothing is sampled after an error"


def test_template(folder, tmp_path):
    def spaced(target):
        path = target / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|assistant|>{%", " <|assistant|>{%"))

    def reply(target):  # the same prompt, another turn of the environment
        path = target / "chat_template.jinja"
        old = "<|user|>{{ m.content }}"
        new = "<|user|>{% if m.role == 'tool' %} {% endif %}{{ m.content }}"
        path.write_text(path.read_text().replace(old, new))

    bad, _ = found(tmp_path / "a", folder, altered(folder, tmp_path / "a", spaced))
    assert bad.keys() == {"template"} and bad["template"].severity == "error"
    assert "the prompt" in bad["template"].what and "from id 4" in bad["template"].what
    teachers = altered(folder, tmp_path / "b", reply)
    assert not found(tmp_path / "b", folder, teachers)[0]
    calls = {"environment": {"calculator": {}}}
    bad, _ = found(tmp_path / "c", folder, teachers, data=calls)
    assert "the tool turn" in bad["template"].what


def test_padded_rows(folder, tmp_path):
    rows = len(load(str(folder / "teacher")).tokenizer)

    def resize(to):
        return edit_weights(lambda net: net.resize_token_embeddings(to, mean_resizing=False))

    wide = altered(folder, tmp_path / "a", resize(rows + 6))
    every = check(context(tmp_path / "a", recipe_of(folder, wide)))
    assert not [f for f in every if f.severity != "ok"]
    assert next(f for f in every if f.check == "padded_rows").what.endswith("0 and 6 are cut off")
    bad, _ = found(tmp_path / "b", folder, altered(folder, tmp_path / "b", resize(rows - 2)))
    assert bad.keys() == {"padded_rows"} and bad["padded_rows"].severity == "error"
    assert f"{rows - 2} rows, fewer than its tokenizer has ids: {rows}" in bad["padded_rows"].what


def test_distinct(folder, tmp_path):
    copied = altered(folder, tmp_path, lambda _: None, source="student")["sums"]
    for n, alone in enumerate((f"{folder}/student", copied)):
        bad, _ = found(tmp_path / f"{n}", folder, {"sums": alone})
        assert bad.keys() == {"distinct"} and bad["distinct"].severity == "error"
        assert "nothing can be learnt" in bad["distinct"].what
    teachers = {"sums": f"{folder}/teacher", "more": copied}
    bad, _ = found(tmp_path / "2", folder, teachers, deep=True)
    assert bad.keys() == {"distinct"} and bad["distinct"].severity == "warning"
    assert bad["distinct"].do == "if that is meant, write more: policy"
    anchored = {"reverse_kl": {}, "outcome": {}}
    bad, _ = found(tmp_path / "3", folder, {"sums": copied}, signals=anchored)
    assert bad["distinct"].severity == "warning"
    teachers = {"sums": f"{folder}/teacher", "more": "policy"}
    assert not found(tmp_path / "4", folder, teachers)[0]


def test_weights_are_compared_whatever_their_files(folder, tmp_path):
    ours, shards = folder / "student", tmp_path / "shards"
    load(str(ours)).net.save_pretrained(shards, max_shard_size="8KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert same_weights(ours, shards) and not same_weights(folder / "teacher", shards)
    edit_weights(lambda net: net.model.norm.weight[0].add_(1e-4))(shards)
    assert not same_weights(ours, shards)


def huge(content):
    content |= {"hidden_size": 2**17, "intermediate_size": 2**19}


def test_memory(folder, tmp_path):
    def shapes_alone(target):
        edit_json("config.json", huge)(target)
        (target / "model.safetensors").unlink()

    run = context(tmp_path, recipe_of(folder, altered(folder, tmp_path, shapes_alone)))
    checked = CheckedStage(run)
    assert stage_memory(checked).teachers == 4 * checked.outline("sums").parameters > 10**11
    bad = [f for f in check(run) if f.check == "memory"]
    assert bad[0].severity == "error" and "resident_teachers" in bad[0].do
    long = {"max_tokens": 10**9}
    wide = shutil.copytree(folder, tmp_path / "wide")
    for name in ("student", "teacher"):
        edit_json("config.json", lambda c: c.update(max_position_embeddings=10**10))(wide / name)
    bad, _ = found(tmp_path / "b", wide, {"sums": f"{wide}/teacher"}, sampling=long)
    assert bad.keys() == {"memory"} and bad["memory"].severity == "warning"
    assert "runtime.rollout_batch" in bad["memory"].do


def test_the_estimate_is_what_torch_holds(folder, tmp_path):
    from transformers import DynamicCache

    teachers = {"sums": f"{folder}/teacher", "more": "policy"}
    run = context(tmp_path, recipe_of(folder, teachers))
    checked = CheckedStage(run)
    guess, model = stage_memory(checked), load(str(folder / "student"))
    optimizer = torch.optim.AdamW(model.net.parameters())
    cache = DynamicCache(config=model.net.config)
    longest = max(len(model.render(p.text)) for p in checked.prompts("sums", 16)) + 4
    wave = torch.zeros(12, longest, dtype=torch.long)
    model.net(wave, **{cache_name(model.net): cache}).logits.sum().backward()
    optimizer.step()
    slots = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    held = [p.grad for p in model.net.parameters()]
    assert guess.gradients == sum(t.nbytes for t in held) == guess.parameters
    assert guess.moments == sum(t.nbytes for t in slots)
    assert guess.teachers == 2 * guess.parameters
    assert guess.cache == sum(c.keys.nbytes + c.values.nbytes for c in cache.layers)


def test_step0(folder, tmp_path):
    def spoil(change):
        name = str(len(list(tmp_path.iterdir())))
        teachers = altered(folder, tmp_path / name, edit_weights(change), source="student")
        return found(tmp_path / name, folder, teachers, deep=True)[0]

    bad = spoil(lambda net: net.model.norm.weight.mul_(1.001))
    assert bad["step0"].severity == "warning" and "all but the student" in bad["step0"].do
    bad = spoil(lambda net: net.model.embed_tokens.weight.copy_(-net.model.embed_tokens.weight))
    assert "family" in bad["step0"].do and "cold start" in bad["step0"].do
    bad = spoil(lambda net: net.model.norm.weight.fill_(float("nan")))
    assert bad["step0"].severity == "error" and "not finite" in bad["step0"].what


def test_step0_measures_the_divergence_itself(folder, tmp_path):
    run = context(tmp_path, recipe_of(folder, {"sums": f"{folder}/teacher"}))
    checked = CheckedStage(run)
    requests = [r.request for r in checked.rollouts[:5]]
    kl, overlap, k = divergence_and_overlap(checked, "sums", requests)
    kls, shares = [], []
    for request in requests:
        ids = torch.tensor([request.ids])
        p, q = (
            load(f"{folder}/{n}").net(ids).logits[0, request.start - 1 : -1].log_softmax(-1)
            for n in ("student", "teacher")
        )
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        tops = zip(p.topk(k).indices.tolist(), q.topk(k).indices.tolist(), strict=True)
        shares += [len(set(a) & set(b)) / k for a, b in tops]
    assert kl == pytest.approx(sum(kls) / len(kls), rel=1e-4) and 0.1 < kl < 1
    assert overlap == pytest.approx(sum(shares) / len(shares)) and k == 5


def test_truncation(folder, tmp_path):
    teachers = {"sums": f"{folder}/teacher"}
    bad, _ = found(tmp_path, folder, teachers, deep=True, sampling={"max_tokens": 1})
    assert bad["truncation"].severity == "error" and "sums 1.00" in bad["truncation"].what


def test_gain(folder, tmp_path):
    teachers = {"sums": f"{folder}/student"}
    bad, _ = found(tmp_path / "a", folder, teachers, deep=True, student="teacher")
    assert bad["gain"].severity == "error" and "worse" in bad["gain"].what
    small = edit_weights(lambda net: net.model.norm.weight.mul_(1.01))
    teachers = altered(folder, tmp_path / "b", small, source="student")
    bad, _ = found(tmp_path / "b", folder, teachers, deep=True)
    assert bad["gain"].severity == "warning" and "not shown" in bad["gain"].what


def test_what_cannot_be_read_is_said_once(folder, tmp_path):
    gone = altered(folder, tmp_path / "a", lambda target: (target / "tokenizer.json").unlink())
    wrong = edit_json("config.json", lambda content: content.update(num_hidden_layers=7))
    for n, teachers in enumerate((gone, altered(folder, tmp_path / "b", wrong))):
        every = check(context(tmp_path / f"{n}", recipe_of(folder, teachers)), deep=True)
        assert [(f.check, f.severity) for f in every] == [("load", "error")]
        assert every[0].what.startswith(f"cannot load {teachers['sums']}: ")
        with pytest.raises(UsageError, match="cannot load"):
            load(teachers["sums"])


def test_an_outline_is_the_model_without_its_weights(folder):
    thin, whole = outline(str(folder / "student")), load(str(folder / "student"))
    assert thin.device.type == "meta" and thin.parameters == whole.parameters
    assert thin.valid_V == whole.valid_V and thin.render("12=") == whole.render("12=")


def tree_of(folder, **stages):
    """A recipe of several stages, as YAML."""
    opd = {
        "kind": "opd",
        "student": f"{folder}/student",
        "teachers": {"sums": f"{folder}/teacher"},
        "steps": 2,
        "prompts": {"per_step": 6, "domains": {"sums": 1}},
        "sampling": {"max_tokens": 4},
    }
    return {
        "name": "p",
        "data": {"sums": {"kind": "jsonl", "path": f"{folder}/p.jsonl"}},
        "stages": {name: {**opd, **keys} for name, keys in stages.items()},
    }


@pytest.fixture(scope="module")
def broken(folder):
    """A teacher that ends its responses by another token."""
    shutil.copytree(folder / "teacher", folder / "broken")
    edit_json("tokenizer_config.json", other_end)(folder / "broken")
    return {"sums": f"{folder}/broken"}


@pytest.fixture(scope="module")
def several(folder, broken):
    """A recipe with a sound stage, a broken one, one with a public teacher, one for later."""
    path = folder / "several.yaml"
    path.write_text(
        json.dumps(
            tree_of(
                folder,
                sound={},
                broken={"teachers": broken},
                public={"teachers": {"sums": "someone/teacher"}},
                later={"student": "stage:sound"},
            )
        )
    )
    cached = folder / "cache" / "models--someone--teacher"
    shutil.copytree(folder / "teacher", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    return path


def test_validate_deep(several, folder):
    env = {**os.environ, "HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = opdctl("validate", several, "--deep", "--json", env=env)
    assert done.returncode == 2, done.stderr
    content = json.loads(done.stdout)
    assert content["valid"] is False and content["problems"] == []
    assert content["later"] == {"later": "stage sound is not done"}
    by_stage = {}
    for f in content["findings"]:
        by_stage.setdefault(f["stage"], {})[f["check"]] = f["severity"]
    assert by_stage["sound"] == by_stage["public"] == dict.fromkeys(EVERY, "ok")
    assert by_stage["broken"] == dict.fromkeys(CHEAP, "ok") | {"tokens": "error"}
    plain = inside("validate", several)
    assert plain.returncode == 0 and "Preflight" not in plain.stdout


def test_run_refuses_before_anything_is_made(several, folder, tmp_path):
    done = inside("run", several, "stages.public=null", "--out", tmp_path / "run", cwd=folder)
    assert done.returncode == 2 and not list(tmp_path.iterdir()), done.stderr
    told = done.stderr.partition("error: tokens, teacher sums: ")[2].splitlines()
    assert "the student ends a response by '<|end|>'" in told[0]
    assert told[1].startswith("  why: ") and "github.com/" in told[1]
    assert told[2].startswith("  do:  give both the same eos_token")
    assert "checking broken" in done.stderr and "checking later" not in done.stderr


def test_a_stage_does_not_start_with_a_broken_teacher(folder, broken, tmp_path):
    done = inside(
        *("stage", "opd", "--student", folder / "student", "--teacher", f"sums={broken['sums']}"),
        *("data.sums.kind=jsonl", f"data.sums.path={folder}/p.jsonl", "prompts.per_step=6"),
        *("steps=2", "sampling.max_tokens=4", "--out", tmp_path / "run"),
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("failed: opd: tokens"))
    assert lines[at + 1].startswith("  why: ") and lines[at + 2].startswith("  do:  ")
    run = RunDir(tmp_path / "run")
    record = run.record("opd")
    assert record["status"] == "failed" and not run.output("opd").exists()
    assert [(f["check"], f["severity"]) for f in record["preflight"]] == [("tokens", "error")]
    assert not (run.stage("opd") / "metrics.jsonl").exists()
    shutil.copy(folder / "teacher" / "tokenizer_config.json", broken["sums"])
    assert worker(run.path, "opd").returncode == 0, "mended, it is checked again and runs"
    assert run.record("opd")["preflight"] == [] and run.output("opd").is_dir()
    edit_json("tokenizer_config.json", other_end)(folder / "broken")


def test_a_warning_is_recorded_and_a_run_directory_looked_at(folder, tmp_path):
    """One teacher of two is the student's own start, as in GLM-5's last stage."""
    tree = tree_of(folder, first={}, second={"student": "stage:first"}, third={})
    tree["data"]["more"] = tree["data"]["sums"]
    tree["stages"]["second"]["teachers"] = {"sums": f"{folder}/teacher", "more": "stage:first"}
    tree["stages"]["second"]["prompts"] = {"per_step": 6, "domains": {"sums": 1, "more": 1}}
    tree["stages"]["third"]["student"] = "stage:second"
    recipe = resolve(tree, "p")
    assert ready(recipe) == (
        ["first"],
        {"second": "stage first is not done", "third": "stage second is not done"},
    )
    run = new_run(recipe, "", tmp_path / "run")
    (run / "logs").mkdir()
    for stage in ("first", "second"):
        done = worker(run.path, stage)
        assert done.returncode == 0, done.stdout
    assert "[second] warning: distinct, teacher more" in done.stdout
    assert run.record("first")["preflight"] == []
    (warning,) = run.record("second")["preflight"]
    assert warning["check"] == "distinct" and warning["severity"] == "warning"
    shutil.rmtree(run.stage("third"))
    done = inside("validate", run.path, "--deep")
    assert done.returncode == 0, done.stderr
    assert "write more: policy" in done.stdout and "why distinct matters" in done.stdout
    assert "third" in done.stdout and "checked when" not in done.stdout
