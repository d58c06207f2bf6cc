# shellcheck shell=bash
# Sourced by the scripts beside it: makes or reuses the virtual environment and defines `cnclip_ft`.
# PYTHON= names the interpreter, VENV= the environment's folder. Works from any folder.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

# install EXTRA: the project (editable) with an extra, at the tested versions.
install() {
  [ -f "$root/setup.cfg" ] || return 0 # scripts that `cnclip-ft scripts` wrote: it is installed
  if [ ! -x "$venv/bin/python" ]; then
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
      echo "$python is too old: Python 3.10 or newer is needed (set PYTHON=)" >&2
      exit 2
    }
    "$python" -m venv "$venv"
  fi
  local wanted
  wanted="${1:-} $(cksum "$root/setup.cfg" "$root/constraints.txt" | cksum)"
  if [ "$(cat "$venv/.cnclip-ft-installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $venv …"
    # torch first and alone: once it is there at the pinned version, nothing below fetches another build.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root${1:+[$1]}"
    printf '%s' "$wanted" >"$venv/.cnclip-ft-installed"
  fi
}

# The command: of the environment where there is one, else whatever is installed.
cnclip_ft() {
  if [ -x "$venv/bin/python" ]; then
    "$venv/bin/python" -m cnclip_ft "$@"
  else
    cnclip-ft "$@"
  fi
}
