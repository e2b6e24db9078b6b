"""The measure of a newcomer's work: how many files a new idea touches. Each idea is put into a copy
of the package and run there, up to the first gradient of a stage."""

import shutil
from pathlib import Path

from running import elsewhere

ROOT = Path(__file__).parent.parent

QUANTITY = """
    Quantity(
        "margin",
        "how far the second most probable token is behind the first, in nats",
        lambda logits_CV, target_C: -logits_CV.topk(2, dim=-1).values.diff(dim=-1)[:, 0],
        of_list=lambda ids_NK, logprob_NK: logprob_NK[:, 0] - logprob_NK[:, 1],
        list_size=2,
    ),
)

QUANTITIES ="""

WEIGHT = '''"""A mask on the teacher's margin: tokens at which it is sure."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.protocols import Weight
from opdctl.scoring.columns import column_of


class Sure(Weight):
    """1 where the teacher's two most probable tokens are far apart."""

    revision = 1
    needs = ("teacher.margin",)

    @dataclass(kw_only=True)
    class Config:
        """Keys of sure."""

        least: float = key(0.2, "nats between the two", least=0.0)

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Shape [N]."""
        return step.columns[column_of("teacher", "margin")] >= self.config.least
'''

READS_IT = """
weights = {"is_gate": {}, "sure": {"least": LEAST}}
first = First(opd(on_disk, folder, objectives={"policy_gradient": {"weights": weights}}))
teacher = load(str(on_disk / "t"))
top_N2 = by_transformers(teacher, first.rollouts).detach().topk(2).values
margin_N = top_N2[:, 0] - top_N2[:, 1]
assert torch.allclose(first.columns["teacher_margin"], margin_N, atol=1e-5)
mask_N = first.columns["mask.policy_gradient.sure"]
assert 0 < mask_N.sum() < len(mask_N)
assert torch.equal(mask_N.bool(), first.columns["teacher_margin"] >= LEAST)
gradient = first.gradient()[1]
assert torch.isfinite(gradient).all() and gradient.norm() > 0
""".replace("LEAST", "0.05")

CONTEXT = '''"""A sentence before the prompt, shown to a teacher alone."""

from __future__ import annotations

from opdctl.types import ScoreRequest

SENTENCE = "1+1=2 "


def with_sentence(tokenizer, request: ScoreRequest) -> ScoreRequest:
    """Return the request with a sentence before the prompt; its targets stay the same."""
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
    skip = tuple((a + len(ids), b + len(ids)) for a, b in request.skip)
    return ScoreRequest((*ids, *request.ids), request.start + len(ids), skip)
'''

SHOWS_MORE = """
from opdctl.scoring.sentence import SENTENCE
first = First(opd(on_disk, folder))
teacher, model = load(str(on_disk / "t")), first.model
more = model.tokenizer.encode(SENTENCE, add_special_tokens=False)
assert more
told = [replace(r, prompt_ids=[*more, *r.prompt_ids]) for r in first.rollouts]
expected_N = said(by_transformers(teacher, told), told)
plain_N = said(by_transformers(teacher, first.rollouts), first.rollouts)
assert torch.allclose(first.columns["teacher"], expected_N, atol=1e-5)
assert (expected_N - plain_N).abs().max() > 1e-2
ours_N = said(by_transformers(model, first.rollouts), first.rollouts)
assert torch.allclose(first.columns["policy"], ours_N, atol=1e-5)
assert torch.allclose(first.columns["advantage"], expected_N - ours_N, atol=1e-4)
"""

BEGIN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
import opdctl
from one_step import First, by_transformers, opd, said
from opdctl.models.model import load
on_disk, folder = map(Path, sys.argv[1:])
assert Path(opdctl.__file__).is_relative_to(folder)
"""


def changed(folder):
    """Files of the copy that differ from the package, or are not in it."""
    files = {p.relative_to(folder) for p in folder.rglob("*.py")}
    return {str(p) for p in files if not (ROOT / p).is_file() or not same(folder / p, ROOT / p)}


def same(a, b):
    return a.read_bytes() == b.read_bytes()


def tried(folder, on_disk, new, edits, script):
    """Make a copy of the package with new files and edits, run a script on it; what changed."""
    shutil.copytree(
        ROOT / "opdctl", folder / "opdctl", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path, text in new.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    for path, replacements in edits.items():
        text = (folder / path).read_text()
        for before, after in replacements:
            assert text.count(before) == 1, (path, before)
            text = text.replace(before, after)
        (folder / path).write_text(text)
    words, paths = ("tried", on_disk, folder), (folder, ROOT / "tests")
    done = elsewhere(folder, BEGIN + script, *words, paths=paths)
    assert done.returncode == 0, done.stdout[-3000:]
    return changed(folder)


def test_a_number_from_the_teacher_and_a_weight_that_reads_it_are_two_files(on_disk, tmp_path):
    table, weight = "opdctl/scoring/quantities.py", "opdctl/loss/weights/sure.py"
    edits = {table: [("\n)\n\nQUANTITIES =", QUANTITY)]}
    assert tried(tmp_path, on_disk, {weight: WEIGHT}, edits, READS_IT) == {table, weight}


def test_a_context_that_shows_a_teacher_more_is_two_files(on_disk, tmp_path):
    context, step = "opdctl/scoring/sentence.py", "opdctl/train/score_step.py"
    edits = {
        step: [
            (
                "requests=[requests[i] for i in mine],",
                "requests=[with_sentence(tokenizer, requests[i]) for i in mine],",
            ),
            (
                "    for name in setup.teachers:\n",
                "    for name, (teacher, _) in setup.teachers.items():\n"
                "        tokenizer = teacher.student.tokenizer\n",
            ),
            (
                "from opdctl.scoring.score import",
                "from opdctl.scoring.sentence import with_sentence\n"
                "from opdctl.scoring.score import",
            ),
        ]
    }
    assert tried(tmp_path, on_disk, {context: CONTEXT}, edits, SHOWS_MORE) == {context, step}
