#!/bin/sh
# sglang-router in front of two servers: pip install sglang-router==0.3.2, then sh sglang-router.sh
# manual keeps requests with the same X-SMG-Routing-Key on one server; cache_aware looks at the text of prompts.
# With API keys, --api-key names the servers' key, clients must send the same, and the servers need --repeated-key.
exec smg launch --host 127.0.0.1 --port 8080 --prometheus-port 29000 \
    --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002 \
    --policy "${POLICY:-manual}" --assignment-mode min_load \
    --max-payload-size 67108864 \
    --health-check-interval-secs 5 --health-failure-threshold 2 --health-success-threshold 1 \
    --cb-failure-threshold 3 --cb-timeout-duration-secs 10 \
    ${VLMSERVE_API_KEY:+--api-key "$VLMSERVE_API_KEY"}
