"""Teachers behind a server: what they answer, and every way in which they can fail, by name.

A healthy vLLM server never shows most of these faults, so they come from a small HTTP server that
speaks its protocol; the real one is in test_vllm_server.py.
"""

import contextlib
import json
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from one_step import First, prompts
from serving import listening

from conftest import make_model
from opdctl.checks.preflight._run_checks import check
from opdctl.config.registry import member
from opdctl.config.settings import Sampling
from opdctl.errors import EXIT_INTERRUPTED, Interrupted, RecipeError, StageFailed, UsageError
from opdctl.models.model import load
from opdctl.recipe.recipe import resolve
from opdctl.run.provenance import served
from opdctl.run.rundir import RunDir, read_rows
from opdctl.run.status import last_line
from opdctl.train.score_step import score_step
from opdctl.train.wal import Wal
from opdctl.types import WAITING, Compute, Prompt
from running import carry_out, one_stage, start

LOGPROB = -1.25


class Served(ThreadingHTTPServer):
    """One model called ``big``: every token has one log-prob, or those of ``model``, which lists
    its most probable ones too; ``fault`` breaks answers.

    Attributes:
        asked: sequences scored after the probe.
        most: requests in hand at once, at most.
        together: so many have to be in hand before the first is answered.
    """

    daemon_threads = True

    def __init__(self, tokenizer, fault=None, names=("big",), together=1, model=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.model = model
        self.tokenizer, self.fault, self.names = tokenizer, fault, names
        self.together, self.met = together, threading.Event()
        self.asked, self.now, self.most, self.tries, self.calls = 0, 0, 0, 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def row(self, ids, k):
        """``prompt_logprobs`` of a sequence: of each token, and of the k most probable."""
        if not self.model:
            return [None, *({str(i): {"logprob": LOGPROB, "rank": 2}} for i in ids[1:])]
        logp_TV = self.model.own_logits(torch.tensor([ids]))[0].log_softmax(-1)
        places = zip(logp_TV[:-1], ids[1:], strict=True)
        listed = (({*logp_V.topk(k).indices.tolist(), i}, logp_V) for logp_V, i in places)
        return [None, *({str(i): {"logprob": float(p_V[i])} for i in some} for some, p_V in listed)]

    def handle_error(self, *_):
        """A client that gave up is no news."""


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, content, code=200):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        models = [{"id": n, "root": "/m", "max_model_len": 64} for n in self.server.names]
        self.reply({"data": models} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] in server.names
        if self.path == "/detokenize":
            return self.reply({"prompt": server.tokenizer.decode(body["tokens"])})
        if self.path != "/v1/completions" or "prompt_logprobs" not in body:
            return self.write(body)
        with server.lock:
            server.calls += 1
            server.now += 1
            server.most = max(server.most, server.now)
            probing = server.calls == 1
            if server.most == server.together:
                server.met.set()
        if not probing:
            server.met.wait(20)
        with server.lock:
            server.now -= 1
        rows = [server.row(ids, body["prompt_logprobs"]) for ids in body["prompt"]]
        answer = {"choices": [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]}
        answer["choices"].reverse()  # an index says which is which
        if not probing:
            server.asked += len(rows) - 1  # beside the known sequence
        if server.fault and (not probing or server.fault in AT_ONCE):
            answer = server.fault(self, answer)
        if answer is not None:
            self.reply(answer)

    def write(self, body):
        server = self.server
        if server.fault and (answer := server.fault(self, body)):
            return self.reply(answer)
        with server.lock:
            server.asked += 1
        text = "12" if body["seed"] % 2 else "7"
        choice = {"finish_reason": "stop", "message": {"content": text}, "text": text}
        return self.reply({"choices": [choice]})


@contextlib.contextmanager
def serving(fault=None, tokenizer=None, **keys):
    with listening(Served(tokenizer or make_model().tokenizer, fault, **keys)) as server:
        yield server


def last(answer):
    return next(c for c in answer["choices"] if c["index"] == 0)["prompt_logprobs"]


def with_nan(handler, answer):
    (entry,) = last(answer)[-1].values()
    entry["logprob"] = float("nan")
    return answer


def with_null(handler, answer):
    (entry,) = last(answer)[-1].values()
    entry["logprob"] = None
    return answer


