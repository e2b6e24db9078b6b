"""``opdctl diagnose`` and servers that are dead, die, or are not what is named."""

import pytest
from test_diagnosis import diagnosed
from test_preflight import folder  # noqa: F401  (a fixture)
from test_served import dying, serving

from conftest import make_model
from opdctl.errors import StageFailed, UsageError
from opdctl.models.model import load
from running import inside

NOBODY = "http://127.0.0.1:1"
JUDGED = {"verifier": {"judge_server": {"url": NOBODY, "name": "big", "timeout": 0.3}}}
ALPHABETS = {"other": "0123456789abcdefghijklmnopqrstuvwxyz =+;"}


@pytest.mark.parametrize(
    ("tokens", "data", "error", "said"),
    [
        ("student", {}, StageFailed, r"teacher sums .*listed \d of the 5 most probable"),
        ("other", {}, UsageError, "teacher sums .*another tokenizer than the student"),
        ("", {}, StageFailed, "teacher sums .*no answer to /v1/models .*refused"),
        ("student", JUDGED, StageFailed, "the judge big of data.sums .*refused"),
    ],
)
def test_servers_are_asked_before_anything_is_sampled(
    folder,  # noqa: F811
    tmp_path,
    capsys,
    tokens,
    data,
    error,
    said,
):
    """A teacher's name, ids and lists of a known sequence, and a judge's name."""
    model = make_model(alphabet=ALPHABETS[tokens]) if tokens in ALPHABETS else None
    model = model or load(f"{folder}/student")
    lists = {"model": model} if data else {}
    with serving(tokenizer=model.tokenizer, **lists) as server, pytest.raises(error, match=said):
        reference = server.url if tokens else NOBODY
        runtime = {"server_timeout": 0.5}
        diagnosed(tmp_path, folder, {"sums": reference}, data=data, runtime=runtime)
    progress = capsys.readouterr().err
    assert "asking teacher sums (http://" in progress and "the student answers" not in progress


def test_a_server_that_dies_leaves_nothing(folder, tmp_path, capsys):  # noqa: F811
    """Its error says so, and not that a run could be resumed."""
    model = load(f"{folder}/teacher")
    tokens = {"tokenizer": model.tokenizer, "model": model}
    with serving(dying, **tokens) as server, pytest.raises(StageFailed) as caught:
        runtime = {"server_timeout": 0.5}
        diagnosed(tmp_path, folder, {"sums": server.url}, runtime=runtime)
    assert "the student answers" in capsys.readouterr().err
    assert "nothing of a diagnosis is kept" in caught.value.hint
    assert "was finished" not in caught.value.hint and "resume" not in caught.value.hint


def test_a_dead_server_is_the_error_of_the_command(folder):  # noqa: F811
    """And the key in its hint names another one: this one is found to be of other tokens."""
    command = ("diagnose", "--student", f"{folder}/student", "--teacher", f"sums={NOBODY}")
    command += ("--data", f"{folder}/p.jsonl", "teachers.sums.serves={p: true}", "--json")
    dead = inside(*command, "runtime.server_timeout=0.5")
    *_, error, hint = dead.stderr.splitlines()
    assert dead.returncode == 1 and not dead.stdout and "ended with" not in dead.stderr
    assert error.startswith(f"error: teacher sums ({NOBODY}): no answer to /v1/models")
    assert "nothing of a diagnosis is kept" in hint and "resume" not in hint
    elsewhere = hint.split("the same command with ")[1]
    with serving(tokenizer=make_model(alphabet=ALPHABETS["other"]).tokenizer) as server:
        moved = inside(*command, elsewhere.replace("http://host:8000", server.url))
    assert moved.returncode == 2 and not moved.stdout
    assert f"error: teacher sums ({server.url}) has another tokenizer" in moved.stderr
