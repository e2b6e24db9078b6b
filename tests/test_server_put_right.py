"""A server that was started wrongly, and is put right, is accepted if nothing was made from it."""

from test_served import raw_logits, serving

from opdctl.run.rundir import RunDir, read_json, write_json
from running import worker


def test_a_server_that_failed_may_be_put_right(on_disk, stage):
    def fails(handler, answer):
        return raw_logits(handler, answer) if handler.server.calls > 2 else answer  # two probes

    with serving(fails) as server:
        big = {"big": {"model": server.url, "serves": {"sums": True}}}
        ctx = stage("runtime.server_timeout=2", teachers=big, steps=2)
        ctx.wal.close()
        run = RunDir(ctx.run.path)
        failed = worker(run.path, "it")
        assert failed.returncode == 1
        assert "gave 3.5 as a log-prob" in failed.stdout
        assert not list(run.stage("it").glob("checkpoints/*"))
        assert "student" in run.record("it")["inputs"]
        assert "teachers.big.model" not in run.record("it")["inputs"]
        server.fault = None
        done = worker(run.path, "it")
        assert done.returncode == 0, done.stdout
        assert "teachers.big.model" in run.record("it")["inputs"]


def test_a_server_whose_answers_are_in_the_log_may_not_become_another(on_disk, stage):
    answers = []

    def fails_after_one(handler, answer):
        answers.append(1)
        return raw_logits(handler, answer) if len(answers) > 2 else answer

    with serving(fails_after_one) as server:
        big = {"big": {"model": server.url, "serves": {"sums": True}}}
        keys = ("runtime.server_batch=1", "runtime.server_requests=1", "runtime.server_timeout=2")
        ctx = stage(*keys, teachers=big, steps=2)
        ctx.wal.close()
        run = RunDir(ctx.run.path)
        assert worker(run.path, "it").returncode == 1
        entry = run.record("it")["inputs"]["teachers.big.model"]
        assert entry["served"] == "big"
        record = read_json(run.stage("it") / "stage.json")
        record["inputs"]["teachers.big.model"]["root"] = "/another"
        write_json(run.stage("it") / "stage.json", record)
        server.fault = None
        refused = worker(run.path, "it")
        assert refused.returncode == 2
        assert "its root changed from /another to /m" in refused.stdout
