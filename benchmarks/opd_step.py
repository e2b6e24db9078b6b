"""A step of on-policy distillation, sampling to update, on one CPU thread: ours beside TRL's.

    python benchmarks/opd_step.py [--json] [--rounds 3] [--only 0.1M,0.85M,5M]
    python benchmarks/opd_step.py --rounds 1 --only 0.1M     (tries the script)

Without trl (pip install trl==1.16.0) ours is measured alone. Both sides load one pair of random
Qwen3 models of one shape, answer the same prompts with equally many tokens, and take the exact
reverse KL over the whole vocabulary and AdamW with the same settings. The weights of the models
make an end token all but impossible (``never_ends``), so every response has full length. Ours is
an opd stage as its worker runs it, TRL's is its DistillationTrainer, in fresh processes that take
turns. A step ends where the next begins: logs are in it; start, load and save are not. Prints CPU
seconds of a step and its phases (medians over processes of their medians), wall seconds, and the
fastest step, which other load moves least. Update is all but sampling and the teacher's pass.
Leaves out GPUs, vLLM, threads, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from measuring import check, chosen_from, in_a_process, installed

END = 256  # id of the end token, after the letters
BATCH, NEW_TOKENS, LR = 32, 32, 1e-3
STEPS, UNTIMED = 7, 2  # steps timed in a process, and how many of them do not count
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.1M": (64, 2, 2, 1), "0.85M": (128, 4, 4, 2), "5M": (256, 6, 8, 4)}
PHASES = ("step", "rollout", "score", "update")
WARM = ["opdctl.process.warm"]  # what a worker of ours is forked from
COLUMNS = (*PHASES, "wall step", "fastest", "first KL")


def prepare(folder, shape):
    """Write a student, a teacher and prompts; returns the parameters of each model."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = Tokenizer(models.BPE({chr(i): i for i in range(256)}, []))
    special = {"pad_token": chr(0), "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    config = Qwen3Config(
        vocab_size=257,  # the letters and the end token
        head_dim=32,
        intermediate_size=3 * shape[0],
        initializer_range=shape[0] ** -0.5,  # logits of variance one: at 0.02 all models are alike
        tie_word_embeddings=True,
        eos_token_id=END,
        **dict(zip(KEYS, shape, strict=True)),
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        net = never_ends(Qwen3ForCausalLM(config))
        net.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    numbers = range(BATCH * (STEPS + 1))
    rows = [{"prompt": f"What is {i} squared?", "answer": i * i} for i in numbers]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return net.num_parameters()


def never_ends(net):
    """Make the end token practically impossible, in the weights: neither side has to forbid it.

    Every token puts one number into the first dimension of the residual stream and no layer writes
    there, so it is positive in every state. The end token's row of the tied head has a large
    negative number there, so its logit lies far below all others (in a random model of these
    shapes by over 40 nats) in every step of the few that are trained. The other rows have equal
    numbers, which cancel in the softmax.
    """
    import torch

    with torch.no_grad():
        head = net.get_input_embeddings().weight
        head[:, 0] = 1.0
        head[END, 0] = -200.0
        for layer in net.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    return net


def now():
    """Return CPU and wall seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def ours(folder, marks):
    """Run an opd stage; return its first divergence and the tokens of each step."""
    from opdctl.process import worker
    from opdctl.recipe.recipe import resolve
    from opdctl.run.launch import new_run
    from opdctl.run.rundir import read_rows
    from opdctl.train import loop

    class Clock(loop.Clock):  # the loop's own has no CPU seconds
        def __init__(self):
            self.since = now()
            marks["step"].append(self.since)
            super().__init__()

        def lap(self, phase):
            super().lap(phase)
            marks.get(phase, []).append(now() - self.since)
            self.since = now()

    loop.Clock = Clock
    models = {"student": f"{folder}/student", "teachers": {"teacher": f"{folder}/teacher"}}
    size = {"prompts": {"per_step": BATCH}, "sampling": {"max_tokens": NEW_TOKENS}}
    loss = {"divergence": {"direction": "reverse", "normalise": "token_mean"}}
    train = {"signals": {}, "objectives": loss, "optim": {"lr": LR}, "steps": STEPS + 1}
    data = {"kind": "jsonl", "path": f"{folder}/prompts.jsonl", "eval_share": 0}
    stages = {"opd": {"kind": "opd", **models, **size, **train}}
    tree = {"name": "step", "data": {"own": data}, "stages": stages, "runtime": {"device": "cpu"}}
    run = new_run(resolve(tree, "opd_step.py"), "", folder / f"run-{os.getpid()}")
    assert worker.run_stage(run.path, "opd") == 0, "the stage failed"
    rows = read_rows(run.stage("opd") / "metrics.jsonl")
    return rows[0]["divergence"], [row["tokens"] for row in rows]


def trl(folder, marks):
    """Run a DistillationTrainer; return its first divergence and the tokens of each step."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    tokens = []

    class Timed(DistillationTrainer):
        def _generate_and_score_completions(self, inputs):  # a step's first act; only generates
            marks["step"].append(since := now())
            out = super()._generate_and_score_completions(inputs)
            marks["rollout"].append(now() - since)
            tokens.append(int(out["num_items_in_batch"]))
            return out

        def _get_last_hidden_state(self, net, *args, **options):
            since = now()
            out = super()._get_last_hidden_state(net, *args, **options)
            if net is self.teacher_model:
                marks["score"].append(now() - since)
            return out

    rows = map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
    size = {"per_device_train_batch_size": BATCH, "max_completion_length": NEW_TOKENS}
    optim = {"learning_rate": LR, "lr_scheduler_type": "constant", "adam_beta2": 0.95}
    off = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}  # as in ours
    log = {"max_steps": STEPS + 1, "logging_first_step": True}
    config = DistillationConfig(f"{folder}/trl", use_cpu=True, **size, **optim, **off, **log)
    trainer = Timed(f"{folder}/student", f"{folder}/teacher", config, Dataset.from_list(list(rows)))
    trainer.train()
    return trainer.state.log_history[0]["loss"], tokens


