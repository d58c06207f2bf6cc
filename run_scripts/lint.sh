#!/usr/bin/env bash
# Style and format of all code, types and import directions of both packages. Installs the test extra where it is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
install test
cd "$root"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
"$venv/bin/lint-imports"
