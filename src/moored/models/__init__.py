"""The model: the frozen base, what is trained on it, its reference, and ZeRO around all of it.

`hub/` finds its files, `loading.py` builds the base, `adapters.py` adds what is trained,
`policy.py` makes one module of it, `engine.py` hands that to DeepSpeed; `tensor_parallel/`
spreads it.
"""
