#!/usr/bin/env bash
# Runs a job on all workers of a Cloud TPU slice. `tpu_pod.sh --help` says how; docs/TPU.md is the
# long form. Everything that happens on the workers is in scripts/tpu_worker.sh.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/tpu_pod.sh SUBCOMMAND --name NAME --zone ZONE [flags] [-- COMMAND...]

sub-commands
  launch   up, install, run: all that a first run needs
  up       create the slice, or reuse the one of that name; waits until it is ready
  install  copy the committed code (git HEAD) to all workers and install it there
  run      start the job on all workers and follow it; it goes on when this terminal is closed
  log      follow the job that runs; prints its log from the beginning
  stop     SIGTERM on all workers: the job saves and ends
  status   the slice, its place in the queue, the job on every worker
  down     delete the slice; nothing is billed any more

flags
  --name NAME               of the slice, and of its queued resource
  --zone ZONE               such as us-west4-a
  --project PROJECT         default: that of `gcloud config`
  --accelerator_type TYPE   such as v5litepod-16, v5p-32, v6e-16 (for launch, up, --keep_alive)
  --runtime_version IMAGE   default: the one for JAX on that type
  --spot                    cheaper, may be taken away at any moment
  --queued                  wait in line for it (a queued resource) instead of failing when none is free
  --config FILE             the main job: python -m deevisum_jax.main --config FILE
  --workdir DIR             ... --workdir DIR; gs://... on more than one host
  --config.FIELD=VALUE      ... with this override; repeatable
  -- COMMAND...             another job instead of the main one
  --keep_alive              run, launch: when the slice is taken away, get another, go on there
  --delete_after            run, launch: delete the slice in the end, however the job ended, and when
                            it could not be started; not where another job runs on it
                            (both are done by this command: it has to stay running)
  --dry_run                 print every command, run none; needs no gcloud

examples
  scripts/tpu_pod.sh launch --name first --zone us-west4-a --accelerator_type v5litepod-16 \
      --config configs/quickstart.py --workdir gs://my-bucket/first --delete_after
  scripts/tpu_pod.sh launch --name big --zone us-east5-a --accelerator_type v5p-64 --spot --queued \
      --keep_alive --config configs/paligemma2_3b.py --workdir gs://my-bucket/big
  scripts/tpu_pod.sh run --name first --zone us-west4-a -- \
      python -m deevisum_jax.summarize --manifest gs://my-bucket/videos.csv \
      --checkpoint gs://my-bucket/first --out gs://my-bucket/summaries

Exit status: 0 the job is done, 2 a mistake in what was given (by you or to the job), 75 the slice
was taken away or saved and stopped (the same command goes on), 130 you stopped it, else the job's.
END
}

readonly PREEMPTED=75 MISTAKE=2 INTERRUPTED=130
readonly WORKER="deevisum_jax/source/scripts/tpu_worker.sh"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly POLL_S="${TPU_POD_POLL_S:-15}"        # between two looks at a slice or a job
readonly GRACE_S="${TPU_POD_GRACE_S:-180}"     # in which a failed worker may prove to be a lost slice
readonly RETRY_S="${TPU_POD_RETRY_S:-300}"     # between two attempts to get another slice
readonly DELETE_PAUSE_S="${TPU_POD_DELETE_PAUSE_S:-30}"   # between two attempts to delete one
readonly DELETE_TRIES=10 INSTALL_TRIES=12

say() { echo "tpu_pod: $1" >&2; }

tell() { $dry_run || say "$1"; }  # how it goes; a dry run shows commands only

die() {
  say "error: $1"
  exit "${2:-$MISTAKE}"
}

# ---- Commands: printed in a dry run, else run ----
# `return 0`, not `return`: in a trap that would be the status from before the trap.

# One word as a shell would have to be given it.
quoted() {
  local quote="'" escaped="'\\''"
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//$quote/$escaped}"
  fi
}

quoted_line() {
  local word separator=""
  for word in "$@"; do
    printf '%s' "$separator"
    quoted "$word"
    separator=" "
  done
}

