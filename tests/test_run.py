"""The commands on a real run, as a user would type them; their JSON contracts and exit codes."""

import json
import shutil

import pytest

from opdctl.run.rundir import RunDir, read_json, read_rows
from running import DEMO, inside, worker

STAGE_KEYS = {"kind", "status", "step", "total", "attempt", "seconds", "fingerprint"}


def test_the_run_ends_with_tables(demo_run):
    folder, done = demo_run
    assert "Accuracy on held-out prompts" in done.stdout and "M5" in done.stdout
    assert f"report: {folder}/report.html" in done.stderr
    assert "outside stage loops" in done.stderr
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "M5" in page and "http" not in page.replace("http://www.w3.org", "")


def test_status_contract(demo_run):
    found = json.loads(inside("status", demo_run[0], "--json").stdout)
    assert found.keys() >= {"run", "recipe", "size", "seed", "state", "stages"}
    assert found["state"] == "done" and found["recipe"] == "demo" and found["size"] == "tiny"
    for stage in found["stages"].values():
        assert stage.keys() >= STAGE_KEYS and stage["status"] == "done"
        assert stage["step"] == stage["total"] and stage["attempt"] == 1
    assert "t_math" in inside("status", demo_run[0]).stdout


def test_plan_and_claims_contracts(demo_run):
    stages = json.loads(inside("plan", demo_run[0], "--json").stdout)["stages"]
    assert {s["action"] for s in stages} == {"skip"}
    assert all(s.keys() >= {"name", "kind", "action", "reasons", "upstream"} for s in stages)
    claims = json.loads(inside("claims", demo_run[0], "--json").stdout)["claims"]
    assert [c["name"] for c in claims] == ["M1", "M5"]
    keys = {"name", "statement", "source", "holds", "measured", "interval", "threshold", "seeds"}
    assert all(c.keys() >= keys and c["holds"] in (True, False, None) for c in claims)
    assert claims == read_json(demo_run[0] / "claims.json")["claims"]


def test_results_and_ledger(demo_run):
    run = RunDir(demo_run[0])
    records = read_json(run.stage("eval_mopd") / "results.json", list)
    keys = {"model", "domain", "n", "accuracy", "ci95", "pass_at_k", "mean_tokens"}
    assert [(r["model"], r["domain"]) for r in records] == [("mopd", "math"), ("mopd", "spell")]
    assert all(r.keys() >= keys and r["n"] == 80 for r in records)
    compute = run.record("mopd")["compute"]
    assert compute["rollout_tokens"] > 0 and compute["teacher_tokens"] > 0
    assert compute["train_tokens"] > 0 and compute["teacher_sampled_tokens"] == 0
    assert all(v > 0 for k, v in compute["flops"].items() if k != "teacher_sampling")
    assert run.record("distilled")["compute"]["teacher_sampled_tokens"] > 0
    assert run.record("base")["compute"]["rollout_tokens"] == 0


def test_metrics_say_what_happened(demo_run):
    rows = read_rows(RunDir(demo_run[0]).stage("mopd") / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 7))
    first = rows[0]
    assert abs(first["kl"]["spell"]) < 1e-5  # its teacher is the student's own start
    assert abs(first["ratio"] - 1) < 1e-5 and first["gate_open"] == 1.0
    assert first["reverse_kl_share"] + first["outcome_share"] == pytest.approx(1)
    logged = RunDir(demo_run[0]).stage("mopd") / "rollouts" / "step-000003.jsonl"
    for line in logged.read_text().splitlines():
        row = json.loads(line)
        assert len(row["advantage"]) == len(row["ids"]) == len(row["behaviour"])


def test_full_vocabulary_distillation_in_a_run(demo_run):
    rows = read_rows(RunDir(demo_run[0]).stage("full") / "metrics.jsonl")
    first = rows[0]["divergence_by_domain"]
    assert first["math"] > 1e-6 and abs(first["spell"]) < 1e-6  # its teacher is its own start
    assert all(r["divergence"] >= 0 and r["teacher_entropy"] > 0 for r in rows)
    assert "reverse_kl_mean" not in rows[0]


def test_output_loads_in_plain_transformers(demo_run):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    run = RunDir(demo_run[0])
    tokenizer = AutoTokenizer.from_pretrained(run.output("mopd"))
    net = AutoModelForCausalLM.from_pretrained(run.output("mopd"))
    turn = [{"role": "user", "content": "gcd 12 18="}]
    ids = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids[0]) == "<|user|>gcd 12 18=<|assistant|>"
    assert torch.isfinite(net(ids).logits).all() and len(tokenizer) == net.config.vocab_size
    judge = AutoModelForTokenClassification.from_pretrained(run.output("orm"))
    assert judge(ids).logits.shape == (1, ids.shape[1], 1) and judge.score.weight.abs().sum() > 0


