#!/usr/bin/env bash
# Write a checkpoint in another format.
# Usage: run_scripts/export.sh CHECKPOINT huggingface|cn_clip|onnx OUTPUT
set -euo pipefail
# shellcheck source=run_scripts/environment.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/environment.sh"
[ $# -eq 3 ] || { echo "usage: $0 CHECKPOINT huggingface|cn_clip|onnx OUTPUT" >&2; exit 2; }
cnclip_ft export "$1" --to "$2" --output "$3"