# A command that changes something; shown in a real run, too.
change() {
  if $dry_run; then
    quoted_line "$@"
    echo
    return 0
  fi
  echo "+ $(quoted_line "$@")" >&2
  "$@" </dev/null
}

# look ASSUMED COMMAND...: a question. Sets `answer`, in a dry run to what is assumed, to ABSENT
# where gcloud knows no such thing, to UNKNOWN where it fails (`problem` says how; `printed` is what
# came before: ssh fails as a whole where one worker does not answer).
look() {
  local assumed=$1 code=0
  shift
  problem=""
  if $dry_run; then
    quoted_line "$@"
    echo
    answer=$assumed printed=$assumed
    return 0
  fi
  printed=$("$@" 2>"$scratch/errors" </dev/null) || code=$?
  answer=$printed
  ((code != 0)) || return 0
  problem=$(cat "$scratch/errors")
  if [[ $problem == *NOT_FOUND* ]]; then answer=ABSENT; else answer=UNKNOWN; fi
}

tpu() {  # tpu-vm|queued-resources VERB [flags]: as the words of a gcloud command, in `words`
  words=(gcloud compute tpus "$@" --zone "$zone" --quiet)
  [[ -z $project ]] || words+=(--project "$project")
}

on_workers() {  # WORKER|all COMMAND: the words of a command that runs it there
  tpu tpu-vm ssh "$name" --worker "$1" --command "$2"
}

# ---- What a person gave ----

subcommand="" name="" zone="" project="" type="" runtime="" config="" workdir=""
spot=false queued=false keep_alive=false delete_after=false dry_run=false
overrides=() command=() words=()

parse() {
  [[ $# -gt 0 ]] || { usage >&2; exit "$MISTAKE"; }
  case $1 in
    -h | --help | help) usage; exit 0 ;;
    launch | up | install | run | log | stop | status | down) subcommand=$1 ;;
    *) die "unknown sub-command '$1'; choose one of launch, up, install, run, log, stop, status, down" ;;
  esac
  shift
  local flag value
  while [[ $# -gt 0 ]]; do
    case $1 in
      --)
        shift
        command=("$@")
        [[ $# -gt 0 ]] || die "nothing after --; give the command that all workers are to run"
        break
        ;;
      --config.*=*) overrides+=("$1") ;;
      --config.*) die "$1 has no value; write overrides as --config.FIELD=VALUE" ;;
      --spot) spot=true ;;
      --queued) queued=true ;;
      --keep_alive) keep_alive=true ;;
      --delete_after) delete_after=true ;;
      --dry_run) dry_run=true ;;
      -h | --help) usage; exit 0 ;;
      --name | --zone | --project | --accelerator_type | --runtime_version | --config | --workdir | \
        --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | \
        --config=* | --workdir=*)
        flag=${1%%=*}
        if [[ $1 == *=* ]]; then
          value=${1#*=}
        else
          [[ $# -gt 1 && $2 != --* ]] || die "$1 needs a value; see --help"
          value=$2
          shift
        fi
        [[ -n $value ]] || die "$flag needs a value; see --help"
        case $flag in
          --name) name=$value ;;
          --zone) zone=$value ;;
          --project) project=$value ;;
          --accelerator_type) type=$value ;;
          --runtime_version) runtime=$value ;;
          --config) config=$value ;;
          --workdir) workdir=$value ;;
        esac
        ;;
      *) die "unknown flag '$1'; see --help (a command for the workers goes behind --)" ;;
    esac
    shift
  done
}