def one_token_short(handler, answer):
    last(answer).pop()
    return answer


def one_sequence_short(handler, answer):
    answer["choices"].pop()
    return answer


def of_other_tokens(handler, answer):
    row = last(answer)
    row[-1] = {"1" if "1" not in row[-1] else "2": {"logprob": -1.0}}
    return answer


def shifted(handler, answer):
    row = last(answer)
    row[1:] = [*row[2:], {"0": {"logprob": -1.0}}]
    return answer


def without_scores(handler, answer):
    return {"choices": [{"index": c["index"], "text": ""} for c in answer["choices"]]}


def no_json(handler, answer):
    return b"<html>a proxy's error page</html>"


def refusing(handler, answer):
    handler.reply({"message": "prompt is too long"}, 400)


def dying(handler, answer):
    handler.server.shutdown_request(handler.request)
    threading.Thread(target=handler.server.shutdown).start()
    handler.server.socket.close()


def hanging(handler, answer):
    time.sleep(20)
    return answer


def raw_logits(handler, answer):
    for entry in last(answer)[1:]:
        for value in entry.values():
            value["logprob"] = 3.5
    return answer


def raw_logits_later(handler, answer):
    return raw_logits(handler, answer) if handler.server.calls > 1 else answer


def drifted_later(handler, answer):
    if handler.server.calls > 1:
        for choice in answer["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                for value in entry.values():
                    value["logprob"] -= 0.2
    return answer


def all_zero(handler, answer):
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            for value in entry.values():
                value["logprob"] = 0.0
    return answer


def all_zero_later(handler, answer):
    return all_zero(handler, answer) if handler.server.calls > 1 else answer


def masked_later(handler, answer):
    (entry,) = last(answer)[-1].values()
    entry["logprob"] = -1e30
    return answer


def a_list(handler, answer):
    return [answer]


def a_list_of_texts(handler, answer):
    return {"choices": ["a" for _ in answer["choices"]]}


def a_number_for_a_token(handler, answer):
    last(answer)[-1] = 3
    return answer


def a_text_for_a_log_prob(handler, answer):
    (entry,) = last(answer)[-1].values()
    entry["logprob"] = "low"
    return answer


def an_id_that_is_no_number(handler, answer):
    entry = last(answer)[-1]
    entry["x"] = {"logprob": -0.5, "rank": 1}
    return answer


AT_ONCE = (without_scores, raw_logits, all_zero)
FORM = r"teacher big \(http.*answered in a form that is not vLLM's: "
FAULTS = {
    with_nan: r"teacher big gave a score that is not finite in the rollout of prompt \w+ \(sums\)",
    with_null: r"teacher big gave a score that is not finite",
    one_token_short: r"teacher big \(http.*scored \d+ of the \d+ tokens",
    one_sequence_short: r"teacher big \(http.*answered \d+ of \d+ sequences",
    of_other_tokens: r"teacher big \(http.*was sent id \d+ at place \d+ and answered for",
    shifted: r"teacher big \(http.*was sent id \d+ at place",
    without_scores: r"teacher big \(http.*it is not vLLM's server",
    no_json: r"teacher big \(http.*is no JSON",
    refusing: r"teacher big \(http.*answered 400.*prompt is too long",
    dying: r"teacher big \(http.*no answer to /v1/completions within 1 s \(tries: \d+\): ",
    hanging: r"teacher big \(http.*no answer to /v1/completions within 1 s \(tries: 1\): ",
    raw_logits: r"teacher big \(http.*as log-probs",
    raw_logits_later: r"teacher big \(http.*gave 3.5 as a log-prob",
    drifted_later: r"teacher big \(http.*is not what it was when this attempt began: .*-1.450",
    all_zero: r"teacher big \(http.*\[0.0, 0.0, 0.0, 0.0\] as log-probs",
    all_zero_later: r"teacher big \(http.*is not what it was when this attempt began",
    masked_later: r"teacher big \(http.*gave -1e\+30 as a log-prob",
    a_list: r"teacher big \(http.*is no JSON object but a list",
    a_list_of_texts: FORM + "AttributeError",
    a_number_for_a_token: FORM + "TypeError",
    a_text_for_a_log_prob: FORM + "ValueError.*low",
    an_id_that_is_no_number: FORM + "ValueError.*'x'",
}


def taught_by(stage, server, *overrides, **keys):
    teachers = {"big": {"model": server.url, "serves": {"sums": True}}}
    own = any(text.startswith("runtime.server_timeout=") for text in overrides)
    limit = [] if own else ["runtime.server_timeout=1"]
    return stage(*limit, *overrides, teachers=teachers, **keys)


def test_scores_stand_at_their_tokens(stage):
    """In batches, several at once, whatever the order of the answers; and they are logged."""
    with serving(together=3) as server:
        ctx = taught_by(
            stage,
            server,
            "runtime.server_batch=2",
            "runtime.server_requests=3",
            "runtime.server_timeout=30",
        )
        first = First(ctx)
        assert (first.columns["teacher"] == LOGPROB).all()
        assert server.asked == len(first.rollouts) == 6 and server.most == 3
        assert torch.allclose(first.columns["advantage"], LOGPROB - first.columns["policy"])
        before = server.calls
        kept = Wal(ctx.folder / "wal")
        ctx.wal.close()
        kept.at(0)
        assert sum(name.startswith("teacher big") for name in kept._found) == 6
        ctx.wal.at(0)
        again = score_step(first.rollouts, first.model, first.setup, ctx, Compute())
        assert (again.columns["teacher"] == first.columns["teacher"]).all()
        assert server.calls == before  # from the log: nothing is asked for twice
        assert served("x", server.url, ctx.runtime) == {"served": "big", "root": "/m"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_reported_by_name_within_the_timeout(stage, fault):
    with serving(fault) as server:
        ctx = taught_by(stage, server)
        begun = time.monotonic()
        with pytest.raises((StageFailed, UsageError), match=FAULTS[fault]):
            First(ctx)
        assert time.monotonic() - begun < 10


def test_a_stage_that_its_teacher_fails_keeps_what_was_sampled(stage):
    """Steps that were taken stay, the tokens of the one in hand are in the log, and no step is
    taken on zeros."""

    def dies_late(handler, answer):
        return dying(handler, answer) if handler.server.calls > 4 else answer

    with serving(dies_late) as server:
        ctx = taught_by(stage, server, steps=9)
        with pytest.raises(StageFailed, match="teacher big"):
            carry_out(ctx)
    rows = read_rows(ctx.folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    ctx.wal.close()
    ctx.wal.at(3)
    assert any(name.startswith("wave") for name in ctx.wal._found)


def test_what_is_busy_or_cut_off_is_asked_again(stage):
    def moody(handler, answer):
        handler.server.tries += 1
        if handler.server.tries == 1:
            return handler.reply({"error": "overloaded"}, 503)
        if handler.server.tries == 2:
            return handler.server.shutdown_request(handler.request)
        return answer

    with serving(moody) as server:
        first = First(taught_by(stage, server, "runtime.server_timeout=20"))
        assert server.tries == 3 and (first.columns["teacher"] == LOGPROB).all()


def test_a_stop_is_heeded_while_a_server_hangs(stage):
    with serving(hanging) as server:
        ctx = taught_by(stage, server, "runtime.server_timeout=15")
        threading.Timer(1.5, lambda: setattr(ctx, "stop", True)).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            First(ctx)
        assert time.monotonic() - begun < 10


def test_a_stop_is_heeded_while_a_server_is_waited_for(on_disk, tmp_path):
    """At the start, where it is not there at all; meanwhile the wait is shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    opd = {"kind": "opd", "student": str(on_disk / "s"), "teachers": {"teacher": url}, "steps": 2}
    tree = {"name": "waits", "data": {"sums": prompts(on_disk)}, "stages": {"it": opd}}
    (tmp_path / "waits.json").write_text(json.dumps(tree))
    run = RunDir(tmp_path / "run")
    process = start("run", tmp_path / "waits.json", "--out", run.path)
    log, begun = run / "logs" / "latest", time.monotonic()
    while process.poll() is None and not (log.exists() and WAITING in last_line(log)):
        assert time.monotonic() - begun < 240
        time.sleep(0.05)
    said = last_line(log)
    assert said.startswith(f"stages.it.teachers.teacher.model ({url})") and "refused" in said
    assert "runtime.server_timeout 120 s" in said
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait(60) == EXIT_INTERRUPTED and time.monotonic() - begun < 20
    assert run.record("it")["status"] == "interrupted"


def test_another_tokenizer_is_found_by_its_first_id(stage):
    other = make_model(alphabet="0123456789abcdefghijklmnopqrstuvwxyz =+;").tokenizer
    with (
        serving(tokenizer=other) as server,
        pytest.raises(UsageError, match=r"big .*id 5 is '0' there and ',' here"),
    ):
        First(taught_by(stage, server))


def test_the_model_meant_is_named_where_several_are_served(stage):
    with serving(names=("big", "small")) as server:
        with pytest.raises(UsageError, match=r"serves big, small: which one.*\n.*#big"):
            First(taught_by(stage, server))
        server.url += "#small"
        First(taught_by(stage, server))
        server.url = server.url.replace("small", "medium")
        with pytest.raises(UsageError, match="and not medium"):
            First(taught_by(stage, server))


def test_a_server_that_is_not_there_is_reported(stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            StageFailed, match=r"x \(http.*no answer to /v1/models within 1 s.*refused"
        ):
            served("x", url, taught_by(stage, type("At", (), {"url": url})).runtime)


def refused(stage_keys, **more):
    base = {"kind": "opd", "student": "a/b", "teachers": {"teacher": "http://host:8000"}}
    data = {"sums": {"kind": "jsonl", "path": __file__}}
    tree = {"name": "x", "data": data, "stages": {"it": {**base, **stage_keys}, **more}}
    with pytest.raises(RecipeError) as caught:
        resolve(tree, "x")
    return str(caught.value)


def test_validate_refuses_what_a_server_cannot_give():
    full = refused({"signals": {}, "objectives": {"divergence": {}}})
    assert "stages.it.objectives.divergence: needs teacher.hidden" in full
    assert "teacher (http://host:8000) is behind a server" in full
    for support in ("topk_student", "topk_union"):
        for name in ("divergence", "topk_tail", "topk_pg"):
            said = refused({"signals": {}, "objectives": {name: {"support": support}}})
            assert "is behind a server" in said and "support=topk_teacher" in said
    gated = {"divergence": {"support": "topk_teacher", "weights": {"eopd": {}}}}
    assert "over=listed" in refused({"signals": {}, "objectives": gated})
    lists = {"policy_gradient": {"weights": {"eopd": {"over": "listed"}}}}
    assert "no objective here says how many" in refused({"objectives": lists})
    assert "kl_baseline" in refused({"signals": {"reverse_kl": {}, "kl_baseline": {}}})
    warm = refused({"sampling": {"temperature": 0.7}})
    assert "stages.it.sampling.temperature" in warm and "at temperature 1" in warm
    confident = {"policy_gradient": {"weights": {"confidence": {}}}}
    assert "weights.confidence: needs teacher.entropy" in refused({"objectives": confident})
    for source in ({"mixture": {"student": 0.5, "teacher": 0.5}}, {"teacher_mixed": {}}):
        forward = {"signals": {}, "objectives": {"sampled_kl": {"estimator": "k2"}}}
        assert "is behind a server" in refused({**forward, "sources": source})
    cold = refused({"loss_temperature": 0.5, "objectives": {"sampled_kl": {"estimator": "k2"}}})
    assert "stages.it.loss_temperature" in cold
    served_student = refused({"student": "http://host:8000", "teachers": {"teacher": "a/b"}})
    assert "cannot be loaded" in served_student
    resolve(
        {
            "name": "x",
            "data": {"sums": {"kind": "jsonl", "path": __file__}},
            "stages": {
                "it": {"kind": "opd", "student": "a/b", "teachers": {"teacher": "http://host:1"}}
            },
        },
        "x",
    )


def padded(handler, answer):
    """As a server of random weights: a row beyond the tokenizer's among the most probable."""
    if "choices" not in answer:
        return None  # it is asked for a text
    rows = [row for choice in answer["choices"] for row in choice["prompt_logprobs"][1:]]
    for row in rows:
        if len(row) > 1:
            row["9999"] = {"logprob": -0.01, "rank": 1}
    return answer


def test_a_list_that_cannot_be_used_leaves_the_divergence_of_what_was_sampled(on_disk, stage):
    """The stage wants log-probs alone; that the overlap cannot be measured is no reason to end."""
    model = load(str(on_disk / "t"))
    with serving(padded, model=model, tokenizer=model.tokenizer) as server:
        ctx = taught_by(stage, server, "runtime.server_timeout=30")
        (found,) = [f for f in check(ctx, deep=True) if f.check == "step0"]
    assert found.severity == "warning" and "KL " in found.what and found.teacher == "big"
    assert "overlap: " in found.what and "9999" in found.what


def answers_of(on_disk, tmp_path, url, **keys):
    source = {"teacher": {"model": url, "keep": "all", "sampling": {"max_tokens": 6}}}
    stage = {"kind": "sft", "student": str(on_disk / "s"), "steps": 3, "sources": source}
    return one_stage(
        tmp_path / "run",
        {"sums": prompts(on_disk)},
        "runtime.server_timeout=1",
        **{**stage, "prompts": {"per_step": 4, "samples": 2}, **keys},
    )


def test_texts_of_an_api_are_sft_data(on_disk, tmp_path):
    with serving() as server:
        ctx = answers_of(on_disk, tmp_path, server.url)
        student = load(str(on_disk / "s"))
        ctx.wal.at(0)
        source = member("sources", "teacher")(ctx.config.sources["teacher"], ctx, student)
        rollouts = source.draw(0)
        assert len(rollouts) == server.asked == 8
        assert {r.text for r in rollouts} == {"7", "12"}
        for r in rollouts:
            assert r.response_ids == student.encode(r.text) and r.behaviour_logprobs is None
            assert r.prompt_ids == student.render(r.prompt.text) and not r.truncated
        ctx.wal.close()
        ctx.wal.at(0)
        again = source.draw(0)  # from the log: nothing is paid for twice
        assert server.asked == 8 and [r.text for r in again] == [r.text for r in rollouts]
        ctx.wal.close()
        rows = carry_out(ctx)
        assert server.asked == 8 + 2 * 8 and len(rows) == 3 and rows[-1]["loss"] < rows[0]["loss"]


def test_an_api_that_gives_no_answer_is_named(on_disk, tmp_path):
    def filtered(handler, body):
        return {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}]}

    with serving(filtered) as server:
        ctx = answers_of(on_disk, tmp_path, server.url)
        with pytest.raises(StageFailed, match=r"of stages\.it \(http.*by 'content_filter'"):
            carry_out(ctx)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thinking_that_comes_apart_is_not_lost(on_disk, tmp_path, key):
    def thinking(handler, body):
        message = {"content": "12", key: "6 and 6"}
        return {"choices": [{"finish_reason": "stop", "message": message}]}

    with serving(thinking) as server:
        ctx = answers_of(on_disk, tmp_path, server.url)
        api = member("teachers", "api")(ctx, load(str(on_disk / "s")), "x", server.url)
        with pytest.raises(StageFailed, match=r"teacher x \(http.*\n.*--reasoning-parser"):
            api.answer([Prompt("0", "d", "1+1=", "2", {})], [5], Sampling(max_tokens=3))


def test_the_api_takes_sampling_as_it_is_asked(on_disk, tmp_path):
    seen = []

    def look(handler, body):
        seen.append(body)

    with serving(look) as server:
        ctx = answers_of(on_disk, tmp_path, server.url)
        ctx.wal.at(0)
        api = member("teachers", "api")(ctx, load(str(on_disk / "s")), "x", server.url)
        asked = [Prompt("0", "d", "1+1=", "2", {}, system=s) for s in ("", "short")]
        api.answer(asked, [5, 2**63], Sampling(temperature=0.5, max_tokens=3))
    said = sorted(([m["content"] for m in b["messages"]] for b in seen), key=len)
    assert said == [["1+1="], ["short", "1+1="]]
    assert sorted(b["seed"] for b in seen) == [0, 2**30]
    assert all(b["temperature"] == 0.5 and b["max_tokens"] == 3 for b in seen)
    assert not hasattr(api, "score")
