#!/usr/bin/env bash
# Makes .venv beside this file if it is missing or outdated, then starts Python; see --help.
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
./launch.sh setup [--pinned] [--with=prepare|gcs|s3|test|compile-tpu|compile-cuda ...]
    only sets up, and looks again for a GPU or TPU. --pinned: with the versions that passed the tests.
    --with=prepare: with TensorFlow, which prepares most public datasets. --with=test: with the tests' tools.
    --with=gcs, --with=s3: with what reads a --data_dir or --workdir such as gs://bucket/run or s3://bucket/run.
    --with=compile-tpu, --with=compile-cuda: with what compiles for a TPU or an NVIDIA GPU that is not there.
Environment:
CNN_JAX_PLATFORM=cpu|cuda|cuda12|cuda13|tpu   what JAX is installed for (default: what is found)
PYTHON=...   makes .venv (default: the newest of 3.11 to 3.13, else 3.14; on PATH, in pyenv's or uv's folder,
             /usr/local/bin or /opt/*/bin)
END
}

say() { printf 'launch.sh: %s\n' "$*" >&2; }
die() { say "${@:2}" && exit "$1"; }

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv
stamp=$venv/.cnn_jax-ready        # written when a set-up has succeeded
unready=$venv/.cnn_jax-unready    # exists while a set-up is incomplete
log=$root/.venv-setup.log         # output of the last set-up; also the lock file
allowed="CPython 3.11 to 3.14 with venv and ensurepip"
child='' why='' asked_platform=${CNN_JAX_PLATFORM:-} asked_python='' asked_options=''

# Succeeds if .venv is as requested; sets was_root etc. from the stamp. Runs in every call, so it
# starts no Python.
is_ready() {
  local name installed=("$venv"/lib/python3*/site-packages/cnn_jax-*.dist-info)
  was_root='' was_python='' was_platform='' was_options='' was_sources=''
  [ ! -r "$stamp" ] || for name in root python platform options sources; do IFS= read -r "was_$name" || true; done <"$stamp"
  for name in $asked_options; do [[ " $was_options " == *" $name "* ]] || return 1; done
  [ -d "${installed[0]}" ] && [ ! -e "$unready" ] && [ -x "$venv/bin/python" ] && [ "$was_root" = "$root" ] &&
    [ "$was_sources" = "$sources" ] && [[ $was_platform == "$asked_platform"* ]] &&
    [ "${asked_python:-$was_python}" = "$was_python" ]
}

# Succeeds if $1 can make .venv, and sets python_version and base_python (not of a virtual
# environment); else sets refusal. It runs $1, because a pyenv shim may have no Python behind it.
probe_python() {
  local kind answer has_venv=true
  answer=$(timeout 60 "$1" -c 'import sys
print(sys.implementation.name + sys.abiflags + " %d.%d" % sys.version_info[:2])
print(sys._base_executable)
import ensurepip, venv' 2>/dev/null </dev/null) || has_venv=false
  { read -r kind python_version && read -r base_python; } <<<"$answer" || true
  case "$kind $python_version" in
    "cpython 3.1"[1-4]) refusal="it lacks venv or ensurepip (Debian and Ubuntu: apt install python$python_version-venv)" ;;
    [a-z]*" 3."[0-9]*) refusal="it is $kind $python_version" && return 1 ;;
    *) refusal="it does not run as Python 3" && return 1 ;;
  esac
  $has_venv
}

