"""Models, data and answers of a stranger: broken folders and files, pickles, code.

Each stands in a real stage: refused with exit code 2, the path and a hint before anything is made,
or by the stage itself; what was given is left as it is.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model
from hostile import ROWS, command, in_child, jsonl
from opdctl.config.settings import Optim
from opdctl.errors import UsageError
from opdctl.models import model as models
from opdctl.process.worker import run_stage
from opdctl.recipe.recipe import resolve
from opdctl.run.launch import new_run
from opdctl.run.rundir import RunDir
from opdctl.train import checkpoint
from opdctl.train.update import make_optimizer
from running import inside

# ways to break a model ---------------------------------------------------------------------------


def config(**keys):
    return edited("config.json", lambda c: c.update(keys))


def edited(name, edit):
    def change(folder):
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(edit):
    def change(folder):
        path = folder / "model.safetensors"
        save_file({**edit(load_file(path))}, path, metadata={"format": "pt"})

    return change


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def link_to_itself(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return change


def folder_instead(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def spoil(tensors, part, edit):
    return {k: edit(v) if part in k else v for k, v in tensors.items()}


REMOTE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
UP, LAYER = "layers.0.mlp.up_proj", "layers.1."
MODELS = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "has no config.json"),
    "config cut": (cut("config.json", 50), "cannot read"),
    "config empty": (cut("config.json", 0), "cannot read"),
    "config a list": (written("config.json", b"[1]"), "not a JSON object"),
    "config too deep": (written("config.json", b'{"a":' * 100_000), "maximum recursion"),
    "config not UTF-8": (written("config.json", b"\xff\xfe\x00"), "cannot read"),
    "config of another type": (config(model_type="bert"), "lacks"),
    "config of no type": (edited("config.json", lambda c: c.pop("model_type")), "model_type"),
    "config of an unknown type": (config(model_type="nope"), "nope"),
    "config with text for a size": (config(hidden_size="big"), "hidden_size"),
    "config with fewer layers": (
        config(num_hidden_layers=1, layer_types=["full_attention"]), "of no use"
    ),
    "config with -1 layers": (config(num_hidden_layers=-1), "layer"),
    "config without heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "config with an unknown activation": (config(hidden_act="nope"), "nope"),
    "layer bomb": (config(num_hidden_layers=10**9), "num_hidden_layers: 1000000000"),
    "vocabulary bomb": (config(vocab_size=10**12), "vocab_size"),
    "width bomb": (config(hidden_size=10**7), "hidden_size"),
    "config a link to itself": (link_to_itself("config.json"), "has no config.json"),
    "config a folder": (folder_instead("config.json"), "has no config.json"),
    "weights gone": (without("model.safetensors"), "no .safetensors"),
    "weights a pickle": (pickled, "a pickle would run code"),
    "weights cut": (cut("model.safetensors", 9000), "its header says"),
    "weights cut in the header": (cut("model.safetensors", 100), "not safetensors"),
    "weights empty": (cut("model.safetensors", 0), "not safetensors"),
    "weights text": (written("model.safetensors", b"hello, this is no model"), "not safetensors"),
    "header bomb": (
        written("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "not safetensors"
    ),
    "header too deep": (
        written("model.safetensors", struct.pack("<Q", 200_000) + b'{"a":' * 40_000),
        "maximum recursion",
    ),
    "weights a link to itself": (link_to_itself("model.safetensors"), "cannot read"),
    "weights a folder": (folder_instead("model.safetensors"), "cannot read"),
    "a tensor missing": (
        weights(lambda w: {k: v for k, v in w.items() if UP not in k}), f"such as model.{UP}"
    ),
    "a layer missing": (
        weights(lambda w: {k: v for k, v in w.items() if LAYER not in k}), "lacks 11 weights"
    ),
    "a tensor too many": (
        weights(lambda w: {**w, "model.layers.7.mlp.up_proj.weight": torch.zeros(3, 3)}), "layers.7"
    ),
    "a tensor of another shape": (
        weights(lambda w: spoil(w, UP, lambda v: v[:, :-1].contiguous())), "mismatch"
    ),
    "weights not a number": (weights(lambda w: spoil(w, UP, lambda v: v * torch.nan)), UP),
    "weights infinite": (weights(lambda w: spoil(w, "model.norm", lambda v: v / 0)), "model.norm"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no token for"),
    "tokenizer.json gone": (without("tokenizer.json"), "tokenizer"),
    "tokenizer cut": (cut("tokenizer.json", 100), "cannot load"),
    "tokenizer a list": (written("tokenizer.json", b"[]"), "cannot load"),
    "tokenizer a folder": (folder_instead("tokenizer.json"), "tokenizer"),
    "tokenizer larger than the embedding": (
        edited("tokenizer.json", lambda c: c["model"]["vocab"].update({"+": 400})), "id 400"
    ),
    "no end token": (edited("tokenizer_config.json", lambda c: c.pop("eos_token")), "no end token"),
    "an end token beyond the embedding": (
        edited("tokenizer_config.json", lambda c: c.update(eos_token="<new>")), "its end token"
    ),
    "template broken": (written("chat_template.jinja", b"{% for"), "chat template"),
    "template that raises": (
        written("chat_template.jinja", b"{{ raise_exception('no') }}"), "chat template"
    ),
    "template that climbs": (
        written("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"), "unsafe"
    ),
    "template that shows nothing": (written("chat_template.jinja", b" "), "leaves the question"),
    "code of its own": (config(model_type="evil", auto_map=REMOTE), "runtime.trust_remote_code"),
    "an adapter alone": (
        lambda f: (without("model.safetensors")(f), written("adapter_config.json", b"{}")(f)),
        "no .safetensors",
    ),
}  # fmt: skip


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def at_stage(tmp_path, student, data="data.own.kind=jsonl", path=None):
    """An sft stage of one step: exit code, everything that was said, whether it was begun."""
    overrides = [
        data,
        f"data.own.path={path}",
        "steps=1",
        "prompts.per_step=2",
        "data.own.eval_share=0",
    ]
    said = ["stage", "sft", "--student", student, *overrides]
    code, out, err = command(*said, "--dry-run")
    assert code in (0, 2)
    if code == 2:
        assert command(*said, "--out", tmp_path / "run")[0] == 2
        assert not (tmp_path / "run").exists() and not out
        return code, err, False
    full = [o if o.startswith("data.") else f"stages.sft.{o}" for o in overrides]
    tree = {"name": "sft", "stages": {"sft": {"kind": "sft", "student": str(student)}}}
    run = new_run(resolve(tree, "test", overrides=tuple(full)), "", tmp_path / "run")
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = run_stage(str(run.path), "sft")
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    record = RunDir(run.path).record("sft")
    assert record["status"] == ("done" if code == 0 else "failed")
    assert run.output("sft").exists() == (code == 0)
    return code, log.getvalue(), True


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_model_is_refused(good, tmp_path, name):
    change, says = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    change(folder)
    before = contents(folder)
    code, said, _ = at_stage(tmp_path, folder, path=good / "data.jsonl")
    assert code == 2, said
    assert says in said and str(folder) in said and "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("  ")]) > 0  # the hint
    assert contents(folder) == before


def test_a_whole_model_is_taken(good, tmp_path):
    code, said, begun = at_stage(tmp_path, good / "model", path=good / "data.jsonl")
    assert code == 0 and begun, said


def test_a_part_beside_the_language_model_is_not_asked_for(good, tmp_path):
    """A vision tower, say: no module of the model, and none more of its layers."""
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    weights(lambda t: {**t, "visual.blocks.0.norm.weight": torch.ones(4)})(folder)
    assert models.load(str(folder)).name == str(folder)
    for stray in ("model.layers.0.mlp.up_proj.bias", "model.layers.9.mlp.up_proj.weight",
                  "model.norm.bias", "stray"):  # fmt: skip
        weights(lambda t, stray=stray: {**t, stray: torch.ones(4)})(folder)
        with pytest.raises(UsageError, match="of no use"):
            models.load(str(folder))
        weights(lambda t, stray=stray: {n: w for n, w in t.items() if n != stray})(folder)


BAD_ROW = {"prompt": "1+1=", "answer": None}
DATA = {
    "not JSON": (jsonl() + "{oops\n", ":41: not JSON"),
    "the last line cut": (jsonl()[:-10], ":40: not JSON"),
    "a list": (jsonl() + "[1, 2]\n", ":41: expected an object"),
    "a number": ("5\n", ":1: expected an object"),
    "no prompt": (jsonl([{"question": "1", "answer": "2"}]), "no column 'prompt'"),
    "no answer": (jsonl([*ROWS, {"prompt": "9+9="}]), "row 41: no column 'answer'"),
    "an answer of nothing": (jsonl([*ROWS, BAD_ROW]), "row 41: column 'answer' holds None"),
    "a prompt of nothing": (jsonl([{"prompt": None, "answer": "1"}]), "column 'prompt' holds None"),
    "a prompt that is a list": (jsonl([{"prompt": [{"role": "user"}], "answer": "1"}]), "holds ["),
    "a prompt that is an object": (jsonl([{"prompt": {"a": 1}, "answer": "1"}]), "holds {"),
    "an empty file": ("", "no training prompts"),
    "blank lines": ("\n\n \n", "no training prompts"),
    "binary": (bytes(range(256)) * 40, "not JSON"),
    "UTF-16": (jsonl().encode("utf-16"), "not JSON"),
    "Latin-1": (jsonl().encode() + b'{"prompt": "\xe4", "answer": "1"}\n', "not JSON"),
    "too deep": (jsonl() + '{"prompt": ' + "[" * 100_000 + "\n", "not JSON: maximum recursion"),
    "a huge line": (jsonl() + '{"prompt": "' + "1" * 2**24 + '"}\n', "a line longer than"),
    "a character unknown": (jsonl([{"prompt": "\u4e00", "answer": "1"}]), "has no token for"),
}


@pytest.mark.parametrize("name", DATA)
def test_a_broken_file_of_prompts_is_refused(good, tmp_path, name):
    content, says = DATA[name]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, said, _ = at_stage(tmp_path, good / "model", path=path)
    assert code == 2 and says in said and "Traceback" not in said, said
    assert str(path) in said or name == "a character unknown"
    assert any(line.startswith("  ") for line in said.splitlines())


FINE = {
    "a byte-order mark": b"\xef\xbb\xbf" + jsonl().encode(),
    "carriage returns": jsonl().replace("\n", "\r\n").encode(),
    "numbers": jsonl([{"prompt": i, "answer": i + 1} for i in range(40)]).encode(),
    "the same prompt often": jsonl([ROWS[0]] * 40).encode(),
    "columns of no use": jsonl([{**r, "extra": [None]} for r in ROWS]).encode(),
}


@pytest.mark.parametrize("name", FINE)
def test_a_file_of_prompts_that_is_only_odd_is_read(good, tmp_path, name):
    (tmp_path / "prompts.jsonl").write_bytes(FINE[name])
    code, said, _ = at_stage(tmp_path, good / "model", path=tmp_path / "prompts.jsonl")
    assert code == 0, said


def folder_with(*names):
    def make(path):
        path.mkdir()
        for name in names:
            (path / name).write_text("open('canary', 'w')")
        return path

    return make


def parquet(path):
    path.with_suffix(".parquet").write_text("x" * 99)
    return path.with_suffix(".parquet")


PLACES = {
    "no file": (lambda p: p, "jsonl", "no file"),
    "a folder": (folder_with(), "jsonl", "no file"),
    "a link to itself": (lambda p: p.symlink_to(p.name) or p, "jsonl", "no file"),
    "a pipe": (lambda p: os.mkfifo(p) or p, "jsonl", "no file"),
    "a name too long": (lambda p: p / ("a" * 5000), "jsonl", "no file"),
    "parquet that is none": (parquet, "jsonl", "is not parquet"),
    "a folder without a data set": (folder_with(), "hf", "cannot load"),
    "a data set broken": (folder_with("state.json", "dataset_info.json"), "hf", "cannot load"),
    "a data set that is a script": (folder_with("x.py", "prompts.py"), "hf", "cannot load"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_wrong_place_of_prompts_is_refused(good, tmp_path, name):
    make, kind, says = PLACES[name]
    path = make(tmp_path / "prompts")
    code, said, _ = at_stage(tmp_path, good / "model", f"data.own.kind={kind}", path)
    assert code == 2 and says in said and str(path)[:60] in said and "Traceback" not in said, said


def test_files_that_may_not_be_read(good, tmp_path):
    """As a user that is not root: nothing of a folder without permission is read."""
    at_stage(tmp_path, good / "model", path=good / "data.jsonl")  # imports what that user may not
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        folder.chmod(0o777)
        shutil.copytree(good / "model", folder / "model")
        (folder / "prompts.jsonl").write_text(jsonl())
        for path in (folder / "model" / "model.safetensors", folder / "prompts.jsonl"):
            path.chmod(0)

        def as_nobody():
            if root:
                os.seteuid(65534)
            return at_stage(folder, folder / "model", path=folder / "prompts.jsonl")[:2]

        said = in_child(as_nobody, seconds=60, mib=4096)
        assert said.startswith("(2, ") and "model.safetensors" in said and "Permission" in said
        (folder / "model" / "model.safetensors").chmod(0o644)
        said = in_child(as_nobody, seconds=60, mib=4096)
        assert said.startswith("(2, ") and "prompts.jsonl" in said and "Permission" in said


def only(name, tensor):
    return lambda folder: save_file({tensor: torch.zeros(1)}, folder / name)


def shorter(folder):
    path = folder / "weights.safetensors"
    save_file({k: v[:1].clone() for k, v in load_file(path).items()}, path)


BREAK = {
    "state a list": written("state.json", b"[1]"),
    "state without a step": written("state.json", b"{}"),
    "state gone": without("state.json"),
    "weights of another model": only("weights.safetensors", "x"),
    "weights of another shape": shorter,
    "weights a pickle": lambda f: torch.save({}, f / "weights.safetensors"),
    "moments of another model": only("optimizer.safetensors", "x|step"),
}


@pytest.mark.parametrize("name", BREAK)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, capsys, name):
    model = make_model()
    optimizer = make_optimizer(model, Optim())
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer, {"compute": {}}, keep=2)
    BREAK[name](tmp_path / "step-000002")
    other = make_model(seed=1)
    found = checkpoint.restore(tmp_path, other, make_optimizer(other, Optim()))
    assert found["step"] == 1 and "step-000002 cannot be read" in capsys.readouterr().out
    pairs = zip(model.net.parameters(), other.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_public_name_that_cannot_be_had_says_how_to_fetch_it(tmp_path):
    done = inside(
        "stage", "rl", "--student", "nobody/nothing@v1", "data.gcd.kind=reasoning_gym",
        "data.gcd.task=gcd", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2 and "hf download nobody/nothing --revision v1" in done.stderr
