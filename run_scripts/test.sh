#!/usr/bin/env bash
# Installs with the test extra and runs the tests. Further arguments go to pytest. PYTHON= names the interpreter.
# The official package and open_clip, which the parity tests run beside ours, go into a folder of their own; without the network
# these tests are skipped with the reason.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
install test
cd "$root"
official=${CNCLIP_FT_OFFICIAL:-$root/.official}
if [ ! -d "$official/cn_clip" ] || [ ! -d "$official/open_clip" ]; then
  echo "Fetching the official package and open_clip into $official …"
  # --no-deps: their pins do not fit a modern environment, and their torchvision must not meet our torch.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$official.new" \
    cn-clip==1.6.0 torchvision==0.28.0 timm==1.0.31 six open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4 &&
    rm -rf "$official" && mv "$official.new" "$official" ||
    echo "They cannot be fetched; the tests against them will be skipped." >&2
fi
# What reads exports elsewhere, for -m slow alone: half a gigabyte. --ignore-scripts: its own fetches libraries for CUDA.
case " $* " in *slow*)
  # Apart: where torchao is installed, every import of transformers loads it, and what it remarks.
  if [ ! -d "$official/torchao" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$official/torchao" torchao==0.18.0 ||
      echo "torchao cannot be fetched; tests in 8 bits run with a stand-in alone." >&2
  fi
  if [ ! -d "$official/onnxruntime_2023/onnxruntime" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$official/onnxruntime_2023" \
      onnxruntime==1.16.3 numpy==1.26.4 ||
      echo "onnxruntime of 2023 cannot be fetched (it has wheels up to Python 3.11); its tests will be skipped." >&2
  fi
  if ! command -v npm >/dev/null; then
    echo "npm is not installed; the tests of transformers.js will be skipped." >&2
  elif [ ! -d "$official/node_modules/@huggingface/transformers" ]; then
    npm install --prefix "$official" --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2 ||
      echo "transformers.js cannot be fetched; its tests will be skipped." >&2
  fi ;;
esac
# A process for each of up to four cores, with a thread each; the tests of a file stay together, as they share what they prepared. A card is
# for one process, and slow tests are sized for a machine of their own.
processes=(-n auto --maxprocesses 4 --dist loadfile)
case " $* " in
  *cuda* | *slow*) processes=(-n 0) ;;
  *) export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ;;
esac
"$venv/bin/python" -m pytest "${processes[@]}" "$@"
