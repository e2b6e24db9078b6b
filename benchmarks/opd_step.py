"""A step of on-policy distillation, sampling to update, on one CPU thread: ours beside TRL.

    pip install trl==1.16.0
    python benchmarks/opd_step.py [--json] [--rounds 3] [--only 0.1M,0.85M,5M]

Both sides load one pair of random Qwen3 models of the same shape, answer the same prompts with
equally many tokens, and take the exact reverse KL over the whole vocabulary and AdamW with the
same settings. Ours is an opd stage as its worker runs it, TRL's is its DistillationTrainer; each
runs in a fresh process, in turn, and its first steps are left out. A step ends where the next
begins, so logging is in it and start, load and save are not. Prints the medians of CPU and wall
seconds of a step and of its phases. Update is what is neither sampling nor the teacher's forward
pass. Leaves out vLLM, GPUs, threads, several updates per batch, checkpoints.
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
WARM, STEPS = 2, 7  # steps a process takes before those that count, and with them
SHAPES = {  # hidden, layers, heads, kv heads, intermediate; heads are 32 wide
    "0.1M": (64, 2, 2, 1, 128),
    "0.85M": (128, 4, 4, 2, 400),
    "5M": (256, 6, 8, 4, 800),
}
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_models(folder, shape):
    """Write a student, a teacher and their prompts; returns the parameters of each."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<|user|>", "<|assistant|>", "<|pad|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        padding_side="left",
    )
    hidden, layers, heads, kv_heads, intermediate = shape
    config = Qwen3Config(
        vocab_size=tokenizer.eos_token_id,  # its end has no row: no response can sample it
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        intermediate_size=intermediate,
        initializer_range=hidden**-0.5,  # logits of variance one, not nearly uniform
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        net = Qwen3ForCausalLM(config)
        net.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [f"sum of {i} and {i * i} =" for i in range(BATCH * (STEPS + 1))]
    lines = [json.dumps({"prompt": text, "answer": ""}) + "\n" for text in rows]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return sum(p.numel() for p in net.parameters())


def now():
    """Wall and CPU seconds."""
    import numpy as np

    return np.array([time.perf_counter(), time.process_time()])


class Watch:
    """Seconds of each step and of its phases."""

    def __init__(self):
        self.begun = []
        self.phases = {"rollout": [], "score": []}

    def begin(self):
        self.begun.append(now())

    def add(self, phase, since):
        self.phases[phase].append(now() - since)

    def medians(self):
        """{clock: {phase: median seconds of the steps that count}}."""
        import numpy as np

        seconds = {name: np.stack(spent)[WARM:-1] for name, spent in self.phases.items()}
        seconds["step"] = np.diff(self.begun, axis=0)[WARM:]
        seconds["update"] = seconds["step"] - seconds["rollout"] - seconds["score"]
        return {
            clock: {name: float(np.median(spent[:, i])) for name, spent in seconds.items()}
            for i, clock in enumerate(("wall", "cpu"))
        }


def ours(folder):
    from opdctl import worker
    from opdctl.core import context, loop
    from opdctl.launch import new_run
    from opdctl.recipe import resolve
    from opdctl.rundir import read_rows

    watch = Watch()

    class Clock(context.Clock):
        """The loop's own, which has no CPU seconds, and beside it those."""

        def __init__(self):
            watch.begin()
            self.since = watch.begun[-1]
            super().__init__()

        def lap(self, phase):
            super().lap(phase)
            if phase in watch.phases:
                watch.add(phase, self.since)
            self.since = now()

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
    runtime = {"device": "cpu", "checkpoint_every": STEPS + 2}
    tree = {"name": "step", "data": {"own": data}, "stages": {"opd": stage}, "runtime": runtime}
    with tempfile.TemporaryDirectory() as out:
        run = new_run(resolve(tree, "benchmark"), "", Path(out) / "run")
        if worker.run_stage(run.path, "opd"):
            raise SystemExit("the stage failed")
        rows = read_rows(run.stage("opd") / "metrics.jsonl")
    return watch, rows[0]["divergence"], [row["tokens"] for row in rows]


def trl(folder):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    watch, tokens = Watch(), []

    class Timed(DistillationTrainer):
        def _generate_and_score_completions(self, inputs):  # its teacher is asked in the loss
            since = now()
            out = super()._generate_and_score_completions(inputs)
            watch.add("rollout", since)
            tokens.append(int(out["num_items_in_batch"]))
            return out

        def _get_last_hidden_state(self, net, *args, **options):
            since = now()
            out = super()._get_last_hidden_state(net, *args, **options)
            if net is teacher:
                watch.add("score", since)
            return out

    class Begin(TrainerCallback):
        def on_step_begin(self, *args, **options):
            watch.begin()

    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder / name) for name in ("student", "teacher"))
    rows = map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,  # this and checkpointing are its defaults: other numbers, and slower here
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_first_step=True,
            per_device_train_batch_size=BATCH,
            max_completion_length=NEW_TOKENS,
            max_steps=STEPS + 1,
            beta=1.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
        )
        trainer = Timed(
            student,
            teacher,
            config,
            Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
            callbacks=[Begin()],
        )
        trainer.train()
    return watch, trainer.state.log_history[0]["loss"], tokens


SIDES = {"ours": ours, "trl": trl}


def measure(side, folder):
    """What a child process does: some steps of one side."""
    import torch

    torch.set_num_threads(1)
    watch, divergence, tokens = SIDES[side](folder)
    if set(tokens) != {BATCH * NEW_TOKENS}:
        raise SystemExit(f"{side}: steps of {sorted(set(tokens))} tokens")
    return {"divergence": divergence, "steps": len(watch.begun) - WARM - 1, **watch.medians()}


def child(side, folder):
    """Measure one side in a fresh process."""
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--case", side, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | single,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            count = make_models(Path(folder), SHAPES[name])
            for number in range(args.rounds):
                for side in sorted(SIDES, reverse=number % 2):
                    found = {"round": number, **child(side, folder)}
                    rows.append({"size": name, "parameters": count, "side": side, **found})
        if not args.json:
            show([row for row in rows if row["size"] == name])
    if args.json:
        print(json.dumps(rows))


def show(rows):
    """The table of one size: CPU seconds, medians over the rounds."""
    step = {side: [r["cpu"]["step"] for r in rows if r["side"] == side] for side in SIDES}
    each = sorted(t / o for t, o in zip(step["trl"], step["ours"], strict=True))
    print(f"{rows[0]['size']}, {rows[0]['parameters']} parameters")
    print("         CPU: step  rollout    score   update   wall: step   first divergence")
    table = {}
    for side in SIDES:
        mine = [r for r in rows if r["side"] == side]
        cpu = [median(r["cpu"][k] for r in mine) for k in ("step", "rollout", "score", "update")]
        table[side] = [*cpu, median(r["wall"]["step"] for r in mine)]
        print(line(side, table[side], f"{mine[0]['divergence']:19.3f}"))
    ratios = [t / o for t, o in zip(table["trl"], table["ours"], strict=True)]
    print(line("trl/ours", ratios, f"  steps of a round: {each[0]:.2f} to {each[-1]:.2f}"))
    print(flush=True)


def line(name, values, last):
    step, rollout, score, update, wall = values
    return f"{name:8} {step:10.3f} {rollout:8.3f} {score:8.3f} {update:8.3f} {wall:12.3f} {last}"


if __name__ == "__main__":
    main()
