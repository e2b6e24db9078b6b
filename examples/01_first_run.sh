#!/usr/bin/env bash
# Run a small pipeline, look at what it did, and judge its claim. Under a minute on two cores; nothing
# is downloaded. Needs `opdctl` on PATH: . .venv/bin/activate
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

echo "== What would run, and why. Nothing is loaded."
opdctl plan "$here/first.yaml"

echo "== Run it: every stage in a process of its own."
opdctl run "$here/first.yaml" --out first

echo "== The stages, as they stand in the run directory."
opdctl status first

echo "== Did one student inherit what its teacher learned? The claim says, with its interval."
opdctl claims first

echo "== Each stage's output is a model folder, ready for transformers."
ls first/stages/opd/output
