#!/usr/bin/env bash
# Starts Python in .venv beside this file; see --help. If .venv is missing or outdated, it runs
# cnn_jax/common/set_up.py with the newest Python it finds, which makes .venv and then starts the same.
set -euo pipefail

usage() {
  cat <<'END'
./launch.sh                        sets up what is missing, then runs the quick start: a small training run
./launch.sh COMMAND [--flags]      sets up what is missing, then runs a command; ./launch.sh list is one
./launch.sh test [--faults] [...]  runs the tests with these arguments of pytest; --faults adds the long fault injections
./launch.sh test -mcompile         runs only the tests that compile for TPUs and GPUs; see --with=compile-tpu
./launch.sh test -mbuckets         runs only the tests on emulators of buckets; they need gcsfs, s3fs, gcp-storage-emulator and moto[server]
./launch.sh test -mplayground      runs only the tests of every network in a browser; minutes
./launch.sh test -mslurm           runs only the tests that start a SLURM; experiments/clusters tells what they need
./launch.sh setup [--pinned] [--with=prepare|gcs|s3|slurm|wandb|mlflow|onnx|notebook|test|compile-tpu|compile-cuda ...]
    only sets up, and looks again for a GPU or TPU. --pinned: with the versions that passed the tests.
    --with=prepare: with TensorFlow, which prepares most public datasets. --with=test: with the tests' tools.
    --with=gcs, --with=s3: with what reads a --data_dir or --workdir such as gs://bucket/run or s3://bucket/run.
    --with=slurm: with what hands runs to SLURM. --with=wandb, --with=mlflow: with these trackers.
    --with=onnx: with what export --format=onnx needs. --with=notebook: with JupyterLab.
    --with=compile-tpu, --with=compile-cuda: with what compiles for a TPU or an NVIDIA GPU that is not there.
Environment:
CNN_JAX_PLATFORM=cpu|cuda|cuda12|cuda13|tpu   what JAX is installed for (default: what is found)
PYTHON=...   makes .venv (default: the newest of 3.11 to 3.13, else 3.14; on PATH, in pyenv's or uv's folder,
             /usr/local/bin or /opt/*/bin)
END
}

die() { printf 'launch.sh: %s\n' "$*" >&2 && exit 2; }

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv
allowed="CPython 3.11 to 3.14 with venv and ensurepip"
asked_platform=${CNN_JAX_PLATFORM:-} asked_python='' asked_options=''

# Succeeds if .venv is as requested, by the stamp that set_up.py has left there. Runs in every call,
# so it starts no Python.
is_ready() {
  local name was_root was_python was_platform was_options was_sources
  local stamp=$venv/.cnn_jax-ready installed=("$venv"/lib/python3*/site-packages/cnn_jax-*.dist-info)
  [ -r "$stamp" ] && [ -x "$venv/bin/python" ] && [ -d "${installed[0]}" ] || return 1
  for name in root python platform options sources; do IFS= read -r "was_$name" || return 1; done <"$stamp"
  for name in $asked_options; do [[ " $was_options " == *" $name "* ]] || return 1; done
  [ "$was_root" = "$root" ] && [ "$was_sources" = "$sources" ] && [[ $was_platform == "$asked_platform"* ]] &&
    [ "${asked_python:-$was_python}" = "$was_python" ]
}

# Succeeds if $1 can make .venv, and sets base_python: $1, or what made the virtual environment of $1.
# Otherwise sets refusal. It runs $1, because a pyenv shim may have no Python behind it.
probe_python() {
  local kind version answer has_venv=true
  answer=$(timeout 60 "$1" -c 'import sys
print(sys.implementation.name + sys.abiflags + " %d.%d" % sys.version_info[:2])
print(sys._base_executable)
import ensurepip, venv' 2>/dev/null </dev/null) || has_venv=false
  { read -r kind version && read -r base_python; } <<<"$answer" || true
  case "$kind $version" in
    "cpython 3.1"[1-4]) refusal="it lacks venv or ensurepip (Debian and Ubuntu: apt install python$version-venv)" ;;
    [a-z]*" 3."[0-9]*) refusal="it is $kind $version" && return 1 ;;
    *) refusal="it does not run as Python 3" && return 1 ;;
  esac
  $has_venv
}

