#!/bin/bash
# A real Slurm of several nodes on this machine, to rehearse job chains on. See README.md beside this file.
#
#   cluster.sh up | down           start and stop it; no system service is touched
#   cluster.sh env                 print the line that makes squeue, gowide submit, ... speak to it
#   cluster.sh status              its daemons and nodes
#   cluster.sh kill-node N         a power cut of node N, with all that runs there (root only)
#   cluster.sh start-node N        node N comes back
#
# Settings (environment): DEVCLUSTER_DIR its folder (.devcluster in the repository), NODES (4), CPUS per node (4, need
# not exist), MEM_MB per node (4000), GPUS per node (0; they are not real: for rehearsing submissions alone),
# CRED_EXPIRE seconds for which a requeued job is held back (5; Slurm's default is 120), PORT0 first port (16800),
# FIRST_JOB id of the first job (1): clusters side by side need ids apart, from which jobs take their ports.
set -euo pipefail

DIR=$(realpath -m "${DEVCLUSTER_DIR:-$(dirname "$0")/../../.devcluster}")
NODES=${NODES:-4} CPUS=${CPUS:-4} MEM_MB=${MEM_MB:-4000} GPUS=${GPUS:-0} CRED_EXPIRE=${CRED_EXPIRE:-5} PORT0=${PORT0:-16800}
FIRST_JOB=${FIRST_JOB:-1}
HOST=$(hostname -s) ME=$(id -un)
# Root gives every node a host name and a process space of its own, so that it can be killed as a whole.
NAMESPACES=$([ "$(id -u)" = 0 ] && echo 1 || echo 0)
export SLURM_CONF=$DIR/etc/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

die() { echo "devcluster: $*" >&2; exit 2; }

write_settings() {
  mkdir -p "$DIR"/{etc,log,run,state,spool,mysql,tmp,munge}
  chmod 755 "$DIR" "$DIR/etc" "$DIR/run"; chmod 700 "$DIR/munge"
  [ -f "$DIR/munge/key" ] || { head -c 1024 /dev/urandom > "$DIR/munge/key"; chmod 400 "$DIR/munge/key"; }
  cat > "$SLURM_CONF" <<X
ClusterName=devcluster
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=$CRED_EXPIRE
CredType=cred/munge
SlurmctldPort=$PORT0
FirstJobId=$FIRST_JOB
# loopback only
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig=$DIR/etc/plugstack.conf
# the declared CPUs and memory need not exist
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
CompleteWait=0
ReturnToService=2
JobRequeue=1
# a job of partition "high" preempts jobs of "main": they get their warning signal, 10 s, and are requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT0 + 1))
AccountingStoragePass=$DIR/run/munge.socket
AccountingStorageTRES=gres/gpu
X
  [ -e /etc/hosts ] || die "/etc/hosts is missing, on which the nodes' names are mounted: touch /etc/hosts"
  cp /etc/hosts "$DIR/etc/hosts"
  : > "$DIR/etc/plugstack.conf"
  : > "$DIR/etc/gres.conf"
  local i gres=""
  [ "$GPUS" = 0 ] || gres="Gres=gpu:$GPUS"
  for i in $(seq "$NODES"); do
    echo "NodeName=node$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT0 + 10 + i)) CPUs=$CPUS RealMemory=$MEM_MB $gres State=UNKNOWN" >> "$SLURM_CONF"
    echo "127.0.0.1 node$i" >> "$DIR/etc/hosts"
    [ "$GPUS" = 0 ] || echo "NodeName=node$i Name=gpu File=/dev/tty[1-$GPUS]" >> "$DIR/etc/gres.conf"
  done
  cat >> "$SLURM_CONF" <<X
PartitionName=main Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=node[1-$NODES] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
X
  cat > "$DIR/etc/slurmdbd.conf" <<X
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT0 + 1))
SlurmUser=$ME
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
X
  chmod 600 "$DIR/etc/slurmdbd.conf"
}

