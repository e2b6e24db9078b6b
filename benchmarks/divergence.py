"""The divergence of one student and its teacher, from hidden states: ours beside its peers.

Each loss runs in a process of its own on identical inputs, forward and backward, head trained:

    python benchmarks/divergence.py [--swift gkd_loss.py] [--json] [--only cost,memory,error]
    python benchmarks/divergence.py --small       (tries the script: tiny shapes, no true numbers)

Prints CPU seconds (median of repeats, one thread), peak resident memory beyond the inputs, and
the relative norm error of both gradients against float64. Peers are those that are installed:
TRL's ChunkedDivergenceFunction (pip install trl==1.16.0), Liger's LigerFusedLinearJSDLoss (pip
install liger-kernel==0.8.5), and ms-swift's gkd_loss, which depends on torch alone while its
package wants an old trl: pip download --no-deps ms-swift==4.6.0, unzip, and name the file. All
fp32 rows must give one value of the loss. benchmarks/divergence_gpu.py is for a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

from measuring import check, chosen_from, in_a_process, installed

NOISE = 0.05  # teacher = student's hidden states + this share of noise: late in distillation


def inputs(tokens, hidden, vocab, dtype, near, device, teacher_hidden=None):
    """Draw hidden states and heads of a student and a teacher, and a mask over half the tokens."""
    import torch

    g = torch.Generator().manual_seed(0)
    scale = 4 * hidden**-0.5  # logits with the spread of a language model's
    student = torch.randn(tokens, hidden, generator=g)
    head = torch.randn(vocab, hidden, generator=g) * scale
    if near:
        teacher = student + NOISE * torch.randn(tokens, hidden, generator=g)
        teacher_head = head.clone()
    else:
        wide = teacher_hidden or hidden
        teacher = torch.randn(tokens, wide, generator=g)
        teacher_head = torch.randn(vocab, wide, generator=g) * 4 * wide**-0.5
    mask = torch.arange(tokens) % 2 == 0
    for kind in dtype.split("->"):  # "bfloat16->float32": values of the one in the other
        student, head, teacher, teacher_head = (
            t.to(getattr(torch, kind)) for t in (student, head, teacher, teacher_head)
        )
    tensors = [t.to(device) for t in (student, head, teacher, teacher_head)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], mask.to(device)]


def ours(beta, chunk_mib=0, kernel="auto", teachers=1, overlap=False):
    import torch

    from opdctl.kernels.chunks import rows_in
    from opdctl.kernels.head import Head
    from opdctl.kernels.select import rows_class
    from opdctl.loss.objectives.divergence import Divergence
    from opdctl.loss.token_view import LossTerm, weighted_sum
    from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache

    config = Divergence.Config(direction="jsd", beta=beta, overlap=overlap)

    def loss(student, head, teacher, teacher_head, mask):
        kept = mask.nonzero()[:, 0]
        n = len(kept)
        held = [
            CachedTeacher(Head(teacher_head, len(head)), h) for h in teacher[kept].chunk(teachers)
        ]
        index = torch.cat([torch.full((len(h.hidden_ND),), i) for i, h in enumerate(held)])
        row = torch.cat([torch.arange(len(h.hidden_ND)) for h in held])
        columns = {
            "teacher_index": index.to(head.device),
            "teacher_row": row.to(head.device),
            "pair_weight": torch.ones(n, device=head.device),
        }
        mine = Head(head, len(head))
        total, _ = weighted_sum(
            student[kept],
            mine,
            torch.zeros(n, dtype=torch.long, device=head.device),
            columns,
            [(LossTerm(Divergence(config)), torch.full((n,), 1 / n, device=head.device))],
            rows_of=rows_class(kernel, head.device),
            size=rows_in(chunk_mib, mine),
            teacher_cache=TeacherCache(held, head.device),
        )
        return total

    return loss


def dense(beta, compact=False):
    """Compute all logits, upcast after the product; of masked tokens too unless compacted."""
    import torch

    from opdctl.kernels.reference import endpoint

    def loss(student, head, teacher, teacher_head, mask):
        if compact:
            student, teacher, mask = student[mask], teacher[mask], mask[mask]
        s = (student @ head.T)[mask].float().log_softmax(-1)
        with torch.no_grad():
            t = (teacher @ teacher_head.T)[mask].float().log_softmax(-1)
        way = endpoint("jsd", beta)
        if way == "reverse":
            value = (s.exp() * (s - t)).sum(-1)
        elif way == "forward":
            value = (t.exp() * (t - s)).sum(-1)
        else:
            m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
            value = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
        return value.mean()

    return loss


def trl(beta, compact=False):
    """Call TRL's loss as its trainer does: masked tokens are dropped on Triton devices only."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student, head, teacher, teacher_head, mask):
        if student.is_cuda or compact:
            student, teacher, mask = student[mask], teacher[mask], mask[mask]
        value, _ = ChunkedDivergenceFunction.apply(
            student, head, None, teacher, teacher_head, None, beta
        )
        return value.masked_fill(~mask, 0).sum() / mask.sum()

    return loss


