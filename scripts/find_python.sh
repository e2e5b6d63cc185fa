#!/usr/bin/env bash
# Read by the scripts that start a recipe. Sets python to the first of these that has meldkit: the active environment's,
# the one of .venv in $ROOT, any on the path. Ends the script with a message where none has it.
set -euo pipefail

fail() { # message, hint
    printf 'error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 2
}

has_meldkit() {
    "$1" -c 'import importlib.metadata as m; m.version("meldkit")' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        "$ROOT/.venv/bin/python" python3 python; do
        if [[ -n $candidate ]] && has_meldkit "$candidate"; then
            # shellcheck disable=SC2034  # read by the script that reads this one
            python=$candidate
            return
        fi
    done
    fail "meldkit is not installed" "run \`make setup\` in $ROOT, or activate the environment that has it"
}
