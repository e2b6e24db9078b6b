"""The inputs of a stage are recorded, and a change of one under the same path is noticed."""

import json
import shutil
import signal

import pytest
from one_step import opd
from test_resume import IN_SAMPLING, copy_without

from opdctl import __version__
from opdctl.errors import UsageError
from opdctl.run import provenance
from opdctl.run.fingerprint import fingerprints
from opdctl.run.rundir import RunDir, read_json, write_json
from running import inside, worker


def test_a_record_says_what_the_stage_was_made_from(demo_run):
    run = RunDir(demo_run[0])
    record, teacher = run.record("mopd"), run.record("t_math")
    math = record["inputs"]["teachers.math.model"]
    assert math["path"] == str(run.output("t_math"))
    assert {k: math[k] for k in ("weights", "tokenizer", "config")} == teacher["output"]
    assert record["output"]["weights"] != teacher["output"]["weights"]
    assert record["output"]["tokenizer"] == teacher["output"]["tokenizer"]
    assert record["seed"]["run"] == run.manifest()["seed"] and record["seed"]["stage"]
    assert record["versions"]["opdctl"] == __version__ and record["versions"]["safetensors"]
    assert set(record["code"]) in ({"commit", "edited"}, set())


def test_hashes_are_of_contents_alone(demo_run, tmp_path):
    output = RunDir(demo_run[0]).output("sft")
    shutil.copytree(output, tmp_path / "copy")
    assert provenance.model(tmp_path / "copy") == provenance.model(output)
    for name, part in (("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        path = tmp_path / "copy" / name
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))
        now = provenance.model(tmp_path / "copy")
        assert now[part] != provenance.model(output)[part]
    assert now["config"] == provenance.model(output)["config"]
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n')
    before = provenance.data(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"a": 2}\n')
    assert before != provenance.data(tmp_path / "data.jsonl")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("killed", [False, True])
def test_another_teacher_under_the_same_path_is_refused(demo_run, tmp_path, killed):
    """The stage may have begun with the old one, or not at all."""
    folder = tmp_path / "run"
    copy_without(demo_run[0], folder, "mopd")
    if killed:
        code = worker(folder, "mopd", IN_SAMPLING.replace("{n}", "12")).returncode
        assert code == -signal.SIGKILL
    flip(RunDir(folder).output("t_math") / "model.safetensors")
    done = worker(folder, "mopd")
    assert done.returncode == 2
    for part in ("teachers.math.model", str(RunDir(folder).output("t_math")), "t_math", "weights"):
        assert part in done.stdout
    assert RunDir(folder).record("mopd")["status"] == "failed"
    flip(RunDir(folder).output("t_math") / "model.safetensors")
    assert worker(folder, "mopd").returncode == 0


def test_a_foreign_folder_and_a_data_file_are_watched_too(demo_run, tmp_path):
    """A resume that would read other files than the stage began with is refused."""
    model = tmp_path / "model"
    shutil.copytree(RunDir(demo_run[0]).output("sft"), model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "b{i:b}=", "answer": "{i % 9}"}}\n' for i in range(40)))
    command = ["stage", "sft", "--student", model, "--out", tmp_path / "one", "steps=2"]
    data = ["data.sums.kind=jsonl", f"data.sums.path={rows}", "prompts.per_step=4"]
    first = inside(*command, *data)
    assert first.returncode == 0, first.stderr
    record = RunDir(tmp_path / "one").record("sft")
    assert record["inputs"]["student"] == {"path": str(model), **provenance.model(model)}
    assert record["inputs"]["data.sums.path"]["data"] == provenance.data(rows)
    record["status"] = "running"
    write_json(RunDir(tmp_path / "one").stage("sft") / "stage.json", record)
    rows.write_text(rows.read_text().replace("b101=", "b1010101="))
    refused = inside("resume", tmp_path / "one")
    assert refused.returncode == 2 and "data.sums.path" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_from_leaves_what_was_made_from_other_files(demo_run, tmp_path):
    from opdctl.run.launch import read_recipe, reuse

    old = tmp_path / "old"
    shutil.copytree(demo_run[0], old, symlinks=True)
    flip(RunDir(old).output("t_math") / "model.safetensors")
    recipe = read_recipe(RunDir(old))
    (tmp_path / "new" / "stages").mkdir(parents=True)
    reused, changed = reuse(RunDir(tmp_path / "new"), recipe, RunDir(old))
    assert "t_math" in changed and "mopd" in changed and "sft" in reused
    assert read_json(tmp_path / "new/stages/sft/stage.json")["reused_from"] == str(old)
    assert not (tmp_path / "new/stages/mopd").exists()


def test_a_public_model_is_known_by_its_commit(on_disk, tmp_path, monkeypatch):
    """From the hub's cache: what a name means is recorded, and that it means another is noticed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--base"
    for commit, model in (("a", "s"), ("b", "t")):
        shutil.copytree(on_disk / model, place / "snapshots" / (commit * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    ctx = opd(on_disk, tmp_path, student=on_disk / "s")
    ctx.config.student = "org/base"
    now = provenance.inputs(ctx.run, ctx.recipe, "it")
    assert now["student"] == {"path": "org/base", "commit": "a" * 40}
    record = {"fingerprint": fingerprints(ctx.recipe)["it"], "inputs": now}
    write_json(ctx.run.stage("it") / "stage.json", record)
    provenance.require_unchanged(ctx.run, ctx.recipe, "it", now)
    (place / "refs" / "main").write_text("b" * 40)
    later = provenance.inputs(ctx.run, ctx.recipe, "it")
    with pytest.raises(UsageError, match=r"its commit changed from a{40} to b{40}"):
        provenance.require_unchanged(ctx.run, ctx.recipe, "it", later)
    ctx.config.student = f"org/base@{'a' * 40}"  # pinned, whatever main is
    assert provenance.inputs(ctx.run, ctx.recipe, "it")["student"]["commit"] == "a" * 40


def named(cache, rows):
    """A public data set org/name as the library keeps it, prepared from these rows."""
    import datasets

    lines = "\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows)
    cache.mkdir(exist_ok=True)
    (cache / "rows.jsonl").write_text(lines)
    files = {"train": str(cache / "rows.jsonl")}
    made = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(cache / "made"))
    made.download_and_prepare()
    place = cache / "org___name" / "default" / "0.0.0" / ("a" * 40)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made.cache_dir, place)
    (place / "json-train.arrow").rename(place / "name-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name"}))


def test_a_public_data_set_is_known_by_its_prompts(on_disk, tmp_path, monkeypatch):
    """Read by its name from the library's cache, without a network."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = [(f"{i}+1=", str(i + 1)) for i in range(8)]
    named(cache, rows)
    data = {"sums": {"kind": "hf", "path": "org/name", "eval_share": 0}}
    ctx = opd(on_disk, tmp_path, data=data)
    assert [p.text for p in ctx.prompts.of("sums", "train")] == [p for p, _ in rows]
    digest = ctx.prompts.counts["sums"]["train"]["digest"]
    record = {"fingerprint": fingerprints(ctx.recipe)["it"], "data": ctx.prompts.counts}
    write_json(ctx.run.stage("it") / "stage.json", record)
    again = type(ctx)(ctx.run, ctx.recipe, "it")
    again.prompts.of("sums", "train")
    assert again.prompts.counts["sums"]["train"]["digest"] == digest
    named(cache, [*rows[:-1], ("7+1=", "9")])
    with pytest.raises(UsageError, match="org/name has other rows than stage it was given"):
        type(ctx)(ctx.run, ctx.recipe, "it").prompts.of("sums", "train")
