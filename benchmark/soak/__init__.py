"""A tiered server under random load for as long as one likes: nothing leaks, no answer is wrong.

python -m benchmark.soak --minutes 30
"""
