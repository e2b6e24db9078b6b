"""What was sampled and scored survives a kill: not paid for again, and not changed by it."""

import shutil
import signal

import numpy as np
import pytest
import torch
from test_resume import IN_SAMPLING, SIGKILL, copy_without

from conftest import make_model
from opdctl import draws
from opdctl.errors import Interrupted
from opdctl.rollout.engines.transformers import Transformers
from opdctl.run.rundir import RunDir
from opdctl.train.wal import Wal
from running import assert_same, worker

COUNT = """
import opdctl.train.loop  # it holds the function itself: the policy's own pass is not counted
import opdctl.scoring.score as scoring
import opdctl.rollout.engines.transformers as engine
draw, asked = engine.draw_tokens, scoring.score
def counted_draw(*a):
    print("drawn", flush=True)
    return draw(*a)
def counted_score(*a, **k):
    print("scored", flush=True)
    return asked(*a, **k)
engine.draw_tokens, scoring.score = counted_draw, counted_score
"""


def arrays(n):
    return {"tokens": np.arange(n), "logprobs": np.linspace(-1, 0, n) / 3}


def test_a_torn_tail_is_cut_wherever_it_was_torn(tmp_path):
    log = Wal(tmp_path)
    log.at(7)
    log.put("a", arrays(3))
    whole = (tmp_path / "step-000007").stat().st_size
    log.put("a", arrays(4))
    log.close()
    content = (tmp_path / "step-000007").read_bytes()
    for end in range(whole, len(content)):
        (tmp_path / "step-000007").write_bytes(content[:end])
        log.at(7)
        found = log.get("a")
        assert len(found) == 1 and (found[0]["logprobs"] == arrays(3)["logprobs"]).all()
        log.put("b", arrays(2))
        log.close()
        log.at(7)
        assert len(log.get("a")) == 1 and len(log.get("b")) == 1
        log.close()
    torn = bytearray(content)
    torn[whole + 20] ^= 1
    (tmp_path / "step-000007").write_bytes(bytes(torn))
    log.at(7)
    assert len(log.get("a")) == 1


