"""A run directory is made by one process or not at all, and keeps nothing that no record needs."""

import json
import os
import threading
import time

import pytest
from test_recipe import GOOD
from typer.testing import CliRunner

from opdctl.cli.app import app
from opdctl.errors import UsageError
from opdctl.recipe.recipe import resolve
from opdctl.recipe.yaml_lines import parse
from opdctl.run import new_directory, tidy
from opdctl.run.launch import new_run, new_set
from opdctl.run.rundir import RunDir, lock, write_json, write_text


def recipe(*overrides):
    return resolve(parse(GOOD, "r.yaml")[0], "r.yaml", overrides=overrides)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_of_two_processes_that_make_one_directory_one_wins(tmp_path):
    place = tmp_path / "run"
    inside = threading.Barrier(2, timeout=20)
    wrong = []

    def make(seed):
        try:
            with new_directory.new_directory(place, False) as run:
                inside.wait()  # both have begun
                write_text(run / "run.json", json.dumps({"recipe": "demo", "seed": seed}))
                for i in range(20):
                    write_text(run / "stages" / f"s{i}" / "config.yaml", str(seed))
                inside.wait()
        except UsageError as error:
            wrong.append(error)

    threads = [threading.Thread(target=make, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 1
    assert "exists" in wrong[0].message
    assert "opdctl resume" in wrong[0].hint
    seeds = {path.read_text() for path in place.glob("stages/*/config.yaml")}
    assert seeds == {str(RunDir(place).manifest()["seed"])}
    assert not hidden(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_place_that_is_taken_is_refused_and_nothing_stays(tmp_path, kind):
    place = tmp_path / "run"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        (place / "mine").touch()
    with pytest.raises(UsageError, match="not a run directory"):
        new_run(recipe(), GOOD, place)
    assert not hidden(tmp_path)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert new_run(recipe(), GOOD, tmp_path / "run").manifest()["recipe"] == "demo"


def test_a_run_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        new_set([recipe()], GOOD, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


def test_a_run_directory_is_private_unless_it_is_shared(tmp_path):
    old = os.umask(0o022)
    try:
        new_run(recipe(), GOOD, tmp_path / "own")
        new_run(recipe("runtime.shared=true"), GOOD, tmp_path / "ours")
        new_set([recipe()], GOOD, tmp_path / "set")
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"own": "0o700", "ours": "0o755", "set": "0o700"}


def litter(run):
    """Put into a run what kills leave there. Return the bytes of it."""
    write_json(run.stage("base") / "stage.json", {"status": "done"})
    write_json(run.stage("mopd") / "stage.json", {"status": "interrupted"})
    paths = [
        run.stage("base") / "checkpoints" / "step-000004" / "model.safetensors",
        run.stage("base") / "wal" / "step-000004",
        run.stage("mopd") / "checkpoints" / ".step-000002.part" / "model.safetensors",
        run.path / ".claims.json.123.part",
        run.path / "stages" / ".t_math.part" / "stage.json",
        run.stage("mopd") / ".output.old" / "config.json",
        run.path.parent / f".{run.path.name}.99-ab.part" / "recipe.yaml",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    long_ago = time.time() - 3600
    os.utime(paths[-1].parent, (long_ago, long_ago))
    return 1000 * len(paths)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_no_record_needs_is_removed(tmp_path):
    run = new_run(recipe(), GOOD, tmp_path / "run")
    kept = run.stage("mopd") / "checkpoints" / "step-000002" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    before = files(tmp_path)
    freed = litter(run)
    records = {f"run/stages/{name}/stage.json" for name in ("base", "mopd")}
    assert tidy.tidy(run) == freed
    assert files(tmp_path) == before | records
    assert tidy.tidy(run) == 0


def test_the_command_says_how_much_it_removed_and_leaves_a_run_that_is_busy(tmp_path):
    run = new_run(recipe(), GOOD, tmp_path / "run")
    freed = litter(run)
    with lock(run / ".lock", "run"):
        busy = CliRunner().invoke(app, ["tidy", str(run.path)])
    assert "is in use by" in str(busy.exception)
    done = CliRunner().invoke(app, ["tidy", str(run.path), "--json"])
    assert json.loads(done.stdout) == {"freed": {str(run.path): freed}}


def test_a_directory_that_is_being_made_is_not_removed(tmp_path):
    with new_directory.new_directory(tmp_path / "run", False) as part:
        long_ago = time.time() - 3600
        os.utime(part.path, (long_ago, long_ago))
        assert not new_directory.abandoned(tmp_path / "run")