check() {
  [[ -n $name ]] || die "--name is missing: how the slice is, or shall be, called"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "--name '$name': lower-case letters, digits and hyphens only, a letter first, 63 at most"
  [[ -n $zone ]] || die "--zone is missing, such as us-west4-a; zones with TPUs: https://cloud.google.com/tpu/docs/regions-zones"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    die "--zone '$zone' is no zone; it looks like us-west4-a (a region has zones, it is none)"
  local creates=false runs=false
  case $subcommand in
    launch) creates=true runs=true ;;
    up) creates=true ;;
    run) runs=true ;;
  esac
  if $keep_alive || $delete_after; then
    $runs || die "--keep_alive and --delete_after are for run and launch, not for $subcommand"
  fi
  ! $keep_alive || creates=true
  ! $creates || [[ -n $type ]] ||
    die "--accelerator_type is missing, such as v5litepod-16; docs/TPU.md says what fits where"
  [[ -z $type ]] || check_type
  if $runs; then
    check_job
    [[ -z $type ]] || check_workdir "$(hosts_of_type)"
  elif [[ ${#command[@]} -gt 0 || ${#overrides[@]} -gt 0 || -n $config$workdir ]]; then
    die "$subcommand starts no job; --config, --workdir and -- COMMAND are for run and launch"
  fi
}

check_type() {
  local size=${type##*-} sizes largest=12288
  [[ $type != v4-* ]] || largest=8192
  case $type in
    v5litepod-* | v6e-*) sizes=" 1 4 8 16 32 64 128 256 " ;;
    v5p-* | v4-*) sizes=" 8 16 32 64 " ;;
    *) sizes="" ;;
  esac
  if [[ $type =~ ^(v4|v5p)-[1-9][0-9]*$ ]] && ((size % 128 == 0 && size <= largest)); then
    sizes=" $size "   # whole cubes of 64 chips
  fi
  [[ $sizes == *" $size "* ]] || die "unknown --accelerator_type '$type'; there are
  v5litepod-N  (v5e)  N chips: 1, 4, 8, 16, 32, 64, 128, 256
  v6e-N               N chips: 1, 4, 8, 16, 32, 64, 128, 256
  v5p-N, v4-N         N cores, two a chip: 8, 16, 32, 64, then multiples of 128
                      up to 12288 (v5p), 8192 (v4)
TPU7x (Ironwood) is to be had on GKE only: scripts/gke_job.sh"
  [[ -n $runtime ]] || case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
  esac
}

hosts_of_type() {
  local size=${type##*-}
  case $type in
    v5p-* | v4-*) echo $((size / 8)) ;;                        # 4 chips a host, 2 cores a chip
    *) if ((size <= 8)); then echo 1; else echo $((size / 4)); fi ;;   # up to 8 chips on one host
  esac
}

