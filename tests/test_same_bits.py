"""A run that goes on under settings that give other bits says so, or is refused."""

import pytest
import torch
from test_recipe import GOOD
from test_run_directory import recipe

from opdctl.errors import UsageError
from opdctl.process.same_bits import other_settings, require_same, settings_of
from opdctl.run.fingerprint import fingerprints
from opdctl.run.launch import new_run
from opdctl.run.rundir import write_json

HERE = {"processor": "x86_64 AVX512", "threads": "2", "torch": "2.13.0"}


def test_the_settings_are_those_of_this_process():
    settings = settings_of("cpu", {"torch": "2.13.0", "reasoning_gym": "1"})
    assert settings["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    assert settings["threads"] == str(torch.get_num_threads())
    assert settings["torch"] == "2.13.0"
    assert "reasoning_gym" not in settings


@pytest.fixture
def run(tmp_path):
    run = new_run(recipe(), GOOD, tmp_path / "run")
    now = fingerprints(recipe())
    for name in ("base", "t_math", "t_sort"):
        write_json(
            run.stage(name) / "stage.json", {"fingerprint": now[name], "settings": dict(HERE)}
        )
    return run


def test_the_same_settings_need_no_word(run):
    before = {"settings": dict(HERE)}
    assert other_settings(run, recipe(), "mopd", before, dict(HERE)) == []


@pytest.mark.parametrize(
    ("name", "value"), [("processor", "x86_64 AVX2"), ("threads", "1"), ("torch", "2.14.0")]
)
def test_every_other_setting_is_named_with_what_it_changed(run, name, value):
    now = {**HERE, name: value}
    lines = other_settings(run, recipe(), "mopd", {"settings": dict(HERE)}, now)
    assert lines[0] == f"when it began: {name} {HERE[name]}, now {value}"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "when stage base ran",
        "when stage t_math ran",
        "when stage t_sort ran",
    ]


def test_a_stage_of_other_inputs_or_an_older_record_is_not_compared(run):
    write_json(run.stage("base") / "stage.json", {"fingerprint": "other", "settings": dict(HERE)})
    write_json(
        run.stage("t_sort") / "stage.json", {"fingerprint": fingerprints(recipe())["t_sort"]}
    )
    lines = other_settings(run, recipe(), "mopd", {}, {**HERE, "threads": "1"})
    assert [line.split(":")[0] for line in lines] == ["when stage t_math ran"]


def test_a_difference_is_refused_by_a_key(run, capsys):
    require_same(run, recipe(), "mopd", ["when it began: threads 2, now 1"])
    assert "equal up to rounding only: when it began" in capsys.readouterr().out
    strict = recipe("runtime.other_machine=refuse")
    with pytest.raises(UsageError, match="threads 2, now 1") as caught:
        require_same(run, strict, "mopd", ["when it began: threads 2, now 1"])
    assert "runtime.other_machine=note" in caught.value.hint
    require_same(run, strict, "mopd", [])
