# Sourced by demo.sh and tests/run.sh: makes .venv with the packages of the file named, once, and
# sets $python. A changed requirements file is installed again.
setup_venv() { # requirements file
    local found=""
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "error: Python 3.11 or newer is needed; on a Mac: brew install python@3.12" >&2
        return 1
    fi
    python=$PWD/.venv/bin/python
    local stamp=.venv/$1.installed
    if [ -x "$python" ] && cmp -s requirements.txt .venv/requirements.seen && [ -e "$stamp" ] &&
        cmp -s "$1" "$stamp"; then
        return 0
    fi
    echo "installing the packages of $1 into .venv"
    [ -x "$python" ] || "$found" -m venv .venv
    "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
    cp requirements.txt .venv/requirements.seen
    cp "$1" "$stamp"
}