# Sets python, python_version and base_python, or exits with 2. 3.14 comes late: it is not tested.
find_python() {
  local name refusals='' pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
  local uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}
  if [ -n "$asked_python" ]; then
    python=$asked_python
    probe_python "$python" || die 2 "PYTHON is '$PYTHON': $refusal; allowed: $allowed"
    return
  fi
  for name in python3.13 python3.12 python3.11 python3.14 python3; do
    while IFS= read -r python; do
      [ -x "$python" ] || continue
      ! probe_python "$python" || return 0
      refusals="$refusals; $python: $refusal"
    done < <(type -aP $name && true; ls -vr "$pyenv"/*/bin/$name "$uv"/*/bin/$name /usr/local/bin/$name /opt/*/bin/$name 2>/dev/null)
  done
  die 2 "found no $allowed on PATH or in pyenv's or uv's folder; install one or name it in PYTHON$refusals"
}

# The smallest value of all GPUs. The time limit: a broken driver can hang nvidia-smi.
smi() { timeout 30 nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | LC_ALL=C sort -n | head -n 1 || true; }

# Sets platform and why. Keeps $1, the platform of .venv, if it fits the request. CUDA's
# requirements are from docs.jax.dev, Installation.
choose_platform() {
  local driver gpu
  platform=$1 why="as before"
  [[ $platform =~ ^(cpu|cuda1.|tpu)$ && $platform == "$asked_platform"* ]] && return
  platform=$asked_platform why="as CNN_JAX_PLATFORM says"
  [[ $platform == '' || $platform == cuda ]] || return 0
  driver=$(smi driver_version) gpu=$(smi compute_cap)
  if [[ ! $driver =~ ^[0-9]+\. ]]; then
    why="nvidia-smi finds no GPU"
    if [ "$platform" = cuda ]; then
      platform=cuda12 why="$why; more drivers run CUDA 12 than 13"
    elif { [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; } && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
      platform=tpu why="there is a PCI device of Google's"
    else
      platform=cpu
    fi
  elif [ "${driver%%.*}" -lt 525 ] && [ -z "$platform" ]; then
    platform=cpu why="driver $driver is older than 525, which CUDA 12 needs; update it, then run ./launch.sh setup"
  elif [ "${driver%%.*}" -lt 580 ]; then
    platform=cuda12 why="driver $driver is older than 580, which CUDA 13 needs"
  elif [[ $gpu == [0-6].* || $gpu == 7.[0-4] ]]; then
    platform=cuda12 why="compute capability $gpu is below 7.5, which CUDA 13 needs"
  else
    platform=cuda13 why="driver $driver is 580 or newer"
  fi
}

# Runs a command of the set-up in the repository: in the background, so that a signal ends it at
# once, and as a process group (set -m), so that its children end too. It inherits the lock, and so
# keeps it if this script is killed.
run_logged() {
  set -m
  (cd -- "$root" && exec "$@") >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  wait "$child"
}

cut_short() {
  [ -z "$child" ] || kill -- "-$child" 2>/dev/null || true
  die "$1" "the set-up was cut short; the next call starts it again"
}

# Prints why .venv must be made again before an installation; prints nothing if it can stay.
reason_to_rebuild() {
  if [ ! -d "$venv" ]; then echo "there is none"
  elif [ -e "$unready" ]; then echo "its last set-up did not finish"
  elif [ "${was_root:-$root}" != "$root" ]; then echo "it was made in another folder"
  elif [ "${asked_python:-$was_python}" != "$was_python" ]; then echo "it was made with ${was_python:-another Python}"
  elif [[ $was_platform != "$platform" && $was_platform =~ cuda|tpu ]]; then echo "it was made for $was_platform"
  elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 </dev/null; then echo "its Python or pip cannot be used"
  fi
}

make_venv() {
  find_python
  say "creating .venv with $python (Python $python_version): $1"
  [ -d "$venv" ] || rm -f "$venv"
  mkdir -p "$venv"
  : >"$unready"
  rm -f "$stamp"
  find "$venv/" -mindepth 1 ! -name "${unready##*/}" -delete # $venv may be a link
  run_logged "$base_python" -m venv "$venv" || die 1 "$base_python could not make $venv (exit $?); see $log"
}

