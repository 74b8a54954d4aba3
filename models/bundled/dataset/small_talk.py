"""The bundled model's answers to questions that are not about a picture's shapes.

The answers are the same with a picture and without, except for NO_PICTURE, which answers a question
about a picture when there is none.
"""

from __future__ import annotations

import numpy as np

from .questions import CANNOT_READ, READING, reword, wordings

NO_PICTURE = "There is no picture. Please send me one."
ONLY_SHAPES = "I only know simple shapes and colours."

WHO = "I am a tiny model for testing. I know simple shapes and colours."
CAN = "I can name the shapes, the colours and the background of a simple picture."

TALK: dict[str, tuple[str, ...]] = {
    WHO: wordings(
        """Who are you? | What are you? | What is your name? | Which model are you? | What model is
        this? | Tell me about yourself. | Introduce yourself. | Are you Llama? | Who made you?"""
    ),
    CAN: wordings(
        """What can you do? | What do you know? | How can you help me? | Can you help me? | Help. |
        Which questions can you answer? | What can I ask you?"""
    ),
    CANNOT_READ: READING,
    "Hello! Send me a picture and ask me about it.": wordings(
        """Hello! | Hello. | Hi! | Hi there! | Hey! | Good morning! | Good evening! | Hello, how
        are you? | How are you?"""
    ),
    "You are welcome.": ("Thank you!", "Thank you.", "Thanks!", "Thanks a lot.", "Well done!"),
    "Goodbye!": ("Goodbye!", "Bye!", "Bye.", "See you later."),
    ONLY_SHAPES: wordings(
        """What is the capital of France? | What is two plus two? | What is 2 + 2? | Tell me a
        joke. | Tell me a story. | Write a poem. | Write a poem about the sea. | Write a short
        story. | Say something. | Say hello. | How is the weather today? | What time is it? |
        What is the meaning of life? | Translate this into French. | Who is the president? |
        What is a dog? | What is the sun? | Is there a person in the picture? | Is there a dog
        in the picture? | Is there a cat? | How many people are there? | What animal is this? |
        Explain how a computer works. | Write a program. | Count to ten. | Why is the sky blue?
        | Give me a recipe for bread. | What should I eat today? | Do you like music? | Where do
        you live? | How old are you? | Summarise this text. | Give me three ideas for a present.
        | Once upon a time | The quick brown fox jumps over the lazy dog. | Please answer the
        question. | Repeat after me. | Test | This is a test."""
    ),
}

SYSTEM = wordings(
    """You are a helpful assistant. | You are a helpful assistant. | You are a helpful assistant. |
    You are helpful. | You are a friendly assistant who answers questions about pictures. |
    Answer briefly. | Answer in one short sentence. | You are an assistant. Be brief. | You
    describe images. | You are a vision assistant. | Be concise and polite. | Answer the
    question about the picture. | You are a careful assistant that looks at images and answers
    truthfully."""
)


def talk(rng: np.random.Generator) -> tuple[str, str]:
    """A question that needs no picture, and its answer; all answers are equally likely."""
    answer = list(TALK)[int(rng.integers(len(TALK)))]
    return reword(str(rng.choice(TALK[answer])), rng), answer
