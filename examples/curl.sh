#!/bin/sh
# Every protocol once, with nothing but curl: sh examples/curl.sh [URL]
set -eu
URL=${1:-${TPSERVE_URL:-http://127.0.0.1:8080}}

ask() {
    path=$1
    shift
    curl -sS --fail-with-body -N -H "Authorization: Bearer ${TPSERVE_API_KEY:-}" -H 'Content-Type: application/json' \
        "$@" "$URL$path"
    echo
}

echo "== ready?"
ask /health/ready

echo "== the model's name"
MODEL=$(ask /v1/models | sed 's/.*"id": *"\([^"]*\)".*/\1/')
echo "$MODEL"

echo "== predictions: a JSON object a line, as its text comes"
ask "/predictions/$MODEL" -d '{"prompt": "Once upon a time", "max_new_tokens": 16}'

echo "== OpenAI's chat completions, streamed"
ask /v1/chat/completions -d '{
    "model": "'"$MODEL"'", "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_completion_tokens": 16, "stream": true, "stream_options": {"include_usage": true}}'

echo "== OpenAI's text completions, several answers at once"
ask /v1/completions -d '{"model": "'"$MODEL"'", "prompt": "Once upon a time", "max_tokens": 16, "n": 2, "temperature": 0.8}'

echo "== one of these words, and no other"
ask /v1/completions -d '{"model": "'"$MODEL"'", "prompt": "Wolves are", "max_tokens": 32, "guided_choice": ["good", "bad"]}'

echo "== Triton's generate extension"
ask /v2/models/ensemble/generate -d '{"text_input": "Once upon a time", "max_tokens": 16}'

echo "== what it is doing, for Prometheus"
ask /metrics | grep '^tpserve:.*_tokens_total'
