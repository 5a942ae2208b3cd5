#!/usr/bin/env bash
# Sets up what is missing (.venv beside this file), then hands over to Python; ./launch.sh --help tells how.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage:
  ./launch.sh                        set up what is missing, then run the quick start: a small training run
  ./launch.sh COMMAND [--flags...]   set up what is missing, then run a command; some examples:
      ./launch.sh list
      ./launch.sh train --experiment=fashion_mnist/lenet --workdir=runs/lenet
      ./launch.sh evaluate --workdir=runs/lenet
  ./launch.sh test [--faults] [pytest arguments]
                                     run the tests; --faults adds the long fault-injection runs. Paths are relative
                                     to the repository; -n 0 runs in one process.
  ./launch.sh setup                  only set up; looks again for a GPU or TPU

Environment:
  CNN_JAX_PLATFORM=cpu|cuda|tpu      what JAX is installed for (default: cuda where nvidia-smi finds a GPU, tpu on a
                                     TPU VM, else cpu)
  PYTHON=...                         the Python that .venv is made with (default: the newest of 3.11 to 3.13 on PATH)
EOF
}

say() { printf 'launch.sh: %s\n' "$*" >&2; }

die() {
  local status=$1
  shift
  say "$@"
  exit "$status"
}

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do
  link=$(readlink "$self")
  case $link in
    /*) self=$link ;;
    *) self=$(dirname -- "$self")/$link ;;
  esac
done
root=$(CDPATH='' cd -P -- "$(dirname -- "$self")" && pwd -P)
venv=$root/.venv
stamp=$venv/.cnn_jax-ready        # written when a set-up has succeeded
unready=$venv/.cnn_jax-unready    # stands there from a set-up's first step to its last
log=$root/.venv-setup.log         # what the last set-up printed; also the lock

asked_platform=${CNN_JAX_PLATFORM:-}
asked_python=   # PYTHON as a path, or empty
asked_extra=    # "test" or empty

read_stamp() {
  stamp_root='' stamp_python='' stamp_platform='' stamp_extra='' stamp_sources=''
  [ -r "$stamp" ] || return 1
  {
    IFS= read -r stamp_root && IFS= read -r stamp_python && IFS= read -r stamp_platform &&
      IFS= read -r stamp_extra && IFS= read -r stamp_sources
  } <"$stamp"
}

# Is .venv what is asked for? Every call asks, so: one cksum and no Python.
is_ready() {
  local installed
  read_stamp || return 1
  [ ! -e "$unready" ] && [ -x "$venv/bin/python" ] || return 1
  [ "$stamp_root" = "$root" ] && [ "$stamp_sources" = "$sources" ] || return 1
  [ -z "$asked_platform" ] || [ "$stamp_platform" = "$asked_platform" ] || return 1
  [ -z "$asked_python" ] || [ "$stamp_python" = "$asked_python" ] || return 1
  [ -z "$asked_extra" ] || [ "$stamp_extra" = "$asked_extra" ] || return 1
  for installed in "$venv"/lib/python3*/site-packages/cnn_jax-*.dist-info; do
    [ ! -d "$installed" ] || return 0
  done
  return 1
}

# Succeeds, with python_version and base_python (not of a virtual environment) set, where $1 can make .venv; else says why
# not in refusal. It runs $1: the name of a Python may be a shim with nothing behind it.
probe_python() {
  local answer has_venv
  refusal="it does not run"
  answer=$("$1" -c 'import sys
try:
    import ensurepip, venv
    has_venv = "yes"
except ImportError:
    has_venv = "no"
base = getattr(sys, "_base_executable", None) or sys.executable
print("%d.%d %s %s" % (sys.version_info[0], sys.version_info[1], has_venv, base))' 2>/dev/null </dev/null) || return 1
  read -r python_version has_venv base_python <<<"$answer"
  case $python_version in
    3.11 | 3.12 | 3.13) ;;
    *) refusal="it is Python $python_version" && return 1 ;;
  esac
  refusal="it lacks venv or ensurepip (Debian and Ubuntu: apt install python$python_version-venv)"
  [ "$has_venv" = yes ]
}

# Sets python_path, python_version and base_python, or ends with exit code 2.
find_python() {
  local name refusals=''
  if [ -n "$asked_python" ]; then
    python_path=$asked_python
    probe_python "$python_path" ||
      die 2 "PYTHON is '$PYTHON': $refusal; allowed: a Python 3.11 to 3.13 with venv and ensurepip"
    return
  fi
  for name in python3.13 python3.12 python3.11 python3; do
    while IFS= read -r python_path; do
      ! probe_python "$python_path" || return 0
      refusals="$refusals; $python_path: $refusal"
    done < <(type -aP "$name")
  done
  die 2 "found no Python 3.11 to 3.13 with venv and ensurepip on PATH; install one or name it in PYTHON$refusals"
}

