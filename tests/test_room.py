"""The longest sequence of a model: positions that end (trl #3569), and rotations that change with
the longest sequence of a batch (Qwen #401). Refused in a plan, before the first step, and by the
model itself."""

import json

import pytest
import torch
import transformers
from architectures import write
from one_step import First, apart, by_transformers, opd, prompts, said

from conftest import make_model, make_model64
from opdctl.config.positions import Room, room_of
from opdctl.errors import RecipeError, UsageError
from opdctl.models.model import load, save
from opdctl.models.packing import pack
from opdctl.rollout.engines._vllm_plugins import require_fixed_rope
from opdctl.rollout.engines.transformers import Transformers
from opdctl.types import ScoreRequest
from running import carry_out, one_stage

SWITCH = 40
LONG = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": SWITCH}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
CHANGING = {
    "dynamic": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 8.0},
    "longrope": LONG,
}
DECIDED = {  # of every rope that transformers has: its configuration, the room
    "linear": ({"factor": 4.0}, (400, False)),
    "dynamic": ({"factor": 4.0}, (100, True)),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 50}, (200, False)),
    "longrope": ({"original_max_position_embeddings": 30, "long_factor": [2]}, (30, True)),
    "llama3": ({"factor": 8.0, "original_max_position_embeddings": 30}, (100, False)),
    "proportional": ({"factor": 1.0}, (100, False)),
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_every_kind_of_rope_is_decided_on(key):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) == set(DECIDED)
    for kind, (rope, expected) in DECIDED.items():
        name = "rope_type" if key == "rope_parameters" else "type"
        config = {"max_position_embeddings": 100, key: {name: kind, **rope}}
        room = room_of(config)
        assert (room.longest, room.switches) == expected, kind
        nested = {"sliding_attention": {name: "default"}, "full_attention": {name: kind, **rope}}
        room = room_of({"max_position_embeddings": 100, key: nested})
        assert room.switches == expected[1]
        assert room_of({"text_config": {**config, key: nested}}) == room


