"""The server on a cluster of Ray: an application of Ray Serve. Needs `vlmserve[ray]`.

The command `vlmserve serve --ray` is in `cli/on_ray.py`.

    application        the ingress and the engines as deployments, with their settings
    built              the same with its arguments from a variable, for `serve build`
    messages           what travels between them
    ingress            takes the requests; retries; asks all replicas where all have a part
    affinity           what the router knows of a request's body
    request_router     which replica takes a request
    engine_replica     a replica: an ordinary server as a child
    metrics_sum        one text of metrics from all replicas'

Nothing of the API is here: each replica's server answers as it does on one machine.
"""
