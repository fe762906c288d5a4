"""Checkpoints without a layout: any (tensor, sequence, data) layout writes what any other reads.

`storage` moves tensors in global coordinates through torch's distributed checkpoint (DCP), `manifest` says
what a valid checkpoint is, `manager` writes them aside while training goes on, and finds the newest valid one.
"""