def test_the_room_of_other_positions():
    positions = {"max_position_embeddings": 100}
    assert room_of({"n_positions": 64}) == Room(64, "n_positions")
    assert room_of({}) == room_of({**positions, "alibi": True}) == Room()
    same = {**LONG, "long_factor": LONG["short_factor"]}  # no switch
    assert room_of({**positions, "rope_parameters": same}).longest == 100
    phi = {**positions, "original_max_position_embeddings": 20}
    phi["rope_scaling"] = {"type": "su", "short_factor": [1], "long_factor": [2]}
    assert room_of(phi).longest == 20
    qwen = room_of({**positions, "use_dynamic_ntk": True, "seq_length": 80})
    assert (qwen.longest, qwen.switches) == (80, True)
    three = {**positions, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    assert room_of(three).longest == 200


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """Models whose rotations change beyond SWITCH positions, two of each kind, and prompts."""
    place = tmp_path_factory.mktemp("changing")
    rows = [{"prompt": "7" * (i % 7) + f"+{i}=", "answer": str(i)} for i in range(12)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, rope in CHANGING.items():
        most = SWITCH if kind == "dynamic" else 4 * SWITCH
        keys = {"rope_parameters": rope, "max_position_embeddings": most}
        for seed, name in enumerate("st"):
            write(place / f"{kind} {name}", "llama", seed=seed, **keys)
    return place


@pytest.mark.parametrize("kind", CHANGING)
def test_rotations_that_a_longer_sequence_changes_are_used_below_the_switch(
    kind, changing, tmp_path
):
    """Up to the switch a sequence is the same beside any other and step by step; beyond, where
    transformers' own log-probs move by nats, nothing is computed."""
    model = load(str(changing / f"{kind} s"))
    assert (model.room.longest, model.room.switches) == (SWITCH, True)
    with torch.no_grad():
        ids = torch.arange(2 * (SWITCH + 24)).view(2, -1) % 200
        alone = model.net(ids[:1, :SWITCH]).logits[0, 12:].log_softmax(-1)
        beside = model.net(ids).logits[0, 12:SWITCH].log_softmax(-1)
        model.net(ids[:, :5])  # transformers goes back to its first frequencies
    assert (beside - alone).abs().max() > 0.5
    short, longest = (ScoreRequest(tuple(ids[0, :n].tolist()), 2) for n in (9, SWITCH))
    for one_row in (False, True):
        packed = pack([short, longest], model.pad, one_row=one_row)
        rows = model.backbone(**packed.inputs).last_hidden_state.flatten(0, 1)
        own = model.backbone(ids[:1, :SWITCH], use_cache=False).last_hidden_state[0, 1:-1]
        assert torch.allclose(rows[packed.prediction_N][7:], own, atol=1e-5)
        beyond = ScoreRequest(tuple(ids[0, : SWITCH + 1].tolist()), 2)
        with pytest.raises(UsageError, match=r"41 tokens, and .* reads 40 .*longest sequence"):
            model.backbone(**pack([short, beyond], model.pad, one_row=one_row).inputs)
    keys = {"student": f"{kind} s", "teacher": f"{kind} t", "signals": {"reverse_kl": {}}}
    data = {"sums": {"kind": "jsonl", "path": str(changing / "sums.jsonl"), "eval_share": 0}}
    longest = 1 + max(model.prompt_length(p) for p in _pool(changing, tmp_path, data, keys))
    room = SWITCH - longest + 1
    first = First(opd(changing, tmp_path, data=data, sampling={"max_tokens": room}, **keys))
    assert max(len(r.prompt_ids) + len(r.response_ids) for r in first.rollouts) == SWITCH
    expected = said(
        by_transformers(first.model, first.rollouts, 1.0, model.valid_V), first.rollouts
    )
    assert (first.columns["behaviour"] - expected).abs().max() < 2e-5
    with pytest.raises(UsageError, match=r"with a response of \d+ may have 41 tokens"):
        First(opd(changing, tmp_path, data=data, sampling={"max_tokens": room + 1}, **keys))
    with pytest.raises(RecipeError, match=r"may have 41 tokens.*longest sequence of a batch"):
        opd(changing, tmp_path, data=data, sampling={"max_tokens": SWITCH}, **keys)


def test_vllm_rotates_as_the_trainer_or_is_refused(changing):
    """It has one table for all lengths, of longrope the short one up to the switch."""
    dynamic, long = (load(str(changing / f"{kind} s")) for kind in CHANGING)
    require_fixed_rope(make_model(), None)
    require_fixed_rope(long, SWITCH)
    for model, longest in ((dynamic, SWITCH), (long, SWITCH + 1), (long, None)):
        with pytest.raises(UsageError, match="other rotations than the trainer's below 40"):
            require_fixed_rope(model, longest)


def _pool(changing, tmp_path, data, keys):
    return opd(changing, tmp_path, data=data, **keys).prompts.of("sums", "train")


def test_rotations_that_change_in_a_way_unknown_here_are_refused_at_load(tmp_path, monkeypatch):
    """The check sees as far as the model reads, though it runs on six tokens."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    write(tmp_path / "m", "llama")
    forward = LlamaRotaryEmbedding.forward

    def stretched(self, x, position_ids):
        far = bool(position_ids.max() >= 100)  # of 128
        cos, sin = forward(self, x, position_ids)
        return (cos * 1.5, sin * 1.5) if far else (cos, sin)

    assert load(str(tmp_path / "m"))
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", stretched)
    with pytest.raises(UsageError, match="beside a sequence of 128 tokens a shorter one has other"):
        load(str(tmp_path / "m"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Models of 64 learned, 64 rotated and 128 rotated positions; prompts with long answers."""
    place = tmp_path_factory.mktemp("short")
    rotated = make_model()
    rotated.net.config.max_position_embeddings = 64
    for name, model in (("learned", make_model64()), ("rotated", rotated), ("long", make_model(1))):
        save(model, place / name)
    rows = [
        {"prompt": f"{i}=", "answer": "1", "much": "1 " * (20 + 20 * (i == 3))} for i in range(6)
    ]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.mark.parametrize("name", ["learned", "rotated"])
def test_a_response_beyond_the_positions_is_refused_where_it_is_known(name, short, tmp_path):
    """By a plan from the sizes, when a stage starts from its prompts, then by the engine."""
    keys = {"student": name, "teacher": name}
    for refused, more in ((64, {}), (60, {"prompts": {"per_step": 6, "max_tokens": 5}})):
        with pytest.raises(RecipeError, match=r"may have 65 tokens, and .* reads 64") as caught:
            opd(short, tmp_path, sampling={"max_tokens": refused}, **more, **keys)
        (problem,) = caught.value.problems
        assert problem.path == "stages.it.sampling.max_tokens"
    assert opd(short, tmp_path, sampling={"max_tokens": 59}, **more, **keys)
    ctx = opd(short, tmp_path, sampling={"max_tokens": 61}, **keys)  # and two or three of a prompt
    with pytest.raises(UsageError, match=r"the prompt '\d=' of 4 tokens with a response of 61"):
        carry_out(ctx)
    assert not (ctx.folder / "metrics.jsonl").exists()
    model = load(str(short / name), dtype="float64" if name == "learned" else "float32")
    with pytest.raises(UsageError, match="may have 65 tokens"):
        Transformers(model, 8).generate([[5] * 60], [1], temperature=1.0, max_tokens=5)
    (sample,) = Transformers(model, 8).generate([[5] * 60], [1], temperature=1.0, max_tokens=4)
    assert len(sample.ids) <= 4


def test_a_teacher_of_fewer_positions_and_stages_before(short, tmp_path):
    """The shortest model of a stage counts; a stage's output reads what its start does."""
    from opdctl.recipe.recipe import resolve

    with pytest.raises(RecipeError, match=r"may have 101 tokens, and .*/rotated reads 64"):
        opd(short, tmp_path, student="long", teacher="rotated", sampling={"max_tokens": 100})
    ctx = opd(short, tmp_path, student="long", teacher="rotated", sampling={"max_tokens": 62})
    with pytest.raises(UsageError, match=r"with a response of 62 .* and .*/rotated reads 64"):
        First(ctx)
    made = {"kind": "pretrain", "model": {"context": 32}}
    stages = {"p": made, "s": {"kind": "sft", "student": "stage:p"}}
    stages["e"] = {"kind": "evaluate", "student": "stage:s", "sampling": {"max_tokens": 40}}
    with pytest.raises(RecipeError, match=r"stage:s reads 32 \(stages.p.model.context\)"):
        resolve({"name": "n", "data": {"sums": prompts(short)}, "stages": stages}, "n")


@pytest.mark.parametrize("student", ["learned", "rotated"])
def test_a_demonstration_beyond_the_positions_is_refused_before_the_first_step(
    student, short, tmp_path
):
    keys = {"kind": "sft", "student": str(short / student), "steps": 3}
    keys |= {"sources": {"dataset": {}}, "prompts": {"per_step": 6}}
    runtime = {"dtype": "float64" if student == "learned" else "float32"}
    ctx = one_stage(tmp_path / "run", {"sums": prompts(short, "much")}, runtime=runtime, **keys)
    with pytest.raises(UsageError, match=r"the prompt '3=' of \d tokens with its answer of 8\d"):
        carry_out(ctx)
    assert not (ctx.folder / "metrics.jsonl").exists()


def test_an_evaluation_looks_at_its_prompts_first(short, tmp_path):
    keys = {"kind": "evaluate", "student": str(short / "rotated"), "sampling": {"max_tokens": 61}}
    data = {"sums": prompts(short) | {"eval_share": 0.5}}
    with pytest.raises(UsageError, match="with a response of 61 may have 65 tokens"):
        carry_out(one_stage(tmp_path / "run", data, **keys))


@torch.no_grad()
def test_what_a_configuration_says_is_what_the_model_reads(tmp_path):
    """The guard does not cut into the positions that are there."""
    write(tmp_path / "m", "gpt2", n_positions=24)
    model = load(str(tmp_path / "m"))
    whole = torch.arange(24)[None]
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")(whole).logits
    ours = model.logits(model.backbone(whole).last_hidden_state[0])[:, : model.valid_V]
    assert apart(ours, own[0, :, : model.valid_V]) < 1e-5
    with pytest.raises(UsageError, match=r"25 tokens, and .* reads 24 \(n_positions\)"):
        model.backbone(torch.arange(25)[None])