def test_a_checkpoint_drops_only_what_it_covers(tmp_path):
    log = Wal(tmp_path)
    for step in range(4):
        log.at(step)
        log.put("a", arrays(1))
    log.drop(3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    log.put("b", arrays(1))
    log.at(3)  # the same step: the file stays open
    log.close()
    log.at(3)
    assert log.get("b")


class Preempted:
    """Raises after a number of tokens, drawn anew for each attempt."""

    def __init__(self, attempt):
        self.left = 14 + int(20 * draws.unit("patience", attempt))

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Interrupted("preempted")


@pytest.fixture(scope="module")
def chatty():
    """A random model whose responses are of all lengths."""
    model = make_model()
    with torch.no_grad():
        model.net.get_output_embeddings().weight[model.eos] *= 0.0
    return model


def generate(model, keys, check=lambda: None, wal=None, wave=16):
    prompts = [model.render("ab"), model.render("sort 3 1 2=")] * (len(keys) // 2)
    engine = Transformers(model, wave, check, wal)
    return engine.generate(prompts, keys, temperature=1.0, max_tokens=24)


def log_until_done(model, keys, folder):
    """Sample under preemption, each attempt on the log of those before it. Samples, attempts."""
    attempts = 0
    while True:
        log = Wal(folder)
        log.at(3)
        try:
            return generate(model, keys, Preempted(attempts), log), attempts
        except Interrupted:
            attempts += 1
        finally:
            log.close()


def test_d4_resuming_a_cut_rollout_is_exact(chatty, tmp_path):
    """DeepSeek-V4: the same bits as without a cut. What was sampled whole costs nothing again."""
    keys = [draws.key(5, i) for i in range(48)]
    whole = generate(chatty, keys)
    samples, attempts = log_until_done(chatty, keys, tmp_path)
    log, passes = Wal(tmp_path), []
    log.at(3)
    handle = chatty.net.base_model.register_forward_hook(lambda *_: passes.append(1))
    again = generate(chatty, keys, wal=log)
    handle.remove()
    assert attempts > 5
    assert [s.ids for s in samples] == [s.ids for s in again] == [s.ids for s in whole]
    assert [s.logprobs for s in samples] == [s.logprobs for s in whole]  # every bit
    assert [s.truncated for s in samples] == [s.truncated for s in whole]
    assert not passes  # from the log alone
    other = generate(chatty, [k + 1 for k in keys], wal=log)
    assert [s.ids for s in other] != [s.ids for s in whole]  # another question, another answer


def test_d4_starting_again_would_favour_short_answers(chatty, tmp_path):
    """Each response is preempted at a token of its own. Drawn anew from its start until one comes
    through, the short ones come through first; from the log, the lengths are what they were."""
    count = 600
    whole = generate(chatty, [draws.key("first", i) for i in range(count)], wave=150)
    limits = [4 + int(16 * draws.unit("limit", i)) for i in range(count)]
    fresh, todo = {}, list(range(count))
    for attempt in range(12):
        drawn = generate(
            chatty, [draws.key(attempt, i) for i in todo] + [0] * (len(todo) % 2), wave=150
        )
        fresh |= {
            i: len(s.ids) for i, s in zip(todo, drawn, strict=False) if len(s.ids) < limits[i]
        }
        todo = [i for i in todo if i not in fresh]
    lengths = [np.array(n) for n in ([len(s.ids) for s in whole], list(fresh.values()))]
    error = sum(n.var() / len(n) for n in lengths) ** 0.5
    assert lengths[0].mean() - lengths[1].mean() > 4 * error  # regenerating is biased
    some = [draws.key("first", i) for i in range(48)]
    kept = log_until_done(chatty, some, tmp_path)[0]
    assert [s.ids for s in kept] == [s.ids for s in generate(chatty, some)]  # ours is not


@pytest.mark.parametrize(("stage", "n"), [("t_math", 30), ("mopd", 22), ("eval_mopd", 8)])
def test_after_a_kill_nothing_is_sampled_or_scored_twice(demo_run, tmp_path, stage, n):
    """Draws and teacher passes of the killed attempt and of the next add up to one run's."""
    folder = tmp_path / "run"
    copy_without(demo_run[0], folder, stage)
    once = worker(folder, stage, COUNT).stdout
    shutil.rmtree(folder)
    copy_without(demo_run[0], folder, stage)
    killed = worker(folder, stage, IN_SAMPLING.replace("{n}", str(n)) + COUNT)
    assert killed.returncode == -signal.SIGKILL
    resumed = worker(folder, stage, COUNT)
    assert resumed.returncode == 0
    drawn = [out.count("drawn") for out in (killed.stdout, resumed.stdout, once)]
    assert drawn[0] + drawn[1] - 1 == drawn[2]  # less the one in which it was killed
    scored = [out.count("scored") for out in (killed.stdout, resumed.stdout, once)]
    assert scored[0] + scored[1] == scored[2]
    assert not (RunDir(folder).stage(stage) / "wal").exists()
    assert_same(demo_run[0], folder, [stage])


IN_UPDATE = (
    SIGKILL
    + """
import opdctl.train.update as update
real, seen = update.step, []
def step(*a):
    seen.append(1)
    if len(seen) == {n}:
        die()
    return real(*a)
update.step = step
"""
)


def test_a_kill_in_the_update_costs_no_draw_and_no_score(demo_run, tmp_path):
    folder = tmp_path / "run"
    copy_without(demo_run[0], folder, "mopd")
    killed = worker(folder, "mopd", IN_UPDATE.replace("{n}", "3") + COUNT)
    assert killed.returncode == -signal.SIGKILL and killed.stdout.count("scored")
    checkpoints = sorted((RunDir(folder).stage("mopd") / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["step-000002"], killed.stdout
    again = worker(folder, "mopd", IN_UPDATE.replace("{n}", "1") + COUNT)
    assert again.returncode == -signal.SIGKILL
    assert not again.stdout.count("drawn") and not again.stdout.count("scored")
    assert worker(folder, "mopd").returncode == 0
    assert_same(demo_run[0], folder, ["mopd"])
