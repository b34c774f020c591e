# Sourced by examples/quickstart, tests/run and .ci/run: Debian packages and the virtual environment, installed once.
# Sets REPO and PYTHON; needs bash. Nothing here starts or stops a service.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${NYDUS_LAB_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/nydus-py}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# need_packages NAME...: installs the missing ones with apt-get; as root only.
need_packages() {
    local missing=() name
    command -v apt-get >/dev/null || return 0
    for name in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null) in ii*) ;; *) missing+=("$name") ;; esac
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || { say "not root, so these packages are not installed: ${missing[*]}"; return 0; }
    say "installing ${missing[*]}"
    mkdir -p "$CACHE"
    local log=$CACHE/apt.log policy=/usr/sbin/policy-rc.d own_policy=
    # Debian starts a package's services at once: a registry on port 5000 and a containerd nobody asked for.
    if [ ! -e $policy ]; then
        own_policy=yes
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 130' INT TERM HUP
    fi
    local status=0
    {
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}" ||
            { apt-get -q update &&
              DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"; }
    } >"$log" 2>&1 </dev/null || status=$?
    if [ -n "$own_policy" ]; then
        rm -f $policy
        trap - EXIT INT TERM HUP
    fi
    [ $status -eq 0 ] || { tail -n 20 "$log" >&2; die "apt-get could not install ${missing[*]} (whole output: $log)"; }
}

# find_python: the first Python of at least 3.11 that can make virtual environments; Debian's before others, because
# its headers are a package away.
find_python() {
    local one
    for one in /usr/bin/python3 python3 python3.11 python3.12 python3.13; do
        if command -v "$one" >/dev/null &&
            "$one" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$one"
            return
        fi
    done
    die "no Python of at least 3.11 with its venv module: apt-get install python3 python3-venv"
}

# need_environment EXTRA: the virtual environment with this package in it, editable; sets PYTHON.
# $NYDUS_VENV names one that exists and is used as it is.
need_environment() {
    local extra=$1 base venv stamp want
    if [ -n "${NYDUS_VENV:-}" ]; then
        PYTHON=$NYDUS_VENV/bin/python
        [ -x "$PYTHON" ] || die "NYDUS_VENV: $PYTHON does not exist"
        return 0
    fi
    base=$(find_python) || exit 1
    venv=$CACHE/venv-$(printf %s "$REPO" | cksum | cut -d' ' -f1)
    want="$("$base" -V) $base $(cksum <"$REPO/pyproject.toml")"
    mkdir -p "$CACHE"
    exec 9>"$CACHE/venv.lock"
    flock -w 600 9 || die "another installation holds $CACHE/venv.lock"
    stamp=$venv/installed
    if ! { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$want" ] && grep -qx "extra $extra" "$stamp"; }; then
        say "installing this package and what it needs into $venv (once; about a minute)"
        if ! { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$want" ]; }; then
            rm -rf "$venv"
            "$base" -m venv "$venv" || die "$base cannot make a virtual environment in $venv"
        fi
        local what="$REPO" log=$CACHE/pip.log
        [ -n "$extra" ] && what="$REPO[$extra]"
        "$venv/bin/python" -m pip install --disable-pip-version-check -q -e "$what" >"$log" 2>&1 </dev/null ||
            { tail -n 20 "$log" >&2; die "pip could not install $what (whole output: $log)"; }
        { echo "$want"; grep -s '^extra' "$stamp" || true; echo "extra $extra"; } >"$stamp.new"
        [ "$extra" != dev ] || echo "extra " >>"$stamp.new"
        mv "$stamp.new" "$stamp"
    fi
    exec 9>&-
    PYTHON=$venv/bin/python
}