def measure(side, folder):
    """Measure some steps of one side, in a child process."""
    import torch

    torch.set_num_threads(1)
    marks = {"step": [], "rollout": [], "score": []}
    divergence, tokens = (ours if side == "ours" else trl)(folder, marks)
    assert tokens == [BATCH * NEW_TOKENS] * (STEPS + 1), tokens
    step = np.diff(marks["step"], axis=0)[UNTIMED:]
    rollout, score = (np.array(marks[phase])[UNTIMED:STEPS] for phase in ("rollout", "score"))
    result = {"divergence": divergence, "fastest": float(step[:, 0].min())}
    for i, clock in enumerate(("cpu", "wall")):
        medians = np.median([step, rollout, score, step - rollout - score], axis=1)[:, i]
        result[clock] = dict(zip(PHASES, medians.tolist(), strict=True))
    return {"side": side, **result}


def show(rows, sides):
    """Print the table of one size."""
    print(f"{rows[0]['size']:9}", *(f"{name:>10}" for name in COLUMNS))
    table = {}
    for side in sides:
        mine = [row for row in rows if row["side"] == side]
        table[side] = [median(row["cpu"][phase] for row in mine) for phase in PHASES]
        wall, least = median(r["wall"]["step"] for r in mine), min(r["fastest"] for r in mine)
        table[side] += [wall, least, mine[0]["divergence"]]
    if len(sides) > 1:
        table["trl/ours"] = [t / o for t, o in zip(table["trl"], table["ours"], strict=True)]
    for name, cells in table.items():
        print(f"{name:9}", *(f"{cell:10.3f}" for cell in cells), flush=True)


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=chosen_from(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main():
    """Measure both sides at every size, print a table of each size, and check it."""
    args = arguments()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sides = ("ours", *installed({"trl": "trl"}))
    rows = []
    for size in args.only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kind = {
                "size": size,
                "parameters": in_a_process(prepare, folder, SHAPES[size], preload=WARM),
            }
            measured = [
                kind | in_a_process(measure, side, folder, preload=WARM)
                for _ in range(args.rounds)
                for side in sides
            ]
        check(measured, args.rounds * len(sides), ("parameters", "fastest", "divergence"))
        for clock in ("cpu", "wall"):
            check([row[clock] for row in measured], len(measured), PHASES)
        kls = [row["divergence"] for row in measured]
        assert max(kls) < 1.01 * min(kls), f"{size}: the sides start at other divergences: {kls}"
        rows += measured
        if not args.json:
            show(measured, sides)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
