"""A step of on-policy distillation, sampling to update, on one CPU thread: ours beside TRL's.

    python benchmarks/opd_step.py [--json] [--rounds 3] [--only 0.1M,0.85M,5M]

Needs trl (pip install trl==1.16.0). Both sides load one pair of random Qwen3 models of one shape,
answer the same prompts with equally many tokens, and take the exact reverse KL over the whole
vocabulary and AdamW with the same settings. Ours is an opd stage as its worker runs it, TRL's is
its DistillationTrainer; each runs in fresh processes, in turn. A step ends where the next begins,
so logs are in it; start, load and save are not. Prints medians over the rounds of each process's
median step and phases, and the fastest step, which other load on the machine moves least. Update
is what is neither sampling nor the teacher's pass. Leaves out GPUs, vLLM, threads, checkpoints.
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

BATCH, NEW_TOKENS, LR = 32, 32, 1e-3
WARM, STEPS = 2, 7  # steps of a process that are timed, and how many of them do not count
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.1M": (64, 2, 2, 1), "0.85M": (128, 4, 4, 2), "5M": (256, 6, 8, 4)}
PHASES = ("step", "rollout", "score", "update")


def prepare(folder, shape):
    """Write a student, a teacher and prompts; returns the parameters of each model."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    characters = Tokenizer(models.BPE({chr(i): i for i in range(256)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=chr(0), eos_token="<end>", padding_side="left"
    )
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
    texts = [f"sum of {i} and {i * i} =" for i in range(BATCH * (STEPS + 1))]
    rows = [json.dumps({"prompt": text, "answer": ""}) for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return net.num_parameters()


def now():
    import numpy as np

    return np.array([time.process_time(), time.perf_counter()])


def ours(folder, marks):
    """First divergence and tokens of each step of an opd stage."""
    from opdctl import worker
    from opdctl.core import context, loop
    from opdctl.launch import new_run
    from opdctl.recipe import resolve
    from opdctl.rundir import read_rows

    class Clock(context.Clock):  # the loop's own has no CPU seconds
        def __init__(self):
            self.since = now()
            marks["step"].append(self.since)
            super().__init__()

        def lap(self, phase):
            super().lap(phase)
            since, self.since = self.since, now()
            if phase in marks:
                marks[phase].append(self.since - since)

    loop.Clock = Clock
    stage = {
        "kind": "opd",
        "student": str(folder / "student"),
        "teachers": {"teacher": str(folder / "teacher")},
        "signals": {},
        "objectives": {"divergence": {"direction": "reverse", "normalise": "token_mean"}},
        "prompts": {"per_step": BATCH, "samples": 1},
        "sampling": {"max_tokens": NEW_TOKENS},
        "optim": {"lr": LR},
        "steps": STEPS + 1,
    }
    data = {"kind": "jsonl", "path": str(folder / "prompts.jsonl"), "eval_share": 0}
    tree = {"name": "step", "data": {"own": data}, "stages": {"opd": stage}}
    with tempfile.TemporaryDirectory() as out:
        recipe = resolve(tree, "opd_step.py", overrides=("runtime.device=cpu",))
        run = new_run(recipe, "", Path(out) / "run")
        if worker.run_stage(run.path, "opd"):
            raise SystemExit("the stage failed")
        rows = read_rows(run.stage("opd") / "metrics.jsonl")
    return rows[0]["divergence"], [row["tokens"] for row in rows]


def trl(folder, marks):
    """First divergence and tokens of each step of a DistillationTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    tokens = []

    class Timed(DistillationTrainer):
        def _generate_and_score_completions(self, inputs):  # it only generates
            since = now()
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

    class Begin(TrainerCallback):
        def on_step_begin(self, *args, **options):
            marks["step"].append(now())

    lines = (folder / "prompts.jsonl").read_text().splitlines()
    prompts = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])
    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            out,
            use_cpu=True,
            bf16=False,  # its default, as is checkpointing: ours does neither
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_completion_length=NEW_TOKENS,
            max_steps=STEPS + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            logging_first_step=True,
            save_strategy="no",
        )
        pair = (str(folder / name) for name in ("student", "teacher"))
        trainer = Timed(*pair, config, prompts, callbacks=[Begin()])
        trainer.train()
    return trainer.state.log_history[0]["loss"], tokens


def measure(side, folder):
    """What a child process does: some steps of one side."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    marks = {"step": [], "rollout": [], "score": []}
    divergence, tokens = {"ours": ours, "trl": trl}[side](folder, marks)
    if tokens != [BATCH * NEW_TOKENS] * (STEPS + 1):
        raise SystemExit(f"{side} took steps of {tokens} tokens")
    spent = {phase: np.array(each)[WARM:STEPS] for phase, each in marks.items()}
    spent["step"] = np.diff(marks["step"], axis=0)[WARM:]
    spent["update"] = spent["step"] - spent["rollout"] - spent["score"]
    found = {"divergence": divergence, "fastest": spent["step"][:, 0].min()}
    for i, clock in enumerate(("cpu", "wall")):
        found[clock] = {phase: np.median(spent[phase][:, i]) for phase in PHASES}
    return found


def child(side, folder):
    """Run one side in a fresh process."""
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--case", side, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | limits)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"side": side, **json.loads(done.stdout.strip().splitlines()[-1])}


def show(rows):
    """Print the table of one size."""
    table = {}
    for side in ("ours", "trl"):
        mine = [row for row in rows if row["side"] == side]
        values = [median(row["cpu"][phase] for row in mine) for phase in PHASES]
        values += [median(row["wall"]["step"] for row in mine), min(r["fastest"] for r in mine)]
        table[side] = [*values, mine[0]["divergence"]]
    table["trl/ours"] = [t / o for t, o in zip(table["trl"], table["ours"], strict=True)]
    names = (*PHASES, "wall step", "fastest", "first KL")
    print(f"{rows[0]['size']:9}" + "".join(f"{name:>11}" for name in names))
    for side, values in table.items():
        print(f"{side:9}" + "".join(f"{value:11.3f}" for value in values), flush=True)


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
            turns = [("ours", "trl") if i % 2 else ("trl", "ours") for i in range(args.rounds)]
            found = [kind | child(side, folder) for turn in turns for side in turn]
        rows += found
        if not args.json:
            show(found)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
