#!/usr/bin/env bash
# Train a recipe on all devices of this machine (GPUS= takes fewer; without a GPU it runs on the CPU).
# Usage: run_scripts/finetune.sh RECIPE [key=value …] [--continue]
# Exit 130: stopped on request; go on with --continue.
# Several machines: set NODES, NODE_RANK and MASTER (host:port of the first) on each and start this on all of them.
set -euo pipefail
# shellcheck source=run_scripts/environment.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/environment.sh"
[ $# -ge 1 ] || { echo "usage: $0 RECIPE [key=value …]" >&2; exit 2; }
python=python3
[ -x "$venv/bin/python" ] && python=$venv/bin/python
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [ "$gpus" -gt 1 ] || [ "${NODES:-1}" -gt 1 ]; then
  exec "$python" -m cnclip_ft.launch --nproc_per_node "$gpus" --nnodes "${NODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --rdzv_backend c10d --rdzv_endpoint "${MASTER:-localhost:0}" -m cnclip_ft train "$@"
fi
exec "$python" -m cnclip_ft train "$@"
