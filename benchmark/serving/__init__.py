"""How fast whole engines serve on CPU: SGLang's own backend, ours (dense and PSA), and vLLM's.

python -m benchmark.serving
"""
