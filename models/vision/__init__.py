"""Turns image tiles into the states that the decoder's cross-attention reads.

Read encoder.py first. layered_encoder.py runs one image a few layers at a time, between other
requests' steps; image_cost.py estimates how long an image takes.
"""