# JAX looks for the same PCI devices.
is_tpu_vm() {
  local device
  [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ] || return 1
  for device in /sys/bus/pci/devices/*; do
    [ -r "$device/vendor" ] && [ "$(<"$device/vendor")" = 0x1ae0 ] || continue
    case $(<"$device/device") in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

detect_platform() {
  local patience=()
  ! command -v timeout >/dev/null || patience=(timeout 30) # a broken driver can hang nvidia-smi
  case $(${patience[@]+"${patience[@]}"} nvidia-smi -L 2>/dev/null || true) in
    GPU\ *) echo cuda ;;
    *) if is_tpu_vm; then echo tpu; else echo cpu; fi ;;
  esac
}

# Runs a command of the set-up from the repository: in the background, so that a signal ends it at once, and as a process
# group (set -m), so that it ends with all it started. It inherits the lock and so keeps it should this script be killed.
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

# Why .venv has to be made anew before anything is installed into it; prints nothing where it can stay.
reason_to_rebuild() {
  if [ -e "$unready" ]; then
    echo "its last set-up did not finish"
  elif [ -n "$stamp_root" ] && [ "$stamp_root" != "$root" ]; then
    echo "it was made in another folder"
  elif [ -n "$stamp_python" ] && [ -n "$asked_python" ] && [ "$stamp_python" != "$asked_python" ]; then
    echo "it was made with $stamp_python"
  elif [ "$stamp_platform" != "$platform" ] && [[ $stamp_platform == cuda || $stamp_platform == tpu ]]; then
    echo "it was made for $stamp_platform"
  elif ! probe_python "$venv/bin/python"; then
    echo "its Python cannot be used: $refusal"
  elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 </dev/null; then
    echo "its pip cannot be used"
  fi
}

make_venv() {
  find_python
  say "creating .venv with $python_path (Python $python_version)"
  [ -d "$venv" ] || rm -f "$venv"
  mkdir -p "$venv"
  : >"$unready"
  rm -f "$stamp"
  find "$venv/" -mindepth 1 ! -name "${unready##*/}" -delete # not the folder: it may be a link to a larger disk
  run_logged "$base_python" -m venv "$venv" || die 1 "$base_python could not make $venv (exit $?); see $log"
}

set_up() {
  local platform extras reason status=0 started=$SECONDS
  child=
  [ -w "$root" ] || die 1 "cannot write to $root, where .venv belongs"
  exec 9>>"$log"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of $venv"
    flock 9 || true
  fi
  if is_ready; then
    exec 9>&-
    return
  fi
  : >"$log"
  trap 'cut_short 129' HUP
  trap 'cut_short 130' INT
  trap 'cut_short 143' TERM
  platform=${asked_platform:-$stamp_platform}
  platform=${platform:-$(detect_platform)}
  extras=${asked_extra:-$stamp_extra}
  if [ -d "$venv" ]; then
    reason=$(reason_to_rebuild)
    [ -z "$reason" ] || say "removing .venv: $reason"
  else
    reason="there is none"
  fi
  [ -z "$reason" ] || make_venv
  python_path=${python_path:-${asked_python:-$stamp_python}}
  # The old stamp waits in $unready: it holds again where pip gives up before it has changed anything.
  if [ -e "$stamp" ]; then mv -f "$stamp" "$unready"; else : >>"$unready"; fi
  say "installing cnn_jax for $platform${extras:+ with its $extras tools}; a first set-up takes a minute or two"
  [ "$platform" = cpu ] || extras=${extras:+$extras,}$platform
  run_logged "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --editable ".${extras:+[$extras]}" ||
    status=$?
  if [ "$status" -ne 0 ]; then
    [ ! -s "$unready" ] || mv -f "$unready" "$stamp"
    die 1 "pip could not install cnn_jax (exit $status): $(grep -o 'ERROR.*' "$log" | tail -n 1); see $log"
  fi
  extras=${asked_extra:-$stamp_extra}
  printf '%s\n' "$root" "$python_path" "$platform" "$extras" "$sources" >"$unready"
  mv -f "$unready" "$stamp"
  trap - HUP INT TERM
  exec 9>&-
  say "ready after $((SECONDS - started)) s"
}

case $asked_platform in
  '' | cpu | cuda | tpu) ;;
  *) die 2 "CNN_JAX_PLATFORM is '$asked_platform'; allowed: cpu, cuda, tpu" ;;
esac
if [ -n "${PYTHON:-}" ]; then
  asked_python=$(command -v "$PYTHON") || die 2 "PYTHON is '$PYTHON', which is not a command; allowed: a Python 3.11 to 3.13"
  case $asked_python in
    /*) ;;
    *) asked_python=$PWD/$asked_python ;;
  esac
fi
sources=$(cd -- "$root" && cksum setup.cfg pyproject.toml)
sources=${sources//$'\n'/ }

case ${1:-} in
  -h | --help)
    usage
    if is_ready; then
      printf '\nThe commands and their flags:\n\n'
      "$venv/bin/python" -P -m cnn_jax.main --help || true
    fi
    exit
    ;;
  setup)
    [ $# -eq 1 ] || die 2 "setup takes no argument, got '$2'"
    [ -n "$asked_platform" ] || asked_platform=$(detect_platform)
    is_ready || set_up
    read_stamp
    say "$venv is set up for $stamp_platform"
    exit
    ;;
  test)
    shift
    faults=false
    for argument; do
      shift
      if [ "$argument" = --faults ]; then faults=true; else set -- "$@" "$argument"; fi
    done
    ! $faults || set -- -m '' "$@"
    asked_extra='test'
    is_ready || set_up
    cd -- "$root"
    exec "$venv/bin/python" -m pytest -n logical --maxprocesses=4 --dist worksteal "$@"
    ;;
esac

is_ready || set_up
[ $# -gt 0 ] || set -- train --experiment=quickstart
# -P: the folder it is called from may hold a cnn_jax or jax.py of its own.
run=("$venv/bin/python" -P -m cnn_jax.main "$@")
# While Python starts, Ctrl-C would be a traceback. Held back, it comes when cnn_jax.main is ready for it; only GNU's env can.
! env --block-signal=INT true 2>/dev/null || run=(env --block-signal=INT "${run[@]}")
exec "${run[@]}"
