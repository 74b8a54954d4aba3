"""Tensor parallelism: one model over several processes, each with a share of every layer.

    plan.py    which linear layers are cut, and along which side
    layers.py  layers that add up or join what the ranks computed
    group.py   the ranks' collectives, over torch.distributed
    ranks.py   the other ranks' processes, and what they are told
    runner.py  a runner whose steps run on all ranks

Nothing outside of this package knows of ranks: a model that was cut computes as a smaller one whose
row products are added up. After Shoeybi et al., Megatron-LM (2019), section 3: attention heads and
MLP channels are shared out, two additions a layer.
"""
