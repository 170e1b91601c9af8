"""The loss: cross-entropy and target-masked KL, from logits or hidden states, whole or sharded.

Torch alone: nothing here knows a model, a batch or a recipe. `tmkl.py` has the public `tmkl_loss`,
`head.py` the public `linear_tmkl_loss`, which never holds the logits; `divergence.py` the options
and the masking. The derivations are in docs/loss.md.
"""
