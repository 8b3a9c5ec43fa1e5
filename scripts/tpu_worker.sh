#!/usr/bin/env bash
# What scripts/tpu_pod.sh has every worker of a TPU slice do. It travels there with the code.
#
#   tpu_worker.sh install            takes the code that was unpacked, makes a venv for it
#   tpu_worker.sh start COMMAND...   runs COMMAND in the background; it outlives the ssh connection
#   tpu_worker.sh log LINE           prints the log from LINE on, until the job ends or for a minute
#   tpu_worker.sh state              one line: @worker HOST none|running|exited CODE|stopped|lost
#   tpu_worker.sh stop               SIGTERM: the job saves; SIGKILL if that takes two minutes
#
# ~/deevisum_jax/ holds source/ (the code), venv/ and job/ (command, log, status of the last job).
# A job that exits with 75 (everything saved on a preemption notice) is started again here, unless
# this machine itself was told to go down.
set -euo pipefail

readonly ROOT="$HOME/deevisum_jax"
readonly SOURCE="$ROOT/source"
readonly VENV="$ROOT/venv"
readonly JOB="$ROOT/job"
readonly PYTHON_VERSION=3.12   # the images' own Python is 3.10, we need 3.11
readonly PREEMPTED=75
readonly RESTART_PAUSE_S="${TPU_WORKER_RESTART_PAUSE_S:-30}"
readonly LOG_S="${TPU_WORKER_LOG_S:-60}"
readonly STOP_S="${TPU_WORKER_STOP_S:-120}"

fail() {
  echo "error on $(hostname): $1" >&2
  exit "${2:-1}"
}

# The lock, not a process id, tells a running job: it goes when the machine restarts. Who asks takes
# a shared one, so that two who ask at once do not see each other.
is_running() {
  [[ -e $JOB/lock ]] && ! flock --shared --nonblock 8 8<"$JOB/lock"
}

install() {
  local uv="$ROOT/uv/bin/uv"
  is_running && fail "a job is running on this slice; end it first: tpu_pod.sh stop" 4
  rm -rf "$SOURCE"
  mv "$ROOT/source.new" "$SOURCE"
  if [[ ! -x $VENV/bin/python ]]; then
    # A private uv: it brings a Python where the system's is too old.
    python3 -m pip install --quiet --upgrade --target "$ROOT/uv" uv ||
      fail "pip cannot install uv; has the slice a way to the internet, and pip for python3?"
    "$uv" venv --quiet --clear --python "$PYTHON_VERSION" "$VENV" ||
      fail "uv finds no Python $PYTHON_VERSION; can the slice reach github.com?"
  fi
  "$uv" pip install --quiet --python "$VENV/bin/python" --editable "${SOURCE}[tpu,gcs]" ||
    fail "the package cannot be installed; the lines above say why"
  "$VENV/bin/python" -c 'import sys, jax, deevisum_jax
print("installed: Python", sys.version.split()[0], "jax", jax.__version__)' ||
    fail "the package was installed but cannot be imported"
}

start() {
  local command
  printf -v command '%q ' "$@"
  mkdir -p "$JOB"
  if is_running; then
    [[ $command == "$(cat "$JOB/command")" ]] ||
      fail "another job is running: $(cat "$JOB/command"); end it first: tpu_pod.sh stop" 4
    echo "already running on $(hostname)"
    return
  fi
  [[ -x $VENV/bin/python ]] || fail "nothing is installed; first: tpu_pod.sh install" 127
  rm -f "$JOB/status" "$JOB/stop" "$JOB/pid"
  [[ ! -e $JOB/log ]] || mv "$JOB/log" "$JOB/log.old"
  printf '%s\n' "$command" >"$JOB/command"
  setsid nohup bash "$SOURCE/scripts/tpu_worker.sh" supervise "$@" \
    >"$JOB/log" 2>&1 </dev/null &
  local tries
  for tries in {1..100}; do
    [[ -e $JOB/pid ]] && break
    sleep 0.1
  done
  [[ $tries -lt 100 ]] || fail "the job does not start; see ~/deevisum_jax/job/log"
  echo "started on $(hostname)"
}

# The job's parent: starts again on 75, leaves the exit status behind. SIGTERM it only notes:
# whoever sends it (`stop`, a machine that goes down) sends it to the job as well.
supervise() {
  exec 9>"$JOB/lock"
  flock --wait 5 9 || fail "another job has just been started" 4
  local code=$PREEMPTED signals=0 child seen
  trap 'signals=$((signals + 1))' TERM
  echo $$ >"$JOB/pid.new"
  mv "$JOB/pid.new" "$JOB/pid"
  cd "$SOURCE"
  export PATH="$VENV/bin:$PATH" PYTHONUNBUFFERED=1
  while ((signals == 0)); do
    echo "--- $(date -u +%FT%TZ) $(hostname): $*"
    "$@" 9>&- &   # what it leaves behind must not hold the lock
    child=$!
    # A signal ends `wait` too early, so it is repeated until none came while waiting.
    while true; do
      seen=$signals code=0
      wait "$child" || code=$?
      [[ $seen -ne $signals ]] || break
    done
    echo "--- $(date -u +%FT%TZ) $(hostname): exit $code"
    ((code == PREEMPTED && signals == 0)) || break
    echo "--- everything is saved and this machine is still here: again in $RESTART_PAUSE_S s"
    sleep "$RESTART_PAUSE_S" 9>&- &
    wait $! || true
  done
  if [[ -e $JOB/stop ]]; then echo stopped; else echo "exited $code"; fi >"$JOB/status.new"
  mv "$JOB/status.new" "$JOB/status"
}

log() {
  local next=$1 total deadline=$((SECONDS + LOG_S)) ended
  [[ -e $JOB/log ]] || return 0
  while true; do
    ended=true
    ! is_running || ended=false
    total=$(wc -l <"$JOB/log")
    if $ended; then
      awk -v from="$next" 'NR >= from' "$JOB/log"
      return
    fi
    # Whole lines only: the one still being written is for the next round.
    awk -v from="$next" -v to="$total" 'NR > to { exit } NR >= from' "$JOB/log"
    next=$((total + 1))
    ((SECONDS < deadline)) || return 0
    sleep 0.5
  done
}

state() {
  local what=none
  if is_running; then
    what=running
  elif [[ -e $JOB/status ]]; then
    what=$(cat "$JOB/status")
  elif [[ -e $JOB/command ]]; then
    what=lost   # it ended without a word: a power cut, or the whole machine was restarted
  fi
  echo "@worker $(hostname) $what"
}

stop() {
  local deadline=$((SECONDS + STOP_S))
  if ! is_running; then
    echo "nothing is running on $(hostname)"
    return
  fi
  touch "$JOB/stop"
  kill -TERM -- "-$(cat "$JOB/pid")" 2>/dev/null || true  # the group: the job and its parent
  while is_running; do
    if ((SECONDS >= deadline)); then
      kill -KILL -- "-$(cat "$JOB/pid")" 2>/dev/null || true
      echo stopped >"$JOB/status"
      echo "killed on $(hostname): it did not end within $STOP_S s of SIGTERM"
      return
    fi
    sleep 0.2
  done
  echo "stopped on $(hostname)"
}

case "${1:-}" in
  install | start | supervise | log | state | stop) "$@" ;;
  *) fail "unknown sub-command '${1:-}'; choose one of install, start, log, state, stop" 2 ;;
esac