# Installs the requested options into .venv, beside those that it has.
install() {
  local options=$was_options extras='' pip=(-m pip install) name reason status=0
  [ -n "$why" ] || choose_platform "$was_platform"
  for name in $asked_options; do [[ " $options " == *" $name "* ]] || options=${options:+$options }$name; done
  for name in $options ${platform#cpu}; do [ "$name" = pinned ] || extras=${extras:+$extras,}$name; done
  python=${asked_python:-$was_python} reason=$(reason_to_rebuild)
  [ -z "$reason" ] || make_venv "$reason"
  # $unready keeps the old stamp, which is restored if pip fails.
  if [ -e "$stamp" ]; then mv -f "$stamp" "$unready"; else : >>"$unready"; fi
  say "installing cnn_jax for $platform ($why)${options:+, $options}; a first set-up takes a minute or two"
  [[ " $options " != *" pinned "* ]] || pip+=(--constraint .ci/constraints.txt)
  # Modules are compiled at their first import, which halves the time of a set-up. For the tests,
  # all are compiled below: compilation can warn, and the tests treat warnings as errors.
  pip+=(--no-compile --no-input --disable-pip-version-check --editable ".${extras:+[$extras]}")
  run_logged "$venv/bin/python" "${pip[@]}" || status=$?
  if [ "$status" -ne 0 ]; then
    [ ! -s "$unready" ] || mv -f "$unready" "$stamp"
    die 1 "pip could not install cnn_jax (exit $status): $(grep -o 'ERROR.*' "$log" | tail -n 1); see $log"
  fi
  [[ " $options " != *" test "* ]] || run_logged "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" || true
  printf '%s\n' "$root" "$python" "$platform" "$options" "$sources" >"$unready"
  mv -f "$unready" "$stamp"
}

# One set-up at a time; file descriptor 9 holds the lock.
set_up() {
  local started=$SECONDS
  [ -w "$root" ] || die 1 "cannot write to $root, where .venv belongs"
  exec 9>>"$log"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of $venv"
    flock 9 || true
  fi
  if ! is_ready; then
    : >"$log"
    trap 'cut_short 129' HUP
    trap 'cut_short 130' INT
    trap 'cut_short 143' TERM
    install
    trap - HUP INT TERM
    say "ready after $((SECONDS - started)) s"
  fi
  exec 9>&-
}

[[ $asked_platform =~ ^(cpu|cuda|cuda12|cuda13|tpu|)$ ]] ||
  die 2 "CNN_JAX_PLATFORM is '$asked_platform'; allowed: cpu, cuda, cuda12, cuda13, tpu"
if [ -n "${PYTHON:-}" ]; then
  asked_python=$(type -P -- "$PYTHON") || die 2 "PYTHON is '$PYTHON', which is not a command; allowed: $allowed"
  [[ $asked_python == /* ]] || asked_python=$PWD/$asked_python
fi
sources=$(cd -- "$root" && cksum setup.cfg pyproject.toml .ci/constraints.txt)
sources=${sources//$'\n'/ }

command=${1:-}
[ "$command" != setup ] || shift
while [[ ${1:-} =~ ^--(pinned|with=(prepare|gcs|s3|test|compile-tpu|compile-cuda))$ ]]; do
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
    [ $# -eq 0 ] || die 2 "setup takes --pinned and --with=prepare, gcs, s3, test, compile-tpu or compile-cuda, got '$1'"
    choose_platform ''
    asked_platform=$platform
    is_ready || set_up
    is_ready
    say "$venv is set up for $was_platform${was_options:+, $was_options}"
    exit
    ;;
  test)
    shift
    asked_options='test'
    is_ready || set_up
    cd -- "$root"
    exec "$venv/bin/python" -m pytest -n logical --maxprocesses=4 --dist worksteal "${@/#--faults/-mfaults or not faults}"
    ;;
esac

is_ready || set_up
# The program calls this script, once, to add TensorFlow.
[[ " $asked_options " == *" prepare "* ]] || export CNN_JAX_LAUNCHER=$root/launch.sh
[ $# -gt 0 ] || set -- train --experiment=quickstart
# -P: ignores a cnn_jax or jax.py in the working directory.
run=("$venv/bin/python" -P -m cnn_jax.main "$@")
# Ctrl-C while Python starts would print a traceback. GNU's env can block it until cnn_jax.main is
# ready to handle it.
! env --block-signal=INT true 2>/dev/null || run=(env --block-signal=INT "${run[@]}")
exec "${run[@]}"
