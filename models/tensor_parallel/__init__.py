"""How one model is cut over several ranks, as in Megatron-LM (Shoeybi et al., 2019), section 3.

In the order in which to read them:

    plan       which linear layers are cut, and along which side
    layers     layers that add or join what the ranks computed
    group      the ranks' collectives, over torch.distributed

A cut model computes like a smaller model; these layers add up and join what its ranks compute.
"""
