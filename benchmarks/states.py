"""One update from given rollouts: hidden states beside the divergences, at a larger vocabulary.

    python benchmarks/states.py [--tokens 512] [--vocab 32768] [--untied]
    python benchmarks/states.py --tokens 32 --vocab 64 --repeats 1     (tries the script)

A random Qwen3 (d = 256, four layers) is taught by another on 16 sequences. Each loss runs in a
process of its own: what the teacher is asked for, the update (forward, loss, backward) and the
optimizer's step. Prints CPU seconds (median of repeats, one thread) of the two passes, and peak
resident memory beyond the models, the moments and the gradients that every loss has: a larger one
means that the loss needs it. Sampling is left out: it is the same for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from measuring import check, in_a_process

LOSSES = {
    "hidden, all layers": ("hidden", {"layers": "all"}, {"hidden", "inner"}),
    "hidden, last layer": ("hidden", {"layers": "last"}, {"hidden"}),
    "bridge, all layers": ("bridge", {}, {"hidden", "inner"}),
    "sampled token": ("policy_gradient", {}, {"logprobs"}),
    "top 16, tail": (
        "divergence",
        {"support": "topk_student", "overlap": False},
        {"hidden", "lse", "topk", "entropy"},
    ),
    "full vocabulary": ("divergence", {"overlap": False}, {"hidden"}),
}


def model_of(seed, vocab, tied):
    """Make a random model whose tokenizer has ``vocab`` tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opdctl.models.from_nothing import new_tokenizer
    from opdctl.models.model import Model

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        tie_word_embeddings=tied,
    )
    model = Model(Qwen3ForCausalLM(config).train(False), new_tokenizer(["abc"]), str(seed))
    model.valid_V = vocab  # the tokenizer of a real model has all of them
    return model


def resident(field):
    """Return a field of /proc/self/status in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def objective_of(name):
    """Make the objective of a loss; a bridge gets random maps."""
    import torch

    from opdctl.config.registry import member

    kind, keys, _ = LOSSES[name]
    cls = member("objectives", kind)
    objective = cls(cls.Config(**keys))
    if kind == "bridge":
        shapes = ((4, 8, 256), (4, 8, 256), (4, 256))
        objective.maps["t"] = tuple(torch.randn(*shape) for shape in shapes)
    return objective


def measure(name, tokens, vocab, tied, repeats):
    """Measure one loss, in a child process."""
    import torch

    from opdctl.config.settings import Optim
    from opdctl.loss.token_view import LossTerm
    from opdctl.models.hidden_layers import layers_of
    from opdctl.scoring.asks import Asks, Pass
    from opdctl.scoring.score import score
    from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
    from opdctl.train import update
    from opdctl.types import ScoreRequest

    torch.set_num_threads(1)
    kind, keys, want = LOSSES[name]
    student, teacher = (model_of(seed, vocab, tied) for seed in (0, 1))
    teacher.net.requires_grad_(False)
    layers = layers_of(student, ["last" if keys.get("layers") == "last" else "all"])
    objective = objective_of(name)
    optimizer = update.make_optimizer(student, Optim(lr=1e-5))
    prompt, generator = 32, torch.Generator().manual_seed(0)

    def step(count, length):
        ids_BT = torch.randint(0, vocab, (count, prompt + length), generator=generator)
        spans = [ScoreRequest(tuple(ids), prompt) for ids in ids_BT.tolist()]
        before = time.process_time()
        scores = score(teacher, spans, Asks.of(*want, layers=layers))
        N, seconds = count * length, [time.process_time() - before]
        columns, taught = {"advantage": torch.randn(N, generator=generator)}, None
        if scores.hidden_ND is not None:
            numbers = scores.per_token
            of = (scores.hidden_ND, numbers.get("lse"), scores.top_NK, numbers.get("entropy"))
            head = None if kind in ("hidden", "bridge") else teacher.lm_head()
            taught = TeacherCache(
                [CachedTeacher(head, *of, None, scores.inner_NLD, "t")], torch.device("cpu")
            )
            columns["teacher_index"] = torch.zeros(N, 1, dtype=torch.long)
            columns |= {"teacher_row": torch.arange(N)[:, None], "pair_weight": torch.ones(N, 1)}
        before = time.process_time()
        batch = update.Batch(spans, columns, [LossTerm(objective)], taught, layers)
        update.accumulate(student, batch, Pass(micro_batch=4))
        update.step(student, optimizer, 1e-5, 1.0)
        return [*seconds, time.process_time() - before]

    step(1, 8)  # makes the moments
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark again
    seconds = [step(16, tokens // 16) for _ in range(repeats)]
    score_s, update_s = (statistics.median(each) for each in zip(*seconds, strict=True))
    peak = resident("VmHWM") - held
    return {"loss": name, "score": score_s, "update": update_s, "peak": peak, "held": held}


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--untied", action="store_true")
    return parser.parse_args()


def main():
    """Measure every loss, print a table, and check it."""
    options = arguments()
    size = (options.tokens, options.vocab, not options.untied, options.repeats)
    print("| loss | teacher | update | held before | peak beyond it |\n|---|---|---|---|---|")
    rows = []
    for name in LOSSES:
        rows.append(row := in_a_process(measure, name, *size, preload=["opdctl.process.warm"]))
        print(
            f"| {name} | {row['score']:.2f} s | {row['update']:.2f} s | {row['held']:.0f} MiB "
            f"| {row['peak']:.0f} MiB |",
            flush=True,
        )
    check(rows, len(LOSSES), ("score", "update", "held"), ("peak",))


if __name__ == "__main__":
    main()
