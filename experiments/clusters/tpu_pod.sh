#!/usr/bin/env bash
# Trains one run on all hosts of a Cloud TPU slice: a process on each, found by JAX.
#
#   experiments/clusters/tpu_pod.sh NAME ZONE cifar10/cifar --workdir=/mnt/shared/runs/cifar
#
# Needed: the slice (gcloud compute tpus tpu-vm create NAME --zone=ZONE ...), a checkout of this
# repository in ~/cnn_jax on each host, and a folder that all hosts have mounted, for the workdir.
# The same command goes on after a maintenance event or a lost host.
#
# Not tried: neither gcloud nor a TPU was at hand. The steps are compiled for TPUs by
# ./launch.sh test -mcompile.
set -eu
name=$1 zone=$2
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/cnn_jax && ./launch.sh train $(printf '%q ' "$@")"
