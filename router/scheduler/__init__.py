"""Which tokens run in the next step: the request queue, the sequences, the plan of a step.

In the order in which to read the files:

    admission           which requests can never run
    sequence_states     the states of a sequence, as a table
    sequence            the tokens of one answer, and how far they are computed
    owners              what each API key's requests have used, and whose turn it is
    request_queue       which sequences wait, in which order, and how many may
    throughput          the wait of a rejected request, the time of a step, how many drafts it has
    interface           the scheduler's limits, its progress, its snapshot
    scheduler           the plan of each step, and what its result changes
    step_budget         what one step may still compute
    block_manager       which blocks each running sequence uses
    lifecycle           starts, preempts and ends sequences
    preemption          which sequence yields its place, its blocks or a step to another
    batch_rows          a sequence's part of a step, as the runner gets it
    drafts/             guesses of a request's next tokens, which a step verifies
"""
