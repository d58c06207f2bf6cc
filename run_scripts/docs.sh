#!/usr/bin/env bash
# The documentation as pages in both languages: build/site/index.html. A warning or a broken link fails. Needs no network but to install.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=${DOCS_VENV:-$here/../.venv-docs}  # of its own: nothing in it is needed to run or test
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/../docs/requirements.txt"
cd "$here/.."
NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --quiet --strict
echo "build/site/index.html; with search: python3 -m http.server --bind 127.0.0.1 --directory build/site"
