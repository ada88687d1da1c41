"""The official client, unchanged but for what a test does not need."""

from __future__ import annotations

import httpx
import openai


def open_client(base_url: str, *, timeout: float) -> openai.OpenAI:
    """Return a client that never retries: a request that fails has to be seen to fail.

    It loads no certificates: nothing here speaks TLS, and they take 50 ms of CPU for each client.

    Args:
        timeout: seconds without a byte.
    """
    return openai.OpenAI(
        base_url=base_url,
        api_key="unused",
        max_retries=0,
        timeout=timeout,
        http_client=httpx.Client(verify=False),
    )
