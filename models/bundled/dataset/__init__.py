"""What the bundled model is trained on: questions about pictures, and their answers.

Read questions.py and small_talk.py for the texts, then tokenizer.py, config.py (the model's sizes)
and data.py, which builds the training batches.
"""