check_job() {
  if [[ ${#command[@]} -gt 0 ]]; then
    [[ -z $config$workdir && ${#overrides[@]} -eq 0 ]] ||
      die "both a command behind -- and --config or --workdir; the latter belong to the main job only"
    [[ ${command[0]} != -* ]] ||
      die "the command behind -- begins with '${command[0]}'; give a whole command, such as -- python -m deevisum_jax.main ..."
    return
  fi
  [[ -n $config ]] || die "--config is missing, such as configs/quickstart.py (or a whole command behind --)"
  [[ -n $workdir ]] || die "--workdir is missing, such as gs://my-bucket/runs/first"
  config=${config#"$ROOT"/}
  git -C "$ROOT" cat-file -e "HEAD:$config" 2>/dev/null ||
    die "--config '$config' is not committed in $ROOT; workers get the committed code: git add and git commit it first"
  command=(python -m deevisum_jax.main --config "$config" --workdir "$workdir")
  [[ ${#overrides[@]} -eq 0 ]] || command+=("${overrides[@]}")
}

check_workdir() {  # HOSTS
  [[ $1 -gt 1 ]] || return 0
  local word value flag=""
  for word in "${command[@]}"; do
    value=""
    case $word in
      --workdir=* | --out=* | --checkpoint=* | --manifest=*) flag=${word%%=*} value=${word#*=} ;;
      *) [[ -z $flag ]] || value=$word ;;
    esac
    [[ -z $value || $value == gs://* || $value == s3://* ]] ||
      die "$flag '$value' would be on the disk of each of the $1 hosts on its own; give a bucket that all share, such as gs://my-bucket/runs/first"
    flag=""
    case $word in --workdir | --out | --checkpoint | --manifest) flag=$word ;; esac
  done
}

check_gcloud() {
  $dry_run || command -v gcloud >/dev/null ||
    die "gcloud is not installed; see https://cloud.google.com/sdk/docs/install (--dry_run needs none)"
  look you@example.com gcloud auth list --filter status:ACTIVE --format 'value(account)'
  [[ $answer != UNKNOWN ]] || die "gcloud auth list fails: $problem"
  [[ -n $answer ]] || die "gcloud is not logged in; first: gcloud auth login"
}

# ---- The slice ----

state="" slice_type="" hosts=1 created=false
ours=false   # there is, or may be, a slice that this command answers for in the end

see_slice() {  # ASSUMED STATE: sets state and, where the slice is known, slice_type and hosts
  local assumed=$1 seen_type seen_hosts
  [[ $assumed == ABSENT ]] || assumed="$assumed"$'\t'"${type:-v5litepod-16}"$'\t'"$(hosts_assumed)"
  tpu tpu-vm describe "$name" --format 'value(state,acceleratorType.basename(),networkEndpoints.len())'
  look "$assumed" "${words[@]}"
  IFS=$'\t' read -r state seen_type seen_hosts <<<"$answer"
  slice_type=${seen_type:-$slice_type} hosts=${seen_hosts:-$hosts}
}

hosts_assumed() { if [[ -n $type ]]; then hosts_of_type; else echo 4; fi; }

see_queue() {  # ASSUMED STATE: sets answer to the state of the queued resource
  tpu queued-resources describe "$name" --format 'value(state.state)'
  look "$1" "${words[@]}"
}

known() {  # WHAT: false where gcloud could not say how it stands
  [[ $answer == UNKNOWN ]] || return 0
  say "error: gcloud cannot say how $1 '$name' in $zone stands; check --project and --zone; is the
API on (gcloud services enable tpu.googleapis.com)? It says:
$problem"
  return 1
}

check_slice_type() {
  [[ -n $type && $slice_type != "$type" ]] || return 0
  ours=false
  die "slice '$name' exists with another type: it is $slice_type, --accelerator_type says $type; take another --name, or delete it first: tpu_pod.sh down"
}

up() {
  created=false
  see_slice ABSENT
  known slice || return 1
  case $state in
    READY)
      check_slice_type
      ours=true
      tell "slice '$name' is there ($slice_type, $hosts hosts), used again"
      return
      ;;
    ABSENT) ;;
    PREEMPTED | TERMINATED)
      say "slice '$name' was taken away; what is left of it is deleted"
      down || return 1
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING)
      say "slice '$name' is $state"
      ours=true
      wait_for_slice || return 1
      check_slice_type
      return
      ;;
    DELETING) wait_until_gone ;;
    *)
      say "error: slice '$name' is $state; wait, or delete it: tpu_pod.sh down"
      return 1
      ;;
  esac
  ours=false
  see_queue ABSENT
  known "queued resource" || return 1
  case $answer in
    ABSENT) ;;
    FAILED | SUSPENDED | SUSPENDING | ACTIVE | DELETING)  # of no use: ACTIVE has lost its slice
      say "an old queued resource '$name' is $answer; it is replaced"
      delete_queue || return 1
      answer=ABSENT
      ;;
    *)
      $queued ||
        die "a queued resource '$name' is in line ($answer) and would bring a second slice; wait for it: --queued, or delete it: tpu_pod.sh down"
      ;;
  esac
  ours=true
  if $queued; then
    up_queued || return 1
  else
    tpu tpu-vm create "$name" --accelerator-type "$type" --version "$runtime"
    ! $spot || words+=(--spot)
    change "${words[@]}" || return 1
  fi
  created=true
  wait_for_slice || return 1
  check_slice_type
}

up_queued() {  # waits in line, with `answer` the state of the queued resource
  if [[ $answer == ABSENT ]]; then
    tpu queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
      --runtime-version "$runtime"
    ! $spot || words+=(--spot)
    change "${words[@]}" || return 1
  fi
  local last=""
  while true; do
    see_queue ACTIVE
    [[ $answer == "$last" ]] || tell "queued resource '$name': $answer"
    last=$answer
    case $answer in
      ACTIVE) return ;;
      FAILED | SUSPENDED | ABSENT)
        say "error: the queue gave no slice; why: gcloud compute tpus queued-resources describe $name --zone $zone"
        return 1
        ;;
    esac
    sleep "$POLL_S"
  done
}

