"""What all Triton kernels of this project share.

triton_support.py: where kernels run, and their least sizes. self_test.py: tries a kernel on this
machine before it is used. The kernels themselves stand next to the code that launches them.
"""
