#!/usr/bin/env bash
# Distil a teacher into a student on prompts of your own. Under a minute on two cores; nothing is
# downloaded. Needs `opdctl` and its `python` on PATH: . .venv/bin/activate
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

echo "== Prompts of one's own: a JSON object a line, with any column names."
python - > prompts.jsonl <<'PYTHON'
import itertools, json

for digits in itertools.product("0123456789", repeat=3):
    text = "".join(digits)
    print(json.dumps({"question": f"sort {text}", "solution": "".join(sorted(text))}))
PYTHON
tail -n 2 prompts.jsonl
prompts=(data.mine.path=prompts.jsonl data.mine.prompt_column=question
         data.mine.answer_column=solution)

echo "== Two small models, in place of yours: a student, and a teacher that is better at this."
cat > models.yaml <<'YAML'
name: models
data: {mine: {kind: jsonl, path: prompts.jsonl, prompt_column: question, answer_column: solution}}
stages:
  student:
    kind: pretrain
    model: {hidden: 48, intermediate: 96, init_std: 0.05}
    corrupt: 0.4
    steps: 120
    prompts: {per_step: 64}
  teacher: {kind: sft, student: stage:student, steps: 100, prompts: {per_step: 64}}
YAML
opdctl run models.yaml --out made
student=made/stages/student/output teacher=made/stages/teacher/output

echo "== On-policy distillation. For a model of real size, set optim.lr to about 2e-6."
opdctl stage opd --student "$student" --teacher "$teacher" "${prompts[@]}" \
    steps=30 prompts.per_step=64 sampling.max_tokens=6 --out distilled

echo "== Accuracy of the student's own samples, and KL to the teacher, at the first step and the last."
python - <<'PYTHON'
import json

rows = [json.loads(line) for line in open("distilled/stages/opd/metrics.jsonl")]
for row in rows[0], rows[-1]:
    print(f"step {row['step']}: accuracy {row['accuracy']['mine']:.2f}, KL {row['kl']['mine']:.3f}")
PYTHON

echo "== The output is a model folder. In plain transformers, no opdctl needed:"
HF_HUB_DISABLE_PROGRESS_BARS=1 python - <<'PYTHON'
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "distilled/stages/opd/output"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
for text in "sort 734", "sort 907":
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]))
PYTHON
