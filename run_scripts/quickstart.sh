#!/usr/bin/env bash
# From nothing to a fine-tuned model on the CPU in a few minutes: installs, draws a demonstration set, trains both
# stages, evaluates, exports. PYTHON= names the interpreter, OUTPUT= the folder for data and run (default: ./demo).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
install fast,plots
out=${OUTPUT:-demo}

began=$SECONDS
cnclip_ft data demo "$out/data" --train 12000 --overwrite
cnclip_ft train demo "data.train=$out/data/train" "data.valid=$out/data/valid" "output=$out/run" --overwrite
cnclip_ft evaluate "$out/run/contrast/best" "$out/data/valid" --json "$out/run/report/evaluation.json"
cnclip_ft export "$out/run/contrast/best" --to huggingface --output "$out/huggingface" --overwrite

echo
cat "$out/run/report/recall.txt"
echo
echo "Checkpoint  $out/run/contrast/best        (cnclip_ft.load reads it, transformers too where the towers allow)"
echo "Export      $out/huggingface"
echo "Report      $out/run/report/index.html"
echo "Took        $((SECONDS - began)) s after installation"