# Every daemon runs in the foreground as a child of ours: its process id, in run/NAME.child, is ours to end.
is_running() { [ -r "/proc/$1/status" ] && ! grep -q '^State:.[ZX]' "/proc/$1/status" 2>/dev/null; }
is_alive() { local pid; pid=$(cat "$DIR/run/$1.child" 2>/dev/null) && is_running "$pid"; }
start() {
  local name=$1; shift
  setsid "$@" < /dev/null >> "$DIR/log/$name.out" 2>&1 &
  echo $! > "$DIR/run/$name.child"
}
stop() {
  local name=$1 signal=${2:-TERM} pid
  pid=$(cat "$DIR/run/$name.child" 2>/dev/null) || return 0
  kill "-$signal" "$pid" 2>/dev/null || true
  for _ in $(seq 200); do is_running "$pid" || break; sleep 0.05; done
  if is_running "$pid"; then kill -KILL "$pid"; fi
  rm -f "$DIR/run/$name.child"
}
wait_for() { # SECONDS WHAT COMMAND...
  local tries=$(($1 * 10)) what=$2; shift 2
  until "$@" > /dev/null 2>&1; do
    tries=$((tries - 1)); [ $tries -gt 0 ] || { echo "devcluster: $what did not come up; see $DIR/log" >&2; return 1; }
    sleep 0.1
  done
}
start_node() {
  mkdir -p "$DIR/spool/node$1"
  if [ "$NAMESPACES" = 1 ]; then
    start "node$1" unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc bash -c \
      "hostname node$1; mount --bind '$DIR/etc/hosts' /etc/hosts; slurmd -N node$1 -D & wait"
  else
    start "node$1" slurmd -N "node$1" -D
  fi
}
stop_node() { stop "node$1" "$([ "$NAMESPACES" = 1 ] && echo KILL || echo TERM)"; }
all_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | sort -u | wc -l)" = "$NODES" ]; }

up() {
  local program child
  for program in slurmctld slurmdbd munged mariadbd; do
    command -v $program > /dev/null || die "$program is missing; apt-get install slurm-wlm slurmdbd munge mariadb-server"
  done
  for child in "$DIR"/run/*.child; do
    [ -f "$child" ] && is_alive "$(basename "$child" .child)" && die "already up in $DIR"
  done
  rm -f "$DIR"/run/*.child "$DIR"/run/*.pid
  write_settings
  trap down EXIT   # also when something does not come up
  start munged munged -F --force --socket="$DIR/run/munge.socket" --key-file="$DIR/munge/key" --num-threads=4 \
    --log-file="$DIR/log/munged.log" --pid-file="$DIR/run/munged.pid" --seed-file="$DIR/munge/seed"
  # In one folder for temporary files, a MariaDB that starts deletes those of another.
  [ -d "$DIR/mysql/mysql" ] || mariadb-install-db --no-defaults --user="$ME" --datadir="$DIR/mysql" --tmpdir="$DIR/tmp" \
    --auth-root-authentication-method=normal --skip-test-db --skip-name-resolve > "$DIR/log/mysql-install.log" 2>&1
  start mariadbd mariadbd --no-defaults --user="$ME" --datadir="$DIR/mysql" --tmpdir="$DIR/tmp" --socket="$DIR/mysql/mysql.sock" \
    --pid-file="$DIR/mysql/mysql.pid" --skip-networking --innodb-buffer-pool-size=64M \
    --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
  wait_for 30 mariadbd mariadb-admin --no-defaults --user=root --socket="$DIR/mysql/mysql.sock" ping
  wait_for 10 munged munge --no-input --socket="$DIR/run/munge.socket"
  MYSQL_UNIX_PORT=$DIR/mysql/mysql.sock start slurmdbd slurmdbd -D
  wait_for 30 slurmdbd sacctmgr -n list cluster
  sacctmgr -n list cluster format=cluster | grep -q devcluster || sacctmgr -i add cluster devcluster > /dev/null
  start slurmctld slurmctld -D
  wait_for 20 slurmctld scontrol ping
  local i; for i in $(seq "$NODES"); do start_node "$i"; done
  wait_for 30 "the nodes" all_idle
  trap - EXIT
}
down() {
  timeout 5 scancel --user="$ME" > /dev/null 2>&1 || true
  local i name
  for i in $(seq 30); do [ -n "$(timeout 5 squeue -h 2> /dev/null)" ] || break; sleep 0.1; done
  for i in "$DIR"/run/node*.child; do [ -f "$i" ] && stop_node "$(basename "$i" .child | tr -dc 0-9)"; done
  for name in slurmctld slurmdbd mariadbd munged; do stop $name; done
}

case ${1:-} in
  up) up; echo "$NODES nodes are up. For this terminal: export SLURM_CONF=$SLURM_CONF" ;;
  down) down ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status)
    for child in "$DIR"/run/*.child; do
      [ -f "$child" ] || die "not up in $DIR"
      name=$(basename "$child" .child); is_alive "$name" && echo "$name running" || echo "$name dead"
    done
    sinfo -N -l ;;
  kill-node) [ "$NAMESPACES" = 1 ] || die "kill-node needs root: only then has a node a process space of its own"; stop_node "$2" ;;
  start-node) start_node "$2" ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
