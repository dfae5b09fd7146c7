# To be sourced. `setup_venv requirements.txt` creates .venv, installs the packages of the file and
# sets $python. It installs again when a requirements file has changed, and replaces a .venv whose
# Python does not work: older than 3.11, or made on another machine. Runs in macOS's bash 3.2.
# shellcheck shell=bash

# Exits 0 on Python 3.11 or newer, native on a Mac (MLX has no wheels for x86), that can create an
# environment or is one. After an upgrade of the system's Python, an old .venv lacks the folder of
# packages of the new version.
_check_python='
import os, platform, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit("it has Python %d.%d" % sys.version_info[:2])
if sys.platform == "darwin" and platform.machine() != "arm64":
    sys.exit("its Python is not for Apple silicon")
if sys.prefix == sys.base_prefix:
    import ensurepip
elif not os.path.isdir(sysconfig.get_path("purelib")):
    sys.exit("its packages are for another Python")
'

_find_python() { # prints the command of the newest suitable Python
    local candidate
    # 3.14 comes later: not every package has wheels for it.
    for candidate in python3.13 python3.12 python3.11 python3.14 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$_check_python" 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: needs Python 3.11 or newer (macOS: brew install python@3.12;" \
        "Debian, Ubuntu: apt install python3-venv)" >&2
    return 1
}

_create_venv() { # creates .venv, or replaces it if it does not work
    local found reason="its Python does not run here"
    if [ -e .venv ] || [ -L .venv ]; then
        "$python" -c "$_check_python" 2>/dev/null && return 0
        if [ -d .venv ] && [ ! -e .venv/pyvenv.cfg ] && [ -n "$(ls -A .venv)" ]; then
            echo "error: .venv is not a Python environment; rename or delete it" >&2
            return 1
        fi
        found=$(_find_python) || return 1
        if "$python" -c '' 2>/dev/null; then
            reason=$("$python" -c "$_check_python" 2>&1) || true
        fi
        echo "replacing .venv ($reason) with an environment of $found"
        rm -rf .venv
    else
        found=$(_find_python) || return 1
    fi
    "$found" -m venv .venv
}

_install() { # requirements file; uv needs a quarter of pip's time, but does not read pip's settings
    local pip=("$python" -m pip install --quiet --disable-pip-version-check)
    if "${pip[@]}" uv 2>/dev/null &&
        "$python" -m uv pip install --quiet --python "$python" -r "$1" 2>/dev/null; then
        return 0
    fi
    "${pip[@]}" -r "$1"
}

setup_venv() { # requirements file
    local stamp=.venv/$1.installed
    python=$PWD/.venv/bin/python
    _create_venv || return 1
    if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
        echo "installing the packages of $1 into .venv"
        # An environment that uv created has no pip.
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
        _install "$1" || return 1
        cat requirements.txt "$1" >"$stamp"
    fi
}
