"""The run: `train.py` is the loop, `setup.py` what is put together before, `step.py` one update."""
