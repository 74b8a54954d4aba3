"""Ask a running vlmserve about a picture, with the OpenAI SDK, and stream the answer.

python examples/ask.py examples/shapes.png "What is in this image?"
"""

import base64
import sys

from openai import OpenAI


def main(path: str, question: str, base_url: str = "http://127.0.0.1:8000/v1") -> None:
    with open(path, "rb") as file:
        picture = base64.b64encode(file.read()).decode()
    client = OpenAI(base_url=base_url, api_key="unused")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{picture}"},
                    },
                    {"type": "text", "text": question},
                ],
            }
        ],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            sys.stdout.write(chunk.choices[0].delta.content or "")
            sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