def only_stage(source, target, stage, old, new):
    """A copy of the run in which one stage is to be done again after an edit of its recipe."""
    shutil.copytree(source, target, symlinks=True)
    for path in RunDir(target).stage(stage).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resolved = target / "resolved.yaml"
    text = resolved.read_text()
    assert text.count(old) == 1
    resolved.write_text(text.replace(old, new))
    done = worker(target, stage)
    assert done.returncode == 0, done.stdout
    return (RunDir(target).output(stage) / "model.safetensors").read_bytes()


OUTCOME = """      outcome:
        coef: 0.5
        reward: stage:orm
        baseline: group
        length_penalty: 0.0
        scale_std: true
"""


def test_coefficient_zero_turns_a_signal_off(demo_run, tmp_path):
    with_it = (RunDir(demo_run[0]).output("mopd") / "model.safetensors").read_bytes()
    zero = only_stage(
        demo_run[0], tmp_path / "zero", "mopd", OUTCOME, OUTCOME.replace("0.5", "0.0")
    )
    without = only_stage(demo_run[0], tmp_path / "without", "mopd", OUTCOME, "")
    by_verifier = OUTCOME.replace("stage:orm", "verifier")
    only_stage(demo_run[0], tmp_path / "verifier", "mopd", OUTCOME, by_verifier)
    assert zero == without
    assert with_it != zero

    def rewards(folder):
        rows = read_rows(RunDir(folder).stage("mopd") / "metrics.jsonl")
        return [r.get("reward") for r in rows]

    assert rewards(tmp_path / "zero") == [None] * 6
    assert all(0 < r < 1 for r in rewards(demo_run[0]))  # probabilities of the outcome model
    assert all((12 * r).is_integer() for r in rewards(tmp_path / "verifier"))  # verdicts