def liger(beta):
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(student, head, teacher, teacher_head, mask):
        form = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=student.is_cuda
        )
        labels = torch.where(mask, 0, -100)
        return form(student, head, teacher, teacher_head, labels)

    return loss


def swift(beta, path=""):
    import torch

    spec = importlib.util.spec_from_file_location("gkd_loss", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gkd_loss"] = module
    spec.loader.exec_module(module)

    def loss(student, head, teacher, teacher_head, mask):
        labels = torch.where(mask, 0, -100)[None]
        with torch.no_grad():
            full = module.TeacherOutput(full_logits=(teacher @ teacher_head.T)[None])
        total, count = module.gkd_loss((student @ head.T)[None], full, labels, beta, 1.0)
        return total / count

    return loss


def products(beta):
    """The four matrix products on the tokens that count, and almost nothing else: a floor."""

    def loss(student, head, teacher, teacher_head, mask):
        return ((student[mask] @ head.T) * (teacher[mask] @ teacher_head.T)).sum()

    return loss


OURS = ("ours", "dense", "compact", "products")  # what needs no peer; ours is first
LOSSES = {
    "products": products,
    "ours": ours,
    "trl": trl,
    "trl-cut": lambda beta: trl(beta, compact=True),
    "liger": liger,
    "swift": swift,
    "dense": dense,
    "compact": lambda beta: dense(beta, compact=True),
}


def resident(field):
    """Return a field of /proc/self/status in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def measure(case):
    """Measure one loss in one case, in a child process."""
    import torch

    torch.set_num_threads(1)
    device = torch.device(case["device"])
    loss_of = LOSSES[case["loss"]](case["beta"], **case.get("options", {}))
    data = inputs(*(case[k] for k in ("tokens", "hidden", "vocab", "dtype", "near")), device)
    leaves = [t for t in data if t.requires_grad]
    seconds, result = [], {}
    for repeat in range(case["repeats"] + 1):
        for leaf in leaves:
            leaf.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark again
        before = resident("VmRSS")
        start = time.process_time()
        value = loss_of(*data)
        value.backward()
        spent = time.process_time() - start
        if repeat:
            seconds.append(spent)
        result["peak_mib"] = resident("VmHWM") - before
    result["seconds"] = statistics.median(seconds) if seconds else spent
    result["value"] = float(value.detach())
    if case.get("exact"):
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in data[:4]]
        reference = dense64(case["beta"])(*exact, data[4])
        reference.backward()
        true_value = float(reference.detach())
        result["value_error"] = abs(result["value"] - true_value) / abs(true_value)
        for name, leaf, true in zip(("hidden", "head"), leaves, exact, strict=False):
            gap = leaf.grad.double() - true.grad
            result[f"{name}_error"] = float(gap.norm() / true.grad.norm())
    return result


def dense64(beta):
    """Compute the loss by its definition, in float64."""
    from opdctl.kernels.reference import divergence

    def loss(student, head, teacher, teacher_head, mask):
        p = (student[mask] @ head.T).log_softmax(-1)
        q = (teacher[mask] @ teacher_head.T).log_softmax(-1)
        return divergence(p, q, "jsd", beta).mean()

    return loss


KEYS = ("tokens", "hidden", "vocab", "dtype", "near", "repeats", "exact")
SHAPES = {
    "cost": (512, 512, 32768, "float32", False, 5, False),
    "memory": (512, 1024, 151936, "float32", False, 0, False),
    "error": (256, 256, 32000, "bfloat16", True, 0, True),
    "error32": (256, 256, 32000, "bfloat16->float32", True, 0, True),
    "far": (256, 256, 32000, "bfloat16", False, 0, True),
    "teachers": (8192, 128, 8192, "float32", False, 3, False),
}
SHAPES = {kind: dict(zip(KEYS, shape, strict=True)) for kind, shape in SHAPES.items()}


SMALL = {"tokens": 32, "hidden": 16, "vocab": 500, "repeats": 1}
BETAS = (0.0, 0.5, 1.0)
ROUNDS = 7  # of the teachers, in turns
COUNTS = (1, 4, 12)  # of the teachers
MOST_ERROR = 0.005  # of ours, relative; bf16 rounds a gradient by .0017
ERRORS = ("value_error", "hidden_error", "head_error")


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--swift", default="", help="path of ms-swift's gkd_loss.py")
    parser.add_argument("--only", type=chosen_from(SHAPES), default=list(SHAPES))
    parser.add_argument("--chunk-mib", type=int, default=0, help="runtime.chunk_mib of ours")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    return parser.parse_args()


def main():
    """Measure every loss in every kind of shape, print a row each, and check them."""
    args = arguments()
    peers = installed({"trl": "trl", "trl-cut": "trl", "liger": "liger_kernel"})
    peers += ["swift"] if args.swift else []
    rows = []
    for kind in args.only:
        shape = SHAPES[kind] | (SMALL if args.small else {})
        fresh = teachers(shape, 1 if args.small else ROUNDS) if kind == "teachers" else ()
        for row in fresh or compared(kind, shape, peers, args):
            rows.append(row)
            if not args.json:
                print(line(row), flush=True)
    for kind in args.only:
        mine, exact = [row for row in rows if row["kind"] == kind], SHAPES[kind]["exact"]
        each = len(BETAS) * (len(OURS) + len(peers) - exact)
        check(
            mine,
            len(COUNTS) if kind == "teachers" else each,
            ("seconds",),
            ("peak_mib", *(ERRORS if exact else ())),
        )
        for row in mine if exact else ():
            worst = max(row[name] for name in ERRORS)
            assert row["loss"] != "ours" or worst < MOST_ERROR, row
    if args.json:
        print(json.dumps(rows))


def compared(kind, shape, peers, args):
    """Measure all losses at one shape; yield a row each."""
    for beta in BETAS:
        first = None
        for name in (*OURS, *peers):
            if name == "products" and shape["exact"]:
                continue  # it is no loss
            case = dict(shape, loss=name, beta=beta, device="cpu")
            if name == "ours" and args.chunk_mib:
                case["options"] = {"chunk_mib": args.chunk_mib}
            if name == "swift":
                case["options"] = {"path": args.swift}
            row = {"kind": kind, "loss": name, "beta": beta, **in_a_process(measure, case)}
            first = first or row
            if shape["dtype"] == "float32" and name != "products":
                assert abs(row["value"] / first["value"] - 1) < 1e-3, f"{name}: not the same loss"
            yield row


def teachers(shape, count):
    """Measure the same tokens from one, four and twelve teachers: medians over ``count`` rounds."""
    rounds_by_count = {number: [] for number in COUNTS}
    for _ in range(count):
        for teacher_count, rounds in rounds_by_count.items():
            case = dict(shape, loss="ours", beta=1.0, device="cpu")
            case["options"] = {"teachers": teacher_count}
            rounds.append(in_a_process(measure, case))
    rows = []
    for teacher_count, rounds in rounds_by_count.items():
        row = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        rows.append({"kind": "teachers", "loss": f"ours x{teacher_count}", "beta": 1.0, **row})
    return rows


def line(row):
    """Return a row as a line of text."""
    errors = [f"{name} {row[name]:.2g}" for name in ERRORS if name in row]
    head = f"{row['kind']:8} {row['loss']:8} beta {row['beta']:<4}"
    return f"{head} {row['seconds']:7.3f} s {row['peak_mib']:7.0f} MiB  {'  '.join(errors)}"


if __name__ == "__main__":
    main()
