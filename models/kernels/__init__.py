"""What all Triton kernels of this project share, and which products a CPU computes fast.

triton_support.py: where kernels run, and their least sizes. self_test.py: tries a kernel on this
machine before it is used. The kernels themselves stand next to the code that launches them.
float32_products.py: products of bfloat16 for a CPU without such instructions. row_products.py and
row_operations.py: products by this project's C, and what lies between them. paged_attention.py:
decodes' attention in C. c_library.py: compiles and loads the C. cpu_trial.py: times a short trial
on a CPU.
"""