# Sets base_python, or exits with 2. 3.14 comes late: it is not tested.
find_python() {
  local name python refusals='' pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
  local uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}
  if [ -n "$asked_python" ]; then
    probe_python "$asked_python" || die "PYTHON is '$PYTHON': $refusal; allowed: $allowed"
    return
  fi
  for name in python3.13 python3.12 python3.11 python3.14 python3; do
    while IFS= read -r python; do
      [ -x "$python" ] || continue
      ! probe_python "$python" || return 0
      refusals="$refusals; $python: $refusal"
    done < <(type -aP $name && true; ls -vr "$pyenv"/*/bin/$name "$uv"/*/bin/$name /usr/local/bin/$name /opt/*/bin/$name 2>/dev/null)
  done
  probe_python "$venv/bin/python" || # PYTHON named it once
    die "found no $allowed on PATH or in pyenv's or uv's folder; install one or name it in PYTHON$refusals"
}

# Replaces this script with set_up.py, and that with the command that is given here.
set_up() {
  find_python
  exec "$base_python" -I "$root/cnn_jax/common/set_up.py" \
    "$asked_python" "$asked_platform" "$asked_options" "$sources" "$@"
}

[[ $asked_platform =~ ^(cpu|cuda|cuda12|cuda13|tpu|)$ ]] ||
  die "CNN_JAX_PLATFORM is '$asked_platform'; allowed: cpu, cuda, cuda12, cuda13, tpu"
if [ -n "${PYTHON:-}" ]; then
  asked_python=$(type -P -- "$PYTHON") || die "PYTHON is '$PYTHON', which is not a command; allowed: $allowed"
  [[ $asked_python == /* ]] || asked_python=$PWD/$asked_python
fi
sources=$(cd -- "$root" && cksum setup.cfg pyproject.toml .ci/constraints.txt)
sources=${sources//$'\n'/ }

command=${1:-}
[ "$command" != setup ] || shift
while [[ ${1:-} =~ ^--(pinned|with=(prepare|gcs|s3|slurm|wandb|mlflow|onnx|notebook|test|compile-tpu|compile-cuda))$ ]]; do
  asked_options="$asked_options ${BASH_REMATCH[2]:-pinned}"
  shift
done
case $command in
  -h | --help)
    usage
    ! is_ready || { echo && "$venv/bin/python" -P -m cnn_jax.main --help; }
    exit
    ;;
  setup)
    [ $# -eq 0 ] || die "setup takes --pinned and --with=prepare, gcs, s3, slurm, wandb, mlflow, onnx, notebook, test, compile-tpu or compile-cuda, got '$1'"
    set_up
    ;;
  test)
    shift
    asked_options='test'
    cd -- "$root"
    run=("$venv/bin/python" -m pytest -n logical --maxprocesses=4 --dist worksteal "${@/#--faults/-mfaults or not faults}")
    ;;
  *)
    # The program calls this script, once, to add TensorFlow.
    [[ " $asked_options " == *" prepare "* ]] || export CNN_JAX_LAUNCHER=$root/launch.sh
    [ $# -gt 0 ] || set -- train --experiment=quickstart
    # -P: ignores a cnn_jax or jax.py in the working directory.
    run=("$venv/bin/python" -P -m cnn_jax.main "$@")
    # Ctrl-C while Python starts would print a traceback. GNU's env can block it until cnn_jax.main is
    # ready to handle it.
    ! env --block-signal=INT true 2>/dev/null || run=(env --block-signal=INT "${run[@]}")
    ;;
esac
is_ready || set_up "${run[@]}"
exec "${run[@]}"
