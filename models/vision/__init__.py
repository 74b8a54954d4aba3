"""Turns image tiles into the states that the decoder's cross-attention reads.

Read encoder.py first. layered_encoder.py runs images a few layers at a time, between other
requests' steps; real_first.py is their attention without a mask; image_cost.py estimates how long
an image takes.
"""
