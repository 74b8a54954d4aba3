"""POST /v1/moderations, in OpenAI's shape, answered by a guard.

Read in this order: `requests` (inputs and how they become conversations), `verdicts` (what a
guard's answer means, and the answer that the client reads).
"""
