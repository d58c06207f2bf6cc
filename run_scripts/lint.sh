#!/usr/bin/env bash
# Style and format of all code, types and import directions of both packages, and the shell scripts. Installs the test extra where it is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_scripts/environment.sh
source "$here/environment.sh"
install test
cd "$root"
# A source file that is not committed passes every check here and is missing in every clone.
if left=$(git ls-files --others --exclude-standard -- '*.py' '*.sh' '*.yaml' '*.html' '*.js' '*.css' 2>/dev/null) && [ -n "$left" ]; then
  printf 'not under version control: git add or remove\n%s\n' "$left" >&2
  exit 1
fi
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
"$venv/bin/lint-imports"
scripts=(run_scripts/*.sh)
if [ -f .ci/run ]; then scripts+=(.ci/run); fi
"$venv/bin/shellcheck" --external-sources "${scripts[@]}"
