#!/usr/bin/env bash
# The steps that put Moored into an image. The Dockerfile, the Apptainer definition and the tests all
# run them from here, so that there is one answer to "how is it installed".
#
#     install.sh system     Python, a C++ compiler, InfiniBand's user side (root on Debian or Ubuntu)
#     install.sh packages   torch and all else that Moored needs, at the pinned versions
#     install.sh moored     Moored itself
#     install.sh check      does it start, and is each version the pinned one?
#
# What the environment decides, beside pip's own settings (PIP_INDEX_URL and so on):
#     MOORED_VENV           where the venv is, or goes (/opt/moored/venv)
#     PYTHON                what makes it (python3)
#     TORCH_INDEX_URL       the index that torch, and torch alone, is taken from (pip's own index)
#     PIP_INSTALL_FLAGS     further arguments of `pip install`, parted by blanks
#
# Nothing is written outside MOORED_VENV, a temporary folder and, by `system`, apt's places.
set -euo pipefail
umask 022 # whoever builds, every uid can read the result

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MOORED_VENV:-/opt/moored/venv}
torch_index=${TORCH_INDEX_URL:-}
torch_build=${torch_index%/}
torch_build=${torch_build##*/} # cu130 of https://download.pytorch.org/whl/cu130
read -ra flags <<<"${PIP_INSTALL_FLAGS:-}"

# What torch's CUDA build brings has pins of its own, where a build was tried.
constraints=("$root/docker/constraints.txt")
if [[ -n $torch_build && -f $root/docker/constraints-$torch_build.txt ]]; then
    constraints+=("$root/docker/constraints-$torch_build.txt")
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export PIP_NO_CACHE_DIR=${PIP_NO_CACHE_DIR:-1} PIP_DISABLE_PIP_VERSION_CHECK=1

# What packages are built with is pinned as well: before 25.3 pip has one name for that, from then on
# the other, and both part files by blanks: hence one file, in a place without any.
pip_install() {
    cat "${constraints[@]}" >"$work/constraints.txt"
    PIP_CONSTRAINT="$work/constraints.txt ${PIP_CONSTRAINT:-}" \
        PIP_BUILD_CONSTRAINT="$work/constraints.txt ${PIP_BUILD_CONSTRAINT:-}" \
        "$venv/bin/python" -m pip install "${constraints[@]/#/--constraint=}" "${flags[@]}" "$@"
}

# DeepSpeed compiles its CPU optimizer, and Triton its launchers, at first use: g++ and Python.h.
# Without verbs NCCL falls back from InfiniBand to sockets, and says so only when asked.
system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3 python3-dev python3-venv \
        ibverbs-providers libibverbs1
    apt-get clean
    rm -rf /var/lib/apt/lists/*
}

packages() {
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
    if [[ -n $torch_index ]]; then
        # Alone and first: no other package can come from this index, nor torch from another.
        pip_install --no-deps --index-url "$torch_index" "$(grep '^torch==' "$root/docker/constraints.txt")"
    fi
    "$venv/bin/python" - "$root/pyproject.toml" >"$work/requirements.txt" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["train"], sep="\n")
PY
    pip_install --requirement "$work/requirements.txt"
}

# From a copy, since building leaves its traces beside the sources.
moored() {
    mkdir "$work/moored"
    cp -R "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/src" "$work/moored"
    pip_install --no-deps "$work/moored"
    if [[ $root == /opt/moored ]]; then # an image's own copy, perhaps made under umask 077
        find "$root" -path "$venv" -prune -o -exec chmod a+rX {} +
    fi
}

# Without a home: some sites give none, and nothing of the builder's may be read or written.
check() {
    HOME=/dev/null TORCH_BUILD=$torch_build "$venv/bin/python" "$root/docker/check.py" "${constraints[@]}"
}

case ${1:-} in
    system | packages | moored | check) "$1" ;;
    *)
        echo "install.sh: got '${1:-}': name one step, system, packages, moored or check" >&2
        exit 2
        ;;
esac
