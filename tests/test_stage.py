"""``opdctl stage`` as a person types it: every kind, on chat models, from files; what it writes
loads in plain transformers. One process, so that torch is imported once."""

import io
import json

import pytest
from rich.console import Console
from test_chat import CHATML, R1, chat
from typer.testing import CliRunner

from opdctl.cli.app import app
from opdctl.cli.catalogue import detail
from opdctl.cli.console import keys_table, table
from opdctl.config.describe import describe
from opdctl.config.registry import FAMILIES, first_line, member, members
from opdctl.models.model import save
from opdctl.recipe.methods import method, methods
from opdctl.recipe.recipe import lookup
from opdctl.run.rundir import RunDir, read_rows

SHORT = ("steps=2", "prompts.per_step=4")
SAMPLED = (*SHORT, "sampling.max_tokens=4")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder: a student and a teacher with a chat template, questions, conversations."""
    folder = tmp_path_factory.mktemp("desk")
    for seed, name in enumerate(("student", "teacher")):
        model = chat(
            CHATML, eos="<|endoftext|>", stops=["<|endoftext|>"], specials=["<|im_end|>"], seed=seed
        )
        save(model, folder / name)
    rows = [{"prompt": f"{i}+{j}", "answer": str(i + j)} for i in range(8) for j in range(8)]
    talks = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"{i}"},
                {"role": "assistant", "content": "ok"},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": f"{i}7"},
            ]
        }
        for i in range(40)
    ]
    for name, content in (("x", rows), ("talks", talks)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def stage(desk, tmp_path, monkeypatch):
    """Runs a stage; gives its run directory and what was printed."""
    monkeypatch.chdir(desk)

    def run(kind, *arguments, data="data.prompts.path=x.jsonl"):
        out = tmp_path / kind
        command = ["stage", kind, *arguments, *([data] if data else []), "--out", str(out)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (done.output, done.exception)
        return RunDir(out), done.output

    return run


def shown(run, kind):
    """The first prompt of a stage, as its log has it."""
    found = json.loads((run.stage(kind) / "example.json").read_text())
    return "".join(f"[[{p['text']}]]" if p["written"] else p["text"] for p in found["parts"])


def loads(folder):
    """The output in plain transformers: weights, template, ends; continues a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    said = net.generate(ids, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > ids.shape[1]
    ends = net.generation_config.eos_token_id
    return tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])


STUDENT, TEACHER = ("--student", "student"), ("--teacher", "teacher")
ENDS = {"<|im_end|>", "<|endoftext|>"}


def test_sft_learns_the_end_of_the_template(stage):
    run, printed = stage("sft", *STUDENT, *SHORT)
    assert "data.prompts.kind: jsonl" in printed
    asked, _, said = shown(run, "sft").partition("<|im_start|>assistant\n")
    assert asked.startswith("<|im_start|>user\n") and "+" in asked
    assert said.startswith("[[") and said.endswith("<|im_end|>]]")
    assert shown(run, "sft") in printed, "shown to the person, too"
    assert set(loads(run.output("sft"))) == ENDS


def test_sft_on_conversations(stage):
    data = ("data.talk.messages_column=messages", "data.talk.thinking.mode=free")
    run, _ = stage("sft", *STUDENT, *SHORT, *data, data="data.talk.path=talks.jsonl")
    text = shown(run, "sft")
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")
    assert "assistant\n[[ok<|im_end|>]]\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>" in text
    assert text.endswith("7<|im_end|>]]") and text.count("[[") == 2
    rows = read_rows(run.stage("sft") / "metrics.jsonl")
    assert rows[0]["tokens"] > rows[0]["rollouts"] * 4


def test_sft_from_a_teacher(stage):
    keep = ("sources.teacher.keep=all", "sources.teacher.sampling.max_tokens=4")
    run, printed = stage("sft", *STUDENT, *TEACHER, *SHORT, *keep)
    assert "the teacher samples" in printed and loads(run.output("sft"))


