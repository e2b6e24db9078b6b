"""Bodies of processes that are forked from the warm server. Each imports this file anew, so it
imports nothing of weight itself."""

import os
import sys


def broken(folder, stage, patch, log):
    """A stage's worker, after ``patch``: source that may break it on purpose."""
    from opdctl.process.worker import child

    exec(patch, {})
    child(folder, stage, log)


def aside(words, log):
    """The worker of a command that checks or measures stages and runs none."""
    printing_to(log)
    from opdctl.process.worker import diagnose, examine

    folder, option, *more = words
    sys.exit({"--preflight": examine, "--diagnose": diagnose}[option](folder, *more))


def printing_to(log):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def another(folder, paths, words, code, log):
    """Run code as a program in a folder, with another copy of opdctl; torch is there already."""
    printing_to(log)
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(here)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] == "opdctl" or os.path.dirname(file) == here:
            del sys.modules[name]
    ours = (root, here, os.path.join(root, "benchmarks"))
    sys.path[:] = [*paths, *(p for p in sys.path if p not in ours)]
    os.chdir(folder)
    sys.argv = list(words)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
