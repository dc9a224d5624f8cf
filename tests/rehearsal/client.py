"""A client on a stand-in Spark: `python3 client.py URL COUNT` sends COUNT chat requests at once, with the key in KEY.

The client prints one line of JSON: for each request the status of the answer and its number of tokens.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

TOKENS = 16


def chat(number: int) -> tuple[int, int]:
    """Send one request, and return the answer's status and number of tokens."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"Request {number}"}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['KEY']}"}
    request = urllib.request.Request(f"{sys.argv[1]}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=240) as answer:
            return answer.status, json.load(answer)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        return error.code, 0


if __name__ == "__main__":
    with ThreadPoolExecutor(int(sys.argv[2])) as pool:
        print(json.dumps(list(pool.map(chat, range(int(sys.argv[2]))))))
