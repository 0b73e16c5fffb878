#!/bin/sh
# Installs a release of twin-device beside the one that runs, switches to it, and goes back if it does not come up.
#
#   release.sh install REQUIREMENT   what pip takes: a folder, a wheel, twin-device==0.1.0
#   release.sh rollback              switch to the release before
#   release.sh list                  what is there
#
# Exit status: 0 done, 1 it failed and the release from before runs, 2 wrong use.
#
# ROOT/releases/TIME is a virtual environment of its own; ROOT/current and ROOT/previous lead to two of them. A switch
# is one rename, so that a power cut leaves either the old or the new.
set -eu

ROOT=${ROOT:-/opt/twin-gateway}
SERVICE=${SERVICE:-twin-gateway}
STATUS=${STATUS:-/run/twin-gateway/status.json}
PYTHON=${PYTHON:-python3}
PATIENCE=${PATIENCE:-60} # seconds for the service to come up

say() { echo "release.sh: $*" >&2; }

lead() { # lead LINK TARGET: the link leads there from now on
    ln -sfn "$2" "$ROOT/$1.new"
    mv -T "$ROOT/$1.new" "$ROOT/$1"
}

target() { readlink "$ROOT/$1" 2>/dev/null || true; }

# True once the gateway runs and keeps its status file; whether the devices are well is another question.
comes_up() {
    systemctl restart "$SERVICE" || return 1
    tries=$PATIENCE
    while [ "$tries" -gt 0 ]; do
        status=0
        "$ROOT/current/bin/twin-device" gateway health --status "$STATUS" >/dev/null 2>&1 || status=$?
        [ "$status" -lt 2 ] && return 0
        tries=$((tries - 1))
        sleep 1
    done
    return 1
}

switch() { # switch RELEASE: to it, or back
    before=$(target current)
    lead current "$1"
    if ! systemctl is-enabled --quiet "$SERVICE" 2>/dev/null; then
        say "$1 is there; $SERVICE is not enabled, so nothing was started"
    elif ! comes_up; then
        say "$1 does not come up: journalctl -u $SERVICE says why"
        if [ -n "$before" ]; then
            lead current "$before"
            if comes_up; then say "$before runs again"; else say "$before does not come up either"; fi
        else
            rm -f "$ROOT/current"
        fi
        return 1
    else
        say "$1 runs"
    fi
    if [ -n "$before" ] && [ "$before" != "$1" ]; then lead previous "$before"; fi
}

install() {
    new=releases/$(date -u +%Y%m%dT%H%M%SZ)
    if [ -e "$ROOT/$new" ]; then
        say "$new is there already"
        return 1
    fi
    if ! "$PYTHON" -m venv "$ROOT/$new" ||
        ! "$ROOT/$new/bin/pip" install --quiet --disable-pip-version-check "$1" ||
        ! "$ROOT/$new/bin/twin-device" --version >&2; then
        rm -rf "${ROOT:?}/$new"
        say "$1 was not installed; nothing was changed"
        return 1
    fi
    # What is written must be on the card before the link leads there.
    sync
    if ! switch "$new"; then
        rm -rf "${ROOT:?}/$new"
        return 1
    fi
    for one in "$ROOT"/releases/*; do
        case releases/${one##*/} in
        "$(target current)" | "$(target previous)") ;;
        *) rm -rf "$one" ;;
        esac
    done
}

rollback() {
    previous=$(target previous)
    if [ -z "$previous" ] || [ ! -x "$ROOT/$previous/bin/twin-device" ]; then
        say "there is no release before"
        return 1
    fi
    switch "$previous"
}

list() {
    for one in "$ROOT"/releases/*; do
        [ -d "$one" ] || continue
        mark=
        [ "releases/${one##*/}" = "$(target previous)" ] && mark=" (previous)"
        [ "releases/${one##*/}" = "$(target current)" ] && mark=" (current)"
        echo "${one##*/}$mark"
    done
}

case ${1-}/$# in
install/2 | rollback/1)
    mkdir -p "$ROOT/releases"
    # One at a time; the lock ends with this process.
    exec 9>"$ROOT/.lock"
    if ! flock -n 9; then
        say "another release.sh is at work"
        exit 1
    fi
    "$@"
    ;;
list/1) list ;;
*)
    say "install REQUIREMENT, rollback, or list"
    exit 2
    ;;
esac
