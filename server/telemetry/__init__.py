"""Metrics, the request log and traces of one HTTP worker.

Read in this order:

    request_record  what the worker notes about one HTTP request
    recorded_app    the Sanic application that opens and closes these records
    request_log     reports a closed record: log line, metrics, trace
    metrics         the registry behind /metrics
    request_timer   times one request in the engine
    adapter_metrics requests by adapter
    usual_fields    names of other servers' fields, as values of a label
    engine_metrics  metrics that engines and the supervisor report
    vllm_names      the same figures under vLLM's names
    live            the counts of the page's engine panel
    tracing         OpenTelemetry spans; needs the extra `otel`
    event_loop_lag  how late the event loop runs

No prompt, image, key, path or address of a client gets into any of them.
"""
