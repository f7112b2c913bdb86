#!/usr/bin/env bash
# A real SLURM of virtual nodes on this machine, for tests: Debian's packages, no systemd, no cgroups, no data base.
#   slurm_lab.sh install          as root: the packages
#   slurm_lab.sh run DIR PORT     start it, print "up", and stop it when standard input ends: it cannot outlive its owner
# After "up": export SLURM_CONF=DIR/slurm.conf. DIR: at most 60 characters (sockets), every part of it open to all.
# Ports: PORT for slurmctld, PORT + i for node i. Each node claims CPUS cores and GPUS GPUs, which need not exist.
set -u
NODES=2 CPUS=16 GPUS=4
PATH=$PATH:/usr/sbin:/sbin

install_packages() {
    local quiet=(-qq -o DPkg::Lock::Timeout=120) library
    export DEBIAN_FRONTEND=noninteractive
    apt-get "${quiet[@]}" update &&
        apt-get "${quiet[@]}" -y --no-install-recommends install slurmctld slurmd slurm-client munge libpmix2 || return
    # SLURM's mpi_pmix does dlopen(".../pmix2/lib/libpmix.so"), a name that is only in libpmix-dev.
    for library in /usr/lib/*/pmix2/lib/libpmix.so.2; do
        [ -e "${library%.2}" ] || ln -s libpmix.so.2 "${library%.2}"
    done
}

write_configuration() {
    local me node
    me=$(id -un)
    mkdir -p "$D"/{dev,munge,state,spool,tmp,log,pid} && chmod 755 "$D" "$D/munge"
    (umask 077 && head -c 128 /dev/urandom >"$D/munge.key")
    for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$D/dev/nvidia$i"; done
    printf '%s\n' AutoDetect=off "NodeName=n[1-$NODES] Name=gpu File=$D/dev/nvidia[0-$((GPUS - 1))]" >"$D/gres.conf"
    echo CgroupPlugin=cgroup/v1 >"$D/cgroup.conf"
    for ((node = 1; node <= NODES; node++)); do mkdir -p "$D/spool/n$node" && mkdir -p -m 1777 "$D/tmp/n$node"; done
    # cred_expire: also the time that a requeued job must wait (default 120 s, at least 5).
    # TmpFS: one for each node, else srun --mpi=pmix over two nodes collides in /tmp.
    cat >"$D/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$(uname -n | cut -d. -f1)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge/munge.sock,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
TmpFS=$D/tmp/%n
SlurmctldPidFile=$D/pid/slurmctld
SlurmdPidFile=$D/pid/slurmd-%n
SlurmctldLogFile=$D/log/slurmctld
SlurmdLogFile=$D/log/slurmd-%n
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdTimeout=120
MessageTimeout=60
UnkillableStepTimeout=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
GresTypes=gpu
NodeName=DEFAULT Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=8000 Gres=gpu:$GPUS State=UNKNOWN
NodeName=n[1-$NODES] NodeHostname=$(uname -n | cut -d. -f1) NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))]
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
CONF
}

start() { # each daemon goes to the background by itself and writes its pid
    munged --key-file="$D/munge.key" --socket="$D/munge/munge.sock" --pid-file="$D/pid/munged" \
        --seed-file="$D/munge.seed" --log-file="$D/log/munged" --num-threads=2 || return
    slurmctld || return
    local node
    for ((node = 1; node <= NODES; node++)); do slurmd -N "n$node" || return; done
    for ((i = 0; i < 300; i++)); do
        [ "$(sinfo -h -N -t idle -o %N | wc -l)" = $NODES ] && return
        sleep 0.1
    done
    sinfo -N -l
    return 1
}

daemon() { # the process of a pid file, if it still is what it was (one that has ended has no exe)
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ $(readlink "/proc/$pid/exe") = */"$2"* ]] && echo "$pid"
}

stop() {
    local file name pid
    if daemon "$D/pid/slurmctld" slurmctld >/dev/null; then # a job's processes outlive slurmd: end the jobs first
        timeout 10 scancel -u "$(id -un)"
        for ((i = 0; i < 150; i++)); do
            [ -z "$(timeout 5 squeue -h)" ] && break
            sleep 0.1
        done
    fi
    for file in "$D"/pid/slurmd-* "$D"/pid/slurmctld "$D"/pid/munged; do
        name=${file##*/}
        name=${name%-*}
        for ((i = 0; i < 100; i++)); do
            pid=$(daemon "$file" "$name") || break
            [ $i = 0 ] && kill "$pid"
            [ $i = 80 ] && kill -KILL "$pid"
            sleep 0.1
        done
    done
}

case ${1:-} in
    install) install_packages ;;
    run)
        D=$2 PORT=$3
        export SLURM_CONF=$D/slurm.conf
        trap '' INT TERM HUP # a Ctrl-C is for the owner; this goes when the owner has gone
        write_configuration
        exec 3<&0 </dev/null
        if (trap - INT TERM HUP && exec 3<&- && start) >"$D/log/start" 2>&1; then
            echo up
            cat <&3 >/dev/null
        else
            cat "$D/log/start"
            tail -n 5 "$D"/log/*
        fi
        stop >/dev/null 2>&1
        ;;
    *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
