"""Any nn.Modules → one torch.fx graph → stages and segments. Knows torch, and nothing of the rest of mmpipe.

Read plan.py first, then capture.py → fuse.py → passes.py → cut.py.
"""
