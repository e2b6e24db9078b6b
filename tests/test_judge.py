"""Judges: a model of this machine, and one behind a server; verdicts, failures, the stage graph."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import listening
from test_data import table
from test_verifiers import answers, prepared

from opdctl.errors import RecipeError, StageFailed
from opdctl.recipe.recipe import resolve
from opdctl.rollout.data.jsonl import Jsonl
from opdctl.rollout.verifiers.judge_server import JudgeServer
from opdctl.run.fingerprint import fingerprints

SHORT = {"template": "{prompt}{response}=", "verdict": "([a-m])", "accept": "A"}


def test_a_judge_of_this_machine(on_disk, tmp_path):
    sampling = {"temperature": 1.0, "max_tokens": 5}
    judge = {"judge": {**SHORT, "model": str(on_disk / "t"), "sampling": sampling}}
    ctx = prepared(on_disk, tmp_path, judge)
    rollouts = answers(ctx, *(f"{i}" for i in range(40)))
    verdicts = ctx.verdicts.verify(rollouts)
    verifier = ctx.verdicts.by_domain["sums"]
    texts = [verifier.question(r.prompt, r.text) for r in rollouts]
    assert texts[3] == rollouts[3].prompt.text + "3="
    replies = verifier.replies([(r.prompt, t) for r, t in zip(rollouts, texts, strict=True)])
    last = [[c for c in reply if "a" <= c <= "m"][-1:] for reply in replies]
    assert verdicts == [float(c == ["a"]) for c in last] and 0 < sum(verdicts) < 40
    assert ctx.verdicts.failed["sums"] == last.count([]) > 0  # no verdict: wrong, and counted
    again = answers(ctx, *(f"{i}" for i in range(40)))
    assert ctx.verdicts.verify(again) == verdicts


def test_what_a_judge_is_asked_is_filled_in_once(on_disk, tmp_path):
    judge = {"judge": {**SHORT, "template": "{prompt}|{answer}|{response}", "model": "x/y"}}
    data = table(Jsonl, judge, path=str(on_disk / "sums.jsonl"), eval_share=0.0)
    prompt = data.prompts("train")[2]
    verifier = data.verifier(data.keys, None, "d")
    assert verifier.question(prompt, "say {answer} {x}") == "2+4=|2|say {answer} {x}"
    assert verifier.read("b then A") == 0.0 == verifier.read("ab") and verifier.read("ba") == 1.0


def recipe(verifier, **data):
    data = {"kind": "jsonl", "path": __file__, "verifier": verifier, **data}
    opd = {"kind": "opd", "student": "stage:base", "teachers": {"teacher": "policy"}}
    opd["prompts"] = {"domains": {"open": 1}}
    base = {"kind": "pretrain", "steps": 1, "prompts": {"domains": {"sums": 1}}}
    tree = {"name": "r", "data": {"open": data, "sums": {"kind": "jsonl", "path": __file__}}}
    judge = {**base, "steps": 2}
    return resolve({**tree, "stages": {"opd": opd, "base": base, "judge": judge}}, "r")


def test_a_judge_of_a_stage_is_an_edge_of_the_graph():
    one = recipe({"judge": {**SHORT, "model": "stage:judge"}})
    assert one.upstream("opd") == ["base", "judge"] and one.order()[-1] == "opd"
    assert one.upstream("base") == []
    other = recipe({"judge": {**SHORT, "model": "stage:base"}})
    changed = {s for s in one.stages if fingerprints(one)[s] != fingerprints(other)[s]}
    assert changed == {"opd"}


@pytest.mark.parametrize(
    ("verifier", "data", "message"),
    [
        ({"judge": {"model": "stage:jugde"}}, {}, "no stage 'jugde'.*\n.*did you mean 'judge'"),
        ({"judge": {"model": "policy"}}, {}, "policy is a teacher's reference"),
        ({"judge": {"model": "a/b", "template": "{prompt}"}}, {}, "would not see the response"),
        ({"judge": {"model": "a/b", "verdict": "yes"}}, {}, "0 groups, and one is read"),
        ({"judge": {"model": "a/b"}}, {"answer_column": ""}, "answer_column: the verifier judge"),
        ({"judge_server": {"url": "localhost", "name": "x"}}, {}, "no http address"),
        ({"judge": {"model": "stage:opd"}}, {}, "a cycle of stages"),
    ],
)
def test_judges_that_cannot_work_are_refused(verifier, data, message):
    with pytest.raises(RecipeError, match=message):
        recipe(verifier, **data)


class Handler(BaseHTTPRequestHandler):
    """Says yes where the response holds the reference answer; some requests go wrong first."""

    def do_POST(self):
        server, length = self.server, int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        with server.guard:
            server.seen.append((self.path, self.headers.get("Authorization"), body["model"]))
            code = server.codes.pop(0) if server.codes else 200
        _, answer, response = body["messages"][0]["content"].split("|")
        said = {"choices": [{"message": {"content": "Yes." if answer in response else "I say no"}}]}
        body = json.dumps(said).encode() if code == 200 else b"not today"
        self.send_response(200 if code == 0 else code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Dying(Handler):
    """A judge whose first answer breaks off in the middle."""

    def do_POST(self):
        if self.server.seen:
            return super().do_POST()
        self.server.seen.append("")
        self.send_response(200)
        self.send_header("Content-Length", "500")
        self.end_headers()
        self.wfile.write(b'{"choices": [')


@pytest.fixture
def server():
    judge = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.seen, judge.codes, judge.guard = [], [], threading.Lock()
    judge.url = f"http://127.0.0.1:{judge.server_port}/v1"
    with listening(judge):
        yield judge


def asking(on_disk, server, **keys):
    keys = {"url": server.url, "name": "big", "template": "{prompt}|{answer}|{response}", **keys}
    data = table(Jsonl, {"judge_server": keys}, path=str(on_disk / "sums.jsonl"), eval_share=0.0)
    verifier = JudgeServer(data.keys, type("C", (), {"check": lambda self: None})(), "d")
    return verifier, data.prompts("train")


def test_a_judge_behind_a_server(on_disk, server, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", "secret")
    verifier, prompts = asking(on_disk, server, token_env="THE_TOKEN")
    answers = [(p, f"it is {p.answer if i % 3 else 'x'}") for i, p in enumerate(prompts)]
    assert verifier.score(answers) == [float(i % 3 > 0) for i in range(len(prompts))]
    assert set(server.seen) == {("/v1/chat/completions", "Bearer secret", "big")}


def test_a_server_that_fails_is_asked_again_and_then_named(on_disk, server):
    verifier, prompts = asking(on_disk, server, tries=3)
    answers = [(prompts[3], "3")]
    server.codes = [503, 0]  # busy, then a page that is no JSON
    assert verifier.score(answers) == [1.0] and len(server.seen) == 3
    server.codes = [401]
    with pytest.raises(StageFailed, match=r"judge big of data.d at http.*401.*tried 1 times"):
        verifier.score(answers)
    server.codes = [500] * 3
    with pytest.raises(StageFailed, match=r"not today.*tried 3 times"):
        verifier.score(answers)
    server.shutdown()
    server.server_close()
    with pytest.raises(StageFailed, match=r"refused.*tried 3 times"):
        verifier.score(answers)


def test_a_judge_that_dies_in_an_answer_is_asked_again(on_disk, server):
    server.RequestHandlerClass = Dying
    verifier, prompts = asking(on_disk, server, tries=2)
    assert verifier.score([(prompts[3], prompts[3].answer)]) == [1.0] and len(server.seen) == 2
    server.seen.clear()
    verifier, prompts = asking(on_disk, server, tries=1)
    with pytest.raises(StageFailed, match=r"judge big of data.d at http.*IncompleteRead"):
        verifier.score([(prompts[3], prompts[3].answer)])
