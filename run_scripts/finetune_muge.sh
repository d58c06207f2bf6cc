#!/usr/bin/env bash
# Fine-tune ViT-B-16 on MUGE: stage two of the recipe alone is the published fine-tuning.
# Usage: run_scripts/finetune_muge.sh DATA [key=value …]
# DATA holds the folder as distributed (train_imgs.tsv, train_texts.jsonl, valid_…) or the stores built from it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
[ $# -ge 1 ] || { echo "usage: $0 DATA [key=value …]" >&2; exit 2; }
data=$1
shift
[ -e "$data/lmdb/train" ] || [ -e "$data/train" ] || cnclip_ft data build "$data" --splits train,valid
stores=$data
[ -e "$data/lmdb/train" ] && stores=$data/lmdb
exec "$here/finetune.sh" muge_vit-b-16 "data.train=$stores/train" "data.valid=$stores/valid" "output=runs/muge" "$@"
