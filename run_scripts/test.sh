#!/usr/bin/env bash
# Installs with the test extra and runs the tests. Further arguments go to pytest. PYTHON= names the interpreter.
# The official package, which the parity tests run beside ours, goes into a folder of its own; without the network
# these tests are skipped with the reason.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
install test
cd "$root"
official=${CNCLIP_FT_OFFICIAL:-$root/.official}
if [ ! -d "$official/cn_clip" ]; then
  echo "Fetching the official package into $official …"
  # --no-deps: its pins do not fit a modern environment, and its torchvision must not meet our torch.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$official.new" \
    cn-clip==1.6.0 torchvision==0.28.0 timm==1.0.31 six &&
    rm -rf "$official" && mv "$official.new" "$official" ||
    echo "It cannot be fetched; the tests against it will be skipped." >&2
fi
"$venv/bin/python" -m pytest "$@"
