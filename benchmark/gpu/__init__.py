"""Checks and measurements that need a CUDA device; ``run.sh`` runs them all."""
