"""A step of on-policy distillation, sampling to update, on one CPU thread: ours beside TRL's.

    python benchmarks/opd_step.py [--json] [--rounds 3] [--only 0.1M,0.85M,5M]

Needs trl (pip install trl==1.16.0). Both sides load one pair of random Qwen3 models of one shape,
answer the same prompts with equally many tokens, and take the exact reverse KL over the whole
vocabulary and AdamW with the same settings. Ours is an opd stage as its worker runs it, TRL's is
its DistillationTrainer, in fresh processes that take turns. A step ends where the next begins:
logs are in it; start, load and save are not. Prints CPU seconds of a step and its phases (medians
over processes of their medians), wall seconds, and the fastest step, which other load moves least.
Update is all but sampling and the teacher's pass. Leaves out GPUs, vLLM, threads, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

BATCH, NEW_TOKENS, LR = 32, 32, 1e-3
STEPS, WARM = 7, 2  # steps timed in a process, and how many of them do not count
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.1M": (64, 2, 2, 1), "0.85M": (128, 4, 4, 2), "5M": (256, 6, 8, 4)}
PHASES = ("step", "rollout", "score", "update")
SIDES = ("ours", "trl")
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
        vocab_size=256,  # no row for the end token: on both sides no response can end early
        head_dim=32,
        intermediate_size=3 * shape[0],
        initializer_range=shape[0] ** -0.5,  # logits of variance one: at 0.02 all models are alike
        tie_word_embeddings=True,
        **dict(zip(KEYS, shape, strict=True)),
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        net = Qwen3ForCausalLM(config)
        net.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    numbers = range(BATCH * (STEPS + 1))
    rows = [{"prompt": f"What is {i} squared?", "answer": i * i} for i in numbers]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return net.num_parameters()


def now():
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
    step = np.diff(marks["step"], axis=0)[WARM:]
    rollout, score = (np.array(marks[phase])[WARM:STEPS] for phase in ("rollout", "score"))
    result = {"divergence": divergence, "fastest": step[:, 0].min()}
    for i, clock in enumerate(("cpu", "wall")):
        medians = np.median([step, rollout, score, step - rollout - score], axis=1)[:, i]
        result[clock] = dict(zip(PHASES, medians, strict=True))
    return {"side": side, **result}


def child(side, folder):
    """Measure one side in a fresh process."""
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--case", side, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | limits)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(rows):
    """Print the table of one size."""
    print(f"{rows[0]['size']:9}", *(f"{name:>10}" for name in COLUMNS))
    table = {}
    for side in SIDES:
        mine = [row for row in rows if row["side"] == side]
        table[side] = [median(row["cpu"][phase] for row in mine) for phase in PHASES]
        wall, least = median(r["wall"]["step"] for r in mine), min(r["fastest"] for r in mine)
        table[side] += [wall, least, mine[0]["divergence"]]
    table["trl/ours"] = [t / o for t, o in zip(table["trl"], table["ours"], strict=True)]
    for name, cells in table.items():
        print(f"{name:9}", *(f"{cell:10.3f}" for cell in cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(SHAPES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], Path(args.case[1]))))
        return
    rows = []
    for size in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            kind = {"size": size, "parameters": prepare(Path(folder), SHAPES[size])}
            measured = [kind | child(side, folder) for _ in range(args.rounds) for side in SIDES]
        rows += measured
        if not args.json:
            show(measured)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
