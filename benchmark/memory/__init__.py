"""What a KV pool of two tiers costs and gives: whole servers, all-resident against tiered.

python -m benchmark.memory
"""