@pytest.mark.parametrize(
    "theirs, ours, begins",
    [(R1, CHATML, "assistant\n[[<think>\n"), (CHATML, R1, "assistant\n<think>\n[[</think>")],
)
def test_a_teachers_answer_keeps_its_marks_of_thinking(stage, tmp_path, theirs, ours, begins):
    for name, template in (("s", ours), ("t", theirs)):
        save(chat(template, seed=len(theirs)), tmp_path / name)
    keep = ("sources.teacher.keep=all", "sources.teacher.sampling.max_tokens=4")
    models = ("--student", str(tmp_path / "s"), "--teacher", str(tmp_path / "t"))
    run, _ = stage("sft", *models, *SHORT, *keep)
    assert begins in shown(run, "sft")


def test_a_demonstration_does_not_open_what_the_template_has_opened(stage, tmp_path):
    save(chat(R1), tmp_path / "s")
    row = {"prompt": "1+1", "answer": "<think>\na</think>2"}
    (tmp_path / "r.jsonl").write_text((json.dumps(row) + "\n") * 3)
    data = f"data.prompts.path={tmp_path / 'r.jsonl'}"
    run, _ = stage("sft", "--student", str(tmp_path / "s"), *SHORT, data=data)
    assert shown(run, "sft").endswith("assistant\n<think>\n[[a</think>2<|im_end|>]]")


def test_rl_by_a_method_with_a_system_turn_and_thinking_off(stage):
    data = (
        "data.prompts.system=be kind", "data.prompts.thinking.mode=no_think",
        "data.prompts.thinking.switch=true",
    )  # fmt: skip
    run, _ = stage("rl", *STUDENT, "--method", "grpo", *SAMPLED, *data)
    text = shown(run, "rl")
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n")
    assert "<think>\n\n</think>\n\n[[" in text, "the template writes the empty block as it asks"
    assert set(loads(run.output("rl"))) == ENDS