def test_numeric_keys_change_nothing_beyond_rounding(demo_run, tmp_path):
    """Micro-batch, chunk and wave: the loss agrees to fp32 rounding after six steps."""
    target = tmp_path / "run"
    only_stage(demo_run[0], target, "mopd", "micro_batch: 0", "micro_batch: 3")
    rows = [read_rows(RunDir(d).stage("mopd") / "metrics.jsonl") for d in (demo_run[0], target)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


def test_stage_command_on_two_checkpoints(demo_run, tmp_path):
    outputs = demo_run[0] / "stages"
    done = inside(
        "stage",
        "opd",
        "--student",
        outputs / "sft" / "output",
        "--teacher",
        f"math={outputs}/t_math/output",
        "--teacher",
        f"spell={outputs}/sft/output",
        "--method",
        "mopd",
        "--out",
        tmp_path / "one",
        "steps=2",
        "prompts.per_step=4",
        "sampling.max_tokens=6",
    )
    assert done.returncode == 0, done.stderr
    assert "as in the run that wrote the model" in done.stderr
    found = json.loads(inside("status", tmp_path / "one", "--json").stdout)
    assert found["state"] == "done" and found["stages"]["opd"]["step"] == 2
    refused = inside(
        "stage",
        "opd",
        "--student",
        outputs / "sft" / "output",
        "--teacher",
        f"maths={outputs}/t_math/output",
    )
    assert refused.returncode == 2 and "no prompt here is of 'maths'" in refused.stderr


def test_stage_command_on_a_file_of_ones_own(demo_run, tmp_path):
    rows = [{"q": f"gcd {i} {i}=", "a": str(i)} for i in range(1, 60)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = demo_run[0] / "stages" / "sft" / "output"
    done = inside(
        "stage",
        "evaluate",
        "--student",
        model,
        "--out",
        tmp_path / "e",
        "data.own.kind=jsonl",
        f"data.own.path={tmp_path}/p.jsonl",
        "data.own.prompt_column=q",
        "data.own.answer_column=a",
        "data.own.eval_share=1.0",
        "prompts.samples=2",
        "sampling.max_tokens=4",
    )
    assert done.returncode == 0, done.stderr
    assert "own" in done.stdout
    broken = inside(
        "stage",
        "evaluate",
        "--student",
        model,
        "--out",
        tmp_path / "b",
        "data.own.kind=jsonl",
        f"data.own.path={tmp_path}/none.jsonl",
    )
    assert broken.returncode == 2 and "no file" in broken.stderr
    assert not (tmp_path / "b").exists()


def test_a_verifier_that_raises_in_an_evaluation_is_told(demo_run, tmp_path):
    (tmp_path / "mine.py").write_text("def bad(answer, prompt, row):\n    return 2.5\n")
    rows = [json.dumps({"prompt": f"gcd {i} {i}=", "answer": str(i)}) for i in range(1, 9)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    data = ["kind=jsonl", f"path={tmp_path}/p.jsonl", "eval_share=1.0"]
    data += [f"verifier.python.call={tmp_path}/mine.py:bad"]
    command = ["stage", "evaluate", "--student", demo_run[0] / "stages/sft/output"]
    given = [f"data.own.{key}" for key in data]
    done = inside(*command, "--out", tmp_path / "e", *given, "sampling.max_tokens=40")
    assert done.returncode == 0 and "0.000 [0.000, 0.324]" in done.stdout, done.stderr
    assert "the verifier of data.own raised on" in " ".join(done.stderr.split())
    refused = inside(*command, "data.own.kind=jsonl", "data.own.verifier.python={}")
    assert refused.returncode == 2 and "missing key 'call'" in refused.stderr
    nobody = inside("stage", "evaluate", *given)
    assert nobody.returncode == 2 and "--student" in nobody.stderr


def test_several_seeds(tmp_path):
    short = [
        "stages.base.steps=2",
        "stages.sft.steps=2",
        "stages.t_math.steps=1",
        "stages.orm.steps=1",
        "stages.mopd.steps=1",
        "stages.distilled.steps=1",
    ]
    done = inside("run", DEMO, "--seeds", "3..4", "--out", tmp_path / "set", *short)
    assert done.returncode == 0, done.stderr
    found = json.loads(inside("status", tmp_path / "set", "--json").stdout)
    assert [r["seed"] for r in found["runs"]] == [3, 4] and found["state"] == "done"
    claims = json.loads(inside("claims", tmp_path / "set", "--json").stdout)["claims"]
    assert claims[0]["seeds"] == [3, 4]
    again = inside("resume", tmp_path / "set")
    assert again.returncode == 0 and "every stage is done" in again.stderr
    weights = [
        (RunDir(tmp_path / "set" / f"seed-{s}").output("base") / "model.safetensors")
        for s in (3, 4)
    ]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_ls_show_cp(tmp_path):
    assert (
        "mimo" in inside("ls", "recipes").stdout and "reverse_kl" in inside("ls", "signals").stdout
    )
    shown = json.loads(inside("show", "opd", "--json").stdout)
    assert {"key", "type", "default", "doc"} <= shown["keys"][0].keys()
    assert any(k["key"] == "optim.lr" and k["default"] == "0.001" for k in shown["keys"])
    copied = inside("cp", "mimo", tmp_path / "my.yaml")
    assert copied.returncode == 0 and "# MiMo-V2-Flash" in (tmp_path / "my.yaml").read_text()
    assert inside("validate", tmp_path / "my.yaml").returncode == 0
    assert inside("cp", "mimo", tmp_path / "my.yaml").returncode == 2
    assert "recipes/glm5.yaml" in inside("show", "glm5").stdout  # a method too
    near = inside("show", "reverse_k")
    assert near.returncode == 2 and "did you mean 'reverse_kl'" in near.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["run", "recipes/nimo.yaml"],
        ["run", "mimo", "--only", "mpod"],
        ["run", "mimo", "--size", "x"],
        ["run", "mimo", "steps"],
        ["run", "mimo", "--out", "/etc/hostname/x"],
        ["ls", "nothing"],
        ["run", "mimo", "--seeds", "x"],
        ["status", "/tmp"],
        ["claims", "/nowhere"],
        ["stage", "opdd"],
        ["report", "/tmp"],
        ["plan", "nothing"],
        ["stage", "opd"],
        ["stage", "sft", "--method", "mopd"],
        ["stage", "rl", "--student", "./nowhere"],
        ["stage", "opd", "--student", "a/b", "--teacher", "x"],
        ["validate", "tests/conftest.py"],
        ["run", "mimo", "--from", "/tmp"],
    ],
)
def test_bad_input_exits_2_without_a_traceback(command):
    done = inside(*command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip()) > 20
    assert not done.stdout.strip()


def test_only_may_be_repeated():
    done = inside("run", "mimo", "--only", "t_math", "--only", "t_sort", "--dry-run")
    assert done.returncode == 0
    for stage in ("base", "sft", "t_math", "t_sort"):
        assert f"\n{stage} " in done.stdout
    assert "t_spell" not in done.stdout and "mopd" not in done.stdout
