#!/usr/bin/env bash
# Creates .venv and installs meldkit with the versions of constraints.txt (and constraints-cpu.txt). Called by every
# target of the Makefile.
#
# A second call returns at once: .venv/.meldkit-setup holds a digest of everything that decides what is installed.
# An installation that was killed leaves .venv/.meldkit-unfinished behind and the next call begins anew.
#
#   PYTHON=python3.12   the interpreter (default: the first of python3, python3.11, python3.12, python3.13 that fits)
#   EXTRAS=dev          the extras of pyproject.toml to install (default: dev,deepspeed,unsloth)
#   TORCH=cpu|cuda      the build of torch (default: cuda where an NVIDIA device is found)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly EXTRAS="${EXTRAS-dev,deepspeed,unsloth}"
readonly VENV=.venv
readonly VENV_PYTHON=$VENV/bin/python
readonly STAMP=$VENV/.meldkit-setup
readonly UNFINISHED=$VENV/.meldkit-unfinished
readonly LOG=$VENV/setup.log

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

python_version() { # prints 3.11.7, or nothing where "$1" is no Python that meldkit supports
    "$1" -c 'import sys
if (3, 11) <= sys.version_info < (3, 14): print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true
}

find_python() { # sets python and version
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        version=$(python_version "$candidate")
        if [[ -n $version ]]; then
            python=$candidate
            return
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs."
    fi
    fail "no Python 3.11, 3.12 or 3.13 found (looked for python3, python3.11, python3.12, python3.13)." \
        "Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

wanted_torch() {
    case ${TORCH:-} in
    cpu | cuda) echo "$TORCH" ;;
    "") if nvidia-smi -L >/dev/null 2>&1 || [[ -e /proc/driver/nvidia/version ]]; then echo cuda; else echo cpu; fi ;;
    *) fail "TORCH=$TORCH: it is cpu or cuda." ;;
    esac
}

digest() { # of everything that decides what is installed: $1 the Python version, $2 the build of torch
    {
        cat pyproject.toml setup.cfg constraints.txt constraints-cpu.txt scripts/setup_env.sh
        printf '%s\n' "$1" "$2" "$EXTRAS" "$PWD"
    } | "$VENV_PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

show_progress() { # the last line of pip, rewritten in place; nothing where nobody watches
    local line
    while IFS= read -r line; do
        if [[ -t 2 ]]; then printf '\r\033[K      %.100s' "$line" >&2; fi
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

logged() { # runs a command into the log. An interruption ends the script here (the traps below), so the mark stays.
    local status=0
    touch "$UNFINISHED"
    printf '$ %s\n' "$*" >>"$LOG"
    # pip warns once for each package and each folder of an index that does not hold it.
    "$@" 2>&1 | { grep --line-buffered -v 'is ignored: it is neither a file nor a directory' || true; } |
        tee -a "$LOG" | show_progress || status=$?
    rm -f "$UNFINISHED"
    return "$status"
}

explain_and_fail() {
    { tail -n 30 "$LOG" | cut -c 1-400; } >&2
    fail "$1 could not be installed; the last lines of $LOG stand above."
}

pip_install() {
    logged "$VENV_PYTHON" -m pip install --constraint constraints.txt "$@"
}

uv_install_torch() { # uv knows where PyTorch keeps its builds; $1 is cpu or auto (the build for the driver that is here)
    logged "$VENV_PYTHON" -m pip install --constraint constraints.txt uv &&
        logged "$VENV_PYTHON" -m uv pip install --python "$VENV_PYTHON" --torch-backend "$1" --no-deps "$torch"
}

installed_torch() { # prints 2.13.0+cpu, or nothing
    "$VENV_PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

install_torch() { # torch comes first: whatever is installed later finds it and brings no other build
    local found
    found=$(installed_torch)
    if [[ $1 == cuda && $found == *+cpu ]]; then
        logged "$VENV_PYTHON" -m pip uninstall --yes torch || explain_and_fail "the CUDA build of torch"
    elif [[ $found == "${torch#torch==}"* ]]; then
        return
    fi
    if [[ $1 == cpu && $(uname -s) == Linux ]]; then
        # A configured index or --find-links may hold the CPU build; else uv; else the default build, which runs on
        # a CPU too but brings 3 GB of CUDA libraries.
        pip_install "$torch+cpu" || uv_install_torch cpu ||
            { echo "      no CPU build within reach; taking the default one (3 GB more)" && pip_install "$torch"; }
    elif [[ $1 == cuda ]]; then
        uv_install_torch auto || pip_install "$torch"
    fi
    # What torch itself needs (uv was told to leave it to pip), or all of it on other systems.
    pip_install "$torch" || explain_and_fail "$torch"
}

step() { # $1 what, the rest: the command
    local start=$SECONDS name=$1
    shift
    printf '  %s ...\n' "$name"
    "$@"
    printf '  %s: %d s\n' "$name" $((SECONDS - start))
}

install_package() {
    local extras=",$EXTRAS,"
    extras=${extras/,unsloth,/,unsloth-needs,} # itself comes later
    extras=${extras//,,/,} extras=${extras#,} extras=${extras%,}
    local package=(--editable ".${extras:+[$extras]}")
    if [[ $(installed_torch) == *+cpu ]]; then # other builds name their own triton
        package+=(--constraint constraints-cpu.txt)
    fi
    pip_install "${package[@]}" || explain_and_fail "meldkit and its dependencies"
}

install_unsloth() { # without its dependencies: see unsloth-needs in pyproject.toml
    if [[ $(installed_torch) != *+cpu ]]; then # on a CPU they must not be there
        pip_install torchvision xformers || echo "      torchvision or xformers not within reach: Unsloth may be slower"
    fi
    pip_install --no-deps unsloth unsloth_zoo || explain_and_fail "unsloth"
}

make_venv() { # $1: an option of venv
    "$python" -m venv "$@" "$VENV" && return
    fail "$python -m venv failed. On Debian and Ubuntu: apt-get install python3-venv"
}

if command -v flock >/dev/null; then # two calls at once take turns
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock 9
fi

build=$(wanted_torch)
python='' version=''
if [[ -n ${PYTHON:-} || ! -x $VENV_PYTHON ]]; then
    find_python
else
    version=$(python_version "$VENV_PYTHON")
    if [[ -z $version ]]; then find_python; fi
fi
if [[ -f $STAMP && ! -e $UNFINISHED && $(python_version "$VENV_PYTHON") == "$version" &&
    $(<"$STAMP") == "$(digest "$version" "$build")" ]]; then
    exit 0
fi

trap 'exit 130' INT
trap 'exit 143' TERM
torch=$(grep -E '^torch==' constraints.txt)
echo "setup: Python $version, $build build of torch, extras ${EXTRAS:-none}"
if [[ ! -e $VENV_PYTHON ]]; then
    make_venv
elif [[ -e $UNFINISHED || $(python_version "$VENV_PYTHON") != "$version" ]] ||
    ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    echo "  $VENV is unfinished or of another Python: beginning anew"
    if [[ -z $python ]]; then find_python; fi
    make_venv --clear
fi
rm -f "$STAMP"
: >"$LOG"
step "torch" install_torch "$build"
step "meldkit and its dependencies" install_package
if [[ ",$EXTRAS," == *,unsloth,* ]]; then step "Unsloth" install_unsloth; fi
digest "$version" "$build" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
echo "setup: done in $SECONDS s"
