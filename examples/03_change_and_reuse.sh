#!/usr/bin/env bash
# Change one key of a finished run and pay only for what changes; kill a run and resume it to the same
# bytes. About a minute on two cores; nothing is downloaded. Needs `opdctl` on PATH.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

echo "== A first run."
opdctl run "$here/first.yaml" stages.base.steps=120 --out first

echo "== Another divergence for the student. Its base and its teacher are taken from the first run."
change=(stages.base.steps=120 stages.opd.objectives.divergence.direction=forward --from first)
opdctl plan "$here/first.yaml" "${change[@]}"
opdctl run "$here/first.yaml" "${change[@]}" --out changed

echo "== The same again, killed while the student trains."
opdctl run "$here/first.yaml" "${change[@]}" runtime.checkpoint_every=5 --out killed &
run=$!
rows=killed/stages/opd/metrics.jsonl
until [ -f "$rows" ] && [ "$(wc -l < "$rows")" -ge 8 ]; do
    kill -0 "$run" || { echo "the run ended before it could be killed" >&2; exit 1; }
    sleep 0.05
done
kill -KILL "$run"
wait "$run" || true
opdctl status killed

echo "== Resume: it goes on inside the stage."
opdctl resume killed

echo "== The student has the same bytes as the one of the run that was never killed."
cmp changed/stages/opd/output/model.safetensors killed/stages/opd/output/model.safetensors
echo "equal"
