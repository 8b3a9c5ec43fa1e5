#!/usr/bin/env bash
# Runs a job on one TPU slice of a GKE cluster: scripts/gke_job.yaml, filled in. See docs/TPU.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/gke_job.sh SUBCOMMAND --name NAME [flags] [-- COMMAND...]

sub-commands
  run     start the job (kubectl apply); it restarts by itself when nodes are taken away
  log     follow the log of the first host
  status  the job and its pods
  stop    delete the job; its pods get SIGTERM and save

flags
  --name NAME            of the job
  --topology CHIP:SHAPE  as scripts/aot_compile.py has it: v5e:4x4, v5p:2x4x4, v6e:4x4
  --image IMAGE          built from scripts/Dockerfile and pushed where the cluster can read it
  --config FILE          the main job: python -m deevisum_jax.main --config FILE
  --workdir DIR          ... --workdir DIR, such as gs://my-bucket/runs/first
  --config.FIELD=VALUE   ... with this override; repeatable
  -- COMMAND...          another job instead of the main one
  --dry_run              print what would be run or applied; needs no kubectl

kubectl must point at the cluster: gcloud container clusters get-credentials CLUSTER --location ZONE
END
}

die() {
  echo "gke_job: error: $1" >&2
  exit 2
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
subcommand="" name="" topology="" image="" config="" workdir="" dry_run=false
overrides=() command=()

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
case $1 in
  -h | --help) usage; exit 0 ;;
  run | log | status | stop) subcommand=$1 ;;
  *) die "unknown sub-command '$1'; choose one of run, log, status, stop" ;;
esac
shift
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry_run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --)
      shift
      command=("$@")
      [[ $# -gt 0 ]] || die "nothing after --; give the command that all pods are to run"
      break
      ;;
    --config.*=*) overrides+=("$1") ;;
    --config.*) die "$1 has no value; write overrides as --config.FIELD=VALUE" ;;
    --name=?* | --topology=?* | --image=?* | --config=?* | --workdir=?*)
      flag=${1%%=*}
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --name | --topology | --image | --config | --workdir)
      [[ $# -gt 1 && -n $2 && $2 != --* ]] || die "$1 needs a value; see --help"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --name= | --topology= | --image= | --config= | --workdir=) die "${1%=} needs a value; see --help" ;;
    *) die "unknown flag '$1'; see --help (a command for the pods goes behind --)" ;;
  esac
  shift
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  die "--name '$name': give lower-case letters, digits and hyphens, a letter first, 40 at most"

kubectl_or_print() {
  if $dry_run; then
    echo "kubectl $*"
    return
  fi
  command -v kubectl >/dev/null || die "kubectl is not installed; see https://cloud.google.com/kubernetes-engine/docs/how-to/cluster-access-for-kubectl"
  kubectl "$@"
}

# A list in the brackets of YAML, which takes JSON's strings. It would fold line breaks as they are.
as_list() {
  local word separator=""
  printf '['
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\r'/\\r}
    word=${word//$'\t'/\\t}
    printf '%s"%s"' "$separator" "$word"
    separator=", "
  done
  printf ']'
}

# As GKE has them: sides that grow; from 64 chips on, in three dimensions, multiples of 4.
check_shape() {  # CHIP SHAPE
  local known a b c
  case $1 in
    v5e | v6e)
      known="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
      ;;
    *)
      known="2x2x1 2x2x2 2x2x4 2x4x4, then multiples of 4x4x4"
      if [[ $2 =~ ^[1-9][0-9]?x[1-9][0-9]?x[1-9][0-9]?$ ]]; then
        IFS=x read -r a b c <<<"$2"
        ((a % 4 || b % 4 || c % 4 || a > b || b > c)) || return 0
      fi
      ;;
  esac
  [[ " ${known%%,*} " == *" $2 "* ]] ||
    die "--topology '$topology': no slice of $1 has that shape; there are $known (smaller sides first)"
}

manifest() {
  local chip=${topology%%:*} shape=${topology#*:} accelerator chips=1 side hosts per_host=4
  case $chip in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    *) die "--topology '$topology': unknown chip '$chip'; choose one of v4, v5e, v5p, v6e, such as v5e:4x4" ;;
  esac
  check_shape "$chip" "$shape"
  for side in ${shape//x/ }; do chips=$((chips * side)); done
  ((chips > 1)) || per_host=1
  hosts=$((chips / per_host))
  if [[ ${#command[@]} -gt 0 ]]; then
    [[ -z $config$workdir && ${#overrides[@]} -eq 0 ]] || die "both a command behind -- and --config or --workdir; the latter belong to the main job only"
  else
    [[ -n $config ]] || die "--config is missing, such as configs/quickstart.py (or a whole command behind --)"
    [[ $workdir == gs://* || $workdir == s3://* ]] ||
      die "--workdir '$workdir': give a bucket, such as gs://my-bucket/runs/first; a pod's own disk goes with the pod"
    config=${config#"$ROOT"/}
    [[ $config == configs/* && -f $ROOT/$config ]] ||
      die "--config '$config' is no file in $ROOT/configs, which is what the image holds"
    command=(python -m deevisum_jax.main --config "$config" --workdir "$workdir")
    [[ ${#overrides[@]} -eq 0 ]] || command+=("${overrides[@]}")
  fi
  [[ -n $image ]] || die "--image is missing; build and push one: docker build --file scripts/Dockerfile --tag IMAGE . && docker push IMAGE"
  local line text word
  for word in "${command[@]}"; do
    [[ ${word//[$'\n\r\t']/} != *[[:cntrl:]]* ]] ||
      die "the command has a control character, which YAML does not take: $(printf '%q' "$word")"
  done
  text=$(as_list "${command[@]}")
  while IFS= read -r line; do
    case $line in
      '#'*) continue ;;
      *"name: NAME") line=${line/NAME/$name} ;;
      *": HOSTS") line=${line/HOSTS/$hosts} ;;
      *": CHIPS") line=${line/CHIPS/$per_host} ;;
      *": ACCELERATOR") line=${line/ACCELERATOR/$accelerator} ;;
      *": TOPOLOGY") line=${line/TOPOLOGY/$shape} ;;
      *": IMAGE") line="${line%IMAGE}$image" ;;
      *": COMMAND") line="${line%COMMAND}$text" ;;
    esac
    printf '%s\n' "$line"
  done <"$ROOT/scripts/gke_job.yaml"
}

case $subcommand in
  run)
    filled=$(manifest)
    if $dry_run; then
      printf '%s\n' "$filled"
    else
      kubectl_or_print apply --filename - <<<"$filled"
    fi
    ;;
  log)
    kubectl_or_print logs --follow --selector "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" --tail -1
    ;;
  status)
    kubectl_or_print get jobset "$name"
    kubectl_or_print get pods --selector "jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  stop) kubectl_or_print delete jobset "$name" ;;
esac
