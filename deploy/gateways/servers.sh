#!/bin/sh
# Two servers on one machine, for trying a gateway: sh servers.sh [MODEL]. Ctrl-C stops both.
# On two machines, run each line on one of them and change the addresses in the gateway's file.
trap 'kill $one $two' INT TERM
vlmserve serve "$@" --port 8001 --replica-name one & one=$!
vlmserve serve "$@" --port 8002 --replica-name two & two=$!
wait