wait_for_slice() {
  while true; do
    see_slice READY
    case $state in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REPAIRING | UNKNOWN) sleep "$POLL_S" ;;
      *)
        say "error: slice '$name' became $state while it was waited for"
        return 1
        ;;
    esac
  done
}

wait_until_gone() {
  while true; do
    see_slice ABSENT
    [[ $state != ABSENT ]] || return 0
    sleep "$POLL_S"
  done
}

delete_queue() {
  tpu queued-resources delete "$name" --force
  change "${words[@]}"
}

# Deletes the queued resource and the slice. Either may be there without the other, and a slice does
# not always belong to the queued resource of its name.
down() {
  local try found=false
  for ((try = 1; try <= DELETE_TRIES; try++)); do
    if delete_what_is_there; then
      $dry_run || $found || say "no slice '$name' in $zone; nothing to delete"
      state=ABSENT
      return 0
    fi
    ((try < DELETE_TRIES)) || break
    say "not deleted yet; next attempt in $DELETE_PAUSE_S s"
    sleep "$DELETE_PAUSE_S"
  done
  say "error: NOT DELETED. Slice '$name' may be STILL THERE AND BILLED. Try again: $(down_command)
or delete it by hand: https://console.cloud.google.com/compute/tpus"
  return 1
}

delete_what_is_there() {  # sets `found`, if there is anything; true once nothing is left
  local failed=false assumed_queue=ABSENT assumed_slice=READY
  ! $queued || assumed_queue=ACTIVE assumed_slice=ABSENT
  see_queue "$assumed_queue"
  if ! known "queued resource"; then
    failed=true
  elif [[ $answer != ABSENT ]]; then
    found=true
    delete_queue || failed=true   # and the slice that it gave
  fi
  see_slice "$assumed_slice"
  if ! known slice; then
    failed=true
  elif [[ $state != ABSENT ]]; then
    found=true
    tpu tpu-vm delete "$name"
    change "${words[@]}" || failed=true
  fi
  ! $failed
}

down_command() {
  printf '%s' "scripts/tpu_pod.sh down --name $name --zone $zone${project:+ --project $project}"
}

status() {
  see_queue ABSENT
  known "queued resource" || return 1
  $dry_run || echo "queued resource: $answer"
  see_slice READY
  known slice || return 1
  $dry_run || echo "slice: $state${slice_type:+ $slice_type $hosts hosts}"
  [[ $state == READY ]] || return 0
  see_workers none
  $dry_run || printf '%s\n' "$workers"
}

need_slice() {
  see_slice READY
  known slice || exit 1
  [[ $state == READY ]] ||
    die "slice '$name' in $zone is $state; first: tpu_pod.sh up (or look: tpu_pod.sh status)"
}

# ---- The code on the workers ----

install() {
  local archive="$ROOT/build/tpu_pod/$name.tar.gz" changed
  git -C "$ROOT" cat-file -e HEAD:scripts/tpu_worker.sh 2>/dev/null ||
    die "$ROOT is no git checkout with scripts/tpu_worker.sh committed; workers get the committed code: git commit it first"
  changed=$(git -C "$ROOT" status --porcelain | head -5 || true)
  [[ -z $changed ]] || say "warning: workers get the last commit, without these changes:
$changed"
  $dry_run || mkdir -p "$(dirname "$archive")"
  change git -C "$ROOT" archive --format tar.gz --output "$archive" HEAD || return 1
  tpu tpu-vm scp "$archive" "$name:deevisum_jax.tar.gz" --worker all
  if ! change "${words[@]}"; then
    say "error: the code cannot be copied to all workers; the lines above say why"
    return 1
  fi
  on_workers all "rm -rf deevisum_jax/source.new && mkdir -p deevisum_jax/source.new && tar -xzf deevisum_jax.tar.gz -C deevisum_jax/source.new && bash deevisum_jax/source.new/scripts/tpu_worker.sh install"
  if ! change "${words[@]}"; then
    say "error: the installation failed; the lines above say on which worker and why"
    return 1
  fi
}

