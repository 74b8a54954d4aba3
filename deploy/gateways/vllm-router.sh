#!/bin/sh
# vllm-router in front of two servers: pip install vllm-router==0.1.17, then sh vllm-router.sh
# consistent_hash keeps requests with the same X-Session-Id on one server; cache_aware looks at the text of prompts.
exec vllm-router --host 127.0.0.1 --port 8080 --prometheus-port 29000 \
    --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002 \
    --policy "${POLICY:-consistent_hash}" \
    --max-payload-size 67108864 \
    --health-check-interval-secs 5 --health-failure-threshold 2 --health-success-threshold 1 \
    --cb-failure-threshold 3 --cb-timeout-duration-secs 10
