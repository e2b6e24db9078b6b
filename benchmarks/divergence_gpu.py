"""The divergence at a language model's size on one GPU, against its floor and its peers.

    python benchmarks/divergence_gpu.py [--json]
    python benchmarks/divergence_gpu.py --device cpu --tokens 64 --vocab 4000 --repeats 1
                                                  (tries the script)

Measures the machine's two ceilings first (a copy and a bf16 product), then forward and backward of
reverse KL with a trained head, bf16 operands, no token masked: milliseconds (median), the ratio to
the floor of four products at the measured ceiling, memory beyond the inputs, and how both grow
with tokens. Targets for an H200 stand beside each row. Leaves out the backbone of either model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from divergence import LOSSES, inputs
from measuring import check, chosen_from, installed

# hidden sizes of student and teacher: milliseconds wanted, and hoped for, at 8192 x 151936
TARGETS = {(1024, 1024): (22.6, 19.4), (2048, 4096): (45.0, 40.3), (4096, 4096): (67.0, 62.0)}
MEMORY_GB = {(4096, 4096): 5.4}  # 4 otherwise


def clock(work, device, repeats):
    """Return the median milliseconds of ``work``, and its peak memory above the start, in GB."""
    for _ in range(3):
        work()
    taken = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - start))
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else None
    return statistics.median(taken), memory


def ceilings(device, size):
    """Return the TFLOP/s of a bf16 product and the TB/s of a copy (read and write counted)."""
    a = torch.randn(size, size, device=device).bfloat16()
    milliseconds, _ = clock(lambda: a @ a, device, 20)
    b = torch.randn(size * size, device=device)
    c = torch.empty_like(b)
    copying, _ = clock(lambda: c.copy_(b), device, 20)
    return 2 * size**3 / milliseconds / 1e9, 2 * b.numel() * b.element_size() / copying / 1e9


def run(name, tokens, widths, vocab, device, repeats):
    """Measure one loss at one shape; None if it does not fit."""
    student, teacher = widths
    data = inputs(tokens, student, vocab, "bfloat16", False, device, teacher)
    data[4] = torch.ones(tokens, dtype=torch.bool, device=device)
    loss_of = LOSSES[name](1.0)

    def work():
        data[0].grad = data[1].grad = None
        loss_of(*data).backward()

    try:
        return clock(work, device, repeats)
    except torch.OutOfMemoryError:
        return None


PEERS = {"trl": "trl", "liger": "liger_kernel"}


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    losses = ["ours", *PEERS, "dense"]
    parser.add_argument("--losses", type=chosen_from(losses), default=losses)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main():
    """Measure the ceilings, then every loss at every shape; print a row each, and check them."""
    args = arguments()
    there = installed({name: PEERS[name] for name in args.losses if name in PEERS})
    losses = [name for name in args.losses if name not in PEERS or name in there]
    device = torch.device(args.device)
    say = (lambda *_: None) if args.json else print
    tflops, tbytes = ceilings(device, 8192 if device.type == "cuda" else 512)
    say(f"ceilings: {tflops:.0f} TFLOP/s bf16 product, {tbytes:.2f} TB/s copy")
    rows = []
    shapes = [(args.tokens, widths) for widths in TARGETS]
    if device.type == "cuda":
        shapes += [(tokens, (1024, 1024)) for tokens in (4096, 16384, 32768, 65536)]
    for tokens, widths in shapes:
        floor = 2 * tokens * args.vocab * (3 * widths[0] + widths[1]) / tflops / 1e9
        for name in losses if tokens == args.tokens else ["ours"]:
            clocked = run(name, tokens, widths, args.vocab, device, args.repeats)
            row = {"loss": name, "tokens": tokens, "widths": widths, "floor_ms": floor}
            if clocked:
                row |= {"ms": clocked[0], "of_floor": clocked[0] / floor, "memory_gb": clocked[1]}
            rows.append(row)
            say(line(row, args))
    check([{"tflops": tflops, "tbytes": tbytes}], 1, ("tflops", "tbytes"))
    measured = [row for row in rows if "ms" in row]  # the others do not fit
    wanted = len(rows) if device.type == "cpu" else max(1, len(measured))
    check(measured, wanted, ("ms", "floor_ms", "of_floor"))
    if args.json:
        print(json.dumps({"tflops": tflops, "tbytes": tbytes, "rows": rows}))


def line(row, args):
    """Return one row, with its target where it has one."""
    head = f"{row['loss']:6} {row['tokens']:6} tokens {row['widths'][0]}/{row['widths'][1]}"
    if "ms" not in row:
        return f"{head}  does not fit"
    memory = "" if row["memory_gb"] is None else f"  {row['memory_gb']:.2f} GB"
    text = f"{head}  {row['ms']:8.1f} ms  {row['of_floor']:.2f}x of the floor{memory}"
    if row["loss"] == "ours" and (args.device, args.tokens) == ("cuda", row["tokens"]):
        wanted, hoped = TARGETS[row["widths"]]
        most = MEMORY_GB.get(row["widths"], 4.0)
        text += f"  (target {wanted} ms, stretch {hoped}, {most} GB)"
    return text


if __name__ == "__main__":
    main()