# ---- The job ----

workers=""

see_workers() {  # ASSUMED WHAT: sets workers to their @worker lines
  local assumed="" host
  if $dry_run; then
    for ((host = 0; host < hosts; host++)); do assumed+="@worker $host $1"$'\n'; done
  fi
  on_workers all "bash $WORKER state"
  look "$assumed" "${words[@]}"
  workers=$(grep '^@worker ' <<<"$printed" || true)
}

how_many() {  # PATTERN: of the workers that answered
  grep -cE " ($1)\$" <<<"$workers" || true
}

start_job() {
  on_workers all "bash $WORKER start $(quoted_line "${command[@]}")"
  local code=0
  change "${words[@]}" || code=$?
  case $code in
    0) return ;;
    4)
      delete_after=false
      die "another job is running on '$name'; follow it: tpu_pod.sh log, end it: tpu_pod.sh stop"
      ;;
    127) die "nothing is installed on '$name'; first: tpu_pod.sh install" ;;
  esac
  slice_is_gone || die "the job could not be started on all workers; the lines above say why" 1
  return "$PREEMPTED"
}

stop_job() {
  on_workers all "bash $WORKER stop"
  change "${words[@]}"
}

# True as soon as the slice is no longer there, false if it still is after GRACE_S.
slice_is_gone() {
  local since=$SECONDS
  while true; do
    see_slice READY
    case $state in
      READY | UNKNOWN) ;;
      *) return 0 ;;
    esac
    ! $dry_run || return 1
    ((SECONDS - since < GRACE_S)) || return 1
    sleep "$POLL_S"
  done
}

# Prints worker 0's log until the job has ended everywhere; returns its exit status, or PREEMPTED.
follow() {
  local next=1 line code running finished failed silent said=0 since="" grace
  following=true
  while true; do
    on_workers 0 "bash $WORKER log $next"
    if $dry_run; then
      change "${words[@]}"
    else
      while IFS= read -r line; do
        printf '%s\n' "$line"
        next=$((next + 1))
      done < <("${words[@]}" 2>/dev/null </dev/null)   # who does not answer is told below
    fi
    see_workers "exited 0"
    if (($(how_many stopped) > 0)); then
      say "the job was stopped; the same command goes on from its last checkpoint"
      return "$INTERRUPTED"
    fi
    running=$(how_many running) finished=$(how_many "exited 0") failed=$(how_many "exited 1")
    silent=$((hosts - $(how_many '.*')))
    # Not so where another worker is missing: to wait for it in vain ends with that status, too.
    if (($(how_many "exited $MISTAKE") > 0 && $(how_many "running|exited (0|$MISTAKE)") == hosts)); then
      say "the job refused what it was given (exit status $MISTAKE); its message is in the log"
      stop_job || true
      return "$MISTAKE"
    fi
    if ((finished == hosts)); then
      return 0
    fi
    if ((silent != said)); then
      say "$silent of $hosts hosts do not answer${problem:+: ${problem##*$'\n'}}"
      said=$silent
    fi
    if ((running + finished < hosts)); then
      # A worker failed, saved and ended, or does not answer. Is the slice on its way out? Workers
      # that run are left alone: either they do not need the others, or jax soon ends them, too.
      see_slice READY
      case $state in
        READY | UNKNOWN) ;;
        *)
          say "slice '$name' was taken away ($state)"
          return "$PREEMPTED"
          ;;
      esac
      if ((finished + failed == hosts)); then
        say "the job has ended, on $failed of $hosts hosts with exit status 1; its log says why"
        return 1
      fi
    fi
    if ((running > 0)) || [[ $state == UNKNOWN ]]; then
      since=""
    else
      since=${since:-$SECONDS}
      # Where none answers, that may be our own network: the job may be well.
      grace=$((silent < hosts ? GRACE_S : 10 * GRACE_S))
      if ((SECONDS - since >= grace)); then
        code=$(sed -n 's/.* exited \([1-9][0-9]*\)$/\1/p' <<<"$workers" | grep -vxE "$PREEMPTED|$MISTAKE" | sort -n | sed 1q || true)
        say "the job ended early, though the slice is there; $silent of $hosts hosts do not answer
