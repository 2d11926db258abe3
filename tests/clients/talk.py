"""What OpenAI's own client gets from the endpoint at argv[1] for the model argv[2], as one JSON object.

Run with the Python of the clients' environment; it knows nothing of ours.
"""

import json
import sys
from importlib.metadata import version

from openai import BadRequestError, NotFoundError, OpenAI

PROMPT = "The capital of France is"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


def main() -> None:
    client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[3], max_retries=0)
    model = sys.argv[2]
    asked = {"model": model, "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(prompt=PROMPT, logprobs=2, **asked)
    several = client.completions.create(prompt=[PROMPT, "A model reads"], n=2, seed=7, **asked)
    pieces = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked)
    )
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **asked)
    followed = list(client.chat.completions.create(messages=MESSAGES, stream=True, **asked))
    sys.stdout.write(
        json.dumps(
            {
                "client": version("openai"),
                "models": [found.id for found in client.models.list()],
                "whole": whole.choices[0].text,
                "logprobs": len(whole.choices[0].logprobs.token_logprobs),
                "tokens": whole.usage.completion_tokens,
                "several": [(choice.index, choice.text) for choice in several.choices],
                "pieces": "".join(piece.choices[0].text for piece in pieces if piece.choices),
                "usage": pieces[-1].usage.completion_tokens,
                "chat": chat.choices[0].message.content,
                "chat_logprobs": [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content],
                "followed": "".join(piece.choices[0].delta.content for piece in followed),
                "unknown": refused(
                    lambda: client.completions.create(model="other", prompt="a"), NotFoundError
                ),
                "too_long": refused(
                    lambda: client.completions.create(model=model, prompt="a", max_tokens=10**6),
                    BadRequestError,
                ),
            }
        )
    )


def refused(ask, kind) -> str:
    """The message of the error that the client raises."""
    try:
        ask()
    except kind as error:
        return error.body["message"]
    raise SystemExit("it was not refused")


if __name__ == "__main__":
    main()
