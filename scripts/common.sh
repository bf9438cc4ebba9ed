# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What all scripts share: messages, a step with progress, the cache. Sourced, not run.

self=${0##*/}
# shellcheck disable=SC2034 # used by the scripts that source this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # as above
cache=${LACE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lace}
progress_every=${LACE_PROGRESS_EVERY:-20}

# Messages go to stderr: stdout is for a script's result.
say() { echo "$self: $*" >&2; }
die() {
	say "$*"
	exit 1
}

need_root() { [ "$(id -u)" = 0 ] || die "must run as root: $1"; }

# need_command NAME GROUP: the Debian package that brings NAME is in GROUP of scripts/setup.
need_command() {
	command -v "$1" >/dev/null || die "$1 is not installed; run: scripts/setup $2"
}

# step LABEL COMMAND [ARG...] runs COMMAND with its output in a log, and says every
# $progress_every seconds that it still runs. If it fails, the end of the log is shown.
# Call it plainly, not behind || or if: there, errexit would be off inside COMMAND.
step() {
	local label=$1 log began=$SECONDS pid ticker rc=0
	shift
	log=$(mktemp "${TMPDIR:-/tmp}/lace-step.XXXXXX")
	say "$label ..."
	# Process groups of their own, so that an interrupt ends the children's children too.
	set -m
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	tick "$label" "$pid" &
	ticker=$!
	set +m
	trap 'kill -- "-$pid" "-$ticker" 2>/dev/null || :; rm -f "$log"; exit 130' INT TERM
	wait "$pid" || rc=$?
	trap - INT TERM
	kill -- "-$ticker" 2>/dev/null || :
	wait "$ticker" 2>/dev/null || :
	report_step "$label" "$rc" $((SECONDS - began)) "$log"
}

# tick LABEL PID: one line now and then while PID lives.
tick() {
	local began=$SECONDS
	while sleep "$progress_every" && kill -0 "$2" 2>/dev/null; do
		say "  $1: $((SECONDS - began)) s so far"
	done
}

report_step() { # LABEL RC SECONDS LOG
	if [ "$2" != 0 ]; then
		say "$1: failed after $3 s with status $2; the last lines of its output:"
		tail -n 40 "$4" | sed 's/^/    /' >&2
		rm -f "$4"
		return "$2"
	fi
	rm -f "$4"
	say "  $1: done in $3 s"
}