def test_opd_between_models_whose_tokenizers_name_other_ends(stage, desk):
    run, _ = stage("opd", *STUDENT, *TEACHER, *SAMPLED)
    rows = read_rows(run.stage("opd") / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["logprob_gap"] < 1e-4
    assert loads(run.output("opd"))


def test_orm_judges_the_student_unless_told_otherwise(stage):
    run, printed = stage("orm", *STUDENT, *SAMPLED)
    assert "policy: the student" in printed
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    judge = AutoModelForTokenClassification.from_pretrained(run.output("orm"))
    assert judge.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(run.output("orm")).chat_template == CHATML


def test_merge(stage):
    run, _ = stage("merge", *STUDENT, "models.a=./teacher", "models.b=./student", data="")
    assert set(loads(run.output("merge"))) == ENDS


def test_evaluate_takes_the_whole_file(stage):
    keys = ("sampling.max_tokens=4", "prompts.samples=1")
    run, printed = stage("evaluate", *STUDENT, *keys)
    found = json.loads((run.stage("evaluate") / "results.json").read_text())
    assert found[0]["n"] == 64 and "all of x.jsonl" in printed
    assert "tokens sampled" in printed


def test_gradients(stage):
    keys = ("batches=2", "prompts.per_step=4", "sampling.max_tokens=4")
    run, _ = stage("gradients", *STUDENT, *TEACHER, *keys)
    assert (run.stage("gradients") / "facts.json").is_file()


def test_pretrain_on_a_file(stage):
    run, _ = stage("pretrain", *SHORT, "model.hidden=16")
    assert "[[" in shown(run, "pretrain") and loads(run.output("pretrain"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("rl", *STUDENT, "lr=1"), "did you mean optim.lr?"),
        (("rl", *STUDENT, "stepz=1"), "did you mean 'steps'?"),
        (("rl", *STUDENT, *TEACHER), "takes no --teacher"),
        (("pretrain", *STUDENT), "takes no --student"),
        (("opd", *STUDENT, "--method", "grpo"), "opdctl stage rl --method grpo"),
        (("rl", *STUDENT, "--method", "grop"), "did you mean 'grpo'?"),
        (("opd", *STUDENT, *TEACHER, "data.p.path=y.jsonl"), "no file"),
        (("opd", *STUDENT, *TEACHER), "there is no data"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_type(desk, monkeypatch, arguments, says):
    monkeypatch.chdir(desk)
    done = CliRunner().invoke(app, ["stage", *arguments, "--dry-run"])
    assert says in str(done.exception)


@pytest.mark.parametrize("width", [20, 80])
def test_a_title_is_not_broken_to_the_width_of_a_narrow_table(monkeypatch, width):
    console = Console(width=width, file=io.StringIO())
    monkeypatch.setattr("opdctl.cli.console.err", console)
    console.print(table(["stage", "status"], [["sft", "done"]], "1/1 stages, 26 s"))
    lines = console.file.getvalue().splitlines()
    assert lines[0].rstrip() == "1/1 stages, 26 s" and max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_of_keys_are_whole_on_a_terminal_of_any_width(monkeypatch, width):
    console = Console(width=width, file=io.StringIO())
    monkeypatch.setattr("opdctl.cli.console.out", console)
    keys = detail("grpo")["keys"]
    console.print(keys_table(keys))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert {k["key"] for k in keys} <= {line.split()[0] for line in lines if line.strip()}
    whole = "".join(console.file.getvalue().split())
    assert "".join(keys[3]["doc"].split()) in whole or width >= 110


def test_keys_are_found_without_reading_code(tmp_path, monkeypatch, desk):
    def run(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.exception
        return done.output

    opd = {r["key"]: r for r in json.loads(run("show", "opd", "--json"))["keys"]}
    assert opd["optim.lr"]["type"] == "float" and opd["optim.lr"]["default"] == "0.001"
    assert opd["teachers.NAME.weight"]["doc"] and opd["signals"]["type"] == "signals/"
    assert "opdctl show objectives/NAME" in run("show", "opd")
    grpo = {r["key"]: r["default"] for r in json.loads(run("show", "grpo", "--json"))["keys"]}
    assert grpo["prompts.samples"] == "8" and "clip_high" in grpo["objectives"]
    assert grpo["steps"] == "100", "what a method leaves is shown with its default"
    assert "direction" in run("show", "divergence") and "runtime.rollout_batch" in run(
        "show", "runtime"
    )
    mine = tmp_path / "mine.yaml"
    run("cp", "grpo", mine)
    mine.write_text(mine.read_text().replace("samples: 8", "samples: 6"))
    monkeypatch.chdir(desk)
    run("stage", "rl", *STUDENT, "--method", mine, "data.p.path=x.jsonl", "--dry-run")
    wrong = CliRunner().invoke(app, ["cp", "grop", str(tmp_path / "x")])
    assert "did you mean 'grpo'?" in str(wrong.exception)


@pytest.mark.parametrize("name", methods())
def test_a_method_is_shown_with_every_key_of_its_stage_and_its_own_values(name):
    """As a person types it; a member of the same name is shown too, behind."""
    printed = CliRunner().invoke(app, ["show", name])
    whole = CliRunner().invoke(app, ["show", name, "--json"])
    assert printed.exit_code == whole.exit_code == 0
    found = json.loads(whole.output)
    own = {k: v for k, v in method(name).items() if k != "about"}
    stage = describe(member("stages", method(name)["kind"]).Config, lookup)
    rows = found["keys"][: len(stage)]
    assert [r["key"] for r in rows] == [r["key"] for r in stage]
    for row, plain in zip(rows, stage, strict=True):
        value = own
        for part in row["key"].split("."):
            value = value.get(part) if isinstance(value, dict) else None
        assert row["default"] == (plain["default"] if value is None else str(value)), row["key"]
        assert row["key"] in printed.output
    assert method(name)["about"] in found["about"] and "objectives" in printed.output
    families = [f for f in FAMILIES if name in members(f)]
    behind = [r for f in families for r in describe(lookup(f, name), lookup, f"{f}/{name}: ")]
    assert found["keys"][len(stage) :] == behind
    for family in families:
        line = f"{family}/{name}: {first_line(member(family, name))}"
        assert line in found["also"] and line in printed.output


def test_members_that_share_a_name_with_a_method_are_shown_alone_by_their_family():
    shared = [(f, n) for n in methods() for f in FAMILIES if n in members(f)]
    assert {("weights", n) for n in ("eopd", "tip", "scope", "reopold")} <= set(shared)
    for family, name in shared:
        found = detail(f"{family}/{name}")
        assert found["keys"] == describe(lookup(family, name), lookup) and "text" not in found