$workers"
        return "${code:-$PREEMPTED}"
      fi
    fi
    sleep "$POLL_S"
  done
}

run_job() {
  local code
  check_workdir "$hosts"
  while true; do
    code=0
    start_job || code=$?
    if ((code == 0)); then
      tell "the job goes on when this terminal is closed, and after Ctrl-C; to end it: tpu_pod.sh stop"
      follow || code=$?
      following=false
    fi
    if ((code != PREEMPTED)) || ! $keep_alive; then
      break
    fi
    bring_back
  done
  case $code in
    0) tell "done" ;;
    "$PREEMPTED") say "the same command goes on from the last checkpoint (with --keep_alive by itself)" ;;
  esac
  return "$code"
}

# Another slice, or the same one, with everything installed.
bring_back() {
  local to_install=false failures=0
  while true; do
    if up; then
      ! $created || to_install=true
      if ! $to_install || install; then
        return
      fi
      failures=$((failures + 1))   # on a slice that is billed meanwhile
      ((failures < INSTALL_TRIES)) || die "the installation failed $failures times" 1
    fi
    say "no slice to go on with yet; next attempt in $RETRY_S s"
    sleep "$RETRY_S"
  done
}

launch() {
  up || die "$NO_SLICE" 1
  local running=false
  if ! $created; then
    see_workers none
    if (($(how_many '.*') < hosts)); then
      delete_after=false   # our job may be running there, and well
      die "not all hosts of '$name' answer, so it is not known whether a job runs there: ${problem##*$'\n'}" 1
    fi
    (($(how_many running) == 0)) || running=true
  fi
  $running || install   # a job that runs is followed, and its code left alone
  run_job
}

run() {
  if $keep_alive; then
    up || die "$NO_SLICE" 1
    ! $created || install
  else
    need_slice
    check_slice_type
    ours=true
  fi
  run_job
}

# ---- Main ----

parse "$@"
check
readonly NO_SLICE="no slice '$name'; the lines above say why. None free: --queued waits in line. No quota for $type in $zone: docs/TPU.md"
scratch="" following=false

# Ctrl-C, or the terminal was closed. A job that runs is left alone, and so is its slice.
interrupted() {
  local was_ours=$ours
  ours=false   # first: at_exit must delete nothing, even where there is no terminal left to write to
  if $following; then
    say "no longer following; the job goes on; see tpu_pod.sh log, stop, down"
    ! $keep_alive || say "but nobody keeps it alive now; the same command takes it up again"
  else
    say "interrupted; what has been asked for may still come: tpu_pod.sh status, down"
  fi
  ! $delete_after || say "--delete_after does not hold any more: nothing will be deleted"
  ! $was_ours || say_kept
  exit "$INTERRUPTED"
}

say_kept() {
  if [[ $state == READY ]]; then
    say "slice '$name' is kept and billed; to delete it: $(down_command)"
  else
    say "slice '$name' may be there all the same, and billed; to delete it: $(down_command)"
  fi
}

at_exit() {
  local code=$?
  set +e
  if $ours && $delete_after; then
    trap '' HUP PIPE   # the terminal may be closed now
    down || code=1
  elif $ours && ! $dry_run; then
    say_kept
  fi
  [[ -z $scratch ]] || rm -rf "$scratch"
  exit "$code"
}

trap interrupted INT TERM HUP PIPE
trap at_exit EXIT
$dry_run || scratch=$(mktemp -d)
check_gcloud
case $subcommand in
  launch | run | status | down) "$subcommand" ;;
  up) up || die "$NO_SLICE" 1 ;;
  install) need_slice && install ;;
  log) need_slice && follow ;;
  stop) need_slice && stop_job ;;
esac
