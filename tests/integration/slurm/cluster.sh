#!/usr/bin/env bash
# A real SLURM cluster on this machine, for tests: munged, slurmctld and NODES slurmd on loopback.
# Everything it makes lies in DIR. Exit 3: SLURM is missing and cannot be installed here.
#   tests/slurm/cluster.sh start DIR [NODES=2] [CPUS_PER_NODE=2]
#   tests/slurm/cluster.sh stop DIR
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin" # Debian keeps the daemons there, off a user's path
FREEZER=/sys/fs/cgroup/freezer
NODE=127.0.0. # and a number: names that resolve on any machine, as torch.distributed wants them to

fail() {
  echo "cluster.sh: $2" >&2
  exit "$1"
}

install_slurm() {
  type munged slurmctld slurmd srun &>/dev/null && return # all of them: command -v takes any
  command -v apt-get >/dev/null || fail 3 "SLURM is not installed, and there is no apt-get"
  [[ $(id -u) == 0 ]] || fail 3 "SLURM is not installed, and only root can install it"
  export DEBIAN_FRONTEND=noninteractive
  local apt=(apt-get install -y --no-install-recommends slurm-wlm munge)
  "${apt[@]}" >&2 || { apt-get update >&2 && "${apt[@]}" >&2; } ||
    fail 3 "SLURM is not installed, and apt-get could not install slurm-wlm and munge"
}

# Prints $1 ports in a row that nothing listens on, below those the kernel lends to clients.
free_ports() {
  local base port
  for _ in {1..50}; do
    base=$((20000 + RANDOM % 12000))
    for ((port = base; port < base + $1; port++)); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    seq "$base" $((base + $1 - 1))
    return
  done
  fail 1 "found no $1 free ports in a row"
}

# As on a real cluster where this machine allows it: only the tasks themselves are signalled, and
# SIGKILL finds every descendant. linuxproc signals all descendants, and loses those that detach.
tracking() {
  if [[ $(id -u) == 0 && -w $FREEZER/cgroup.procs ]]; then echo cgroup; else echo linuxproc; fi
}

write_conf() { # DIR CPUS CONTROLLER_PORT NODE_PORT...
  local dir=$1 cpus=$2 host node=0 port
  host=$(hostname -s)
  cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$3
# Two clusters must not share job ids: the control groups are named after them.
FirstJobId=${3}000
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 7 s here, 121 s by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=6
ProctrackType=proctrack/$(tracking)
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
KillWait=30
MinJobAge=86400
CONF
  shift 3
  for port; do
    node=$((node + 1))
    echo "NodeName=$NODE$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$cpus RealMemory=65536"
  done
  echo "PartitionName=main Nodes=$NODE[1-$node] Default=YES MaxTime=INFINITE State=UP"
}

abandon() { # DIR REASON
  tail -n 5 "$1"/*.log >&2
  stop "$1"
  fail 1 "$2; the logs are in $1"
}

start() {
  local dir=$1 nodes=${2:-2} cpus=${3:-2} ports node idle
  install_slurm
  mkdir -p "$dir"
  dir=$(cd "$dir" && pwd -P)
  [[ ! -e $dir/slurm.conf ]] || fail 1 "$dir/slurm.conf exists: stop that cluster, or name a new folder"
  ((${#dir} <= 80)) || fail 1 "$dir is too long for the sockets in it: 80 characters at most"
  mkdir -p "$dir/state"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  ports=$(free_ports $((nodes + 1)))
  # shellcheck disable=SC2086 # one argument a port
  write_conf "$dir" "$cpus" $ports >"$dir/slurm.conf"
  if [[ $(tracking) == cgroup ]]; then
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\n' "${FREEZER%/*}" >"$dir/cgroup.conf"
  fi
  export SLURM_CONF=$dir/slurm.conf

  # --force: the folder of a test is private, and munged wants one that all may enter
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --num-threads=2 \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" \
    >>"$dir/start.log" 2>&1 || abandon "$dir" "munged did not start"
  slurmctld >>"$dir/start.log" 2>&1 || abandon "$dir" "slurmctld did not start"
  for ((node = 1; node <= nodes; node++)); do
    mkdir -p "$dir/spool.$NODE$node"
    slurmd -N "$NODE$node" >>"$dir/start.log" 2>&1 || abandon "$dir" "slurmd $NODE$node did not start"
  done
  for _ in {1..150}; do
    idle=$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l) || idle=0
    if ((idle == nodes)); then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  abandon "$dir" "$idle of $nodes nodes became idle in 30 s"
}

# The process ids of what jobs of this cluster left: their processes, and their managers where $2 is "all".
leftovers() {
  local environ mine
  for environ in /proc/[0-9]*/environ; do
    mine=$(tr '\0' '\n' <"$environ" | grep -xE "SLURM_CONF=$1/slurm.conf|SLURM_JOB_ID=.*" | wc -l) || continue
    if ((mine == 2)) || { ((mine == 1)) && [[ $2 == all && $(<"${environ%environ}comm") == slurmstepd ]]; }; then
      basename "${environ%/environ}"
    fi
  done 2>/dev/null
}

stop() {
  local dir pid pids=() file
  [[ -d $1 ]] || fail 1 "there is no folder $1"
  dir=$(cd "$1" && pwd -P)
  export SLURM_CONF=$dir/slurm.conf
  if [[ -e $SLURM_CONF ]] && scontrol ping >/dev/null 2>&1; then
    # SIGKILL: scancel alone would wait for KillWait where a job ignores SIGTERM.
    scancel --signal=KILL --full --partition=main --state=RUNNING 2>/dev/null || true
    scancel --partition=main 2>/dev/null || true
    for pid in $(leftovers "$dir" jobs); do kill -KILL "$pid" 2>/dev/null || true; done
    for _ in {1..50}; do
      [[ -n $(squeue --noheader 2>/dev/null) ]] || break
      sleep 0.2
    done
  fi
  for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    pid=$(cat "$file" 2>/dev/null) || continue
    # After a crash the number may be another program's.
    case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmd | slurmctld | munged) pids+=("$pid") ;; esac
  done
  kill "${pids[@]}" 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  for pid in "${pids[@]}" $(leftovers "$dir" all); do kill -KILL "$pid" 2>/dev/null || true; done
  rmdir "$FREEZER"/slurm_"$NODE"*/uid_* "$FREEZER"/slurm_"$NODE"* 2>/dev/null || true
  rm -f "$dir/slurm.conf"
}

case ${1:-} in
  start | stop) [[ -n ${2:-} ]] || fail 2 "name the folder: $1 DIR" ;;
  *) fail 2 "start DIR [NODES] [CPUS_PER_NODE], or stop DIR" ;;
esac
"$@"
