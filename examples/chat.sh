#!/usr/bin/env bash
# Ask a running server with curl: the whole answer at once, then the same as a stream of server-sent events.
set -euo pipefail
URL="${OPENAI_BASE_URL:-http://127.0.0.1:23333/v1}"
MODEL="${MODEL:-demo}"
REQUEST='{
  "model": "'"$MODEL"'",
  "messages": [{"role": "user", "content": "Give me three suggestions on time management"}],
  "temperature": 0.8,
  "top_p": 0.8
}'

curl --fail-with-body --silent --show-error "$URL/chat/completions" -H "Content-Type: application/json" -d "$REQUEST"
echo
curl --fail-with-body --silent --show-error --no-buffer "$URL/chat/completions" \
  -H "Content-Type: application/json" -d "${REQUEST%\}}"', "stream": true}'
