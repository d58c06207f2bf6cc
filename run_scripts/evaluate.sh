#!/usr/bin/env bash
# Recall of a checkpoint on a split, both ways.
# Usage: run_scripts/evaluate.sh CHECKPOINT SPLIT [options of cnclip-ft evaluate]
set -euo pipefail
# shellcheck source=run_scripts/environment.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/environment.sh"
[ $# -ge 2 ] || { echo "usage: $0 CHECKPOINT SPLIT [options]" >&2; exit 2; }
cnclip_ft evaluate "$@"
