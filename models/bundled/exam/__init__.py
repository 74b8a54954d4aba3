"""Measures the bundled model on held-out pictures.

exam.py: the questions and scores. grading.py answers them with transformers, client.py asks a
server; evaluate.py is the command line.
"""
