#!/usr/bin/env bash
# One run under Slurm, on 2 nodes with 2 GPUs each; head and driver are on the first.
#
#   launch/install.sh .venv && sbatch launch/slurm.sh
#
# All nodes must reach this folder with its .venv, data.url and run.url. Submitted again, the run goes on from its
# newest checkpoint. Tried with stand-ins for srun and scontrol, not yet under a real Slurm: docs/cluster.md.
#SBATCH --job-name=felrec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=2
#SBATCH --mem=96G
#SBATCH --time=24:00:00
# To this script, ten minutes before the time is over: the run takes a checkpoint and ends.
#SBATCH --signal=B:TERM@600
set -euo pipefail
source .venv/bin/activate

port=6379
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}'):$port
# Others have processes on these machines: only who knows this word may join.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS=$address

start_ray() { # NODES SRUN_OPTION RAY_START_OPTION...
    srun --nodes="$1" --ntasks="$1" --cpus-per-task="$SLURM_CPUS_PER_TASK" "$2" \
        ray start "${@:3}" --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" \
        --num-gpus="$SLURM_GPUS_PER_NODE" --resources='{"cache_node": 1}' &
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
start_ray 1 --nodelist="$first" --head --port="$port" --temp-dir="/tmp/ray-$SLURM_JOB_ID"
for _ in $(seq 60); do
    ray health-check --address "$address" >/dev/null 2>&1 && break
    sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    start_ray "$others" --exclude="$first" --address="$address"
fi

# Waits until the other nodes have joined.
felrec train configs/ml-25m_q.yaml \
    data.url=/scratch/your-group/data/ml-25m run.url=/scratch/your-group/runs/ml-25m_q \
    cache.num_shards=2 'cluster.shard_resources={cache_node: 1}' cluster.memory_per_shard_gb=40 \
    cluster.start_timeout_s=1800 &
run=$!
trap 'kill -TERM "$run"' TERM INT
code=0
wait "$run" || code=$?
# A signal ends the wait, not the run.
while kill -0 "$run" 2>/dev/null; do
    code=0
    wait "$run" || code=$?
done
exit "$code"
